"""U-Nets that tests share: SDXL's on the meta device, and a small one of the same kind."""

import torch
from diffusers import UNet2DConditionModel

SDXL = {
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}

SMALL = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": 2,
    "norm_num_groups": 4,
    "cross_attention_dim": 32,
    "use_linear_projection": True,
}


def sdxl_unet() -> UNet2DConditionModel:
    """No weights, only shapes."""
    with torch.device("meta"):
        return UNet2DConditionModel(**SDXL)


def small_unet(**changes) -> UNet2DConditionModel:
    """Seeded by its own; norms and biases, which diffusers starts at 1 and 0, are drawn too."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DConditionModel(**(SMALL | changes))
        for name, parameter in unet.named_parameters():
            if parameter.ndim == 1:
                torch.nn.init.normal_(parameter, mean=float("norm" in name and "weight" in name), std=0.3)
    return unet.eval().requires_grad_(False)


def output(unet, *, dtype=torch.float32):
    """The noise prediction for two fixed inputs [2, 4, 8, 8]."""
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    text = torch.randn(2, 5, unet.config.cross_attention_dim, generator=generator)
    with torch.no_grad():
        return unet(latents.to(dtype), torch.tensor([3, 700]), text.to(dtype)).sample
