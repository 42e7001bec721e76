"""What a feature cache is, apart from the hooks that run it: a sampler's schedule and corrections, of one model."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vqdm.acceleration.schedules import check_calls
from vqdm.errors import UserError

CACHE_NAME = "vqdm_cache"  # the denoiser's StoredCache
PREDICTIONS = ("linear", "reuse")


@dataclass(frozen=True)
class Schedule:
    """What a cache does in every call of one sampler."""

    scheduler: str  # its class
    steps: int  # as pipelines are asked for them; some samplers make more calls
    timesteps: tuple[float, ...]  # of all calls, in order
    full: tuple[int, ...]  # the calls that run whole
    depth: int = 1
    predict: str = "linear"

    def __post_init__(self):
        """Raise UserError for what cannot be run, as a damaged file may say."""
        check_calls(len(self.timesteps))
        in_order = list(self.full) == sorted(set(self.full))
        if not in_order or self.full[:1] != (0,) or self.full[-1] >= len(self.timesteps):
            raise UserError(f"a cache's full calls must rise from 0 below {len(self.timesteps)}, not {self.full}")
        if self.predict not in PREDICTIONS or self.depth < 1:
            raise UserError(f"a cache's prediction {self.predict!r} or depth {self.depth} is none that vqdm knows")

    def to_dict(self) -> dict:
        return {
            "scheduler": self.scheduler,
            "steps": self.steps,
            "timesteps": list(self.timesteps),
            "full": list(self.full),
            "depth": self.depth,
            "predict": self.predict,
        }

    @classmethod
    def from_dict(cls, fields: object) -> "Schedule":
        """Read a schedule from JSON values; UserError if they are none."""
        try:
            known = dict(fields)
            timesteps, full = tuple(known["timesteps"]), tuple(known["full"])
            scheduler, steps, depth, predict = (known[name] for name in ("scheduler", "steps", "depth", "predict"))
            numbers = all(type(t) in (int, float) for t in timesteps) and all(type(c) is int for c in full)
            words = isinstance(scheduler, str) and isinstance(predict, str)
            if not numbers or not words or type(depth) is not int or type(steps) is not int:
                raise TypeError("a value of another type")
            return cls(scheduler, steps, tuple(map(float, timesteps)), full, depth, predict)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"not a cache's schedule: {str(fields)[:200]} ({error!r})") from error

    def sources(self, call: int) -> tuple[int, ...]:
        """The one or two full calls from whose features that of a cached call is predicted."""
        before = [full for full in self.full if full < call]
        return tuple(before[-2:] if self.predict == "linear" else before[-1:])


def predicted(features: list[tuple[int, Tensor]], call: int) -> Tensor:
    """The feature of a call from one or two of earlier calls: F_b + (F_b − F_a) · (call − b) / (b − a), or F_b."""
    if len(features) == 1:
        return features[0][1]
    (first, one), (second, other) = features
    return torch.lerp(one, other, (call - first) / (second - first))


class StoredCache(nn.Module):
    """A schedule with its corrections, per call and channel, as a part of the denoiser that is saved with it.

    scales, shifts: [calls, channels], empty without corrections; a cached call's feature becomes scales · F + shifts.
    """

    def __init__(self, schedule: Schedule, channels: int = 0):
        super().__init__()
        self.schedule = schedule
        if channels:
            self.register_buffer("scales", torch.ones(len(schedule.timesteps), channels))
            self.register_buffer("shifts", torch.zeros(len(schedule.timesteps), channels))

    @property
    def channels(self) -> int:
        return self.scales.shape[1] if "scales" in self._buffers else 0

    def to_dict(self) -> dict:
        """The cache as JSON values, without its tensors."""
        return self.schedule.to_dict() | ({"channels": self.channels} if self.channels else {})

    def corrected(self, feature: Tensor, call: int) -> Tensor:
        if not self.channels:
            return feature
        scale, shift = (values[call].to(feature)[:, None, None] for values in (self.scales, self.shifts))
        return feature * scale + shift


def store_cache(denoiser: nn.Module, stored: StoredCache) -> None:
    """Make a cache a part of a denoiser, to be saved with it."""
    reference = next(denoiser.parameters())
    denoiser.add_module(CACHE_NAME, stored.to(reference.device, reference.dtype))
