"""What can happen to a saved checkpoint: every mutation changes its folder and says what was done, given a generator.

Used by scripts/fuzz_checkpoints.py and its tests.
"""

import hashlib
import json
import os
import random
import shutil
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

GOLDEN = Path(__file__).resolve().parent.parent / "tests" / "golden"
CHECKSUM_DIGITS = 16  # docs/format.md
CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"


@dataclass
class File:
    """A safetensors file taken apart: header (with `vqdm`'s own text as `about`) and data."""

    path: Path
    header: dict
    about: dict
    data: bytes

    @classmethod
    def read(cls, path: Path) -> "File":
        content = path.read_bytes()
        end = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:end])
        return cls(path, header, json.loads(header["__metadata__"]["vqdm"]), content[end:])

    def write(self, about: str | None = None) -> None:
        """about: another text for the metadata than `self.about`."""
        if "__metadata__" in self.header:
            self.header["__metadata__"]["vqdm"] = json.dumps(self.about) if about is None else about
        text = json.dumps(self.header).encode()
        text += b" " * (-len(text) % 8)
        self.path.write_bytes(len(text).to_bytes(8, "little") + text + self.data)

    @property
    def tensors(self) -> dict[str, dict]:
        return {name: entry for name, entry in self.header.items() if name != "__metadata__"}

    def put(self, name: str, content: bytes) -> None:
        start, end = self.header[name]["data_offsets"]
        self.data = self.data[:start] + content + self.data[end:]

    def get(self, name: str) -> bytes:
        return self.data[slice(*self.header[name]["data_offsets"])]

    def close_gaps(self) -> None:
        """Lay the tensors side by side, as safetensors demands."""
        contents = {name: self.get(name) for name in self.tensors}
        start = 0
        for name, content in contents.items():
            self.header[name]["data_offsets"] = [start, start + len(content)]
            start += len(content)
        self.data = b"".join(contents.values())


def read_config(folder: Path) -> dict:
    return json.loads((folder / CONFIG).read_text())


def write_config(folder: Path, config: object) -> None:
    (folder / CONFIG).write_text(json.dumps(config))


def _flip(path: Path, rng: random.Random, *, among: int | None = None) -> str:
    content = bytearray(path.read_bytes())
    places = [rng.randrange(among or len(content)) for _ in range(rng.randint(1, 8))]
    for place in places:
        content[place] ^= 1 << rng.randrange(8) if rng.random() < 0.5 else rng.randint(1, 255)
    path.write_bytes(content)
    return f"{path.name} at {places}"


def flip_weights(folder: Path, rng: random.Random) -> str:
    return _flip(folder / WEIGHTS, rng)


def flip_header(folder: Path, rng: random.Random) -> str:
    return _flip(folder / WEIGHTS, rng, among=8 + int.from_bytes((folder / WEIGHTS).read_bytes()[:8], "little"))


def flip_data(folder: Path, rng: random.Random) -> str:
    file = File.read(folder / WEIGHTS)
    name = rng.choice(sorted(file.tensors))
    content = bytearray(file.get(name))
    place = rng.randrange(len(content))
    content[place] ^= 1 << rng.randrange(8)
    file.put(name, bytes(content))
    file.write()
    return f"{name} at {place}"


def flip_config(folder: Path, rng: random.Random) -> str:
    return _flip(folder / CONFIG, rng)


def truncate(folder: Path, rng: random.Random) -> str:
    path = folder / rng.choice([CONFIG, WEIGHTS, WEIGHTS])
    size = rng.randrange(path.stat().st_size)
    os.truncate(path, size)
    return f"{path.name} to {size} bytes"


def append(folder: Path, rng: random.Random) -> str:
    path = folder / rng.choice([CONFIG, WEIGHTS])
    more = rng.choice([b"\0", b" ", rng.randbytes(rng.randint(1, 64)), b"{}"])
    path.write_bytes(path.read_bytes() + more)
    return f"{more!r} to {path.name}"


def _altered(value: object, rng: random.Random, *, largest: float) -> object:
    """Another value, of the same type more often than not."""
    if rng.random() < 0.2:
        return rng.choice([None, "", "x", 5, -1, 2.5, True, [], {}, [[]], {"kind": []}])
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        numbers = [0, -1, 1, value + 1, value - 1, 2 * value, value / 2, float(value), str(value), float("nan")]
        return rng.choice(numbers + [n for n in (1e9, 10**9, 10**30, 1 << 62, float("inf")) if n <= largest])
    if isinstance(value, str):
        place = rng.randrange(len(value) + 1)
        return rng.choice([value[:place], value + "x", value[:place] + "0" + value[place + 1 :], value.upper(), "é"])
    if isinstance(value, list):
        return rng.choice([value[1:], value + value[:1], value[::-1], value * 2, value[:-1], [value]])
    if isinstance(value, dict):
        return rng.choice([{}, value | {"more": 1}, list(value), [value]])
    return rng.choice([0, 1, 7, "x"])


