"""What of a student trains, and in which units its numbers are stepped."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vqdm.config.options import TrainedConfig
from vqdm.distillation.moving_codes import DriftingWeight
from vqdm.weights.base import QuantizedWeight, SharedPart
from vqdm.weights.scalar import ScalarWeight

SMALLEST_UNIT = 1e-3  # of a tensor that is all but zero, such as a fresh bias


@dataclass(frozen=True)
class Trained:
    """A parameter that trains. unit: what a step of one means, a number or one for every element."""

    name: str
    parameter: nn.Parameter
    kind: str  # codebooks | scales | biases | norms | rest | drift
    unit: Tensor


def trained_parameters(module: nn.Module, config: TrainedConfig, *, code_rate: float = 1.0) -> list[Trained]:
    """Those that `config` switches on, in module order, and what lets codes move.

    Scales step in parts of themselves, so that rows and columns of any size go alike; all else in parts of the
    tensor's root mean square; drifts in `code_rate` parts of that of their row's weights.
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
    """None for what never trains: zero points are whole numbers."""
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
