"""EDICT (arXiv 2211.12446) inverts any network exactly, so its reconstruction says nothing about a compressed one."""

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel

from vqdm.metrics.probes.inversion import Ddim, Noise
from vqdm.models.shipped import builtin_directory

STEPS, MIX = 4, 0.93


def coefficients(way: Ddim) -> list[tuple[float, float, int]]:
    """(a, b, timestep) of each step down: x ← a x + b ε."""
    timesteps = way.down.timesteps.tolist()
    levels = way.down.alphas_cumprod[[*timesteps, 0]].double()
    return [
        (float((low / high).sqrt()), float((1 - low).sqrt() - (low / high).sqrt() * (1 - high).sqrt()), timestep)
        for high, low, timestep in zip(levels, levels[1:], timesteps, strict=False)
    ]


def down(x: torch.Tensor, y: torch.Tensor, noise: Noise, way: Ddim) -> tuple[torch.Tensor, torch.Tensor]:
    for a, b, timestep in coefficients(way):
        x = a * x + b * noise(y, timestep)
        y = a * y + b * noise(x, timestep)
        x = MIX * x + (1 - MIX) * y
        y = MIX * y + (1 - MIX) * x
    return x, y


def up(x: torch.Tensor, y: torch.Tensor, noise: Noise, way: Ddim) -> tuple[torch.Tensor, torch.Tensor]:
    for a, b, timestep in reversed(coefficients(way)):
        y = (y - (1 - MIX) * x) / MIX
        x = (x - (1 - MIX) * y) / MIX
        y = (y - b * noise(x, timestep)) / a
        x = (x - b * noise(y, timestep)) / a
    return x, y


@pytest.mark.parametrize("bits", [None, 2])
@torch.no_grad()
def test_there_and_back_is_exact_whatever_the_weights_are(bits):
    unet = UNet2DConditionModel.from_pretrained(builtin_directory("tiny") / "unet").double()
    if bits is not None:
        for weight in unet.parameters():
            step = weight.abs().max() / 2 ** (bits - 1)
            weight.copy_((weight / step).round() * step)
    generator = torch.Generator().manual_seed(0)
    latent, text, pooled = (
        torch.randn(size, generator=generator, dtype=torch.float64)
        for size in ((1, 4, 8, 8), (1, 24, unet.config.cross_attention_dim), (1, 128))
    )
    conditions = {"text_embeds": pooled, "time_ids": torch.tensor([[32, 32, 0, 0, 32, 32]], dtype=torch.float64)}

    def noise(x: torch.Tensor, timestep: int) -> torch.Tensor:
        return unet(x, timestep, text, added_cond_kwargs=conditions).sample

    way = Ddim(DDIMScheduler(beta_schedule="scaled_linear", set_alpha_to_one=False, steps_offset=1), steps=STEPS)
    noisy = up(latent, latent, noise, way)
    back = down(*noisy, noise, way)
    assert not torch.allclose(noisy[0], latent, atol=0.1)
    for track in back:
        assert float((track - latent).square().mean()) < 1e-20
