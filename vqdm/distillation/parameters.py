"""The parameters of a student that train, and the units of their steps."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vqdm.config.options import TrainedConfig
from vqdm.distillation.moving_codes import DriftingWeight
from vqdm.weights.base import QuantizedWeight, SharedPart
from vqdm.weights.scalar import ScalarWeight

SMALLEST_UNIT = 1e-3  # unit of a tensor that is nearly zero, such as a fresh bias


@dataclass(frozen=True)
class Trained:
    """A parameter that trains. unit: the size of a step of one, a number or a tensor with one for every element."""

    name: str
    parameter: nn.Parameter
    kind: str  # codebooks | scales | biases | norms | rest | drift
    unit: Tensor


def trained_parameters(module: nn.Module, config: TrainedConfig, *, code_rate: float = 1.0) -> list[Trained]:
    """Parameters that `config` switches on, in module order, and the drifts that move codes.

    A scale's unit is its own size, so that rows and columns of any size move alike. Other parameters have the root mean
    square of their tensor, drifts `code_rate` times that of their row's weights.
    """
    found = []
    for prefix, part in module.named_modules():
        for name, parameter in part.named_parameters(recurse=False):
            kind = _kind(part, name)
            if kind == "drift" or (kind is not None and getattr(config, kind)):
                unit = _unit(part, parameter, kind, code_rate=code_rate)
                found.append(Trained(f"{prefix}.{name}".lstrip("."), parameter, kind, unit))
    return found


def _kind(part: nn.Module, name: str) -> str | None:
    """The kind of a parameter; None for those that never train, such as zero points, which are whole numbers."""
    if isinstance(part, DriftingWeight):
        return "drift"
    if isinstance(part, SharedPart):
        return "codebooks"
    if isinstance(part, QuantizedWeight):
        if isinstance(part, ScalarWeight) and name == "zeros":
            return None
        return "codebooks" if name == "codebooks" else "scales"
    if "Norm" in type(part).__name__:
        return "norms"
    return "biases" if name == "bias" else "rest"


@torch.no_grad()
def _unit(part: nn.Module, parameter: nn.Parameter, kind: str, *, code_rate: float) -> Tensor:
    if kind == "scales":
        return parameter.detach().abs().float()
    if kind == "drift":
        return code_rate * part.inner().float().square().mean(1, keepdim=True).sqrt()
    return parameter.detach().float().square().mean().sqrt().clamp(min=SMALLEST_UNIT)
