"""Losses of few-step students against closed forms: straight ways, DDIM of the library, gradients between Gaussians."""

import pytest
import torch
from diffusers import DDIMScheduler
from torch import nn

from vqdm.few_step.losses import Consistency, Grid, Matching, Schedule, direct, one_step, uniform_in, velocity
from vqdm.few_step.pairs import Pairs, sampled, student_scheduler

SCHEDULER = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
SCHEDULE = Schedule(SCHEDULER.alphas_cumprod)


class Knows(nn.Module):
    """A denoiser whose prediction is a function of latents and timesteps."""

    def __init__(self, predict):
        super().__init__()
        self.predict = predict

    def forward(self, sample, timestep, return_dict):
        return (self.predict(sample, timestep),)


def made(count: int = 6, *, seed: int = 0) -> Pairs:
    draw = torch.Generator().manual_seed(seed)
    noise, clean = torch.randn(2, count, 4, 2, 2, generator=draw)
    return Pairs(noise, 0.7 * clean, {"sample": noise}, None)


def straight(pairs: Pairs) -> torch.Tensor:
    """The noise that lies between both ends, from ᾱ of the library."""
    alpha = SCHEDULER.alphas_cumprod[-1]
    return (pairs.noise - alpha**0.5 * pairs.clean) / (1 - alpha) ** 0.5


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_a_network_that_predicts_reflows_noise_reaches_the_image_in_any_number_of_ddim_steps(steps):
    pairs = made()
    net = Knows(lambda latents, times: straight(pairs))
    assert velocity(net, pairs, SCHEDULE, torch.Generator().manual_seed(0)) < 1e-9
    scheduler = student_scheduler(SCHEDULER)
    torch.testing.assert_close(sampled(net, pairs, scheduler, steps=steps), pairs.clean, atol=1e-4, rtol=0)
    assert scheduler.timesteps[0] == SCHEDULE.last


def test_reflows_loss_is_the_error_of_the_velocity_on_the_straight_line():
    """Against Liu et al.'s form: points (1 − s) z + s ε*, velocity z − ε*, the network's own being x₀ − ε."""
    pairs, asked = made(), {}

    def predict(latents, times):
        asked.update(latents=latents, times=times)
        return 0.3 * latents

    found = velocity(Knows(predict), pairs, SCHEDULE, torch.Generator().manual_seed(3))
    noise, latents, times = straight(pairs), asked["latents"], asked["times"]
    alpha = SCHEDULER.alphas_cumprod[times].view(-1, 1, 1, 1)
    sigma = ((1 - alpha) / alpha).sqrt()
    s = sigma / (1 + sigma)
    point = latents / alpha.sqrt() / (1 + sigma)
    torch.testing.assert_close(point, (1 - s) * pairs.clean + s * noise)
    own = (latents / alpha.sqrt() - sigma * 0.3 * latents) - 0.3 * latents
    torch.testing.assert_close(found, (own - (pairs.clean - noise)).square().mean())


def test_timesteps_are_drawn_so_that_the_place_on_the_line_is_uniform():
    sigmas = SCHEDULE.sigmas()
    places = sigmas / (1 + sigmas)
    drawn = places[uniform_in(places, 20_000, torch.Generator().manual_seed(0))] / places[-1]
    shares = torch.histc(drawn, bins=5, min=0, max=1) / len(drawn)
    assert (shares - 0.2).abs().max() < 0.02


def test_the_direct_loss_is_zero_for_the_teachers_own_image_and_one_step_is_ddims():
    pairs = made()
    right = Knows(lambda latents, times: straight(pairs))
    assert direct(right, pairs, SCHEDULE, None) < 1e-6
    wrong = Knows(lambda latents, times: 0.5 * latents)
    by_library = sampled(wrong, pairs, student_scheduler(SCHEDULER), steps=1)
    torch.testing.assert_close(one_step(wrong, pairs, SCHEDULE), by_library, atol=1e-4, rtol=1e-4)
    assert direct(wrong, pairs, SCHEDULE, None) > 1


SPREAD = 0.7  # of the clean latents of a world that is a Gaussian


def gaussian_noise(latents, times):
    """The noise that is expected in latents of that world, in closed form."""
    alpha = SCHEDULER.alphas_cumprod[times].view(-1, 1, 1, 1)
    return (1 - alpha).sqrt() * latents / (alpha * SPREAD**2 + 1 - alpha)


def by_the_library(steps: int) -> tuple[DDIMScheduler, torch.Tensor]:
    """DDIM in so many steps, and the factor from each of its timesteps to the clean latent of the Gaussian world."""
    scheduler = student_scheduler(SCHEDULER)
    scheduler.set_timesteps(steps)
    factors = []
    for start in range(steps):
        latents = torch.ones(1, 1, 1, 1)
        for time in scheduler.timesteps[start:]:
            latents = scheduler.step(gaussian_noise(latents, time[None]), time, latents).prev_sample
        factors.append(latents)
    return scheduler, torch.cat(factors)


