"""Prompts from a file, from the list shipped with vqdm, or from the tiny world: checked, hashed, in a known order.

A shorter list is a prefix of a longer one, so images and calibration data can be extended. Imports no torch.
"""

import csv
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.resources import files
from pathlib import Path
from typing import Any

from vqdm.config import PROMPT_ORDERS as ORDERS
from vqdm.config import PROMPT_SOURCES as SOURCES
from vqdm.errors import UserError
from vqdm.seeds import numpy_generator

TEXT_COLUMNS = ("captions", "caption", "prompt", "Prompt", "text", "TEXT")
WORLD_SEED = 0  # of the tiny world's scenes and captions; its denoiser was trained on the split "train" of this seed
TINY_LENGTH = 1_000_000  # a split never ends; it is called a list of this length so that it can be shuffled
MAX_CHARACTERS = 10_000  # of one prompt; longer is a broken file, and text encoders see some 300 characters
MAX_FILE_BYTES = 512 * 2**20  # five times the captions of COCO train

_PLAIN_ID = re.compile(r"\w[\w.-]{0,99}", re.ASCII)
_QUOTED_FIELD = re.compile(r'"(?:[^"]|"")*"')
_NOT_TEXT = re.compile("[\0\ud800-\udfff]")  # NUL, and surrogates that UTF-8 cannot hold


@dataclass(frozen=True)
class Prompt:
    id: str
    text: str


