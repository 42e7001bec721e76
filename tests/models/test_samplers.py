"""Schedulers set by name keep the model's own noise schedule, and clip nothing that the model does not clip."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, EulerAncestralDiscreteScheduler
from tiny_world import ROOT

from vqdm.config.options import SamplerConfig
from vqdm.models.samplers import set_sampler

TURBO = ROOT / "vqdm" / "models" / "tiny_turbo" / "scheduler"


def with_scheduler(scheduler):
    pipeline = SimpleNamespace(scheduler=scheduler)
    set_sampler(pipeline, SamplerConfig(scheduler="ddim", steps=1))
    return pipeline.scheduler


def test_one_step_of_ddim_is_the_estimate_of_the_clean_latent():
    """A clipped one took all right from .69 to .12 on tiny_turbo: latents reach beyond 1."""
    scheduler = with_scheduler(EulerAncestralDiscreteScheduler.from_pretrained(TURBO))
    scheduler.set_timesteps(1)
    (time,) = scheduler.timesteps
    generator = torch.Generator().manual_seed(0)
    noisy, noise = (torch.randn(2, 4, 8, 8, generator=generator) for _ in range(2))
    kept = scheduler.alphas_cumprod[time]
    estimate = (noisy - (1 - kept).sqrt() * noise) / kept.sqrt()
    assert estimate.abs().max() > 1
    made = scheduler.step(noise, time, noisy).pred_original_sample
    torch.testing.assert_close(made, estimate)


@pytest.mark.parametrize("clips", [False, True])
def test_what_the_model_says_itself_stays(clips):
    assert with_scheduler(DDIMScheduler(clip_sample=clips)).config.clip_sample is clips
