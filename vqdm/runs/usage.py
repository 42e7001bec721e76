"""Time and peak memory of a stage, for its manifest: provenance, like the date. Imports no torch."""

import contextlib
import re
import sys
import time
from pathlib import Path

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
FORGET_THE_PEAK = "5"  # proc(5): VmHWM begins again at the present size


class Usage:
    """What this process has used since the object was made; one at a time, as there is one peak per process."""

    def __init__(self):
        self._began, self._cpu = time.monotonic(), time.process_time()
        self._resets = _forget_peak()

    def so_far(self) -> dict:
        """{seconds, cpu_seconds, peak_memory_bytes: {host, device}}; None where the system does not tell.

        host: resident memory, mapped files included. device: what torch allocated on the GPU, without its context.
        """
        return {
            "seconds": round(time.monotonic() - self._began, 3),
            "cpu_seconds": round(time.process_time() - self._cpu, 3),
            "peak_memory_bytes": {"host": _host_peak() if self._resets else None, "device": _device_peak()},
        }


def _forget_peak() -> bool:
    """Begin the peaks anew; False where the host's cannot be, as outside Linux."""
    if (cuda := _cuda()) is not None:
        cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        RESET.write_text(FORGET_THE_PEAK)
        return True
    return False


def _host_peak() -> int | None:
    with contextlib.suppress(OSError):
        if found := re.search(r"^VmHWM:\s+(\d+) kB$", STATUS.read_text(), re.MULTILINE):
            return 1024 * int(found[1])
    return None


def _device_peak() -> int | None:
    return None if (cuda := _cuda()) is None else cuda.max_memory_allocated()


def _cuda():
    """torch.cuda where a GPU is in use: only then has torch been imported and has anything been allocated."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_initialized() else None
