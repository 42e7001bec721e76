"""Pictures of one's own, their captions and masks: a JSONL file and images beside it, read as a stranger's.

A line is {"id", "caption", "edited", "image", "mask"} and, where all have it, "truth" (docs/probes.md). Every fault is
one line that names the file's line, before any work.
"""

import hashlib
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from vqdm.prompts.readers import PLAIN_ID, name_inside
from vqdm.prompts.text_files import decode, fault, is_text, json_lines, listed, read_bytes
from vqdm.runs.identity import file_identity

TEXTS, FILES, OPTIONAL = ("id", "caption", "edited"), ("image", "mask"), ("truth",)
MOST_RECORDS, MOST_CHARACTERS = 1000, 1000
MOST_BYTES, MOST_PIXELS = 64 * 2**20, 64_000_000  # of an image
FORMATS = ("PNG", "JPEG")
TURNED = (5, 6, 7, 8)  # orientations in which a camera's sides are exchanged
WHITE = 128  # and above: the picture may change there


@dataclass(frozen=True)
class Record:
    """A picture, its caption, the caption it is to have, and the mask inside which it may change."""

    id: str
    caption: str
    edited: str
    image: Path
    mask: Path
    truth: Path | None  # the edit as it should be


def read_records(path: Path) -> list[Record]:
    """All records of a file; UserError for the first bad one."""
    path = path.expanduser()
    records: list[Record] = []
    for line, row in json_lines(decode(read_bytes(path), path.name), path.name):
        where = f"{path.name} line {line}"
        if len(records) == MOST_RECORDS:
            raise fault(where, f"more than {MOST_RECORDS} records", "split the file")
        record = _record(row, path.parent, where)
        if record.id in {one.id for one in records}:
            raise fault(where, f"id {record.id!r} stands there twice", "give each picture its own")
        if records and (record.truth is None) != (records[0].truth is None):
            raise fault(where, "a truth in some records only", "give it in all, or in none")
        records.append(record)
    if not records:
        raise fault(path.name, "holds no record", "write one a line")
    return records


def _record(row: dict, folder: Path, where: str) -> Record:
    known = (*TEXTS, *FILES, *OPTIONAL)
    if strange := [key for key in row if key not in known]:
        raise fault(where, f"unknown key {strange[0]!r}", f"keys are {listed(known)}")
    if missing := [key for key in (*TEXTS, *FILES) if key not in row]:
        raise fault(where, f"no {missing[0]!r}", f"give {listed((*TEXTS, *FILES))}")
    for key in TEXTS:
        if not is_text(row[key]) or not row[key].strip() or len(row[key]) > MOST_CHARACTERS:
            raise fault(where, f"{key} is no text of 1 to {MOST_CHARACTERS} characters", "write it in double quotes")
    if not PLAIN_ID.fullmatch(row["id"]):
        raise fault(where, f"id {row['id']!r} is no plain name", "use up to 100 letters, digits, '_', '.' and '-'")
    if row["caption"].split() == row["edited"].split():
        raise fault(where, "caption and edited are the same", "say in edited what the picture is to show")
    files = {key: _file(row[key], f"{where}: {key}", folder) for key in (*FILES, *OPTIONAL) if key in row}
    sizes = {key: _size(file, f"{where}: {key}") for key, file in files.items()}
    for key, size in sizes.items():
        if size != sizes["image"]:
            wide, high = sizes["image"]
            raise fault(where, f"{key} has {size[0]}×{size[1]} pixels, the image {wide}×{high}", "give equal sizes")
    _check_mask(files["mask"], f"{where}: mask")
    captions = (" ".join(row[key].split()) for key in ("caption", "edited"))
    return Record(row["id"], *captions, files["image"], files["mask"], files.get("truth"))


def _file(name, where: str, folder: Path) -> Path:
    """The file of that name below the folder, wherever links lead."""
    inside = name_inside(name)
    path = folder / (inside or "")
    if inside is None or not path.resolve().is_relative_to(folder.resolve()):
        raise fault(where, f"{name!r} is not below the file's own folder", "give a relative path, without ..")
    if not path.is_file():
        raise fault(where, f"there is no file {name!r}", "correct the path, or put the image there")
    if path.stat().st_size > MOST_BYTES:
        raise fault(where, f"{name!r} is larger than {MOST_BYTES // 2**20} MiB", "make it smaller")
    return path


def _size(path: Path, where: str) -> tuple[int, int]:
    """Width and height as the picture is shown, from its header."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # sizes are refused below
            with Image.open(path, formats=FORMATS) as image:
                (wide, high), orientation = image.size, image.getexif().get(0x0112)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise fault(where, f"{path.name} cannot be read as PNG or JPEG ({error})", "save it anew") from error
    if wide * high > MOST_PIXELS:
        raise fault(where, f"{path.name} has {wide}×{high} pixels", f"make it smaller than {MOST_PIXELS:,} pixels")
    return (high, wide) if orientation in TURNED else (wide, high)


def _check_mask(path: Path, where: str) -> None:
    inside = square(path, 256, where=where, mode="L") >= WHITE
    if inside.all() or not inside.any():
        which = "black" if inside.all() else "white"
        raise fault(where, f"the middle square of {path.name} has nothing {which}", "white is where it may change")


def square(path: Path, size: int, *, where: str, mode: str = "RGB") -> np.ndarray:
    """The middle square of an image, uint8 [size, size] or, in RGB, [size, size, 3]; masks ("L") keep their values."""
    method = Image.Resampling.NEAREST if mode == "L" else Image.Resampling.LANCZOS
    try:
        with Image.open(path, formats=FORMATS) as image:
            shown = ImageOps.exif_transpose(image).convert(mode)
    except (OSError, SyntaxError, ValueError) as error:
        raise fault(where, f"{path.name} cannot be read as PNG or JPEG ({error})", "save it anew") from error
    return np.array(ImageOps.fit(shown, (size, size), method))


def records_identity(records: list[Record], cache: Path) -> str:
    """sha256 over all records and the bytes of their images. cache: of the files' hashes."""
    digest = hashlib.sha256()
    for record in records:
        files = [file_identity(path, cache) for path in (record.image, record.mask, record.truth) if path is not None]
        digest.update(repr([record.id, record.caption, record.edited, *files]).encode())
    return digest.hexdigest()
