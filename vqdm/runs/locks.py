"""One process at a time in a directory, by a kernel lock (flock), which ends with its process, even after kill -9."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from vqdm.errors import UserError
from vqdm.runs.files import unwritable_is_mendable

LOCK = ".lock"
PRUNED_AT_MOST = 100  # times in a row that a directory may go between its making and its lock
log = logging.getLogger("vqdm")


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Make the directory and hold its lock; logs one line when it has to wait for another process."""
    lock = FileLock(directory / LOCK)
    if not _acquire(lock, directory, timeout=0):
        log.info("%s: another process is working in it; waiting", directory)
        _acquire(lock, directory, timeout=-1)
    try:
        yield
    finally:
        lock.release()


@contextmanager
def lock_if_free(directory: Path) -> Iterator[bool]:
    """Hold the lock of an existing directory, or yield False at once when another process has it."""
    lock = FileLock(directory / LOCK)
    try:
        lock.acquire(timeout=0)
    except (Timeout, FileNotFoundError):
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def _acquire(lock: FileLock, directory: Path, *, timeout: float) -> bool:
    """Acquire the lock and return True, or False when time runs out.

    Starts over if the directory was pruned meanwhile. UserError where none can ever be made, as in /proc.
    """
    for _ in range(PRUNED_AT_MOST):
        try:
            _make_and_acquire(lock, directory, timeout=timeout)
        except Timeout:
            return False
        except FileNotFoundError:
            continue
        if (directory / LOCK).exists():
            return True
        lock.release()  # the locked file was renamed away with its directory
    raise UserError(f"cannot make {directory}: no such place; give another one (results_dir=…)")


def _make_and_acquire(lock: FileLock, directory: Path, *, timeout: float) -> None:
    """FileNotFoundError where the directory went meanwhile, or where none can ever be (/proc, a dead link)."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=timeout, poll_interval=0.2)
    except FileNotFoundError:
        raise
    except OSError:
        with unwritable_is_mendable(directory):
            raise
