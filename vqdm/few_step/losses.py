"""Losses of few-step students: functions of a batch of pairs and a generator. No evaluator takes part.

Noised latents are x_t = √ᾱ_t z + √(1 − ᾱ_t) ε; the clean estimate from a prediction ε is (x_t − √(1 − ᾱ_t) ε) / √ᾱ_t.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from vqdm.few_step.pairs import Pairs

PROPER = (0.02, 0.98)  # share of the timesteps that distribution matching draws from, as DMD does


@dataclass(frozen=True)
class Schedule:
    """The cumulative alphas of a noise schedule: [timesteps], fp32, on the device of training."""

    alphas: Tensor

    @property
    def last(self) -> int:
        """The noisiest timestep, from which a student's first step starts."""
        return len(self.alphas) - 1

    def level(self, timesteps: Tensor) -> Tensor:
        return self.alphas[timesteps].view(-1, 1, 1, 1)

    def noised(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        level = self.level(timesteps)
        return level.sqrt() * clean + (1 - level).sqrt() * noise

    def clean(self, noisy: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        level = self.level(timesteps)
        return (noisy - (1 - level).sqrt() * noise) / level.sqrt()

    def noise_between(self, noisy: Tensor, clean: Tensor, timesteps: Tensor) -> Tensor:
        """The ε with which `clean` becomes `noisy`: the inverse of `clean` in its second argument."""
        level = self.level(timesteps)
        return (noisy - level.sqrt() * clean) / (1 - level).sqrt()

    def starts(self, pairs: Pairs) -> Tensor:
        return torch.full((len(pairs.noise),), self.last, device=pairs.noise.device)

    def sigmas(self) -> Tensor:
        """σ = √((1 − ᾱ) / ᾱ): [timesteps]."""
        return ((1 - self.alphas) / self.alphas).sqrt()


def pseudo_huber(error: Tensor, *, width: float = 0.1) -> Tensor:
    """mean(√(e² + w²) − w)."""
    return ((error.square() + width**2).sqrt() - width).mean()


def one_step(student: nn.Module, pairs: Pairs, schedule: Schedule) -> Tensor:
    """The student's clean estimate from pure noise, which is its image by DDIM in one step."""
    times = schedule.starts(pairs)
    return schedule.clean(pairs.noise, pairs.ask(student, pairs.noise, times), times)


def direct(student: nn.Module, pairs: Pairs, schedule: Schedule, _generator: torch.Generator) -> Tensor:
    """Distance of the student's image in one step from the teacher's of the same noise (InstaFlow's last stage)."""
    return pseudo_huber(one_step(student, pairs, schedule) - pairs.clean)


def velocity(student: nn.Module, pairs: Pairs, schedule: Schedule, generator: torch.Generator) -> Tensor:
    """Reflow's loss (InstaFlow, Liu et al. 2023) of a network that predicts noise.

    In u = x / √ᾱ against σ = √((1 − ᾱ) / ᾱ) the DDIM ODE is du/dσ = ε: it is straight where ε stays the same on the
    way. So the noise to predict between noise x and image z is, at every timestep, ε* = (x − √ᾱ_T z) / √(1 − ᾱ_T).
    With s = σ / (1 + σ), u / (1 + σ) = (1 − s) z + s ε*, and the error of the velocity z − ε* is (1 + σ) that of ε:
    timesteps are drawn so that s is uniform, and errors are weighted by (1 + σ)².
    """
    aim = schedule.noise_between(pairs.noise, pairs.clean, schedule.starts(pairs))
    sigmas = schedule.sigmas()
    times = uniform_in(sigmas / (1 + sigmas), len(aim), generator)
    predicted = pairs.ask(student, schedule.noised(pairs.clean, aim, times), times)
    weights = (1 + sigmas[times]).view(-1, 1, 1, 1).square()
    return (weights * (predicted - aim).square()).mean()


def uniform_in(values: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw `count` indices of the rising `values` whose values are uniform from 0 to the last."""
    drawn = torch.rand(count, generator=generator, device="cpu").to(values.device) * values[-1]
    return torch.searchsorted(values, drawn).clamp(max=len(values) - 1)


@dataclass(frozen=True)
class Grid:
    """The timesteps of a DDIM solver from pure noise to a clean latent, between which consistency is learned.

    times: [steps], falling. levels: [steps + 1, 1, 1, 1], ᾱ at each of them and 1 after the last. every: grid steps of
    one step of the student, whose own timesteps half of the draws lie on.
    """

    times: Tensor
    levels: Tensor
    every: int = 1

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Places on the grid, 0 to steps − 1: [count]."""
        places = torch.randint(len(self.times), (count,), generator=generator, device="cpu")
        own = torch.rand(count, generator=generator, device="cpu") < 0.5
        return torch.where(own, places // self.every * self.every, places).to(self.times.device)

    def noised(self, clean: Tensor, noise: Tensor, places: Tensor) -> Tensor:
        """Latents at places, which may be `steps`, where nothing of the noise is left."""
        level = self.levels[places]
        return level.sqrt() * clean + (1 - level).sqrt() * noise

    def clean(self, noisy: Tensor, noise: Tensor, places: Tensor) -> Tensor:
        level = self.levels[places]
        return (noisy - (1 - level).sqrt() * noise) / level.sqrt()


Predictor = Callable[[Tensor, Tensor], Tensor]  # (latents, timesteps [n]) → the noise in them


def consistency(
    noisy: Tensor, places: Tensor, grid: Grid, *, student: Predictor, aim: Predictor, teacher: Predictor
) -> Tensor:
    """Latent consistency distillation (Luo et al. 2023) of latents at places of a grid.

    Pseudo-Huber distance of the student's clean estimate from that of `aim` one DDIM step of the teacher further down.
    At the end of the grid the latent itself is clean: there the teacher's own estimate is learned. Only the student's
    estimate has a gradient.
    """
    with torch.no_grad():
        asked = teacher(noisy, grid.times[places])
        further, after = grid.noised(grid.clean(noisy, asked, places), asked, places + 1), places + 1
        inside = after.clamp(max=len(grid.times) - 1)
        estimate = grid.clean(further, aim(further, grid.times[inside]), inside)
        wanted = torch.where((after > inside).view(-1, 1, 1, 1), further, estimate)
    return pseudo_huber(grid.clean(noisy, student(noisy, grid.times[places]), places) - wanted)


@dataclass(frozen=True)
class Consistency:
    """Latent consistency with guidance folded in: the teacher's steps are guided, the student is asked without.

    aim: the network whose estimate is learned, the student's average in the paper; None: the student itself, as later
    found to be enough (Song and Dhariwal 2023, section 3.2).
    """

    teacher: nn.Module
    aim: nn.Module | None
    guidance: float
    grid: Grid

    def loss(self, student: nn.Module, pairs: Pairs, _schedule: Schedule, generator: torch.Generator) -> Tensor:
        """`consistency` of the pairs' images, each with fresh noise at a place that is drawn."""
        places = self.grid.draw(len(pairs.clean), generator)
        noisy = self.grid.noised(pairs.clean, normal(pairs.clean, generator), places)
        return consistency(
            noisy,
            places,
            self.grid,
            student=partial(pairs.ask, student),
            aim=partial(pairs.ask, self.aim or student),
            teacher=partial(pairs.ask_guided, self.teacher, guidance=self.guidance),
        )


@dataclass(frozen=True)
class Matching:
    """Distribution matching by the reverse Kullback-Leibler divergence (DMD2, Yin et al. 2024).

    critic: predicts noise on the student's images, so that its score is theirs; trained beside the student.
    """

    teacher: nn.Module
    critic: nn.Module
    guidance: float

    def loss(self, student: nn.Module, pairs: Pairs, schedule: Schedule, generator: torch.Generator) -> Tensor:
        """½ mean (x − sg[x − w (x̂_critic − x̂_teacher)])², w = 1 / mean |x − x̂_teacher|; its gradient in x is the KL's.

        x is the student's image of fresh noise, both estimates are from x noised at a random timestep, and only the
        teacher's is guided.
        """
        fresh = with_fresh_noise(pairs, generator)
        image = one_step(student, fresh, schedule)
        with torch.no_grad():
            times = draw_times(len(image), schedule, generator)
            noisy = schedule.noised(image, normal(image, generator), times)
            asked = fresh.ask_guided(self.teacher, noisy, times, guidance=self.guidance)
            aim = self.aim(image, noisy, times, asked=asked, pairs=fresh, schedule=schedule)
        return 0.5 * (image - aim).square().mean()

    @torch.no_grad()
    def aim(
        self, image: Tensor, noisy: Tensor, times: Tensor, *, asked: Tensor, pairs: Pairs, schedule: Schedule
    ) -> Tensor:
        """x − w (x̂_critic − x̂_teacher), w as in `loss`. noisy: x noised; asked: the teacher's prediction for it."""
        real = schedule.clean(noisy, asked, times)
        fake = schedule.clean(noisy, pairs.ask(self.critic, noisy, times), times)
        scale = (image - real).abs().mean((1, 2, 3), keepdim=True).clamp(min=1e-6)
        return image - (fake - real) / scale

    def critic_loss(self, student: nn.Module, pairs: Pairs, schedule: Schedule, generator: torch.Generator) -> Tensor:
        """Mean squared error of the critic's noise prediction on the student's images."""
        fresh = with_fresh_noise(pairs, generator)
        with torch.no_grad():
            image = one_step(student, fresh, schedule)
        times, noise = draw_times(len(image), schedule, generator), normal(image, generator)
        predicted = fresh.ask(self.critic, schedule.noised(image, noise, times), times)
        return (predicted - noise).square().mean()


def with_fresh_noise(pairs: Pairs, generator: torch.Generator) -> Pairs:
    """The pairs' captions with noise of another draw; their images are not its."""
    return dataclasses.replace(pairs, noise=normal(pairs.noise, generator))


def normal(like: Tensor, generator: torch.Generator) -> Tensor:
    """Normal noise of that shape on its device, drawn on the CPU."""
    return torch.randn(like.shape, generator=generator, device="cpu").to(like.device)


def draw_times(count: int, schedule: Schedule, generator: torch.Generator) -> Tensor:
    """Uniform timesteps without the first and last hundredths of the schedule."""
    low, high = (int(share * len(schedule.alphas)) for share in PROPER)
    drawn = torch.randint(low, high, (count,), generator=generator, device="cpu")
    return drawn.to(schedule.alphas.device)