@dataclass(frozen=True)
class PromptList:
    """Prompts in order; `origin` is one line for people: which source, which rule, how many."""

    prompts: tuple[Prompt, ...]
    origin: str

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def texts(self) -> list[str]:
        return [prompt.text for prompt in self.prompts]

    @cached_property
    def sha256(self) -> str:
        """Identity of the list: ids and texts in order, not where they came from."""
        return hashlib.sha256(self.to_jsonl()).hexdigest()

    def to_jsonl(self) -> bytes:
        """Canonical: one `{"id":…,"text":…}` a line, UTF-8, no spaces."""
        rows = ({"id": prompt.id, "text": prompt.text} for prompt in self.prompts)
        return "".join(json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n" for row in rows).encode()

    @classmethod
    def read_jsonl(cls, path: str | Path) -> "PromptList":
        """Read back what `to_jsonl` wrote, to the byte."""
        data, name = _read_bytes(Path(path)), Path(path).name
        prompts = []
        for line, row in _json_lines(_decode(data, name), name):
            if row.keys() != {"id", "text"} or not all(map(_is_text, row.values())):
                raise _error(f"{name} line {line}", 'is not {"id": string, "text": string}', "make the list again")
            prompts.append(Prompt(row["id"], row["text"]))
        found = cls(tuple(prompts), f"{name} (sha256 {_short_hash(data)}), as written")
        if not prompts or found.to_jsonl() != data:
            raise _error(name, "is not a prompt list as vqdm writes it", "make the list again")
        return found


def load_prompts(
    *,
    source: str,
    path: str | None = None,
    column: str | None = None,
    split: str = "train",
    n: int | None = None,
    order: str = "first",
    seed: int = 0,
) -> PromptList:
    """The first n prompts of a source, in its order or in one drawn from `seed`; n = None takes all.

    `path` and `column` belong to source "file", `split` to source "tiny". Cheap enough to call before any long
    work, so that a bad path fails first. Raises UserError.
    """
    _check_request(source, path, column, n=n, order=order)
    if source == "tiny":
        available, prompt_at, what = _tiny(split, n)
    else:
        prompts, what = _builtin() if source == "builtin" else _read_file(Path(path), column)
        available, prompt_at = len(prompts), prompts.__getitem__
    count = available if n is None else n
    if count > available:
        raise _error(what, f"has {available} prompts, but n={n} were asked for", "lower n, or take a longer list")
    if order == "first":
        rows, which = range(count), f"the first {count} of {available}"
    else:
        rows = numpy_generator(seed, "prompts/order").permutation(available)[:count].tolist()
        which = f"{count} of {available}, shuffled with seed {seed}"
    origin = " ".join(f"{what}; {which}".split())
    return PromptList(tuple(prompt_at(row) for row in rows), origin)


def prompt_list(texts: Iterable[str]) -> PromptList:
    """Texts given in Python as prompts, numbered. UserError unless they are some strings with text in them."""
    texts = [texts] if isinstance(texts, str) else list(texts)
    if not texts or not all(_is_text(text) and text.strip() for text in texts):
        raise _error("prompts", "must be one or more strings with text in them", "give captions")
    return PromptList(tuple(Prompt(f"{i:06d}", text) for i, text in enumerate(texts)), f"{len(texts)} given prompts")


def token_report(prompts: PromptList | Iterable[str], tokenizer: Any, max_length: int) -> dict[str, int]:
    """What a text encoder of `max_length` tokens does not see of the prompts.

    Counts are of content tokens, without start and end. CLIP names its end token as the unknown one too, and
    being byte-level knows every text: there `unknown` is 0.
    """
    texts = prompts.texts if isinstance(prompts, PromptList) else list(prompts)
    room = max_length - tokenizer.num_special_tokens_to_add()
    if room < 1:
        raise ValueError(f"max_length {max_length} leaves no room for content beside the tokenizer's special tokens")
    # verbose=False: no warning for each prompt that is too long, they are counted here
    ids = tokenizer(texts, add_special_tokens=False, truncation=False, verbose=False)["input_ids"] if texts else []
    unknown = tokenizer.unk_token_id if tokenizer.unk_token_id != tokenizer.eos_token_id else None
    cut = [len(row) - room for row in ids if len(row) > room]
    return {
        "prompts": len(texts),
        "tokens": sum(map(len, ids)),
        "unknown": 0 if unknown is None else sum(row.count(unknown) for row in ids),
        "truncated_prompts": len(cut),
        "truncated_tokens": sum(cut),
    }


def one_line(report: dict[str, int]) -> str:
    """A `token_report` as a person reads it."""
    text = f"{report['prompts']} prompts, {report['tokens']} tokens, {report['unknown']} unknown"
    if not report["truncated_prompts"]:
        return f"{text}, none truncated"
    return f"{text}, {report['truncated_prompts']} prompts truncated by {report['truncated_tokens']} tokens in all"


def _error(where: str | Path, problem: str, cure: str) -> UserError:
    """One line whatever names and texts an untrusted file puts into it."""
    return UserError(" ".join(f"{where}: {problem}; {cure}".split()))


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and not _NOT_TEXT.search(value)


def _listed(names: Iterable[str]) -> str:
    text = ", ".join(map(str, names)) or "none"
    return text if len(text) <= 300 else f"{text[:300]}…"


def _short_hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _check_request(source: str, path: str | None, column: str | None, *, n: int | None, order: str) -> None:
    if source not in SOURCES:
        raise _error("prompts", f"unknown source {source!r}", f"choose one of {_listed(SOURCES)}")
    if order not in ORDERS:
        raise _error("prompts", f"unknown order {order!r}", f"choose one of {_listed(ORDERS)}")
    if n is not None and n <= 0:
        raise _error("prompts", f"n={n} is not a number of prompts", "give n of 1 or more, or leave it out for all")
    if source == "file" and not path:
        raise _error("prompts", "source 'file' has no path", f"set path to a {_listed(_READERS)} file")
    if source != "file" and (path or column):
        raise _error("prompts", f"path and column mean nothing to source {source!r}", "set source to 'file'")


def _tiny(split: str, n: int | None) -> tuple[int, Callable[[int], Prompt], str]:
    """Length, access by index, and description of a split of the tiny world."""
    from vqdm.tiny.captions import caption_of
    from vqdm.tiny.scenes import SPLITS, draw_scene

    if split not in SPLITS:
        raise _error("tiny prompts", f"unknown split {split!r}", f"choose one of {_listed(SPLITS)}")
    if n is None:
        raise _error("tiny prompts", f"the split {split!r} never ends", "set n, the number of prompts")

    def prompt_at(index: int) -> Prompt:
        scene = draw_scene(WORLD_SEED, split, index)
        return Prompt(f"{split}-{index:06d}", caption_of(scene, seed=WORLD_SEED, split=split, index=index))

    return TINY_LENGTH, prompt_at, f"tiny world, split {split}, seed {WORLD_SEED}"


def _builtin() -> tuple[list[Prompt], str]:
    lines = files("vqdm").joinpath("data/builtin_prompts.txt").read_text("utf-8").splitlines()
    texts = [line for line in lines if line and not line.startswith("#")]
    return [Prompt(f"builtin-{i:03d}", text) for i, text in enumerate(texts)], "list shipped with vqdm"


@dataclass(frozen=True)
class _Row:
    """One row of a file, before it is checked; `where` is what an error calls it."""

    where: str
    text: str
    id: Any = None


def _read_file(path: Path, column: str | None) -> tuple[list[Prompt], str]:
    """All prompts of a file that are not empty, and one line on where they come from."""
    data = _read_bytes(path)
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise _error(path, f"unknown suffix {path.suffix!r}", f"give a {_listed(_READERS)} file")
    rows, rule = reader(_decode(data, path.name), path.name, column)
    texts = [_clean(row) for row in rows]
    kept = [index for index, text in enumerate(texts) if text]
    if not kept:
        raise _error(path.name, f"holds no prompt ({len(rows)} empty rows)", "give a file with one prompt or more")
    ids = _ids(rows, kept)
    empty = f", {len(rows) - len(kept)} empty rows skipped" if len(kept) < len(rows) else ""
    prompts = [Prompt(name, texts[k]) for name, k in zip(ids, kept, strict=True)]
    return prompts, f"{path.name} (sha256 {_short_hash(data)}), {rule}{empty}"


def _ids(rows: Sequence[_Row], kept: Sequence[int]) -> list[str]:
    """The file's own ids when they are unique and plain (they may name files later), else row numbers."""
    given = ["" if rows[k].id is None else str(rows[k].id) for k in kept]
    if len(set(given)) == len(given) and all(_PLAIN_ID.fullmatch(i) for i in given):
        return given
    return [str(k) for k in kept]


def _clean(row: _Row) -> str:
    """White space collapsed; refuses what cannot be a prompt."""
    if len(row.text) > MAX_CHARACTERS:
        size = f"a prompt of {len(row.text)} characters, more than {MAX_CHARACTERS}"
        raise _error(row.where, size, "shorten it (is a quote left open, or is this not a text file?)")
    if not _is_text(row.text):
        raise _error(row.where, "a character that is no text (NUL or half a surrogate pair)", "remove it")
    return " ".join(row.text.split())


def _read_bytes(path: Path) -> bytes:
    try:
        path = path.expanduser()
        if path.is_dir():
            raise _error(path, "is a directory", "give the file in it that holds the prompts")
        if not path.exists():
            raise _error(path, "no such file", "correct the path (it is relative to where the command runs)")
        if not path.is_file():
            raise _error(path, "is no ordinary file", "give a file of prompts")
        if path.stat().st_size > MAX_FILE_BYTES:
            raise _error(path, f"is larger than {MAX_FILE_BYTES // 2**20} MiB", "keep the rows that are needed")
        return path.read_bytes()
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: ~name of nobody
        raise _error(path, f"cannot be read ({error})", "correct the path or its permissions") from error


def _decode(data: bytes, name: str) -> str:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise _error(f"{name} line {line}", "is not UTF-8", "save the file as UTF-8 text") from error
    if not text.strip():
        raise _error(name, "is empty", "give a file with one prompt or more")
    return text


def _parse_json(text: str, name: str, line: int | None = None) -> Any:
    """`line` is where the text stands in its file, when it is one line of it."""
    where = name if line is None else f"{name} line {line}"
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"line {line or error.lineno}, column {error.colno}"
        raise _error(name, f"is not JSON ({place}: {error.msg})", "mend or fetch it again") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; brackets thousands deep
        raise _error(where, f"is JSON that cannot be read ({error})", "mend or fetch it again") from error


def _json_lines(text: str, name: str) -> Iterable[tuple[int, dict]]:
    """(line number from 1, object); only line feeds end a line, as U+2028 may stand inside a JSON string."""
    for line, content in enumerate(io.StringIO(text, newline=None), 1):
        if not content.strip():
            continue
        row = _parse_json(content, name, line)
        if not isinstance(row, dict):
            raise _error(f"{name} line {line}", "is no JSON object", 'write one {"prompt": …} a line')
        yield line, row


def _pick_column(present: Sequence[str], column: str | None, name: str) -> str:
    wanted = TEXT_COLUMNS if column is None else (column,)
    found = next((candidate for candidate in wanted if candidate in present), None)
    if found is None:
        problem = f"no column {' or '.join(map(repr, wanted))} among: {_listed(map(repr, present))}"
        raise _error(name, problem, "set column to one of these (a header row is needed)")
    if list(present).count(found) > 1:
        raise _error(name, f"more than one column {found!r}", "rename all but one")
    return found


def _no_column(name: str, column: str | None, kind: str) -> None:
    if column is not None:
        raise _error(name, f"{kind} has no columns, but column={column!r} was asked for", "leave column out")


def _read_text(text: str, name: str, column: str | None) -> tuple[list[_Row], str]:
    _no_column(name, column, "a .txt file")
    lines = enumerate(io.StringIO(text, newline=None), 1)
    return [_Row(f"{name} line {number}", line) for number, line in lines], "one prompt a line"


def _read_jsonl(text: str, name: str, column: str | None) -> tuple[list[_Row], str]:
    rows: list[_Row] = []
    for line, row in _json_lines(text, name):
        column = _pick_column(list(row), column, f"{name} line {line}")
        content = "" if row[column] is None else row[column]
        if not isinstance(content, str):
            raise _error(f"{name} line {line}", f"{column!r} is no string", "write the prompt in double quotes")
        rows.append(_Row(f"{name} line {line}", content, row.get("id")))
    return rows, f"column {column}"


def _is_plain_tsv(text: str) -> bool:
    """Many .tsv files (PartiPrompts) know no quoting: there, a quote that opens a prompt is part of the prompt."""
    rows = [line.rstrip("\n").split("\t") for line in io.StringIO(text, newline=None) if line.strip()]
    as_wide = all(len(row) == len(rows[0]) for row in rows)
    return as_wide and not any(_QUOTED_FIELD.fullmatch(field) for row in rows for field in row)


def _read_table(text: str, name: str, column: str | None, delimiter: str = ",") -> tuple[list[_Row], str]:
    """Quoted fields may hold delimiters, doubled quotes and line breaks; every row is as wide as the header."""
    quoting = csv.QUOTE_NONE if delimiter == "\t" and _is_plain_tsv(text) else csv.QUOTE_MINIMAL
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting, strict=True)
    rows: list[_Row] = []
    try:
        header = [field.strip() for field in next(lines)]
        column = _pick_column(header, column, name)
        for fields in lines:
            where = f"{name} line {lines.line_num}"
            if fields and len(fields) != len(header):
                problem = f"{len(fields)} fields where the header has {len(header)}"
                raise _error(where, problem, "put fields that hold delimiters or line breaks in double quotes")
            values = dict(zip(header, fields, strict=False))  # a blank line has no fields
            rows.append(_Row(where, values.get(column, ""), values.get("id")))
    except csv.Error as error:
        cure = "close every double quote, and double those inside a field"
        raise _error(f"{name} line {lines.line_num}", f"is malformed ({error})", cure) from error
    return rows, f"column {column}"


