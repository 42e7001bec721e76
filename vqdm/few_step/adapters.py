"""HiPA (Zhang and Hooi 2023): a LoRA that makes one step of a model; its loss looks at high frequencies of images.

Its code is not public; which layers, weights of the losses and band of frequencies are of this project's choosing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from vqdm.few_step.losses import Schedule, one_step, pseudo_huber
from vqdm.few_step.pairs import Pairs
from vqdm.seeds import seeded_initialisation

TARGETS = (
    "to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out", "conv1", "conv2",
    "conv_shortcut", "time_emb_proj",
)  # fmt: skip
HIGH = 0.125  # cycles per pixel, a quarter of what an image can hold; below it lie colours and places


@dataclass(frozen=True)
class Frequencies:
    """Distance of a student's images from the teacher's of the same noise, high frequencies and edges counted again.

    decode: latents to images [n, 3, h, w]. weight: of the two losses on images.
    """

    decode: Callable[[Tensor], Tensor]
    weight: float

    def loss(self, student: nn.Module, pairs: Pairs, schedule: Schedule, _generator: torch.Generator) -> Tensor:
        """d(z) + w (d(high-passed images) + d(edges)), d the pseudo-Huber distance from the teacher's."""
        latents = one_step(student, pairs, schedule)
        with torch.no_grad():
            target = self.decode(pairs.clean)
        image = self.decode(latents)
        fine = pseudo_huber(high_pass(image - target)) + pseudo_huber(edges(image) - edges(target))
        return pseudo_huber(latents - pairs.clean) + self.weight * fine


def high_pass(images: Tensor) -> Tensor:
    """Images without what has fewer than HIGH cycles per pixel."""
    height, width = images.shape[-2:]
    rows = torch.fft.fftfreq(height, device=images.device)[:, None]
    columns = torch.fft.rfftfreq(width, device=images.device)[None]
    kept = (rows.square() + columns.square()).sqrt() >= HIGH
    return torch.fft.irfft2(torch.fft.rfft2(images) * kept, s=(height, width))


def edges(images: Tensor) -> Tensor:
    """√(∂x² + ∂y²) by differences of neighbours: [n, 3, h − 1, w − 1]."""
    down = images[..., 1:, :-1] - images[..., :-1, :-1]
    right = images[..., :-1, 1:] - images[..., :-1, :-1]
    return (down.square() + right.square() + 1e-6).sqrt()


def decoder(vae: nn.Module) -> Callable[[Tensor], Tensor]:
    """Latents to images by a VAE in fp32, with gradients to the latents only."""
    vae.eval().requires_grad_(False)
    return lambda latents: vae.decode(latents / vae.config.scaling_factor).sample


def add_adapter(denoiser: nn.Module, *, rank: int, seed: int, rate: float) -> torch.optim.AdamW:
    """Put a LoRA beside the denoiser's attentions and convolutions; returns the optimizer of its matrices alone."""
    from peft import LoraConfig

    with seeded_initialisation(seed, "few_step/adapter"):
        denoiser.add_adapter(
            LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=list(TARGETS))
        )
    trained = [parameter for name, parameter in denoiser.named_parameters() if "lora_" in name]
    return torch.optim.AdamW(trained, lr=rate, betas=(0.9, 0.99), weight_decay=0.0)


def save_adapter(pipeline, denoiser: nn.Module, directory: Path) -> None:
    """Write a denoiser's LoRA as diffusers' file for it, in fp16, and merge it into the denoiser's own weights."""
    from peft.utils import get_peft_model_state_dict

    layers = {name: tensor.half() for name, tensor in get_peft_model_state_dict(denoiser).items()}
    type(pipeline).save_lora_weights(directory, unet_lora_layers=layers)
    denoiser.fuse_lora()
    denoiser.unload_lora()
