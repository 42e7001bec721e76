"""Codes that move while a student is trained: the changes that gradients ask for add up, and codes follow them.

Gradients reach a quantized weight's float parameters but not its codes. A `DriftingWeight` passes them straight
through to a full matrix, the drift, which an optimizer moves. `settle` then searches the codes nearest to weight plus
drift, as in the discrete step of PV-Tuning (Malinovskii et al. 2024); what the codes cannot express remains in the
drift, so that small moves add up.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from vqdm.codecs.recode import recode_
from vqdm.weights.base import QuantizedWeight, Scheme
from vqdm.weights.layers import quantized_layers


class DriftingWeight(QuantizedWeight):
    """A quantized weight in training: `inner`, and an fp32 `drift` [out, in] that takes gradients but adds nothing.

    It decodes to the same bits as `inner`. It is not for files: call `stop_drifting` before counting or saving.
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
        """Search the codes nearest to weight + drift, keep the rest as the new drift, and return how many codes
        changed.

        On a GPU it is slow, bound by launches: of a trellis layer, value after value of its columns, tens of thousands.
        UserError for a drift that is not finite.
        """
        target = self.inner().float() + self.drift
        changed = recode_(self.inner, target)
        if changed:
            self.drift.copy_(target - self.inner())
        return changed


class _StraightThrough(torch.autograd.Function):
    """Returns the first of two arguments and passes the gradient to both.

    In floating point x + d − d is not x, and neither is x + (d − d) for x = −0.
    """

    @staticmethod
    def forward(ctx, value: Tensor, drift: Tensor) -> Tensor:
        ctx.dtype = drift.dtype
        return value.view_as(value)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, gradient.to(ctx.dtype)


def let_drift(denoiser: nn.Module, names: Iterable[str] | None = None) -> dict[str, DriftingWeight]:
    """Let the weights of all quantized layers, or of the named ones, drift in place; returns them by layer name.

    Weights that drift already are kept. ValueError for a name that is not a quantized layer's.
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
    """Put quantized weights back in place of drifting ones; drift that has not settled is dropped."""
    for layer in quantized_layers(denoiser).values():
        if isinstance(layer.weight, DriftingWeight):
            layer.weight = layer.weight.inner