def solver_grid(scheduler: DDIMScheduler, every: int = 1) -> Grid:
    levels = torch.cat([scheduler.alphas_cumprod[scheduler.timesteps], torch.ones(1)]).view(-1, 1, 1, 1)
    return Grid(scheduler.timesteps, levels, every)


@pytest.mark.parametrize("steps", [1, 4, 20])
def test_a_student_that_solves_the_teachers_ode_has_no_consistency_loss(steps):
    scheduler, factors = by_the_library(steps)

    def solved(latents, times):
        """The noise whose clean estimate is where the library's steps end."""
        places = (scheduler.timesteps[None] == times[:, None]).int().argmax(1)
        alpha = SCHEDULER.alphas_cumprod[times].view(-1, 1, 1, 1)
        return (latents - alpha.sqrt() * factors[places] * latents) / (1 - alpha).sqrt()

    consistency = Consistency(Knows(gaussian_noise), None, guidance=3.0, grid=solver_grid(scheduler))
    draw = (made(16), SCHEDULE, torch.Generator().manual_seed(0))
    assert consistency.loss(Knows(solved), *draw) < 1e-5
    draw = (made(16), SCHEDULE, torch.Generator().manual_seed(0))
    assert (consistency.loss(Knows(gaussian_noise), *draw) > 1e-3) == (steps > 1), "in one step both are the same"


def test_at_the_end_of_the_grid_the_teachers_estimate_is_learned_whatever_the_students_average_says():
    scheduler, _ = by_the_library(1)
    teacher, lost = Knows(gaussian_noise), Knows(lambda latents, times: torch.full_like(latents, torch.nan))
    student = Knows(lambda latents, times: 0.9 * gaussian_noise(latents, times))
    found = Consistency(teacher, lost, guidance=3.0, grid=solver_grid(scheduler)).loss(
        student, made(), SCHEDULE, torch.Generator().manual_seed(0)
    )
    assert torch.isfinite(found) and found > 0


def test_only_the_students_own_estimate_has_a_gradient():
    scheduler, _ = by_the_library(4)
    teacher, aim, student = (Shifted(mean) for mean in (1.0, 0.5, 0.2))
    loss = Consistency(teacher, aim, guidance=3.0, grid=solver_grid(scheduler)).loss(
        student, made(200), SCHEDULE, torch.Generator().manual_seed(0)
    )
    loss.backward()
    assert student.mean.grad < -0.5, "towards both"
    assert teacher.mean.grad is None and aim.mean.grad is None


def test_half_of_the_draws_lie_on_the_students_own_timesteps():
    scheduler, _ = by_the_library(20)
    places = solver_grid(scheduler, every=5).draw(8_000, torch.Generator().manual_seed(0))
    assert places.min() == 0 and places.max() == 19
    assert abs((places % 5 == 0).float().mean() - (0.5 + 0.5 / 5)) < 0.02
    own = student_scheduler(SCHEDULER)
    own.set_timesteps(4)
    assert scheduler.timesteps[::5].tolist() == own.timesteps.tolist()


class Shifted(nn.Module):
    """A denoiser in one step: noise away from the teacher's mean by a parameter."""

    def __init__(self, mean: float):
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(mean))

    def forward(self, sample, timestep, return_dict):
        alpha = SCHEDULER.alphas_cumprod[timestep].view(-1, 1, 1, 1)
        return ((sample - alpha.sqrt() * self.mean) / (1 - alpha).sqrt(),)


def test_matching_pushes_the_student_towards_the_teachers_images():
    """Scores of a point mass at m are exact: x̂ = m. So the loss is half the sign of the means' difference, squared."""
    teacher, critic, student = (Shifted(mean).requires_grad_(True) for mean in (1.0, 0.2, 0.2))
    matching = Matching(teacher.requires_grad_(False), critic, guidance=3.0)
    pairs = made()
    loss = matching.loss(student, pairs, SCHEDULE, torch.Generator().manual_seed(0))
    loss.backward()
    torch.testing.assert_close(loss, torch.tensor(0.5), atol=1e-3, rtol=0)
    torch.testing.assert_close(student.mean.grad, torch.tensor(-1.0), atol=1e-2, rtol=0)
    assert critic.mean.grad is None and teacher.mean.grad is None
    exact = matching.critic_loss(student, pairs, SCHEDULE, torch.Generator().manual_seed(1))
    assert exact < 1e-6, "the critic knows the student's images"


def test_guidance_goes_away_from_the_empty_caption():
    pairs = Pairs(torch.zeros(2, 1, 1, 1), torch.zeros(2, 1, 1, 1), {"sample": 0, "c": 2.0}, {"sample": 0, "c": 0.5})

    class Caption(nn.Module):
        def forward(self, sample, timestep, c, return_dict):
            return (sample + c,)

    found = pairs.ask_guided(Caption(), pairs.noise, torch.zeros(2), guidance=3.0)
    assert found.flatten().tolist() == [5.0, 5.0]  # 0.5 + 3 × 1.5
