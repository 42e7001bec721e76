"""The way of DDIM from a picture's latent up to noise, and down again: whole, or inside a mask only.

Level 0 is the picture, level i the i-th timestep from below. Up: Song et al. 2021, section 4.3, by diffusers'
DDIMInverseScheduler; its noise is asked at the level it goes to, so that a step up and the same step down cancel
wherever the prediction does not change between their latents.
"""

from collections.abc import Callable

import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler
from torch import Tensor

Noise = Callable[[Tensor, int], Tensor]  # (latents, timestep) → predicted noise


class Ddim:
    """Both ways of DDIM in `steps` steps, with the noise schedule of a model's own scheduler, nothing clipped."""

    def __init__(self, scheduler, *, steps: int, device: str | torch.device = "cpu"):
        settings = {"clip_sample": False, "thresholding": False}
        self.up = DDIMInverseScheduler.from_config(scheduler.config, **settings)
        self.down = DDIMScheduler.from_config(scheduler.config, **settings)
        self.up.set_timesteps(steps, device=device)
        self.down.set_timesteps(steps, device=device)

    def invert(self, latents: Tensor, noise: Noise) -> list[Tensor]:
        """The latents of every level, from the picture's own, level 0, up to noise: `steps` + 1 of them."""
        kept = [latents]
        for timestep in self.up.timesteps:
            kept.append(self.up.step(noise(kept[-1], timestep), timestep, kept[-1]).prev_sample)
        return kept

    def sample(self, kept: list[Tensor], noise: Noise, *, start: int, mask: Tensor | None = None) -> Tensor:
        """The latents that sampling from level `start` of the kept ones arrives at.

        mask: bool, broadcast over the latents: where it is False, every level is the kept one (Layered Diffusion
        Brushes, arXiv 2405.00313, without its fresh noise).
        """
        latents, timesteps = kept[start], self.down.timesteps
        for level, timestep in zip(reversed(range(start)), timesteps[len(timesteps) - start :], strict=True):
            latents = self.down.step(noise(latents, timestep), timestep, latents).prev_sample
            if mask is not None:
                latents = torch.where(mask, latents, kept[level])
        return latents
