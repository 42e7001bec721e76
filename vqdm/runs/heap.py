"""The C library's heap, which keeps what is freed between blocks in use: gigabytes, beside a large model."""

import contextlib
import ctypes
import gc


def return_freed_memory() -> None:
    """Collect what refers to itself, as pipelines do, and give free pages back to the system, where glibc can."""
    gc.collect()
    return_free_pages()


def return_free_pages() -> None:
    """Give free pages back to the system, where glibc can: what refers to itself stays, and nothing is looked for."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
