"""Texts from outside (options, captions, models' names) made safe for names of files, CSV and Markdown; times in words.

Imports the standard library only.
"""

import difflib
import re
from collections.abc import Iterable

from vqdm.errors import UserError

LONGEST_NAME = 120  # bytes; file systems take 255, and suffixes are added
_NAME = re.compile(r"\w[\w .+=,@()-]*")
_FORMULA = ("=", "+", "-", "@", "\t", "\r")
_TAG = re.compile(r"<(?=[A-Za-z/!?])")


def is_file_name(text: str) -> bool:
    """True if a text can name a file or folder on any system: no separators, no leading dots, not too long."""
    return bool(_NAME.fullmatch(text)) and text == text.strip() and len(text.encode()) <= LONGEST_NAME


def check_file_name(option: str, text: str, *, folders: bool = False) -> None:
    """UserError unless `text` can be a file's name. folders: slashes may make folders of it."""
    if not all(map(is_file_name, text.split("/") if folders else [text])):
        slash = ", folders between slashes" if folders else ""
        raise UserError(
            f"{option}={text[:100]!r} cannot be a file's name: give letters, digits, blanks, . + = , @ ( ) -{slash}, "
            f"beginning with a letter or digit, at most {LONGEST_NAME} bytes"
        )


def file_name_of(text: str, *, longest: int = LONGEST_NAME) -> str:
    """Name for a file, similar to the text; other texts may get the same."""
    plain = re.sub(r"[^\w.+=,-]+", "-", text).encode()[:longest].decode(errors="ignore").strip("-.")
    return plain or "unnamed"


def in_one_line(text: str) -> str:
    """The text with every run of white space, line breaks included, as one blank: it cannot end a comment."""
    return " ".join(str(text).split())


def nearest(word: str, known: Iterable[str]) -> str:
    """The known word that is most like this one."""
    return difflib.get_close_matches(word, list(known), n=1, cutoff=0.0)[0]


def in_csv(value):
    """A cell that no spreadsheet takes for a formula: a text that begins like one gets an apostrophe. Numbers stay."""
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value


def in_markdown(text: str, *, cell: bool = False) -> str:
    """The text in one line that opens no HTML tag. cell: of a table, which it does not break."""
    line = _TAG.sub("&lt;", in_one_line(text))
    return line.replace("|", r"\|") if cell else line


def duration(seconds: float) -> str:
    """Time in words, to two digits: 40 s, 12 min, 3.5 h, 12 days."""
    for unit, size, limit in (("s", 1, 90), ("min", 60, 90), ("h", 3600, 48)):
        if seconds < limit * size:
            return f"{two_digits(seconds / size)} {unit}"
    return f"{two_digits(seconds / 86400)} days"


def two_digits(value: float) -> str:
    if value >= 9.95:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 0.095 else f"{value:.1g}"
