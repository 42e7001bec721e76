"""Prompts from .csv, .tsv, .jsonl and .txt files: every row is one, as it stands."""

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vqdm.prompts.text_files import fault, json_lines, listed

TEXT_COLUMNS = ("captions", "caption", "prompt", "Prompt", "text", "TEXT", "Prompts")
IMAGE_COLUMNS = ("file_name", "filename")
_QUOTED_FIELD = re.compile(r'"(?:[^"]|"")*"')


@dataclass(frozen=True)
class Row:
    """One row of a file, not yet checked; `where` names it in errors."""

    where: str
    text: str
    id: Any = None
    image: Any = None  # file name of the image that the caption belongs to


def _pick_column(present: Sequence[str], column: str | None, name: str) -> str:
    wanted = TEXT_COLUMNS if column is None else (column,)
    found = next((candidate for candidate in wanted if candidate in present), None)
    if found is None:
        problem = f"no column {' or '.join(map(repr, wanted))} among: {listed(map(repr, present))}"
        raise fault(name, problem, "set column to one of these (a header row is needed)")
    if list(present).count(found) > 1:
        raise fault(name, f"more than one column {found!r}", "rename all but one")
    return found


def _image_of(values: dict) -> Any:
    return next((values[column] for column in IMAGE_COLUMNS if values.get(column)), None)


def no_column(name: str, column: str | None, kind: str) -> None:
    if column is not None:
        raise fault(name, f"{kind} has no columns, but column={column!r} was asked for", "leave column out")


def read_text(text: str, name: str, *, column: str | None, **_: Any) -> tuple[list[Row], str]:
    no_column(name, column, "a .txt file")
    lines = enumerate(io.StringIO(text, newline=None), 1)
    return [Row(f"{name} line {number}", line) for number, line in lines], "one prompt a line"


def read_jsonl(text: str, name: str, *, column: str | None, **_: Any) -> tuple[list[Row], str]:
    rows: list[Row] = []
    for line, row in json_lines(text, name):
        column = _pick_column(list(row), column, f"{name} line {line}")
        content = "" if row[column] is None else row[column]
        if not isinstance(content, str):
            raise fault(f"{name} line {line}", f"{column!r} is no string", "write the prompt in double quotes")
        rows.append(Row(f"{name} line {line}", content, row.get("id"), _image_of(row)))
    return rows, f"column {column}"


def _is_plain_tsv(text: str) -> bool:
    """True for a .tsv file without quoting, like PartiPrompts', where a quote that opens a prompt is part of it."""
    rows = [line.rstrip("\n").split("\t") for line in io.StringIO(text, newline=None) if line.strip()]
    as_wide = all(len(row) == len(rows[0]) for row in rows)
    return as_wide and not any(_QUOTED_FIELD.fullmatch(field) for row in rows for field in row)


def read_table(text: str, name: str, *, column: str | None, delimiter: str = ",", **_: Any) -> tuple[list[Row], str]:
    """Read a table whose quoted fields may hold delimiters, doubled quotes and line breaks.

    All rows are equally wide.
    """
    quoting = csv.QUOTE_NONE if delimiter == "\t" and _is_plain_tsv(text) else csv.QUOTE_MINIMAL
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting, strict=True)
    rows: list[Row] = []
    try:
        header = [field.strip() for field in next(lines)]
        column = _pick_column(header, column, name)
        for fields in lines:
            where = f"{name} line {lines.line_num}"
            if fields and len(fields) != len(header):
                problem = f"{len(fields)} fields where the header has {len(header)}"
                raise fault(where, problem, "put fields that hold delimiters or line breaks in double quotes")
            values = dict(zip(header, fields, strict=False))  # a blank line has no fields
            rows.append(Row(where, values.get(column, ""), values.get("id"), _image_of(values)))
    except csv.Error as error:
        cure = "close every double quote, and double those inside a field"
        raise fault(f"{name} line {lines.line_num}", f"is malformed ({error})", cure) from error
    return rows, f"column {column}"
