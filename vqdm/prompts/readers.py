"""The prompts of a file: read according to its suffix, cleaned, with unique ids."""

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from vqdm.prompts.coco import read_coco
from vqdm.prompts.tables import Row, read_jsonl, read_table, read_text
from vqdm.prompts.text_files import decode, fault, is_text, listed, read_bytes

MAX_CHARACTERS = 10_000  # in one prompt; a longer one means a broken file, and text encoders see some 300 characters
PLAIN_ID = re.compile(r"\w[\w.-]{0,99}", re.ASCII)

READERS: dict[str, Callable[..., tuple[list[Row], str]]] = {
    ".json": read_coco,
    ".csv": read_table,
    ".tsv": partial(read_table, delimiter="\t"),
    ".jsonl": read_jsonl,
    ".txt": read_text,
}


@dataclass(frozen=True)
class Prompt:
    """A text and its id; `image` is not part of its identity."""

    id: str
    text: str
    image: str | None = field(default=None, compare=False)  # name of the image it describes, if known


@dataclass(frozen=True)
class PromptFile:
    prompts: list[Prompt]
    what: str  # one line: which file, which rule
    sha256: str  # of the file's bytes


def read_file(path: Path, *, column: str | None, split: str) -> PromptFile:
    """Read all prompts of a file that are not empty, and say in one line where they come from."""
    data = read_bytes(path)
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise fault(path, f"unknown suffix {path.suffix!r}", f"give a {listed(READERS)} file")
    rows, rule = reader(decode(data, path.name), path.name, column=column, split=split)
    texts = [_clean(row) for row in rows]
    kept = [index for index, text in enumerate(texts) if text]
    if not kept:
        raise fault(path.name, f"holds no prompt ({len(rows)} empty rows)", "give a file with one prompt or more")
    ids = _ids(rows, kept)
    empty = f", {len(rows) - len(kept)} empty rows skipped" if len(kept) < len(rows) else ""
    prompts = [Prompt(name, texts[k], name_inside(rows[k].image)) for name, k in zip(ids, kept, strict=True)]
    sha256 = hashlib.sha256(data).hexdigest()
    return PromptFile(prompts, f"{path.name} (sha256 {sha256[:16]}), {rule}{empty}", sha256)


def _ids(rows: Sequence[Row], kept: Sequence[int]) -> list[str]:
    """The file's own ids when they are unique and plain (they may name files later), else row numbers."""
    given = ["" if rows[k].id is None else str(rows[k].id) for k in kept]
    if len(set(given)) == len(given) and all(PLAIN_ID.fullmatch(i) for i in given):
        return given
    return [str(k) for k in kept]


def _clean(row: Row) -> str:
    """The row's text with white space collapsed; UserError if it cannot be a prompt."""
    if len(row.text) > MAX_CHARACTERS:
        size = f"a prompt of {len(row.text)} characters, more than {MAX_CHARACTERS}"
        raise fault(row.where, size, "shorten it (is a quote left open, or is this not a text file?)")
    if not is_text(row.text):
        raise fault(row.where, "a character that is no text (NUL or half a surrogate pair)", "remove it")
    return " ".join(row.text.split())


def name_inside(name: Any) -> str | None:
    """The image's file name, perhaps below folders; None if it could lead out of the folder it is looked up in."""
    if not is_text(name) or not name.strip() or "\\" in name or ":" in name:
        return None
    path = PurePosixPath(name.strip())
    return None if path.is_absolute() or ".." in path.parts or not path.name else str(path)
