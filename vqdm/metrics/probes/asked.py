"""Questions to a model: latents of pictures, states of captions, and the noise it predicts in one with the other."""

import contextlib
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from vqdm.errors import UserError
from vqdm.models.placement import visits


class Asked:
    """An SDXL pipeline whose U-Net predicts noise; UserError, naming the family of metrics, for any other."""

    def __init__(self, pipeline, family: str):
        if "XL" not in type(pipeline).__name__ or pipeline.scheduler.config.prediction_type != "epsilon":
            raise UserError(
                f"evaluate.metrics: {family} asks an SDXL pipeline that predicts noise, not {type(pipeline).__name__}; "
                "leave it out"
            )
        self.pipeline, self.device = pipeline, pipeline.unet.device

    def latents(self, pictures: np.ndarray) -> Tensor:
        """The latents [n, channels, height, width] that pictures uint8 [n, height, width, 3] are encoded to."""
        vae = self.pipeline.vae
        pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).to(self.device) / 127.5 - 1
        with visits(self.pipeline), _without_overflow(vae):
            pixels = pixels.to(vae.dtype)
            latents = vae.encode(pixels).latent_dist.mode() * vae.config.scaling_factor
        return latents.to(self.pipeline.unet.dtype)

    def pictures(self, latents: Tensor) -> np.ndarray:
        """The pictures uint8 [n, height, width, 3] that latents are decoded to."""
        vae = self.pipeline.vae
        with visits(self.pipeline), _without_overflow(vae):
            pixels = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor).sample
        return ((pixels.float() / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()

    def states(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """What the text encoders make of captions: states [n, tokens, d] and pooled [n, pooled d]."""
        with visits(self.pipeline):
            text, _, pooled, _ = self.pipeline.encode_prompt(
                prompt=captions, device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
            )
        return text, pooled

    def noise_with(self, captions: list[str], guidance: float = 0.0) -> Callable[[Tensor, int], Tensor]:
        """A function (latents [n, …], timestep) → predicted noise, row by row with its caption.

        guidance, if more than 1, is the pipelines' own: ε̂ = ε(no caption) + guidance · (ε(caption) − ε(no caption)).
        """
        pipeline, guided = self.pipeline, guidance > 1
        with visits(pipeline):
            text, no_text, pooled, no_pooled = pipeline.encode_prompt(
                prompt=captions, device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=guided
            )
        if guided:
            text, pooled = torch.cat([no_text, text]), torch.cat([no_pooled, pooled])

        def noise(latents: Tensor, timestep: int) -> Tensor:
            size = tuple(pipeline.vae_scale_factor * length for length in latents.shape[-2:])
            ids = torch.tensor([[*size, 0, 0, *size]], dtype=text.dtype, device=latents.device).repeat(len(text), 1)
            asked = torch.cat([latents, latents]) if guided else latents
            conditions = {"text_embeds": pooled, "time_ids": ids}
            predicted = pipeline.unet(asked, timestep, text, added_cond_kwargs=conditions).sample
            if not guided:
                return predicted
            without, with_caption = predicted.chunk(2)
            return without + guidance * (with_caption - without)

        return noise


@contextlib.contextmanager
def _without_overflow(vae) -> Iterator[None]:
    """Context in which a VAE that float16 is too small for, SDXL's, is float32, as in diffusers' own pipelines."""
    narrow = vae.dtype == torch.float16 and vae.config.force_upcast
    if narrow:
        vae.to(torch.float32)
    try:
        yield
    finally:
        if narrow:
            vae.to(torch.float16)
