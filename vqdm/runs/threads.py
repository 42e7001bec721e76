"""CPU threads for a machine that others use too: how long idle ones spin, and how many are worth having now.

torch's OpenMP threads wait for each other by spinning. Where another process holds the core that is waited for, that
burns whole time slices: with libgomp's 300,000 rounds a small model takes 10 to 20 times the CPU time. A bound on the
rounds keeps the worst case at 4 times and costs a quiet machine nothing; so few that it would cost a busy one nothing
make a quiet one slower by a quarter. Hence both: this bound, and no more threads than there are free cores.

Imports no torch: the bound must be in the environment before OpenMP is loaded.
"""

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

SPIN_ROUNDS = "10000"  # measured, see docs/lab-notes.md; about half a millisecond
SHORTEST = 0.3  # seconds between two looks: the kernel counts in hundredths
WORTH_A_THREAD = 0.6  # part of a core that must be free, so that a little work of others costs no thread


def bound_spinning() -> None:
    """Bound the spinning before torch is imported, unless the user has said how OpenMP's threads wait."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_ROUNDS)


def usable_cores() -> int:
    """Cores that this process may run on: its affinity, or its container's share of time where that is less."""
    allowed = len(_affinity()) or os.cpu_count() or 1
    return max(1, math.ceil(min(allowed, _quota())))


def _affinity() -> set[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()


def _quota() -> float:
    """Cores' worth of time that a control group grants; infinite without a limit."""
    root = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):
        limit, period = (root / "cpu.max").read_text().split()
        return float(limit) / float(period)
    with contextlib.suppress(OSError, ValueError):
        limit, period = (float((root / "cpu" / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
        return limit / period if limit > 0 else math.inf
    return math.inf


class FreeCores:
    """Number of cores that this process could have: those it has used and those idle since the last look."""

    def __init__(self):
        self._last, self._found = self._look(), None

    def count(self) -> float | None:
        """Mean number of free cores since the last look, or the last result if that was just now; None: unknown."""
        now = self._look()
        seconds = now[0] - self._last[0]
        if seconds >= SHORTEST:
            known = None not in (now[1], self._last[1])
            self._found = sum(new - old for new, old in zip(now[1:], self._last[1:], strict=True)) if known else None
            self._found = self._found / seconds if known else None
            self._last = now
        return self._found

    @staticmethod
    def _look() -> tuple[float, float | None, float]:
        """(clock, seconds that our cores have idled, seconds of CPU that this process has used)"""
        spent = os.times()
        return time.monotonic(), _idle_seconds(), spent.user + spent.system


def _idle_seconds() -> float | None:
    """Idle seconds of all cores that this process may run on; None where the kernel does not tell.

    Systems other than Linux have no /proc/stat; some sandboxes show one of zeros, or one that lacks some of the cores.
    """
    try:
        rows = [line.split() for line in Path("/proc/stat").read_text().splitlines()]
        cores = {f"cpu{number}" for number in _affinity()}
        ticks = [[int(count) for count in counts] for name, *counts in filter(None, rows) if name in cores]
        known = cores and len(ticks) == len(cores) and any(map(any, ticks))
        return sum(sum(row[3:5]) for row in ticks) / os.sysconf("SC_CLK_TCK") if known else None  # idle, iowait
    except (OSError, ValueError):
        return None


_since_start, _chosen, _asked = FreeCores(), False, False  # of this process, as torch's own number of threads is


def set_threads(wanted: int | None) -> int:
    """Set torch's CPU threads for this process and return them: `wanted`, or at most the cores that it may use."""
    global _chosen, _asked
    import torch

    _asked = wanted is not None
    _chosen = wanted is not None or "OMP_NUM_THREADS" in os.environ
    if wanted is not None:
        torch.set_num_threads(wanted)
    elif not _chosen and usable_cores() < torch.get_num_threads():
        torch.set_num_threads(usable_cores())
    return torch.get_num_threads()


def workers() -> int:
    """Number of layers to encode at a time: torch's threads, or this process's share of the cores if that is more.

    torchrun gives each of several processes one OpenMP thread (OMP_NUM_THREADS=1), whatever it may run on; a number of
    threads that the user asked for (threads=…) stays.
    """
    import torch

    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if _asked or here == 1:
        return torch.get_num_threads()
    return max(torch.get_num_threads(), usable_cores() // here)


@contextlib.contextmanager
def threads_that_are_free() -> Iterator[Callable[[], None]]:
    """Context with a function that sets torch's CPU threads to the cores that are free now; undone at the end.

    For inference only: its results are the same, bit for bit, from any number of threads; gradients are not. Threads
    that the user has chosen stay.
    """
    import torch

    before = torch.get_num_threads()

    def adjust() -> None:
        free = None if _chosen or before == 1 else _since_start.count()
        threads = before if free is None else max(1, min(before, math.floor(free + 1 - WORTH_A_THREAD)))
        if threads != torch.get_num_threads():
            torch.set_num_threads(threads)

    try:
        yield adjust
    finally:
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)
