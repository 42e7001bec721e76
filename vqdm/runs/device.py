"""The device and the reason for it: decided once, printed, and kept in every manifest."""

import contextlib
import dataclasses
import threading
from collections.abc import Iterator

from vqdm.errors import UserError


@dataclasses.dataclass(frozen=True)
class Device:
    name: str  # cpu | cuda
    reason: str
    threads: int

    def __str__(self) -> str:
        return f"device {self.name} ({self.reason}), {self.threads} threads"


def resolve_device(wanted: str, *, threads: int | None) -> Device:
    """The device to run on; `auto` takes a GPU where torch sees one. Also sets torch's number of CPU threads."""
    import torch

    from vqdm.runs import processes
    from vqdm.runs.threads import set_threads

    set_threads(threads)
    there = torch.cuda.is_available()
    if wanted == "cuda" and not there:
        raise UserError(
            f"device=cuda, but torch {torch.__version__} sees no GPU; use device=cpu or install a CUDA build; "
            "to plan for a GPU that is not here, add plan=true plan_for=h100"
        )
    name = "cuda" if there and wanted != "cpu" else "cpu"
    processes.join(cpu=name == "cpu")
    reason = f"device={wanted}" if wanted != "auto" else ("torch sees a GPU" if there else "torch sees no GPU")
    return Device(name, reason, torch.get_num_threads())


def encoding_room() -> int:
    """Bytes of the host's memory that all layers encoded at the same time may take together."""
    import psutil

    return int(0.8 * psutil.virtual_memory().available)


class MemoryGate:
    """Lets threads through while the memory they hold together stays within `room` bytes; one alone always passes."""

    def __init__(self, room: int):
        self.room, self._held, self._changed = room, 0, threading.Condition()

    @contextlib.contextmanager
    def holding(self, size: float) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: self._held == 0 or self._held + size <= self.room)
            self._held += size
        try:
            yield
        finally:
            with self._changed:
                self._held -= size
                self._changed.notify_all()


@contextlib.contextmanager
def one_thread_each() -> Iterator[None]:
    """Limit torch to one CPU thread inside, also in threads started inside: sums are then always in the same order."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Keep GPU convolutions in float32 inside; by default cuDNN rounds their inputs to the 10 bits of TF32."""
    import torch

    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before
