"""Statistics of the cached feature along samplings without a cache: costs of reusing it, and what corrects it."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from vqdm.acceleration.branch_cache import source_of
from vqdm.acceleration.stored_cache import Schedule, predicted


class FeatureTap:
    """Context that hands the feature of every call to `take(call, feature)`, calls counted from 0."""

    def __init__(self, unet: nn.Module, depth: int, take: Callable[[int, Tensor], None]):
        self.source, self.take, self.call = source_of(unet, depth), take, 0

    def __enter__(self):
        self._hook = self.source.register_forward_hook(self._seen)
        return self

    def __exit__(self, *_):
        self._hook.remove()

    def _seen(self, module, args, output):
        self.take(self.call, (output[0] if isinstance(output, tuple) else output).detach())
        self.call += 1


class ReuseCosts:
    """Costs of reusing features, summed over what it is given: [start][call] = mean |F_call − F_start|.

    Only calls less than `longest` after a start are compared; the other entries are 0.
    """

    def __init__(self, calls: int, longest: int):
        self.costs = [[0.0] * calls for _ in range(calls)]
        self.longest, self._recent = longest, []

    def take(self, call: int, feature: Tensor) -> None:
        for start, other in self._recent:
            self.costs[start][call] = float((feature - other).abs().mean(dtype=torch.float64))
        self._recent = [*self._recent, (call, feature)][-(self.longest - 1) :]


class CorrectionSums:
    """Sums from which the affine corrections follow: of n, p, p², f and p·f over batch and positions.

    p is the feature that the schedule's cache predicts for a call, f the call's own. sums: fp64 [5, calls, channels].
    """

    def __init__(self, schedule: Schedule):
        self.schedule, self.sums = schedule, None
        self._full: list[tuple[int, Tensor]] = []

    def take(self, call: int, feature: Tensor) -> None:
        if self.sums is None:
            self.sums = torch.zeros(
                5, len(self.schedule.timesteps), feature.shape[1], dtype=torch.float64, device="cpu"
            )
        if call in self.schedule.full:
            self._full = [*self._full, (call, feature)][-2:]
            return
        kept = self._full[-len(self.schedule.sources(call)) :]
        guess, own = (x.double().transpose(0, 1).flatten(1).cpu() for x in (predicted(kept, call), feature))
        terms = (torch.ones_like(own), guess, guess.square(), own, guess * own)
        self.sums[:, call] = torch.stack([term.sum(1) for term in terms])


def corrections(sums: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and shifts [calls, channels] of least squares, f ≈ scale · p + shift; 1 and 0 where nothing was summed.

    scale = (n Σpf − Σp Σf) / (n Σp² − (Σp)²), shift = (Σf − scale Σp) / n (CacheQuant, arXiv 2503.01323, DEC).
    """
    n, p, pp, f, pf = sums
    spread = n * pp - p.square()
    known = spread > 1e-12 * n * pp
    scales = torch.where(known, (n * pf - p * f) / torch.where(known, spread, 1.0), 1.0)
    return scales, (f - scales * p) / n.clamp(min=1)
