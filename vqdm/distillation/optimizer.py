"""Parts that all training loops share: learning rates, Adam with a unit for each number, its state as tensors."""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")  # Adam's two moments


def learning_rate(step: int, *, steps: int, peak: float, warmup: int, decay_from: float) -> float:
    """The rate of a step: linear warm-up, constant, half a cosine to zero over the last (1 − decay_from) of all."""
    if step < warmup:
        return peak * (step + 1) / warmup
    start = decay_from * steps
    if step < start:
        return peak
    return peak * 0.5 * (1 + math.cos(math.pi * (step - start) / max(1.0, steps - start)))


class RelativeAdam(torch.optim.Adam):
    """Adam with its step multiplied by a unit, so that one learning rate fits numbers of different sizes.

    parameters: (parameter, unit) pairs; a unit broadcasts to its parameter. Adam's own step is about the rate.
    """

    def __init__(self, parameters: Iterable[tuple[nn.Parameter, Tensor]], *, lr: float = 1e-3):
        trained, self.units = zip(*parameters, strict=True)
        super().__init__(trained, lr=lr)

    @torch.no_grad()
    def step(self) -> None:
        trained = self.param_groups[0]["params"]
        before = [parameter.detach().clone() for parameter in trained]
        super().step()
        for parameter, start, unit in zip(trained, before, self.units, strict=True):
            parameter.sub_(start).mul_(unit).add_(start)


def optimizer_tensors(optimizer: torch.optim.Adam, names: Mapping[nn.Parameter, str]) -> dict[str, Tensor]:
    """Adam's moments as `<moment>.<name of the parameter>`."""
    return {f"{key}.{names[p]}": state[key] for p, state in optimizer.state.items() for key in MOMENTS}


def restore_optimizer(
    optimizer: torch.optim.Adam, names: Mapping[nn.Parameter, str], tensors: Mapping[str, Tensor], *, step: int
) -> None:
    """Restore Adam's moments after `step` steps: the inverse of `optimizer_tensors`.

    Parameters that had no gradient have no state.
    """
    for parameter, name in names.items():
        if f"{MOMENTS[0]}.{name}" in tensors:
            moments = {key: tensors[f"{key}.{name}"].to(parameter.device) for key in MOMENTS}
            optimizer.state[parameter] = {"step": torch.tensor(float(step), device="cpu"), **moments}
