"""Pipelines with weights drawn from a seed: true shapes, for what depends on nothing else, where no model is at hand.

Memory, time, loading and saving are those of a trained model; images are noise. Imports no torch until one is made.
"""

import hashlib
import json
import logging
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vqdm.errors import UserError
from vqdm.models.foreign import safetensors_header
from vqdm.models.parts import INDEX, VOCABULARIES, parts_of
from vqdm.runs import progress
from vqdm.runs.files import atomic_write, canonical_json, sha256_file
from vqdm.runs.locks import locked

SHARD = 512 << 20  # bytes of a file's tensors, at most, but for a larger tensor: what a kill costs, and twice as memory
VERSION = 1  # raised when the same seed gives other weights
STEMS = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}
MARK = "drawn"  # in the metadata of every file of weights: the identity of the model
log = logging.getLogger("vqdm")


def drawn_identity(configs: Path, seed: int) -> str:
    """Identity of the model that `make_drawn` makes from these configs, whether it is there or not."""
    files = {path.relative_to(configs).as_posix(): sha256_file(path) for path in _configs(configs)}
    return hashlib.sha256(canonical_json([VERSION, seed, files])).hexdigest()


def _configs(configs: Path) -> list[Path]:
    """All JSON files but indices of weights, model_index.json last: it makes a directory a pipeline."""
    found = [path for path in sorted(configs.rglob("*.json")) if not path.name.endswith(".index.json")]
    return sorted(found, key=lambda path: path == configs / INDEX)


@dataclass(frozen=True)
class _File:
    """A file of weights to come: its tensors' names and shapes."""

    path: Path
    tensors: dict[str, tuple[int, ...]]

    @property
    def bytes(self) -> int:
        """In bfloat16."""
        return 2 * sum(map(math.prod, self.tensors.values()))


def make_drawn(configs: Path, directory: Path, *, seed: int) -> Path:
    """Make the model in `directory`, in bfloat16, unless it is there; a stopped making goes on with the next file.

    configs: a pipeline directory's, in which weights are not looked at. UserError for a directory with weights that
    were not drawn, and for a disk without room.
    """
    identity = drawn_identity(configs, seed)
    with locked(directory):
        files = list(_files(configs, directory))
        missing = [file for file in files if not _is_there(file.path, identity)]
        if missing:
            _announce(directory, missing)
            _draw(missing, seed=seed, identity=identity)
        _write_vocabularies(configs, directory)
        for path in _configs(configs):
            _write(directory / path.relative_to(configs), path.read_bytes())
    return directory


def _files(configs: Path, directory: Path) -> Iterator[_File]:
    """The files of weights, by the shapes of the configs; a part of several has an index, which is written here."""
    from vqdm.models.single_file import component_on_meta

    for part, (library, kind) in parts_of(configs).items():
        if library not in STEMS or kind.endswith(("Scheduler", "Processor", "Extractor")) or "Tokenizer" in kind:
            continue
        state = component_on_meta(configs / part).state_dict()
        shards = _shards({name: tuple(tensor.shape) for name, tensor in state.items()})
        stem, count = STEMS[library], len(shards)
        names = [f"{stem}{f'-{i:05d}-of-{count:05d}' if count > 1 else ''}.safetensors" for i in range(1, count + 1)]
        found = [_File(directory / part / name, own) for name, own in zip(names, shards, strict=True)]
        if count > 1:
            index = {name: file.path.name for file in found for name in file.tensors}
            content = {"metadata": {"total_size": sum(file.bytes for file in found)}, "weight_map": index}
            _write(directory / part / f"{stem}.safetensors.index.json", json.dumps(content, indent=1).encode())
        yield from found


def _shards(shapes: dict[str, tuple[int, ...]]) -> list[dict[str, tuple[int, ...]]]:
    found: list[dict] = [{}]
    held = 0
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        if held + size > SHARD and found[-1]:
            found.append({})
            held = 0
        found[-1][name] = shape
        held += size
    return found


def _is_there(path: Path, identity: str) -> bool:
    """True for a whole file of this model; one that is damaged or of another drawn model is made anew."""
    if not path.is_file():
        return False
    try:
        mark = safetensors_header(path).get("__metadata__", {}).get(MARK)
    except UserError:
        return False
    if mark is None:
        raise UserError(
            f"{path} holds weights that were not drawn: give model.path=<another folder>, or model.random_seed=null to "
            "use them"
        )
    return mark == identity


def _announce(directory: Path, missing: list[_File]) -> None:
    size, free = sum(file.bytes for file in missing), shutil.disk_usage(directory).free
    what = f"{directory}: drawing {size / 2e9:.2f} billion random weights, {size / 1e9:.2f} GB on disk"
    if size + SHARD > free:
        raise UserError(
            f"{what}, where {free / 1e9:.2f} GB are free: free space, or give results_dir=… on another disk"
        )
    log.info("%s, once; delete the folder at will", what)


def _draw(files: list[_File], *, seed: int, identity: str) -> None:
    from safetensors.torch import save

    with progress.bar("draw weights", sum(file.bytes for file in files), count=len(files), unit="file") as bar:
        for file in files:
            part = file.path.parent.name
            tensors = {name: _tensor(f"{part}.{name}", shape, seed) for name, shape in file.tensors.items()}
            atomic_write(file.path, save(tensors, {"format": "pt", MARK: identity}))
            bar.add(file.bytes)


def _tensor(name: str, shape: tuple[int, ...], seed: int):
    """Weights ~ N(0, 1 / (3 · inputs)), the variance of torch's own start; norms 1 and biases 0, as there."""
    import torch

    from vqdm.seeds import torch_generator

    if len(shape) < 2:
        return torch.full(shape, 0.0 if name.endswith("bias") else 1.0, dtype=torch.bfloat16, device="cpu")
    drawn = torch.randn(shape, generator=torch_generator(seed, "drawn model", name), device="cpu")
    return drawn.mul_((3 * math.prod(shape[1:])) ** -0.5).to(torch.bfloat16)


def _write_vocabularies(configs: Path, directory: Path) -> None:
    """Write CLIP's where the configs have none."""
    from vqdm.models.single_file import clip_tokenizer

    for part, (_, kind) in parts_of(configs).items():
        folders = (configs / part, directory / part)
        if "Tokenizer" in kind and not any((folder / name).is_file() for folder in folders for name in VOCABULARIES):
            clip_tokenizer(configs / part).save_pretrained(directory / part)


def _write(place: Path, content: bytes) -> None:
    if not place.is_file() or place.read_bytes() != content:
        atomic_write(place, content)
