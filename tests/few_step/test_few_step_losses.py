"""Losses of few-step students against closed forms: straight ways, DDIM of the library, gradients between Gaussians."""

import pytest
import torch
from diffusers import DDIMScheduler
from torch import nn

from vqdm.few_step.losses import Matching, Schedule, direct, one_step, uniform_in, velocity
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
