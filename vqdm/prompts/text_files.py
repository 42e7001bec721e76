"""Bytes, text and JSON from an untrusted file; every fault is one line that names the file."""

import hashlib
import io
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vqdm.errors import UserError

LOOK = 2**20  # bytes, before the rest is read
MAX_FILE_BYTES = 512 * 2**20  # five times the captions of COCO train
_NOT_TEXT = re.compile("[\0\ud800-\udfff]")  # NUL, and surrogates that UTF-8 cannot hold


def fault(where: str | Path, problem: str, cure: str) -> UserError:
    """A UserError of one line, whatever names and texts an untrusted file puts into it."""
    return UserError(" ".join(f"{where}: {problem}; {cure}".split()))


def is_text(value: Any) -> bool:
    return isinstance(value, str) and not _NOT_TEXT.search(value)


def is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def listed(names: Iterable[str]) -> str:
    text = ", ".join(map(str, names)) or "none"
    return text if len(text) <= 300 else f"{text[:300]}…"


def short_hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def read_bytes(path: Path) -> bytes:
    try:
        path = path.expanduser()
        if path.is_dir():
            raise fault(path, "is a directory", "give the file in it that holds the prompts")
        if not path.exists():
            raise fault(
                path,
                "no such file",
                "correct the path (relative to where the command runs), or fetch COCO by scripts/download_coco.py",
            )
        if not path.is_file():
            raise fault(path, "is no ordinary file", "give a file of prompts")
        if path.stat().st_size > MAX_FILE_BYTES:
            raise fault(path, f"is larger than {MAX_FILE_BYTES // 2**20} MiB", "keep the rows that are needed")
        with path.open("rb") as file:
            data = file.read(LOOK)
            if b"\0" not in data:
                data += file.read()
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: a ~name that is no user
        raise fault(path, f"cannot be read ({error})", "correct the path or its permissions") from error
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise fault(f"{path.name} line 1", "is not UTF-8 but UTF-16", "save the file as UTF-8 text")
    if (place := data.find(b"\0")) >= 0:  # before it is made text, which takes four times as much memory
        line = data.count(b"\n", 0, place) + 1
        raise fault(
            f"{path.name} line {line}", "a character that is no text (NUL)", "take it out, or give another file"
        )
    return data


def decode(data: bytes, name: str) -> str:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise fault(f"{name} line {line}", "is not UTF-8", "save the file as UTF-8 text") from error
    if not text.strip():
        raise fault(name, "is empty", "give a file with one prompt or more")
    return text


def parse_json(text: str, name: str, line: int | None = None) -> Any:
    """Parse JSON; `line` is the text's line number in its file, if it is one line of it."""
    where = name if line is None else f"{name} line {line}"
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"line {line or error.lineno}, column {error.colno}"
        raise fault(name, f"is not JSON ({place}: {error.msg})", "mend or fetch it again") from error
    except (ValueError, RecursionError) as error:  # a number with thousands of digits, or brackets thousands deep
        raise fault(where, f"is JSON that cannot be read ({error})", "mend or fetch it again") from error


def json_lines(text: str, name: str) -> Iterable[tuple[int, dict]]:
    """(line number from 1, object) for each line; only line feeds end one, as a JSON string may hold U+2028."""
    for line, content in enumerate(io.StringIO(text, newline=None), 1):
        if not content.strip():
            continue
        row = parse_json(content, name, line)
        if not isinstance(row, dict):
            raise fault(f"{name} line {line}", "is no JSON object", 'write one {"prompt": …} a line')
        yield line, row
