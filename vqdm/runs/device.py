"""The device and the reason for it: decided once, printed, and kept in every manifest."""

import contextlib
import dataclasses
import functools
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from vqdm.errors import UserError

if TYPE_CHECKING:
    import torch

FLOAT32 = "full precision; TF32 only in Hessians of 16-bit activations, which it holds exactly"  # on a GPU


@dataclasses.dataclass(frozen=True)
class Device:
    name: str  # cpu | cuda | the type of another accelerator that torch sees
    reason: str
    threads: int

    def environment(self) -> dict:
        """What of it belongs to the protocol of whatever is computed on it."""
        return {"device": self.name} | ({} if self.name == "cpu" else {"float32": FLOAT32})

    def __str__(self) -> str:
        return f"device {self.name} ({self.reason}), {self.threads} threads"


def resolve_device(wanted: str, *, threads: int | None) -> Device:
    """The device to run on; `auto` takes a GPU where torch sees one. Also sets torch's number of CPU threads.

    On a GPU float32 is float32 from then on, in this process: dtype=float32 asks for it, and rows of a table compare.
    """
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
    name = wanted if wanted != "auto" else ("cuda" if there else "cpu")
    processes.join(cpu=name == "cpu")
    if name != "cpu":
        _allow_tf32_in_convolutions(False)
    reason = f"device={wanted}" if wanted != "auto" else ("torch sees a GPU" if there else "torch sees no GPU")
    return Device(name, reason, torch.get_num_threads())


def computes_in_bfloat16(device: str) -> bool:
    """False for a CPU that torch has no bfloat16 kernels for: it emulates them, many times as slow as float32."""
    import torch

    return device != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def accelerator() -> str | None:
    """The type of the accelerator that torch sees, whatever it is: cuda (ROCm's too), xpu, one of an extension."""
    import torch

    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return None if found is None else found.type


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
    take_back = _allow_tf32_in_convolutions(False)
    try:
        yield
    finally:
        take_back()


@contextlib.contextmanager
def exact_tf32(dtype: "torch.dtype") -> Iterator[None]:
    """Let a GPU form products of float32 matrices inside in TF32, if their numbers were of a 16-bit `dtype`.

    Its 8 bits of exponent and 10 of fraction hold every float16 and bfloat16; sums are kept in float32. Tensor cores
    are some eight times as fast so.
    """
    import torch

    matmul = torch.backends.cuda.matmul
    take_back = _allow_tf32(True, matmul, matmul) if dtype in (torch.float16, torch.bfloat16) else lambda: None
    try:
        yield
    finally:
        take_back()


@contextlib.contextmanager
def one_order_of_sums(device: "torch.device") -> Iterator[None]:
    """Have a GPU add up gradients in one order inside, as the CPU does: resumed training then gives the same weights.

    cuDNN, cuBLAS and torch take algorithms that promise it; an op that has none warns, and is not repeatable.
    """
    import torch

    if device.type == "cpu":
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _allow_tf32_in_convolutions(wanted: bool) -> Callable[[], None]:
    import torch

    cudnn = torch.backends.cudnn
    return _allow_tf32(wanted, cudnn, getattr(cudnn, "conv", None))


def _allow_tf32(wanted: bool, old, new) -> Callable[[], None]:
    """Allow TF32 in one kind of op, or do not; returns a function that takes it back.

    old, new: where torch keeps that, `allow_tf32` and `fp32_precision`. Once anybody has set the newer, the old cannot
    be read.
    """
    try:
        place, name, value, before = old, "allow_tf32", wanted, old.allow_tf32
    except RuntimeError:
        place, name, value, before = new, "fp32_precision", "tf32" if wanted else "ieee", new.fp32_precision
    setattr(place, name, value)
    return functools.partial(setattr, place, name, before)
