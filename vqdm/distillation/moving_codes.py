"""Codes that move while a student is trained: what gradients want of every weight gathers, and codes follow it.

Gradients reach the float parameters of a quantized weight; its codes stay. A `DriftingWeight` lets them pass straight
through to a full matrix, the drift, which an optimizer moves. `settle` then searches the codes nearest to the weight
plus its drift, the counterpart of the discrete step of PV-Tuning (Malinovskii et al. 2024); what codes cannot express
remains in the drift, so that small moves add up.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from vqdm.codecs.recode import recode_
from vqdm.weights.base import QuantizedWeight, Scheme
from vqdm.weights.layers import quantized_layers


class DriftingWeight(QuantizedWeight):
    """A quantized weight during training: `inner`, and its fp32 `drift` [out, in], of which only gradients are seen.

    It decodes to what `inner` decodes to, bit for bit. Not for files: `stop_drifting` before a denoiser is counted or
    saved.
    """

    scheme_type = Scheme

    def __init__(self, inner: QuantizedWeight):
        super().__init__(inner.scheme, inner.shape, *inner.shared)
        self.original_shape = inner.original_shape
        self.inner = inner
        self.drift = nn.Parameter(torch.zeros(inner.shape, dtype=torch.float32, device=inner.device))

    def forward(self) -> Tensor:
        return _StraightThrough.apply(self.inner(), self.drift)

    @property
    def dtype(self) -> torch.dtype:
        return self.inner.dtype

    @property
    def device(self) -> torch.device:
        return self.inner.device

    @torch.no_grad()
    def settle(self) -> int:
        """Search the codes nearest to weight + drift; what they miss is the new drift. How many changed, as `recode_`.

        UserError for a drift that is not finite.
        """
        target = self.inner().float() + self.drift
        changed = recode_(self.inner, target)
        if changed:
            self.drift.copy_(target - self.inner())
        return changed


class _StraightThrough(torch.autograd.Function):
    """The first of two arguments, whose gradient is that of both.

    The sum x + d − d is not x in floating point, nor is x + (d − d) where x is −0.
    """

    @staticmethod
    def forward(ctx, value: Tensor, drift: Tensor) -> Tensor:
        ctx.dtype = drift.dtype
        return value.view_as(value)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, gradient.to(ctx.dtype)


def let_drift(denoiser: nn.Module, names: Iterable[str] | None = None) -> dict[str, DriftingWeight]:
    """Make the weights of all quantized layers, or of those named, drift, in place: by layer, in module order.

    Those that drift already go on. ValueError for a name that is no quantized layer's.
    """
    layers = quantized_layers(denoiser)
    chosen = list(layers) if names is None else list(names)
    unknown = sorted(set(chosen) - set(layers))
    if unknown:
        raise ValueError(f"{unknown[0]} is no quantized layer: its codes cannot drift")
    for name in chosen:
        layer = layers[name]
        if not isinstance(layer.weight, DriftingWeight):
            layer.weight = DriftingWeight(layer.weight).train(layer.training)
    return {name: layer.weight for name, layer in layers.items() if name in chosen}


def stop_drifting(denoiser: nn.Module) -> None:
    """Put the quantized weights back in the place of the drifting ones; what has not settled is dropped."""
    for layer in quantized_layers(denoiser).values():
        if isinstance(layer.weight, DriftingWeight):
            layer.weight = layer.weight.inner
