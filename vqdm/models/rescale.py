"""Per-channel rescalings that leave a U-Net's function unchanged but make its weights as uneven as a large model's.

A gain s taken out of one linear map is put into the next: W₂ diag(s) · diag(1/s) W₁. This gives the small default
model the outlier channels that large models have, and on which quantizers differ.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from vqdm.seeds import torch_generator


@dataclass(frozen=True)
class _Pair:
    """Parameters that one vector rescales, as views with channels first; `name` seeds the draw of the vector."""

    name: str
    divide: list[Tensor]
    multiply: list[Tensor]


@torch.no_grad()
def rescale_(denoiser: nn.Module, *, sigma: float, seed: int) -> int:
    """Rescale every known pair of a diffusers U-Net in place by s = exp(sigma · normal) per channel.

    Every vector is drawn from (seed, "rescale", the module's name). Modules that this file does not know stay as they
    are. Returns the number of vectors. sigma = 0 changes no bit.
    """
    count = 0
    for name, module in denoiser.named_modules():
        for pair in _pairs(name, module):
            generator = torch_generator(seed, "rescale", pair.name)
            normal = torch.randn(pair.divide[0].shape[0], generator=generator, dtype=torch.float64, device="cpu")
            _apply(pair, torch.exp(sigma * normal))
            count += 1
    return count


def _apply(pair: _Pair, scale: Tensor) -> None:
    for view in pair.divide:
        view.div_(_per_channel(scale, view))
    for view in pair.multiply:
        view.mul_(_per_channel(scale, view))


def _per_channel(scale: Tensor, view: Tensor) -> Tensor:
    return scale.to(view.device).view(-1, *[1] * (view.ndim - 1))


def _pairs(name: str, module: nn.Module) -> Iterator[_Pair]:
    if isinstance(module, Transformer2DModel) and isinstance(getattr(module, "norm", None), nn.GroupNorm):
        yield from _norm_pair(f"{name}.norm", module.norm, [module.proj_in])
    if isinstance(module, BasicTransformerBlock) and module.norm_type == "layer_norm" and module.pos_embed is None:
        yield from _block_pairs(name, module)


def _block_pairs(name: str, block: BasicTransformerBlock) -> Iterator[_Pair]:
    if _is_plain(block.attn1):
        readers = (block.attn1.to_q,) if block.only_cross_attention else _projections(block.attn1)
        yield from _norm_pair(f"{name}.norm1", block.norm1, readers)
        yield from _attention_pairs(f"{name}.attn1", block.attn1)
    # Without a cross-attention width, attn2 may read its keys from norm2 too: leave it alone.
    if _is_plain(block.attn2) and block.attn2.is_cross_attention:
        yield from _norm_pair(f"{name}.norm2", block.norm2, [block.attn2.to_q])
        yield from _attention_pairs(f"{name}.attn2", block.attn2)
    entry = block.ff.net[0]
    if isinstance(entry, GEGLU) and isinstance(entry.proj, nn.Linear) and isinstance(block.ff.net[2], nn.Linear):
        yield from _norm_pair(f"{name}.norm3", block.norm3, [entry.proj])
        # GEGLU is hidden · gelu(gate), linear in `hidden`, which is the first half of the rows.
        half = block.ff.net[2].in_features
        yield _Pair(f"{name}.ff", _columns(block.ff.net[2]), [view[:half] for view in _rows(entry.proj)])


def _attention_pairs(name: str, attention: Attention) -> Iterator[_Pair]:
    yield _Pair(f"{name}.to_v", _columns(attention.to_out[0]), _rows(attention.to_v))
    yield _Pair(f"{name}.to_q", _rows(attention.to_k), _rows(attention.to_q))


def _norm_pair(name: str, norm: nn.Module, readers: list[nn.Module] | tuple[nn.Module, ...]) -> Iterator[_Pair]:
    """Pair the gain and bias of a norm with the columns of all layers that read it; nothing if it has no gain."""
    known = isinstance(norm, (nn.LayerNorm, nn.GroupNorm)) and all(
        isinstance(r, (nn.Linear, nn.Conv2d)) for r in readers
    )
    if known and norm.weight is not None:
        yield _Pair(name, _rows(norm), [view for reader in readers for view in _columns(reader)])


def _is_plain(attention: Attention | None) -> bool:
    """True for softmax(QKᵀ)V on plain Linear layers with nothing in between."""
    if not isinstance(attention, Attention) or not isinstance(attention.processor, (AttnProcessor, AttnProcessor2_0)):
        return False
    between = (attention.norm_q, attention.norm_k, attention.norm_cross, attention.group_norm, attention.spatial_norm)
    layers = (*_projections(attention), attention.to_out[0])
    same_width = attention.inner_dim == attention.inner_kv_dim
    return (
        same_width
        and not attention.fused_projections
        and all(module is None for module in between)
        and all(isinstance(layer, nn.Linear) for layer in layers)
    )


def _projections(attention: Attention) -> tuple[nn.Module, nn.Module, nn.Module]:
    return attention.to_q, attention.to_k, attention.to_v


def _rows(layer: nn.Module) -> list[Tensor]:
    """Weight and bias with output channels first (a norm's: its channels)."""
    return [layer.weight.data] if layer.bias is None else [layer.weight.data, layer.bias.data]


def _columns(layer: nn.Module) -> list[Tensor]:
    """The weight with input channels first."""
    return [layer.weight.data.transpose(0, 1)]
