"""A world's AutoencoderKL, 32×32×3 -> 8×8×4 in tiny: latent channels normalised to mean 0 and variance 1."""

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from vqdm.seeds import seeded_initialisation
from vqdm.stages.tiny_train.loop import fit
from vqdm.tiny.data import SceneSet


def build_vae(image_size: int) -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=16,
        sample_size=image_size,
        scaling_factor=1.0,
        force_upcast=False,
    )


def train_vae(scenes: SceneSet, *, directory: Path, steps: int, batch_size: int, seed: int, kl_weight: float = 1e-5):
    """Train a VAE on mean absolute plus squared error of pixels and of their gradients, and a light KL term."""
    with seeded_initialisation(seed, "vae"):
        vae = build_vae(scenes.world.image_size)

    def loss_of(generator: torch.Generator) -> torch.Tensor:
        images = scenes.images(scenes.pick(batch_size, generator))
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(images).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=generator, device="cpu")
            decoded = vae.decode(posterior.mean + posterior.std * noise).sample
        error = decoded.float() - images
        slopes = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
        return error.abs().mean() + 4 * error.square().mean() + slopes + kl_weight * posterior.kl().mean()

    average = fit(
        vae,
        loss_of,
        purpose="vae",
        directory=directory,
        steps=steps,
        learning_rate_peak=1.5e-3,
        seed=seed,
        decay_from=0.3,
    )
    vae.load_state_dict(average)
    vae.eval().requires_grad_(False)
    normalise_latents(vae, scenes.images(torch.arange(min(2048, len(scenes)), device="cpu")))
    return vae


@torch.no_grad()
def normalise_latents(vae: AutoencoderKL, images: torch.Tensor) -> None:
    """Fold a per-channel affine map into quant_conv and post_quant_conv: same pictures, unit latents."""
    latents = torch.cat([vae.encode(chunk).latent_dist.mean for chunk in images.split(256)])
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    channels = len(mean)
    quant, post = vae.quant_conv, vae.post_quant_conv  # both are 1×1
    post.bias += post.weight[:, :, 0, 0] @ mean
    post.weight *= std[None, :, None, None]
    quant.bias[:channels] = (quant.bias[:channels] - mean) / std
    quant.weight[:channels] /= std[:, None, None, None]
    quant.bias[channels:] -= 2 * std.log()  # the second half of the outputs is the log-variance


@torch.no_grad()
def reconstruction_psnr(vae: AutoencoderKL, images: torch.Tensor) -> float:
    """PSNR of reconstructions in dB, mean over images in [-1, 1] (peak 2)."""
    decoded = torch.cat([vae.decode(vae.encode(c).latent_dist.mean).sample for c in images.split(256)])
    error = F.mse_loss(decoded.clamp(-1, 1), images, reduction="none").mean((1, 2, 3))
    return float((10 * torch.log10(4 / error)).mean())
