"""Trajectories in files: a denoiser's calls at many steps for one batch of captions, read back sample by sample.

A sample is one caption's rows in one call: two with guidance. A file holds tensors that change from call to call as
`each.<name>` [calls, …] and all others once as `all.<name>`, so that captions are not stored for every step.
"""

import functools
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from vqdm.calibration.recording import OUTPUT, PLAIN, Call, call_arguments, in_fp32

EACH, ALL = "each.", "all."
OPEN_FILES = 64
NOTHING = torch.empty(0, device="cpu")


def pack(calls: Sequence[Call], *, captions: int) -> bytes:
    """The calls of one batch as a file. Their rows are the captions', once or, with guidance, several times over."""
    tensors = {}
    if any(not torch.equal(call.get(PLAIN, NOTHING), calls[0].get(PLAIN, NOTHING)) for call in calls):
        raise ValueError("the denoiser takes an argument that is no tensor and changes from step to step")
    for name, first in calls[0].items():
        values = [call[name] for call in calls]
        changes = first.ndim == 0 or name == OUTPUT or any(not torch.equal(value, first) for value in values)
        tensors[f"{EACH}{name}" if changes else f"{ALL}{name}"] = torch.stack(values) if changes else first
    about = {"calls": str(len(calls)), "captions": str(captions), "rows": str(len(calls[0][OUTPUT]))}
    return to_bytes({name: tensor.contiguous() for name, tensor in tensors.items()}, about)


@dataclass(frozen=True)
class Batch:
    """Samples on a device, floats in fp32: arguments of one call, the teacher's output for it, and timesteps.

    Rows come sample by sample, `rows_each` of them together.
    """

    arguments: dict
    target: Tensor  # [samples · rows_each, …]
    timesteps: Tensor  # [samples], on the CPU
    rows_each: int


@dataclass(frozen=True)
class _Sample:
    file: Path
    call: int
    caption: int


class Trajectories:
    """The samples in some files, read on demand."""

    def __init__(self, files: Iterable[Path]):
        self._opened = functools.lru_cache(OPEN_FILES)(_open)
        self.samples: list[_Sample] = []
        for path in sorted(files):
            calls, captions, _ = _counts(_open(path))
            self.samples += [_Sample(path, *at) for at in itertools.product(range(calls), range(captions))]

    def __len__(self) -> int:
        return len(self.samples)

    def batch(self, indices: Sequence[int], *, device: str | torch.device) -> Batch:
        """The samples with these indices, in this order."""
        samples = [self.samples[index] for index in indices]
        read = [_read(self._opened(sample.file), sample) for sample in samples]
        rows_each = len(read[0][OUTPUT])
        call = in_fp32({name: _joined(name, [sample[name] for sample in read]) for name in read[0]})
        timesteps = call["timestep"].view(len(read), -1)[:, 0]
        return Batch(call_arguments(call, device=device), call[OUTPUT].to(device), timesteps, rows_each)


def _open(path: Path):
    return safe_open(path, "pt").__enter__()


def _counts(file) -> tuple[int, int, int]:
    """Numbers of calls, of captions, and of rows in a call."""
    about = file.metadata()
    return int(about["calls"]), int(about["captions"]), int(about["rows"])


def _read(file, sample: _Sample) -> dict[str, "Tensor | _Whole"]:
    """One sample's rows of every tensor; a number becomes a row, a tensor without rows per caption stays whole."""
    _, captions, rows = _counts(file)
    own = range(sample.caption, rows, captions)
    call = {}
    for key in file.keys():  # noqa: SIM118
        kind, name = key.split(".", 1)
        part = file.get_slice(key)
        shape = part.get_shape()
        if kind + "." == EACH:
            this = part[sample.call : sample.call + 1]
            call[name] = this.expand(len(own)) if len(shape) == 1 else this[0, list(own)]
        else:
            whole = part[:]
            by_row = name != PLAIN and bool(shape) and shape[0] == rows
            call[name] = whole[list(own)] if by_row else _Whole(whole)
    return call


class _Whole:
    """A tensor that is the same for all samples."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor


def _joined(name: str, values: list) -> Tensor:
    if not isinstance(values[0], _Whole):
        return torch.cat(values)
    first = values[0].tensor
    if any(not torch.equal(value.tensor, first) for value in values):
        raise ValueError(f"the denoiser takes {name}, which has no row per sample and differs between recordings")
    return first
