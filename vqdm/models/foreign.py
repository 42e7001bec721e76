"""Reading of others' files: JSON objects, safetensors headers, and one line for whatever a library's error says.

Imports no torch, so that a plan has it too.
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

from vqdm.errors import UserError

LONGEST_HEADER = 100_000_000  # bytes; safetensors' own limit
_OF_MEMORY = ("OutOfMemoryError", "MemoryError")  # not the fault of any file


def first_line(error: BaseException) -> str:
    """One line of an error's message, short enough to stand in ours; its type where it has none."""
    line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return line.strip()[:300]


@contextlib.contextmanager
def loading(place: Path | str, what: str = "a diffusers pipeline") -> Iterator[None]:
    """Context that turns what a library raises while reading others' files into a UserError that names the place."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if type(error).__name__ in _OF_MEMORY:
            raise
        raise UserError(
            f"{place} cannot be loaded as {what} ({type(error).__name__}: {first_line(error)}); get it again"
        ) from error


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """Silence the progress bars of diffusers and transformers inside, where a bar of ours is shown."""
    from diffusers.utils import logging as diffusers
    from transformers.utils import logging as transformers

    shown = [library for library in (diffusers, transformers) if library.is_progress_bar_enabled()]
    for library in shown:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in shown:
            library.enable_progress_bar()


def json_object(file: Path) -> dict:
    """The content of a JSON file that holds an object. UserError for one that is missing or holds anything else."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not JSON ({first_line(error)}); download the model again") from error
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}); download the model again") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} holds {type(content).__name__} where an object should be; download the model again")
    return content


def safetensors_header(file: Path) -> dict[str, dict]:
    """{tensor: {dtype, shape, data_offsets}}, and `__metadata__`. UserError for a file that is cut off or damaged."""
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if not 2 <= length <= min(size - 8, LONGEST_HEADER):
                raise ValueError("its header is longer than the file")
            header = json.loads(opened.read(length))
        entries = [entry for name, entry in header.items() if name != "__metadata__"]
        end = 8 + length + max((entry["data_offsets"][1] for entry in entries), default=0)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise UserError(f"{file} is no whole safetensors file ({first_line(error)}); get it again") from error
    if size != end:
        raise UserError(f"{file} has {size} bytes instead of {end}: it was cut off or altered; get it again")
    return header
