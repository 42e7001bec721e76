"""A world's denoiser: a small version of SDXL's U-Net, trained to predict noise on VAE latents."""

from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from safetensors.torch import load_file, save_file
from torch import nn

from vqdm.runs import progress
from vqdm.seeds import derive, seeded_initialisation
from vqdm.stages.tiny_train.loop import fast_precision, fit
from vqdm.stages.tiny_train.text import text_states, token_ids
from vqdm.tiny.data import SceneSet
from vqdm.tiny.world import World

SCHEDULE = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SIZES = {  # heads of 32; the first level has no transformers, as in SDXL
    "tiny": {"block_out_channels": (32, 64, 112), "transformer_layers_per_block": [1, 1, 1]},
    "small": {"block_out_channels": (64, 96, 128), "transformer_layers_per_block": [1, 2, 2]},
}
HEADS = {"tiny": [1, 2, 4], "small": [2, 3, 4]}  # numbers of heads, which SDXL's config calls attention_head_dim
TEXT_WIDTHS = {"tiny": 64 + 128, "small": 96 + 128}
LEARNING_RATES = {"tiny": 8e-4, "small": 6e-4}
DECAY_FROM = {"tiny": 0.6, "small": 0.85}  # part of the steps with the full rate
# in small, two fifths of a step were the backward pass of the fused attention; tiny's weights were made with it
ATTENTION = {"tiny": AttnProcessor2_0, "small": AttnProcessor}
# where small's first 5,000 steps showed that a wrong word costs most (scripts/lab/caption_timesteps.py)
TELLING_TIMESTEPS = {"small": (75, 700)}
CHECKPOINT_EVERY = {"tiny": 500, "small": 250}  # steps


def build_unet(world: World) -> UNet2DConditionModel:
    """Build a U-Net with SDXL's block types, `text_time` conditioning and linear projections.

    tiny: 3.59 M parameters, latents 8×8; small: 7.98 M, latents 16×16.
    """
    unet = UNet2DConditionModel(
        sample_size=world.image_size // 4,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=HEADS[world.name],
        cross_attention_dim=TEXT_WIDTHS[world.name],
        norm_num_groups=16,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=128 + 6 * 8,
        **SIZES[world.name],
    )
    unet.set_attn_processor(ATTENTION[world.name]())
    return unet


def load_unet(directory: Path, world: World) -> UNet2DConditionModel:
    unet = UNet2DConditionModel.from_pretrained(directory)
    unet.set_attn_processor(ATTENTION[world.name]())
    return unet


@torch.no_grad()
def gaussian_initialisation(model: nn.Module, *, seed: int) -> None:
    """Draw weights from a normal distribution instead of torch's uniform one, with the same variance.

    Uniform weights suit round-to-nearest best, and much of the initialisation survives a short training; large trained
    models have bell-shaped weights.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            generator = torch.Generator().manual_seed(derive(seed, "gaussian_initialisation", name))
            fan_in = module.weight[0].numel()
            module.weight.normal_(std=(3 * fan_in) ** -0.5, generator=generator)


@torch.no_grad()
def encode_text(text_encoder, text_encoder_2, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Penultimate states of both encoders [n, tokens, sum of widths], and pooled text of the second [n, 128]."""
    first, second, pooled = text_states(text_encoder, text_encoder_2, ids)
    return torch.cat([first, second], -1), pooled