def _objects(document: Any, key: str, name: str) -> list[dict]:
    found = document.get(key) if isinstance(document, dict) else None
    if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
        cure = "give COCO captions in the official format {info, images, annotations}, or a .jsonl file"
        raise _error(name, f"has no list of objects {key!r}", cure)
    return found


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_annotation(item: dict, name: str) -> None:
    if not _is_integer(item.get("id")):
        raise _error(name, f"an annotation has no integer id ({str(item)[:100]})", "mend or fetch it again")
    if not isinstance(item.get("caption"), str):
        cure = "give a captions file (captions_*.json), not instances or keypoints"
        raise _error(f"{name} annotation {item['id']}", "has no caption", cure)


def _read_coco(text: str, name: str, column: str | None) -> tuple[list[_Row], str]:
    """One caption an image: the annotation with the lowest id; images in the order of `images`."""
    _no_column(name, column, "a COCO .json file")
    document = _parse_json(text, name)
    annotations = _objects(document, "annotations", name)
    images = [image.get("id") for image in _objects(document, "images", name)]
    if not all(map(_is_integer, images)) or len(set(images)) < len(images):
        raise _error(name, "'images' without unique integer ids", "mend or fetch it again")
    lowest: dict[int, dict | None] = dict.fromkeys(images)
    for item in annotations:
        _check_annotation(item, name)
        image = item.get("image_id")
        if not _is_integer(image) or image not in lowest:
            where = f"{name} annotation {item['id']}"
            raise _error(where, f"image_id {image!r} is not among 'images'", "mend or fetch it again")
        best = lowest[image]
        if best is None or item["id"] < best["id"]:
            lowest[image] = item
    chosen = [item for item in lowest.values() if item is not None]
    if len({item["id"] for item in chosen}) < len(chosen):
        raise _error(name, "annotations that share an id", "mend or fetch it again")
    rows = [_Row(f"{name} annotation {item['id']}", item["caption"], item["id"]) for item in chosen]
    without = f", {len(images) - len(rows)} images without a caption" if len(rows) < len(images) else ""
    return rows, f"of each image the caption with the lowest id{without}"


_READERS: dict[str, Callable[..., tuple[list[_Row], str]]] = {
    ".json": _read_coco,
    ".csv": _read_table,
    ".tsv": partial(_read_table, delimiter="\t"),
    ".jsonl": _read_jsonl,
    ".txt": _read_text,
}
