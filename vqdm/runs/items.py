"""Items: the pieces of a long stage (a layer, an image, a checkpoint), each whole or absent, so a kill costs one.

An item is its files plus `items/<name>.json`, written last, which holds its record and its files' checksums.
"""

import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from vqdm.errors import UserError
from vqdm.runs import progress
from vqdm.runs.files import atomic_write, file_fault, read_sealed, write_sealed
from vqdm.runs.threads import threads_that_are_free

log = logging.getLogger("vqdm")


class Item(NamedTuple):
    """What an item's sidecar holds: its record, and {path relative to the directory: {size, sha256}} of its files."""

    record: dict
    files: dict[str, dict]


def _sidecar(directory: Path, name: str) -> Path:
    return directory / "items" / f"{name}.json"


def write_item(directory: Path, name: str, files: dict[str, bytes], record: dict) -> None:
    """Write `files` (path relative to `directory` -> bytes), then the sidecar that makes the item count as done."""
    sidecar = _sidecar(directory, name)
    sidecar.unlink(missing_ok=True)  # while the files are those of neither item, nothing may count as done
    described = {}
    for relative, data in files.items():
        atomic_write(directory / relative, data)
        described[relative] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    write_sealed(sidecar, {"record": record, "files": described})


def read_item(directory: Path, name: str) -> dict | None:
    """The item's record if the item is whole; None if there is none, or if it is damaged (logged in one line)."""
    sidecar = _sidecar(directory, name)
    try:
        content = read_sealed(sidecar)
        fault = None if content is None else _first_fault(directory, content["files"])
    except ValueError as error:
        content, fault = None, f"{sidecar.name} {error}"
    if fault:
        log.warning("%s: item %s is damaged (%s); it is made again", directory, name, fault)
        sidecar.unlink(missing_ok=True)
        return None
    return None if content is None else content["record"]


def make_missing(
    directory: Path, makers: dict[str, Callable[[], tuple[dict[str, bytes], dict]]], *, title: str, unit: str = "batch"
) -> None:
    """Make every item that is missing, under a bar; inference only, on the threads that are free.

    makers: by an item's name what gives its files and its record, as `write_item` takes them.
    """
    with threads_that_are_free() as adjust_threads, progress.bar(title, len(makers), unit=unit) as bar:
        for name, make in makers.items():
            if read_item(directory, name) is not None:
                bar.skip()
                continue
            adjust_threads()
            write_item(directory, name, *make())
            bar.add()


def peek(directory: Path, name: str) -> Item:
    """An item's record and its files' checksums without a look at the files, for code that only reads the directory.

    Raises UserError if the sidecar is missing or does not match its own checksum: the run that made it mends it.
    """
    sidecar = _sidecar(directory, name)
    try:
        content = read_sealed(sidecar)
        fault = "is missing" if content is None else None
    except ValueError as error:
        fault = str(error)
    if fault:
        raise UserError(f"{sidecar} {fault}; run its experiment again, which makes this item anew")
    return Item(content["record"], content["files"])


def item_names(directory: Path, prefix: str = "") -> list[str]:
    """Names of the items that begin with `prefix`, sorted; `read_item` tells whether they are whole."""
    return sorted(path.stem for path in (directory / "items").glob(f"{prefix}*.json"))


def remove_item(directory: Path, name: str, files: list[str]) -> None:
    """Remove an item, its sidecar first: whatever an interrupted removal leaves then no longer counts as an item."""
    _sidecar(directory, name).unlink(missing_ok=True)
    for relative in files:
        (directory / relative).unlink(missing_ok=True)


def _first_fault(directory: Path, files: dict[str, dict]) -> str | None:
    for relative, expected in files.items():
        if fault := file_fault(directory / relative, expected):
            return f"{relative} {fault}"
    return None


def batches(count: int, size: int) -> list[tuple[str, range]]:
    """Fixed index ranges, each with the name of its item."""
    return [(f"{start:06d}", range(start, min(start + size, count))) for start in range(0, count, size)]
