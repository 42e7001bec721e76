"""Lists of prompts: the first n of a source, with an identity."""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path

from vqdm.config.options import PROMPT_ORDERS as ORDERS
from vqdm.config.options import PROMPT_SOURCES as SOURCES
from vqdm.config.options import TINY_WORLDS
from vqdm.prompts.readers import READERS, Prompt, read_file
from vqdm.prompts.text_files import decode, fault, is_text, json_lines, listed, read_bytes, short_hash
from vqdm.seeds import numpy_generator

TINY_LENGTH = 1_000_000  # a split never ends; it passes for a list of this length so that it can be shuffled
_SHA256 = re.compile("[0-9a-fA-F]{64}")


@dataclass(frozen=True)
class PromptList:
    """Prompts in order; `origin` is one line for people: which source, which rule, how many."""

    prompts: tuple[Prompt, ...]
    origin: str
    source: str | None = None  # None: these prompts are all there are

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def texts(self) -> list[str]:
        return [prompt.text for prompt in self.prompts]

    @cached_property
    def sha256(self) -> str:
        """Identity of the list: its ids and texts in order, but not where they came from."""
        return hashlib.sha256(self.to_jsonl()).hexdigest()

    @property
    def source_id(self) -> str:
        """Identity of the full source: of two lists with the same source, the shorter is the beginning of the longer.

        It does not depend on n. For files and the builtin list it is the sha256 of the list of all their prompts.
        """
        return self.source or self.sha256

    def to_jsonl(self) -> bytes:
        """The list in canonical form: one `{"id":…,"text":…}` per line, UTF-8, no spaces."""
        return b"".join(map(_line, self.prompts))

    @classmethod
    def read_jsonl(cls, path: str | Path) -> "PromptList":
        """Read back a file of exactly the bytes that `to_jsonl` writes."""
        data, name = read_bytes(Path(path)), Path(path).name
        prompts = []
        for line, row in json_lines(decode(data, name), name):
            if row.keys() != {"id", "text"} or not all(map(is_text, row.values())):
                raise fault(f"{name} line {line}", 'is not {"id": string, "text": string}', "make the list again")
            prompts.append(Prompt(row["id"], row["text"]))
        found = cls(tuple(prompts), f"{name} (sha256 {short_hash(data)}), as written")
        if not prompts or found.to_jsonl() != data:
            raise fault(name, "is not a prompt list as vqdm writes it", "make the list again")
        return found