def _edit(tree: object, rng: random.Random, *, largest: float = float("inf")) -> str:
    """Delete, rename or alter one key of nested JSON, in place."""
    here, path = tree, []
    while True:
        keys = sorted(here) if isinstance(here, dict) else list(range(len(here)))
        key = rng.choice(keys)
        path.append(str(key))
        if not isinstance(here[key], dict | list) or not here[key] or rng.random() < 0.15:
            break
        here = here[key]
    how = rng.choice(["delete", "rename", "alter", "alter", "alter", "alter"])
    if how == "delete":
        del here[key]
    elif how == "rename" and isinstance(here, dict):
        here[key[:-1] + "0"] = here.pop(key)
    else:
        here[key] = _altered(here[key], rng, largest=largest)
        how = f"alter to {str(here[key])[:60]}"
    return f"{'.'.join(path)}: {how}"


def edit_table(folder: Path, rng: random.Random) -> str:
    file = File.read(folder / WEIGHTS)
    done = _edit(file.header, rng)
    if isinstance(file.header.get("__metadata__"), dict):
        file.write(about=file.header["__metadata__"].get("vqdm"))
    else:
        file.header.pop("__metadata__", None)
        file.write()
    return done


def edit_metadata(folder: Path, rng: random.Random) -> str:
    file = File.read(folder / WEIGHTS)
    done = _edit(file.about, rng)
    file.write()
    return done


def edit_quantization_config(folder: Path, rng: random.Random) -> str:
    config = read_config(folder)
    chosen = {"quantization_config": config.pop("quantization_config")}
    done = _edit(chosen, rng)
    write_config(folder, config | chosen)
    return done


def edit_both(folder: Path, rng: random.Random) -> str:
    """The same edit of the groups in both files: what only a hostile hand would do."""
    config, file = read_config(folder), File.read(folder / WEIGHTS)
    state = rng.getstate()
    done = _edit(config["quantization_config"]["groups"], rng)
    rng.setstate(state)
    _edit(file.about["groups"], rng)
    write_config(folder, config)
    file.write()
    return done


def edit_options(folder: Path, rng: random.Random) -> str:
    """An option of the denoiser. No huge numbers: diffusers would build what they ask for before vqdm is asked."""
    config = read_config(folder)
    quantization = config.pop("quantization_config")
    done = _edit(config, rng, largest=64)
    write_config(folder, config | {"quantization_config": quantization})
    return done


def swap_tensors(folder: Path, rng: random.Random) -> str:
    """The data of two tensors of one size."""
    file, by_size = File.read(folder / WEIGHTS), defaultdict(list)
    for name in file.tensors:
        by_size[len(file.get(name))].append(name)
    one, other = rng.sample(rng.choice([names for _, names in sorted(by_size.items()) if len(names) > 1]), 2)
    first, second = file.get(one), file.get(other)
    file.put(one, second)
    file.put(other, first)
    file.write()
    return f"{one} and {other}"


def shuffle_codes(folder: Path, rng: random.Random) -> str:
    file = File.read(folder / WEIGHTS)
    name = rng.choice([name for name in file.tensors if name.endswith(".codes")])
    content = list(file.get(name))
    rng.shuffle(content)
    file.put(name, bytes(content))
    file.write()
    return name


def rename_tensor(folder: Path, rng: random.Random) -> str:
    """Rename, drop, double, or put in the place of another."""
    file = File.read(folder / WEIGHTS)
    name, other = rng.sample(sorted(file.tensors), 2)
    how = rng.choice(["rename", "drop", "double", "replace", "swap names"])
    entry = file.header[name] if how == "double" else file.header.pop(name)
    if how in ("rename", "double"):
        file.header[rng.choice([name + "x", name[:-1], "more", f"more.{name}"])] = dict(entry)
    elif how == "replace":
        file.header[other] = entry
    elif how == "swap names":
        file.header[name], file.header[other] = file.header[other], entry
    file.close_gaps()
    file.write()
    return f"{how} {name}, {other}"


def retype(folder: Path, rng: random.Random) -> str:
    """Another dtype of the same width, or another shape of the same size."""
    file = File.read(folder / WEIGHTS)
    name = rng.choice(sorted(file.tensors))
    entry = file.header[name]
    if rng.random() < 0.5:
        entry["dtype"] = {"F16": rng.choice(["BF16", "I16"]), "U8": rng.choice(["I8", "BOOL"])}[entry["dtype"]]
    else:
        entry["shape"] = rng.choice([entry["shape"] + [1], [1] + entry["shape"], [*entry["shape"][::-1], 1]])
    file.write()
    return f"{name} is {entry['dtype']} {entry['shape']}"


