"""How fast this machine is: products, convolutions, attention and Cholesky factors, each timed for a moment.

Rates are kept in a JSON file under a key that names the machine and the libraries, so that a plan measures once.
"""

import concurrent.futures
import contextlib
import dataclasses
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numba
import torch
import torch.nn.functional as F
from torch import Tensor

from vqdm.runs.files import atomic_write, canonical_json
from vqdm.seeds import torch_generator
from vqdm.stages.plan.forward import ForwardCost

SECONDS, CALLS = 0.05, 3  # that one operation is timed for, at least; the fastest call counts
SLOW = 0.3  # seconds of one call, after which no more and no larger ones are made: convolutions in fp16 on a CPU
VERSION = 1  # of what the cache holds


@dataclass(frozen=True)
class Speeds:
    """Of a device: FLOP/s of three kinds in the model's dtype, bytes/s the rest writes, FLOP/s of fp32 products."""

    matmul: float
    convolution: float
    attention: float
    writing: float
    fp32_matmul: float

    def seconds(self, cost: ForwardCost) -> float:
        return (
            cost.matmul_flops / self.matmul
            + cost.convolution_flops / self.convolution
            + cost.attention_flops / self.attention
            + cost.written_bytes / self.writing
        )


@dataclass(frozen=True)
class Hardware:
    """sampling: all threads of torch, or the GPU. recording: one thread, or the GPU.

    worker_matmul, worker_cholesky: fp32 FLOP/s of one of the CPU's workers that encode layers, all of them at work.
    """

    sampling: Speeds
    recording: Speeds
    worker_matmul: float
    worker_cholesky: float


def probe_hardware(*, device: str, dtype: str, threads: int, workers: int, cache: Path) -> Hardware:
    """Measured in a second or two, or read from the cache. device: cpu | cuda; dtype: of the model, by torch's name."""
    key = {"device": device_name(device), "dtype": dtype, "threads": threads, "workers": workers} | machine()
    found = cached(cache, "hardware", key, partial(_measured, device, dtype, threads, workers))
    speeds = {name: Speeds(**found[name]) for name in ("sampling", "recording")}
    return Hardware(**(found | speeds))


def _measured(device: str, dtype: str, threads: int, workers: int) -> dict:
    with torch.no_grad():
        with torch_threads(threads):
            sampling = _speeds(device, getattr(torch, dtype))
        recording = sampling
        with torch_threads(1):
            if device == "cpu" and threads > 1:
                recording = _speeds(device, getattr(torch, dtype))
            square = _draw(1280, 1280)
            matrix = square @ square.T + torch.eye(1280)
            found = {
                "worker_matmul": _worker_rate(2 * 1280**3, lambda: square @ square, workers),
                "worker_cholesky": _worker_rate(1280**3 / 3, lambda: torch.linalg.cholesky_ex(matrix), workers),
            }
    return found | {"sampling": dataclasses.asdict(sampling), "recording": dataclasses.asdict(recording)}


def _speeds(device: str, dtype: torch.dtype) -> Speeds:
    """On shapes of SDXL's, small enough for a slow CPU and large enough for a fast GPU."""
    scale = 1 if device == "cpu" else 16
    rows, channels, side, heads = 512 * scale, 320, 32, 10
    square = _draw(rows, 1280).to(device, dtype)
    weight = _draw(1280, 1280).to(device, dtype)
    rate = partial(_rate, device=device)
    image = _draw(scale, channels, side, side).to(device, dtype)
    kernel = _draw(channels, channels, 3, 3).to(device, dtype)

    def convolution(image: Tensor) -> float:
        return rate(2 * 9 * image.numel() * channels, lambda: F.conv2d(image, kernel, padding=1))

    query = _draw(scale, heads, side**2, 64).to(device, dtype)
    gain = torch.ones(channels, device=device, dtype=dtype)
    image32, square32 = image.repeat(4, 1, 1, 1), square.float()
    small = convolution(image[:, :, :8, :8])
    is_slow = 2 * 9 * image.numel() * channels / small > SLOW
    return Speeds(
        matmul=rate(2 * rows * 1280**2, lambda: F.linear(square, weight)),
        convolution=small if is_slow else convolution(image),
        attention=rate(4 * query.numel() * side**2, lambda: F.scaled_dot_product_attention(query, query, query)),
        writing=rate(2 * image32.nbytes, lambda: F.silu(F.group_norm(image32, 32, gain, gain))),
        fp32_matmul=rate(2 * rows * 1280**2, lambda: square32.T @ square32),
    )


def _draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch_generator(0, "probe")) / shape[-1] ** 0.5


def _rate(work: float, call: Callable[[], object], *, device: str = "cpu") -> float:
    """Work per second of the fastest call in SECONDS; the first, a warm-up, counts only if it is slow."""
    first = _seconds(call, device)
    if first > SLOW:
        return work / first
    seconds = [_seconds(call, device) for _ in range(CALLS)]
    while sum(seconds) < SECONDS:
        seconds.append(_seconds(call, device))
    return work / min(seconds)


def _seconds(call: Callable[[], object], device: str) -> float:
    """By the clock; of one thread on the CPU its own time, so that other programs count for less."""
    if device == "cpu":
        clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
        began = clock()
        call()
        return clock() - began
    torch.cuda.synchronize()
    began = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def _worker_rate(work: float, call: Callable[[], object], workers: int) -> float:
    return min(together(workers, lambda: _rate(work, call)))


def together(workers: int, call: Callable[[], float]) -> list[float]:
    """What `call` gives in each of so many threads at once: two that share a core are slower than one."""
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        return [future.result() for future in [pool.submit(call) for _ in range(workers)]]


@contextlib.contextmanager
def torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def machine() -> dict:
    """What rates depend on beside devices and options."""
    return {
        "processor": f"{platform.machine()} {platform.processor()}".strip(),
        "cpus": os.cpu_count(),
        "torch": torch.__version__,
        "numba": numba.__version__,
        "version": VERSION,
    }


def device_name(device: str) -> str:
    return "cpu" if device == "cpu" else torch.cuda.get_device_name()


def cached(file: Path, kind: str, key: dict, make: Callable[[], dict]) -> dict:
    """What `make` gave for a key the first time. A file that is no JSON of ours is made anew."""
    name = f"{kind} {canonical_json(key)}"
    kept = read_cache(file)
    if name not in kept:
        made = make()
        atomic_write(file, json.dumps(read_cache(file) | {name: made}, indent=1).encode())
        return made
    return kept[name]


def read_cache(file: Path) -> dict:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
