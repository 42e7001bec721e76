"""Small random pipelines with the transformers of PixArt-Σ, Stable Diffusion 3.5 and FLUX, built in code.

Every function saves a whole pipeline, as save_pretrained does, and returns its directory. 32 pixels are 16 latents.
"""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from vqdm.tiny.captions import vocabulary
from vqdm.tiny.tokenizer import MAX_TOKENS, build_tokenizer

WIDTH = 64  # of the transformers' tokens
TEXT_WIDTH = 32  # of the text encoders
SIZE = 32  # pixels to sample at


def tiny_pixart(directory: Path) -> Path:
    """Cross attention and classifier-free guidance; the output has a half for the variance."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        transformer = PixArtTransformer2DModel(
            sample_size=SIZE // 2, num_layers=2, num_attention_heads=WIDTH // 16, attention_head_dim=16, in_channels=4,
            out_channels=8, cross_attention_dim=WIDTH, caption_channels=TEXT_WIDTH,
        )  # fmt: skip
        pipeline = PixArtSigmaPipeline(
            tokenizer=t5_tokenizer(), text_encoder=_t5(), vae=_vae(4), transformer=_drawn(transformer),
            scheduler=DPMSolverMultistepScheduler(beta_schedule="linear", beta_end=0.02),
        )  # fmt: skip
    pipeline.save_pretrained(directory)
    return directory


def tiny_sd3(directory: Path) -> Path:
    """Joint attention; the first block has a second attention, the last one no way out for the text."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        transformer = SD3Transformer2DModel(
            sample_size=SIZE // 2, num_layers=2, num_attention_heads=WIDTH // 16, attention_head_dim=16,
            joint_attention_dim=2 * TEXT_WIDTH, caption_projection_dim=WIDTH, pooled_projection_dim=2 * TEXT_WIDTH,
            pos_embed_max_size=16, dual_attention_layers=(0,), qk_norm="rms_norm",
        )  # fmt: skip
        pipeline = StableDiffusion3Pipeline(
            transformer=_drawn(transformer), scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=_vae(16),
            text_encoder=_clip(CLIPTextModelWithProjection), tokenizer=build_tokenizer(),
            text_encoder_2=_clip(CLIPTextModelWithProjection), tokenizer_2=build_tokenizer(),
            text_encoder_3=_t5(2 * TEXT_WIDTH), tokenizer_3=t5_tokenizer(),
        )  # fmt: skip
    pipeline.save_pretrained(directory)
    return directory


def tiny_flux(directory: Path) -> Path:
    """A block for two streams and a block for one; guidance is an input."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        transformer = FluxTransformer2DModel(
            in_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=WIDTH // 16,
            joint_attention_dim=TEXT_WIDTH, pooled_projection_dim=TEXT_WIDTH, guidance_embeds=True,
            axes_dims_rope=(4, 6, 6),
        )  # fmt: skip
        pipeline = FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True), vae=_vae(16),
            text_encoder=_clip(CLIPTextModel), tokenizer=build_tokenizer(), text_encoder_2=_t5(),
            tokenizer_2=t5_tokenizer(), transformer=_drawn(transformer),
        )  # fmt: skip
    pipeline.save_pretrained(directory)
    return directory


def t5_tokenizer() -> T5Tokenizer:
    """A Unigram tokenizer that knows the tiny world's words, and single letters."""
    words = [(f"▁{word}", -1.0) for word in vocabulary()]
    letters = [(letter, -9.0) for letter in ["▁", *"abcdefghijklmnopqrstuvwxyz,."]]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), *words, *letters]
    return T5Tokenizer(vocab=list(dict(pieces).items()), extra_ids=0, model_max_length=512)


def _t5(width: int = TEXT_WIDTH) -> T5EncoderModel:
    config = T5Config(
        vocab_size=len(t5_tokenizer()), d_model=width, d_kv=16, num_heads=2, d_ff=64, num_layers=1,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return T5EncoderModel(config).eval()


def _clip(kind: type) -> nn.Module:
    tokenizer = build_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=TEXT_WIDTH, intermediate_size=64, projection_dim=TEXT_WIDTH,
        num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return kind(config).eval()


def _vae(channels: int) -> AutoencoderKL:
    """Half the size; with 16 channels as SD3's and FLUX's: a shift, and no convolution around the latents."""
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    like_sd3 = {"scaling_factor": 1.5305, "shift_factor": 0.0609, "use_quant_conv": False, "use_post_quant_conv": False}
    return AutoencoderKL(
        latent_channels=channels, block_out_channels=(8, 16), norm_num_groups=4, sample_size=SIZE, **blocks,
        **(like_sd3 if channels == 16 else {"scaling_factor": 0.13025}),
    ).eval()  # fmt: skip


def _drawn(transformer: nn.Module) -> nn.Module:
    """With biases and gains of norms drawn, too."""
    for name, parameter in transformer.named_parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, mean=float("norm" in name and name.endswith("weight")), std=0.3)
    return transformer.eval()
