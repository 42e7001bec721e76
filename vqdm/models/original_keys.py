"""The original ("ldm") names and layouts of an SDXL-type pipeline's weights, as single-file checkpoints hold them.

The names follow from the configs: blocks are numbered consecutively, with `layers_per_block` resnets and one sampler.
"""

import re
from collections.abc import Callable, Mapping

import torch

from vqdm.errors import UserError

UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET_SLOTS = {"resnets": 0, "attentions": 1}  # inside an input, middle or output block
VAE_ENDS = {
    "quant_conv": "quant_conv",
    "post_quant_conv": "post_quant_conv",
    **{f"{part}.{end}": f"{part}.{end}" for part in ("encoder", "decoder") for end in ("conv_in", "conv_out")},
    **{f"{part}.conv_norm_out": f"{part}.norm_out" for part in ("encoder", "decoder")},
}
VAE_RESNET = {"conv_shortcut": "nin_shortcut"} | {part: part for part in ("norm1", "conv1", "norm2", "conv2")}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OPEN_CLIP_ROOT = {
    "embeddings.position_embedding.weight": "positional_embedding",
    "text_projection.weight": "text_projection",
}
OPEN_CLIP_ENDS = {
    "embeddings.token_embedding": "token_embedding",
    "final_layer_norm": "ln_final",
    "encoder.layers": "transformer.resblocks",
}
OPEN_CLIP_INNER = (("layer_norm", "ln_"), ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj"), ("self_attn", "attn"))


def to_original(component: str, weights: Mapping[str, torch.Tensor], settings) -> dict[str, torch.Tensor]:
    """One component's weights under their original names, in their original layouts; tensors may be on meta.

    component: unet, vae, text_encoder or text_encoder_2. weights: its state dict. settings: its `.config`.
    """
    prefix, key, layout = COMPONENTS[component]
    return {prefix + name: tensor for name, tensor in layout({key(n, settings): w for n, w in weights.items()}).items()}


def _renamed(name: str, table: Mapping[str, str]) -> str:
    """`name` with the module found in `table` replaced."""
    for ours, original in table.items():
        if name.startswith(f"{ours}."):
            return original + name.removeprefix(ours)
    raise UserError(f"the weight {name} has no name in the original SDXL format; convert a plain SDXL-type pipeline")


def _unet_key(name: str, settings) -> str:
    layers = settings.layers_per_block
    if not isinstance(layers, int):
        raise UserError(f"layers_per_block={layers} of the U-Net is no single number; the original SDXL format has one")
    if mid := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)", name):
        kind, index, rest = mid.groups()
        return f"middle_block.{2 * int(index) + UNET_SLOTS[kind]}.{_unet_inner(kind, rest)}"
    block = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)", name)
    if block is None:
        return _renamed(name, UNET_ENDS)
    side, index, kind, layer, rest = block.groups()
    first = int(index) * (layers + 1) + (side == "down")  # input block 0 is conv_in
    if kind == "downsamplers":
        return f"input_blocks.{first + layers}.0.op.{rest.removeprefix('conv.')}"
    if kind == "upsamplers":  # the upsampler comes last in the block's last output block
        return f"output_blocks.{first + layers}.{1 + ('Attn' in settings.up_block_types[int(index)])}.{rest}"
    stem = {"down": "input_blocks", "up": "output_blocks"}[side]
    return f"{stem}.{first + int(layer)}.{UNET_SLOTS[kind]}.{_unet_inner(kind, rest)}"


def _unet_inner(kind: str, rest: str) -> str:
    return _renamed(rest, UNET_RESNET) if kind == "resnets" else rest


def _vae_key(name: str, settings) -> str:
    if mid := re.fullmatch(r"(\w+)\.mid_block\.(resnets|attentions)\.(\d+)\.(.+)", name):
        part, kind, index, rest = mid.groups()
        stem, table = ("block", VAE_RESNET) if kind == "resnets" else ("attn", VAE_ATTENTION)
        return f"{part}.mid.{stem}_{int(index) + 1}.{_renamed(rest, table)}"
    block = re.fullmatch(r"(\w+)\.(down|up)_blocks\.(\d+)\.(resnets|downsamplers|upsamplers)\.(\d+)\.(.+)", name)
    if block is None:
        return _renamed(name, VAE_ENDS)
    part, side, index, kind, layer, rest = block.groups()
    # the original counts the decoder's blocks from the image inwards
    level = int(index) if side == "down" else len(settings.up_block_types) - 1 - int(index)
    inner = f"block.{layer}.{_renamed(rest, VAE_RESNET)}" if kind == "resnets" else f"{side}sample.{rest}"
    return f"{part}.{side}.{level}.{inner}"


def _clip_key(name: str, settings) -> str:
    return name.removeprefix("text_model.")  # transformers 5.6 took this level out of CLIPTextModel


def _open_clip_key(name: str, settings) -> str:
    name = name.removeprefix("text_model.")
    if name in OPEN_CLIP_ROOT:
        return OPEN_CLIP_ROOT[name]
    name = _renamed(name, OPEN_CLIP_ENDS)
    for ours, original in OPEN_CLIP_INNER:
        name = name.replace(ours, original)
    return name


def _vae_layout(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Turn attention projections [out, in] into 1 × 1 convolutions [out, in, 1, 1]."""
    return {k: w[:, :, None, None] if ".attn_" in k and w.ndim == 2 else w for k, w in weights.items()}


def _open_clip_layout(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Join query, key and value in one tensor [3 width, …]; turn text_projection into [width, projection]."""
    out = {}
    for key, weight in weights.items():
        if query := re.fullmatch(r"(.+\.)q_proj\.(weight|bias)", key):
            stem, kind = query.groups()
            out[f"{stem}in_proj_{kind}"] = torch.cat([weights[f"{stem}{part}_proj.{kind}"] for part in "qkv"])
        elif not re.search(r"\.attn\.[kv]_proj\.", key):
            out[key] = weight.T if key == "text_projection" else weight
    return out


# component: prefix, function from a weight's name to the original one, function from all weights to their layout
COMPONENTS: dict[str, tuple[str, Callable, Callable]] = {
    "unet": ("model.diffusion_model.", _unet_key, dict),
    "vae": ("first_stage_model.", _vae_key, _vae_layout),
    "text_encoder": ("conditioner.embedders.0.transformer.text_model.", _clip_key, dict),
    "text_encoder_2": ("conditioner.embedders.1.model.", _open_clip_key, _open_clip_layout),
}