def sharded(folder: Path, rng: random.Random) -> str:
    """Saved in shards, of which one is dropped, doubled, or taken from another checkpoint."""
    from diffusers import UNet2DConditionModel

    UNet2DConditionModel.from_pretrained(folder).save_pretrained(folder, max_shard_size="8KB")
    (folder / WEIGHTS).unlink()
    shards = sorted(folder.glob("*.safetensors"))
    one, other = rng.sample(shards, 2)
    how = rng.choice(["nothing", "dropped", "doubled", "foreign", "index"])
    if how == "dropped":
        one.unlink()
    elif how == "doubled":
        shutil.copy(one, other)
    elif how == "foreign":
        kinds = sorted(path for path in GOLDEN.iterdir() if path.name != folder.name)
        shutil.copy(rng.choice(kinds) / WEIGHTS, one)
    elif how == "index":
        path = next(folder.glob("*.index.json"))
        index = json.loads(path.read_text())
        how = f"index {_edit(index['weight_map'], rng)}"
        path.write_text(json.dumps(index))
    return f"{one.name}: {how}"


def hostile(folder: Path, rng: random.Random) -> str:
    """Numbers and nesting that would exhaust memory or the stack."""
    file, config = File.read(folder / WEIGHTS), read_config(folder)
    name = rng.choice(sorted(file.tensors))
    deep = "[" * 100_000 + "]" * 100_000
    how = rng.choice(["shape", "offsets", "length", "deep", "deep header", "digits", "counts", "layers", "rates"])
    if how == "shape":
        file.header[name]["shape"] = [1 << 40, 1 << 20]
    elif how == "offsets":
        file.header[name]["data_offsets"] = [0, 1 << 50]
    elif how in ("deep", "digits"):
        file.write(about=deep if how == "deep" else '{"version":' + "1" * 10_000 + "}")
        return how
    elif how in ("length", "deep header"):
        text = deep.encode() if how == "deep header" else b"{}"
        length = len(text) if how == "deep header" else rng.choice([(1 << 64) - 1, 1 << 40, 1 << 26])
        file.path.write_bytes(length.to_bytes(8, "little") + text)
        return how
    elif how == "rates":
        name = rng.choice([name for name in file.tensors if name.endswith(".codes")])
        file.put(name, b"\xff" * len(file.get(name)))
    else:
        for groups in (file.about["groups"], config["quantization_config"]["groups"]):
            if how == "layers":
                groups *= 1000
            else:
                scheme = groups[0]["scheme"]
                number = next(key for key in ("num_codebooks", "group_size", "codec") if key in scheme)
                scheme[number] = 1 << 40
        write_config(folder, config)
    file.write()
    return f"{how} {name}"


def forge_checksums(folder: Path) -> None:
    """Make the checksums of a file fit what it holds now; a file that cannot be taken apart is left as it is."""
    try:
        file = File.read(folder / WEIGHTS)
        names = sorted(file.tensors)
        texts = [
            f"{name} {_stored_name(file.header[name]['dtype'])} {json.dumps(file.header[name]['shape'])}\n"
            for name in names
        ]
        contents = [file.get(name) for name in names]
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        return
    sums = [hashlib.sha256(text.encode() + data).hexdigest() for text, data in zip(texts, contents, strict=True)]
    file.about["checksums"] = "".join(one[:CHECKSUM_DIGITS] for one in sums)
    file.write()


def _stored_name(dtype: str) -> str:
    """The name of a dtype as a checksum has it: safetensors' own for what vqdm stores, else torch's."""
    return {"I8": "torch.int8", "I16": "torch.int16", "BOOL": "torch.bool"}.get(dtype, dtype)


def forge_numbers(folder: Path, rng: random.Random) -> str:
    """One float of one tensor becomes NaN, infinite or the largest there is; the checksums fit."""
    file = File.read(folder / WEIGHTS)
    name = rng.choice([name for name, entry in sorted(file.tensors.items()) if entry["dtype"] == "F16"])
    content, value = bytearray(file.get(name)), rng.choice([0x7E00, 0xFE01, 0x7C00, 0xFC00, 0x7BFF])
    place = 2 * rng.randrange(len(content) // 2)
    content[place : place + 2] = value.to_bytes(2, "little")
    file.put(name, bytes(content))
    file.write()
    forge_checksums(folder)
    return f"{name} at {place} is {value:#x}"


def _forged(mutate: Callable[[Path, random.Random], str]) -> Callable[[Path, random.Random], str]:
    """The same damage, with checksums that fit it."""

    def forge(folder: Path, rng: random.Random) -> str:
        done = mutate(folder, rng)
        forge_checksums(folder)
        return done

    forge.__name__ = f"forged_{mutate.__name__}"
    return forge


MUTATIONS: tuple[Callable[[Path, random.Random], str], ...] = (
    flip_weights, flip_header, flip_data, flip_config, truncate, append, edit_table, edit_metadata,
    edit_quantization_config, edit_both, edit_options, swap_tensors, shuffle_codes, rename_tensor, retype, sharded,
    hostile, forge_numbers,
    *map(_forged, (flip_data, edit_table, edit_both, swap_tensors, shuffle_codes, rename_tensor, retype, hostile)),
)  # fmt: skip
