"""Files that are either whole or absent, and JSON that knows its own checksum. A leaf: the standard library only."""

import errno
import hashlib
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from vqdm.errors import UserError

TEMPORARY_SUFFIX = ".tmp"
_NO_SPACE = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
_NO_PLACE = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENOENT, errno.ELOOP,
    errno.ENAMETOOLONG,
)  # fmt: skip


@contextmanager
def unwritable_is_mendable(path: Path) -> Iterator[None]:
    """`full_disk_is_mendable`, and a UserError too where nothing can be written there at all. Only around writing."""
    try:
        with full_disk_is_mendable(path):
            yield
    except OSError as error:
        if error.errno not in _NO_PLACE:
            raise
        reason = os.strerror(error.errno)
        raise UserError(f"cannot write in {path} ({reason}); mend that, or set results_dir=…") from error


@contextmanager
def full_disk_is_mendable(path: Path) -> Iterator[None]:
    """Turn "disk full", "quota exceeded" and "file too large" into a UserError that says what to do.

    A file size limit (ulimit -f) comes as EFBIG and not as a deadly SIGXFSZ, because Python ignores that signal.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_SPACE:
            raise
        raise UserError(
            f"no space left ({os.strerror(error.errno)}) while writing {path}; free space or set results_dir=…; "
            "finished work is kept and the same command goes on"
        ) from error


def atomic_write(path: Path, data: bytes) -> None:
    """Write beside `path`, then rename over it: a reader or a kill never sees half a file.

    The temporary name is drawn, because two processes may write the same file without a lock (runs, hash caches).
    No fsync: it would cost more than it saves with thousands of images, and the checksums find what a power cut tore.
    """
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")
    try:
        with unwritable_is_mendable(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(data)
            temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


@contextmanager
def whole_directory(path: Path) -> Iterator[Path]:
    """Give an empty directory beside `path`, which takes its place in the end: a kill never leaves half of one."""
    partial = path.with_name(f"{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    replace_directory(partial, path)


def replace_directory(new: Path, place: Path) -> None:
    """Put a complete directory in the place of an older one, which is deleted only then."""
    old = new.with_name(f"{new.name}-old")
    if place.exists():
        shutil.rmtree(old, ignore_errors=True)  # left by a process killed just here
        place.rename(old)
    new.rename(place)
    shutil.rmtree(old, ignore_errors=True)


def is_writable(directory: Path) -> bool:
    """True if a file can be made in a directory, or in the nearest one above that exists; finds out by making one."""
    there = next(place for place in (directory, *directory.absolute().parents) if os.path.lexists(place))
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        return error.errno in _NO_SPACE  # which is said where it matters
    return True


def write_json(path: Path, obj) -> None:
    """Write JSON, indented, since people read these files too."""
    atomic_write(path, (json.dumps(obj, indent=1, ensure_ascii=False) + "\n").encode())


def make_newest(path: Path, others: Iterable[Path]) -> None:
    """Give a file that was just written a later mtime than all `others`, even where a clock ran ahead of ours."""
    latest = max((other.stat().st_mtime_ns for other in others if other != path), default=0)
    stat = path.stat()
    if stat.st_mtime_ns <= latest:
        os.utime(path, ns=(stat.st_atime_ns, latest + 1_000_000))


def canonical_json(obj) -> bytes:
    """JSON bytes that are equal for equal values.

    The round trip first turns tuples into lists and number keys into text.
    """
    plain = json.loads(json.dumps(obj))
    return json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()


def write_sealed(path: Path, obj: dict) -> None:
    """Write JSON with the sha256 of all its other content under "sha256", since nothing else vouches for this file."""
    write_json(path, obj | {"sha256": hashlib.sha256(canonical_json(obj)).hexdigest()})


def read_sealed(path: Path) -> dict | None:
    """Content that `write_sealed` wrote, without the seal; None if there is no file, ValueError if it is damaged."""
    try:
        content = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:  # the parent of both UnicodeDecodeError and JSONDecodeError
        raise ValueError("is not readable as JSON") from error
    seal = content.pop("sha256", None) if isinstance(content, dict) else None
    if seal != hashlib.sha256(canonical_json(content)).hexdigest():
        raise ValueError("does not match its own checksum")
    return content


def files_below(directory: Path, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """All files below a directory, in order, with those of linked folders, which rglob leaves out.

    Folders that may not be read, or are not there, have none, as for rglob. above: the folders on the way here, to
    which no link leads back.
    """
    here = directory.resolve()
    if here in above:
        return
    try:
        found = sorted(directory.iterdir())
    except (PermissionError, FileNotFoundError):
        return
    for path in found:
        if path.is_dir():
            yield from files_below(path, (*above, here))
        elif path.is_file():
            yield path


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe_file(path: Path) -> dict:
    """{size in bytes, sha256}: the form in which manifests and sidecars keep a file."""
    return {"size": path.stat().st_size, "sha256": sha256_file(path)}


def file_fault(path: Path, expected: dict, *, hashed: bool = True) -> str | None:
    """A description of how a file differs from its `describe_file`, or None.

    Without `hashed` only its size is compared.
    """
    try:
        size = path.stat().st_size
        if size != expected["size"]:
            return f"has {size} bytes instead of {expected['size']}"
        if hashed and sha256_file(path) != expected["sha256"]:
            return "does not match its checksum"
    except (FileNotFoundError, NotADirectoryError):  # also if another process removes it just now
        return "is missing"
    return None
