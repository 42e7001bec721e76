"""Time and peak memory of a stage, for its manifest: provenance, like the date. Imports no torch."""

import contextlib
import re
import sys
import threading
import time
import weakref
from pathlib import Path

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
FORGET_THE_PEAK = "5"  # proc(5): VmHWM begins again at the present size
OF_NO_FILE = ("RssAnon", "RssShmem", "VmSwap")  # proc(5): what the system cannot drop and read again from a file
WATCHER = "memory of a stage"  # the thread's name
INTERVAL = 0.05  # seconds between two looks, a thousandth of them spent: memory fills by 0.1 GiB meanwhile, or less


class Usage:
    """What this process has used since the object was made; one at a time, as there is one peak per process.

    While it lives a thread looks at the memory of no file, of which Linux keeps no peak. It runs beside products and
    kernels, which give up the interpreter's lock, and changes nothing but this object.
    """

    def __init__(self):
        self._began, self._cpu = time.monotonic(), time.process_time()
        self._resets = _forget_peak()
        self._anonymous = _anonymous_now()
        if self._anonymous is not None:
            threading.Thread(target=_watch, args=(weakref.ref(self),), daemon=True, name=WATCHER).start()

    def so_far(self) -> dict:
        """{seconds, cpu_seconds, peak_memory_bytes: {host, anonymous, device}}; None where the system does not tell.

        host: resident memory, mapped files included, as far as the system left them there. anonymous: without them,
        what it could not take back, as seen every INTERVAL seconds. device: what torch allocated on the GPU, without
        its context.
        """
        self.look()
        return {
            "seconds": round(time.monotonic() - self._began, 3),
            "cpu_seconds": round(time.process_time() - self._cpu, 3),
            "peak_memory_bytes": {
                "host": _host_peak() if self._resets else None,
                "anonymous": self._anonymous,
                "device": _device_peak(),
            },
        }

    def look(self) -> None:
        """Let the present size count."""
        if self._anonymous is not None:
            self._anonymous = max(self._anonymous, _anonymous_now() or 0)


def _watch(usage: weakref.ref) -> None:
    """Look until nobody holds the object any more."""
    while (found := usage()) is not None:
        found.look()
        del found
        time.sleep(INTERVAL)


def _forget_peak() -> bool:
    """Begin the peaks anew; False where the host's cannot be, as outside Linux."""
    if (cuda := _cuda()) is not None:
        cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        RESET.write_text(FORGET_THE_PEAK)
        return True
    return False


def _host_peak() -> int | None:
    return _status().get("VmHWM")


def _anonymous_now() -> int | None:
    found = _status()
    return sum(found.get(name, 0) for name in OF_NO_FILE) if OF_NO_FILE[0] in found else None


def _status() -> dict[str, int]:
    """Bytes by name, as Linux tells them of this process; nothing elsewhere."""
    with contextlib.suppress(OSError):
        found = re.findall(r"^(\w+):\s+(\d+) kB$", STATUS.read_text(), re.MULTILINE)
        return {name: 1024 * int(size) for name, size in found}
    return {}


def _device_peak() -> int | None:
    return None if (cuda := _cuda()) is None else cuda.max_memory_allocated()


def _cuda():
    """torch.cuda where a GPU is in use: only then has torch been imported and has anything been allocated."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_initialized() else None
