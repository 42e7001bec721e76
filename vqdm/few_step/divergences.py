"""f-distill (Xu et al. 2025): distribution matching weighted for other divergences than the reverse Kullback-Leibler.

The gradient of an f-divergence is that of the reverse one times h(r) = r² f''(r), where r = p_teacher / p_student is
the ratio of densities of noised images. A discriminator on the teacher's features estimates it: r = exp(logit).
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqdm.few_step.losses import Matching, Schedule, draw_times, normal, one_step, with_fresh_noise
from vqdm.few_step.pairs import Pairs
from vqdm.seeds import seeded_initialisation

WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {  # h(r), up to a factor
    "rkl": torch.ones_like,
    "fkl": lambda r: r,
    "js": lambda r: r / (1 + r),
    "sf": lambda r: 1 / (1 + r),
    "sh": torch.sqrt,
    "jeffreys": lambda r: 1 + r,
    "neyman": lambda r: 1 / r,
}
RATIOS = (0.1, 20.0)  # least and largest ratio
BINS, MEMORY = 10, 0.99  # parts of the schedule with a mean ratio of their own, and how slowly it moves


class Discriminator(nn.Module):
    """A head on the teacher's middle features that tells its images, noised, from the student's.

    means: running means of the ratio in parts of the schedule: [BINS].
    """

    def __init__(self, channels: int, *, seed: int):
        super().__init__()
        with seeded_initialisation(seed, "few_step/discriminator"):
            self.head = nn.Sequential(
                nn.Conv2d(channels, channels, 3, padding=1),
                nn.GroupNorm(1, channels),
                nn.SiLU(),
                nn.Conv2d(channels, 1, 1),
            )
        self.register_buffer("means", torch.ones(BINS, device="cpu"))

    def forward(self, features: Tensor) -> Tensor:
        """Logits, the larger the more it looks like the teacher's: [images]."""
        return self.head(features.float()).mean((1, 2, 3))

    @torch.no_grad()
    def weights(self, logits: Tensor, parts: Tensor, *, divergence: str) -> Tensor:
        """h(r) of every image, of mean 1, and r relative to the mean of its part of the schedule; parts: [images]."""
        ratios = logits.exp().clamp(*RATIOS)
        for part in parts.unique():
            self.means[part].lerp_(ratios[parts == part].mean(), 1 - MEMORY)
        found = WEIGHTS[divergence]((ratios / self.means[parts]).clamp(*RATIOS))
        return found / found.mean()


@contextlib.contextmanager
def middle_features(denoiser: nn.Module) -> Iterator[list[Tensor]]:
    """What a U-Net's middle block gives, call after call inside."""
    seen: list[Tensor] = []
    hook = denoiser.mid_block.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    try:
        yield seen
    finally:
        hook.remove()


@dataclass(frozen=True)
class Divergence:
    """Distribution matching with an f-divergence's weights. adversarial: weight of the student's adversarial loss."""

    matching: Matching
    discriminator: Discriminator
    divergence: str
    adversarial: float

    def loss(self, student: nn.Module, pairs: Pairs, schedule: Schedule, generator: torch.Generator) -> Tensor:
        """½ mean h(r) (x − sg[aim])² + a mean softplus(−logit), with matching's aim."""
        fresh = with_fresh_noise(pairs, generator)
        image = one_step(student, fresh, schedule)
        times = draw_times(len(image), schedule, generator)
        noisy = schedule.noised(image, normal(image, generator), times)
        with middle_features(self.matching.teacher) as seen:
            asked = fresh.ask_guided(self.matching.teacher, noisy, times, guidance=self.matching.guidance)
        aim = self.matching.aim(image, noisy, times, asked=asked, pairs=fresh, schedule=schedule)
        logits = self.discriminator(seen[0])  # the caption's pass comes before the empty one's
        parts = times * BINS // len(schedule.alphas)
        weights = self.discriminator.weights(logits, parts, divergence=self.divergence)
        errors = 0.5 * (image - aim).square().mean((1, 2, 3))
        return (weights * errors).mean() + self.adversarial * F.softplus(-logits).mean()

    def discriminator_loss(
        self, student: nn.Module, pairs: Pairs, schedule: Schedule, generator: torch.Generator
    ) -> Tensor:
        """mean softplus(logit) of the student's images + mean softplus(−logit) of the teacher's, equally noised."""
        with torch.no_grad():
            image = one_step(student, with_fresh_noise(pairs, generator), schedule)
            times, noise = draw_times(len(image), schedule, generator), normal(image, generator)
            with middle_features(self.matching.teacher) as seen:
                for clean in (image, pairs.clean):
                    pairs.ask(self.matching.teacher, schedule.noised(clean, noise, times), times)
        fake, real = (self.discriminator(features) for features in seen)
        return F.softplus(fake).mean() + F.softplus(-real).mean()