def _line(prompt: Prompt) -> bytes:
    row = {"id": prompt.id, "text": prompt.text}
    return (json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n").encode()


@dataclass(frozen=True)
class _Source:
    """All prompts of a source, in its own order."""

    available: int
    prompt_at: Callable[[int], Prompt]
    what: str
    identity: str
    endless: bool = False
    file_sha256: str | None = None


def load_prompts(
    *,
    source: str,
    path: str | None = None,
    column: str | None = None,
    split: str = "train",
    n: int | None = None,
    order: str = "first",
    seed: int = 0,
    sha256: str | None = None,
) -> PromptList:
    """The first n prompts of a source, in its own order or in one drawn from `seed`; n = None takes all.

    `path` and `column` belong to source "file", `split` to the worlds and to Karpathy's file. With `sha256` the prompts
    must be the list with that hash, or its beginning, or come from a file with that hash. It is cheap enough to call
    before any long work, so that a bad path fails first. Raises UserError.
    """
    _check_request(source, path, column, n=n, order=order, sha256=sha256)
    whole = _source(source, path, column, split=split, n=n)
    count = whole.available if n is None else n
    if count > whole.available:
        problem = f"has {whole.available} prompts, but n={n} were asked for"
        raise fault(whole.what, problem, "lower n, or take a longer list")
    if order == "first":
        rows, source_id, which = range(whole.available), whole.identity, f"the first {count} of {whole.available}"
    else:
        rows = numpy_generator(seed, "prompts/order").permutation(whole.available)
        source_id, which = (
            f"{whole.identity}-shuffled{seed}",
            f"{count} of {whole.available}, shuffled with seed {seed}",
        )
    prompts = tuple(whole.prompt_at(int(row)) for row in rows[:count])
    found = PromptList(prompts, " ".join(f"{whole.what}; {which}".split()), source_id)
    if sha256 is not None:
        longer = () if whole.endless else (whole.prompt_at(int(row)) for row in rows[count:])
        _check_pin(found, sha256.lower(), longer=longer, file_sha256=whole.file_sha256)
    return found


def _check_pin(prompts: PromptList, pin: str, *, longer: Iterable[Prompt], file_sha256: str | None) -> None:
    """Raise UserError unless `pin` is the sha256 of the file, of the list, or of the list continued by `longer`."""
    if pin in (file_sha256, prompts.sha256):
        return
    digest = hashlib.sha256(prompts.to_jsonl())
    for prompt in longer:
        digest.update(_line(prompt))
        if digest.hexdigest() == pin:
            return
    cure = "take the file, column, order and at most the n of the pinned list, or set sha256=null"
    raise fault(prompts.origin, f"the list's sha256 is {prompts.sha256}, but sha256={pin} is pinned", cure)


def prompt_list(texts: Iterable[str]) -> PromptList:
    """Number texts given in Python as prompts. UserError unless they are one or more strings that are not blank."""
    texts = [texts] if isinstance(texts, str) else list(texts)
    if not texts or not all(is_text(text) and text.strip() for text in texts):
        raise fault("prompts", "must be one or more strings with text in them", "give captions")
    return PromptList(tuple(Prompt(f"{i:06d}", text) for i, text in enumerate(texts)), f"{len(texts)} given prompts")


def _check_request(
    source: str, path: str | None, column: str | None, *, n: int | None, order: str, sha256: str | None
) -> None:
    if source not in SOURCES:
        raise fault("prompts", f"unknown source {source!r}", f"choose one of {listed(SOURCES)}")
    if order not in ORDERS:
        raise fault("prompts", f"unknown order {order!r}", f"choose one of {listed(ORDERS)}")
    if n is not None and n <= 0:
        raise fault("prompts", f"n={n} is not a number of prompts", "give n of 1 or more, or leave it out for all")
    if source == "file" and not path:
        raise fault("prompts", "source 'file' has no path", f"set path to a {listed(READERS)} file")
    if source != "file" and (path or column):
        raise fault("prompts", f"path and column mean nothing to source {source!r}", "set source to 'file'")
    if sha256 is not None and not _SHA256.fullmatch(sha256):
        raise fault("prompts", f"sha256={sha256[:100]!r} is no sha256", "give its 64 hexadecimal digits, or null")


def _source(source: str, path: str | None, column: str | None, *, split: str, n: int | None) -> _Source:
    if source in TINY_WORLDS:
        return _of_world(source, split, n)
    if source == "builtin":
        return _finite(_builtin(), "list shipped with vqdm")
    file = read_file(Path(path), column=column, split=split)
    return _finite(file.prompts, file.what, file.sha256)


def _finite(prompts: Sequence[Prompt], what: str, file_sha256: str | None = None) -> _Source:
    identity = PromptList(tuple(prompts), what).sha256
    return _Source(len(prompts), prompts.__getitem__, what, identity, file_sha256=file_sha256)


def _of_world(name: str, split: str, n: int | None) -> _Source:
    from vqdm.tiny.captions import caption_of
    from vqdm.tiny.scenes import SPLITS, WORLD_SEED, draw_scene
    from vqdm.tiny.worlds import WORLDS

    world = WORLDS[name]
    if split not in SPLITS:
        raise fault(f"{name} prompts", f"unknown split {split!r}", f"choose one of {listed(SPLITS)}")
    if n is None:
        raise fault(f"{name} prompts", f"the split {split!r} never ends", "set n, the number of prompts")

    def prompt_at(index: int) -> Prompt:
        scene = draw_scene(WORLD_SEED, split, index, world=world)
        text = caption_of(scene, seed=WORLD_SEED, split=split, index=index, world=world)
        return Prompt(f"{split}-{index:06d}", text)

    what = f"{name} world, split {split}, seed {WORLD_SEED}"
    return _Source(TINY_LENGTH, prompt_at, what, f"{name}-{split}-seed{WORLD_SEED}", endless=True)


def _builtin() -> list[Prompt]:
    lines = files("vqdm").joinpath("prompts/builtin_prompts.txt").read_text("utf-8").splitlines()
    texts = [line for line in lines if line and not line.startswith("#")]
    return [Prompt(f"builtin-{i:03d}", text) for i, text in enumerate(texts)]
