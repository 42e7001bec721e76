"""numba's compiler, which says on the screen that it works: once, as the result is kept on disk."""

import contextlib

from numba import njit
from numba.core import event

from vqdm.runs import progress

__all__ = ["njit"]


class _Said(event.Listener):
    """Shows a step from the first function's beginning to its end; those that it calls are compiled inside."""

    def __init__(self):
        self._depth, self._shown = 0, contextlib.ExitStack()

    def on_start(self, event) -> None:
        if self._depth == 0:
            self._shown.enter_context(progress.step("compiling kernels, once"))
        self._depth += 1

    def on_end(self, event) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._shown.close()


event.register("numba:compile", _Said())  # only where the cache on disk has nothing; one thread at a time compiles