class LatentSet:
    """Latents and text states of the SceneSet that `scenes` makes, computed once and kept beside the checkpoints."""

    def __init__(self, scenes: Callable[[], SceneSet], *, vae, tokenizer, text_encoder, text_encoder_2, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            self._compute(scenes(), vae, tokenizer, text_encoder, text_encoder_2, path)
        tensors = load_file(path)
        self.latents, self.text, self.pooled = tensors["latents"], tensors["text"], tensors["pooled"]

    @staticmethod
    @torch.no_grad()
    def _compute(scenes, vae, tokenizer, text_encoder, text_encoder_2, path: Path) -> None:
        columns: dict[str, list[torch.Tensor]] = {"latents": [], "text": [], "pooled": []}
        ids = token_ids(tokenizer, scenes.captions)
        for rows in progress.over(torch.arange(len(scenes), device="cpu").split(512), "latents", unit="batch"):
            text, pooled = encode_text(text_encoder, text_encoder_2, ids[rows])
            columns["latents"].append(vae.encode(scenes.images(rows)).latent_dist.mean)
            columns["text"].append(text.bfloat16())
            columns["pooled"].append(pooled)
        partial = path.with_suffix(".tmp")
        save_file({name: torch.cat(parts).contiguous() for name, parts in columns.items()}, partial)
        partial.replace(path)

    def __len__(self) -> int:
        return len(self.latents)

    def batch(self, size: int, generator: torch.Generator):
        """(latents, text, pooled) of random scenes."""
        rows = torch.randint(len(self), (size,), generator=generator, device="cpu")
        return self.latents[rows], self.text[rows].float(), self.pooled[rows]


def conditions(unet: UNet2DConditionModel, pooled: torch.Tensor) -> dict[str, torch.Tensor]:
    """The `added_cond_kwargs` of SDXL's U-Net: size and crop conditioning is constant here."""
    size = 4 * unet.config.sample_size  # pixels
    ids = torch.tensor([[size, size, 0, 0, size, size]], dtype=torch.float32, device="cpu")
    return {"text_embeds": pooled, "time_ids": ids.repeat(len(pooled), 1)}


def guided_noise(unet, noisy, timesteps, text, pooled, *, guidance: float) -> torch.Tensor:
    """The prediction under guidance away from the empty caption."""
    both = conditions(unet, torch.cat([pooled, torch.zeros_like(pooled)]))
    double = torch.cat([text, torch.zeros_like(text)])
    time = timesteps.repeat(2)
    noise, empty = unet(noisy.repeat(2, 1, 1, 1), time, double, added_cond_kwargs=both).sample.float().chunk(2)
    return empty + guidance * (noise - empty)


def draw_timesteps(count: int, generator: torch.Generator, *, telling: tuple[int, int] | None = None) -> torch.Tensor:
    """Uniform timesteps in [0, 1000), or a quarter of them so and the others uniform in `telling`: int64 [count]."""
    total = SCHEDULE["num_train_timesteps"]
    drawn = torch.randint(total, (count,), generator=generator, device="cpu")
    if telling is None:
        return drawn
    among = torch.randint(*telling, (count,), generator=generator, device="cpu")
    return torch.where(torch.rand(count, generator=generator, device="cpu") < 0.25, drawn, among)


def train_unet(
    latents: LatentSet,
    *,
    world: World,
    directory: Path,
    steps: int,
    batch_size: int,
    seed: int,
    init_from: Path | None = None,
    after_step=None,
) -> UNet2DConditionModel:
    """Train noise prediction with min-SNR-5 weights (Hang et al. 2023, eq. 9) and 10 % empty (zero) conditions.

    init_from: the directory of a U-Net to train on from, with draws of its own, since the same seed may have made it.
    """
    with seeded_initialisation(seed, "unet"):
        unet = build_unet(world)
    gaussian_initialisation(unet, seed=seed)
    if init_from is not None:
        unet.load_state_dict(UNet2DConditionModel.from_pretrained(init_from).state_dict())
    alphas = DDIMScheduler(**SCHEDULE).alphas_cumprod
    snr = alphas / (1 - alphas)
    weights = snr.clamp(max=5) / snr

    def loss_of(generator: torch.Generator) -> torch.Tensor:
        clean, text, pooled = latents.batch(batch_size, generator)
        timesteps = draw_timesteps(batch_size, generator, telling=TELLING_TIMESTEPS.get(world.name))
        noise = torch.randn(clean.shape, generator=generator, device="cpu")
        keep = (torch.rand(batch_size, generator=generator, device="cpu") >= 0.1).float()
        level = alphas[timesteps].view(-1, 1, 1, 1)
        noisy = level.sqrt() * clean + (1 - level).sqrt() * noise
        with fast_precision():
            about = conditions(unet, pooled * keep.view(-1, 1))
            predicted = unet(noisy, timesteps, text * keep.view(-1, 1, 1), added_cond_kwargs=about).sample
        error = (predicted.float() - noise).square().mean((1, 2, 3))
        return (weights[timesteps] * error).mean()

    average = fit(
        unet,
        loss_of,
        purpose="unet" if init_from is None else "unet_on",
        directory=directory,
        steps=steps,
        learning_rate_peak=LEARNING_RATES[world.name],
        seed=seed,
        warmup=min(500, steps),
        decay_from=DECAY_FROM[world.name],
        checkpoint_every=CHECKPOINT_EVERY[world.name],
        weight_decay=0.01,
        after_step=after_step,
    )
    unet.load_state_dict(average)
    return unet.eval().requires_grad_(False)
