"""Products of integers: activations of 8 bits with scalar codes, for Linear layers of one scale per row.

With x[t, i] = s[t] · q[t, i] + m[t] and w[o, i] = c[o] · (code[o, i] − zero[o]) = c[o] · k[o, i]:
y[t, o] = c[o] · (s[t] · Σ_i q[t, i] · k[o, i] + m[t] · Σ_i k[o, i]), the first sum in int32 (torch._int_mm).
"""

import torch
from torch import Tensor, nn

from vqdm.acceleration.activations import token_grids
from vqdm.errors import UserError
from vqdm.weights.base import unpack_codes
from vqdm.weights.layers import QuantizedLinear, quantized_layers

BITS = 8  # of the activations
HALF = 2 ** (BITS - 1)
LEAST_TOKENS, MULTIPLE = 17, 8  # what CUDA's kernel asks for


def fits(layer: nn.Module) -> bool:
    """True for a Linear of scalar codes whose rows have one scale each, with code − zero within 8 bits."""
    scheme = layer.weight.scheme if isinstance(layer, QuantizedLinear) else None
    if getattr(scheme, "kind", None) != "scalar" or scheme.bits > BITS - 1:
        return False
    return scheme.group_size is None and scheme.split is None


class IntegerProduct(nn.Module):
    """The product of a layer, with its codes kept unpacked: int8 [out, in]. They are unpacked when first needed."""

    def __init__(self, weight: nn.Module):
        super().__init__()
        self._weight = (weight,)
        self._codes: Tensor | None = None

    def _apply(self, fn, recurse=True):
        self._codes = None
        return super()._apply(fn, recurse)

    def codes(self) -> Tensor:
        """code − zero, int8 [out, in]; zero points are whole numbers."""
        if self._codes is None:
            (weight,) = self._weight
            codes = unpack_codes(weight.codes, weight.scheme.bits, weight.shape)
            self._codes = (codes.to(torch.int16) - weight.zeros.detach().to(torch.int16)).to(torch.int8)
        return self._codes

    def forward(self, inputs: Tensor, bias: Tensor | None) -> Tensor:
        (weight,) = self._weight
        scales, lows = token_grids(inputs, BITS)
        whole = ((inputs - lows) / scales).round().clamp(0, 2 * HALF - 1) - HALF
        sums = integer_product(whole.to(torch.int8).flatten(0, -2), self.codes()).unflatten(0, inputs.shape[:-1])
        middles, totals = lows + HALF * scales, self.codes().sum(1, dtype=torch.int32)
        product = (sums.float() * scales + middles * totals.float()) * weight.scales.detach().float().flatten()
        product = product.to(inputs.dtype)
        return product if bias is None else product + bias


def integer_product(tokens: Tensor, codes: Tensor) -> Tensor:
    """tokens · codesᵀ of int8 [n, in] and [out, in], in int32 [n, out]. Devices get their tokens and sides padded."""
    if tokens.device.type == "cpu":
        return torch._int_mm(tokens, codes.t())
    rows, outputs = len(tokens), len(codes)
    size = -tokens.shape[1] % MULTIPLE
    tokens = nn.functional.pad(tokens, (0, size, 0, max(0, LEAST_TOKENS - rows)))
    codes = nn.functional.pad(codes, (0, size, 0, -outputs % MULTIPLE))
    return torch._int_mm(tokens, codes.t())[:rows, :outputs]


def add_products(denoiser: nn.Module, names: list[str]) -> list[str]:
    """Let the named layers that can compute with integers do so; returns their names. UserError if none can."""
    layers = quantized_layers(denoiser)
    chosen = [name for name in names if name in layers and fits(layers[name])]
    if not chosen:
        raise UserError(
            "activations.product=int8 is for Linear layers of scalar codes of up to 7 bits with a scale per row, as of "
            "quantize=rtn4 or gptq4: no layer has them; give activations.product=simulated"
        )
    for name in chosen:
        layers[name].product = IntegerProduct(layers[name].weight)
    return chosen
