"""A world's AutoencoderKL, 32×32×3 -> 8×8×4 in tiny: latent channels normalised to mean 0 and variance 1."""

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from vqdm.seeds import seeded_initialisation
from vqdm.stages.tiny_train.loop import fast_precision, fit
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


CROP = 32  # pixels along a side
RATE, RATE_AFTER_CROPS = 1.5e-3, 5e-4


def crops_of_things(scenes: SceneSet, count: int, generator: torch.Generator) -> torch.Tensor:
    """A square about one thing of each of `count` random scenes, float [count, 3, CROP, CROP] in [-1, 1]."""
    rows, most = scenes.pick(count, generator), scenes.world.image_size - CROP
    draws = torch.rand(count, 3, generator=generator, device="cpu").tolist()
    found = []
    for image, row, (which, *shifts) in zip(scenes.images(rows), rows.tolist(), draws, strict=True):
        things = scenes.scenes[row].things
        thing = things[int(which * len(things))]
        starts = (centre + (shift / 2 - 0.75) * CROP for centre, shift in zip((thing.x, thing.y), shifts, strict=True))
        x, y = (int(min(max(start, 0), most)) for start in starts)
        found.append(image[:, y : y + CROP, x : x + CROP])
    return torch.stack(found)


def train_vae(
    scenes: SceneSet,
    *,
    directory: Path,
    steps: int,
    batch_size: int,
    seed: int,
    crop_steps: int = 0,
    kl_weight: float = 1e-5,
):
    """Train a VAE on mean absolute plus squared error of pixels and of their gradients, and a light KL term.

    crop_steps: steps before these on twice as many crops about things, of which a whole image shows little: small ones
    with textures are what is hard.
    """
    with seeded_initialisation(seed, "vae"):
        vae = build_vae(scenes.world.image_size)

    def loss(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        with fast_precision():
            posterior = vae.encode(images).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=generator, device="cpu")
            decoded = vae.decode(posterior.mean + posterior.std * noise).sample
        error = decoded.float() - images
        slopes = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
        return error.abs().mean() + 4 * error.square().mean() + slopes + kl_weight * posterior.kl().mean()

    def of_crops(generator: torch.Generator) -> torch.Tensor:
        return loss(crops_of_things(scenes, 2 * batch_size, generator), generator)

    def of_images(generator: torch.Generator) -> torch.Tensor:
        return loss(scenes.images(scenes.pick(batch_size, generator)), generator)

    settings = {"directory": directory, "seed": seed, "decay_from": 0.3}
    rate = RATE
    if crop_steps:
        crops = fit(vae, of_crops, purpose="vae_crops", steps=crop_steps, learning_rate_peak=rate, **settings)
        vae.load_state_dict(crops)
        rate = RATE_AFTER_CROPS
    vae.load_state_dict(fit(vae, of_images, purpose="vae", steps=steps, learning_rate_peak=rate, **settings))
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
