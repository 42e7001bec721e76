"""Attention's scores in few bits, simulated: steps of each image's own largest one, even or logarithmic.

DGQ (arXiv 2501.04304, as released) leaves the first token of the text alone, which stands for nothing and takes most
of the attention in many models. Its own scale is the largest score of the whole batch; here it is that of the image.
"""

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from torch import Tensor, nn

from vqdm.errors import UserError

SMALLEST = 2.0**-126


def rounded_scores(scores: Tensor, *, bits: int, grid: str, kept: int) -> Tensor:
    """Scores [images, heads, queries, keys] on a grid below each image's largest s; the first `kept` keys stay.

    uniform: s · round(p / s · (2^b − 1)) / (2^b − 1). log: s · 2^(−q) with q = round(−log2(p / s)) in 0 … 2^b − 1.
    """
    alone, rest = scores[..., :kept], scores[..., kept:]
    largest, top = rest.amax((1, 2, 3), keepdim=True).clamp(min=SMALLEST), 2**bits - 1
    if grid == "log":
        rest = largest * torch.exp2(-(-torch.log2(rest / largest)).round().clamp(0, top))
    else:
        rest = (rest / largest * top).round() / top * largest
    return torch.cat([alone, rest], -1)


class ScoreQuantizer:
    """An attention processor that computes scores one by one, without a fused kernel, and rounds them.

    bos: the first token of the text stays as it is, in cross-attention.
    """

    def __init__(self, *, bits: int, grid: str, bos: bool):
        self.bits, self.grid, self.bos = bits, grid, bos

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        images, crosses = len(hidden_states), encoder_hidden_states is not None
        source = encoder_hidden_states if crosses else hidden_states
        mask = attn.prepare_attention_mask(attention_mask, source.shape[1], images)
        query, key, value = attn.to_q(hidden_states), attn.to_k(source), attn.to_v(source)
        query, key, value = (attn.head_to_batch_dim(part) for part in (query, key, value))
        scores = attn.get_attention_scores(query, key, mask).unflatten(0, (images, -1))
        kept = 1 if crosses and self.bos else 0
        scores = rounded_scores(scores, bits=self.bits, grid=self.grid, kept=kept).flatten(0, 1).to(value.dtype)
        return attn.to_out[1](attn.to_out[0](attn.batch_to_head_dim(torch.bmm(scores, value))))


def attentions(denoiser: nn.Module) -> list[Attention]:
    """The attentions whose scores can be rounded; UserError if some are of another kind, as those of transformers."""
    found = [module for module in denoiser.modules() if hasattr(module, "processor")]
    if not found or not all(_is_plain(module) for module in found):
        raise UserError(
            f"activations.scores_bits is for U-Nets' attention, and {type(denoiser).__name__} has another: leave it out"
        )
    return found


def _is_plain(module: nn.Module) -> bool:
    usual = isinstance(module, Attention) and isinstance(module.processor, AttnProcessor | AttnProcessor2_0)
    extras = ("group_norm", "spatial_norm", "norm_q", "norm_cross", "added_kv_proj_dim")
    return usual and not any(getattr(module, name, None) for name in extras) and not module.residual_connection


def quantize_scores(denoiser: nn.Module, *, bits: int, grid: str, bos: bool) -> None:
    """Let all attentions of a U-Net round their scores."""
    for attention in attentions(denoiser):
        attention.set_processor(ScoreQuantizer(bits=bits, grid=grid, bos=bos))
