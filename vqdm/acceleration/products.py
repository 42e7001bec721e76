"""Products of a scalar code's own whole numbers with 8-bit activations, for Linear layers of one scale per row.

With w[o, i] = c[o] · (code[o, i] − zero[o]) = c[o] · k[o, i], the weights k are computed with as they are:
- int8, x[t, i] = s[t] · q[t, i] + m[t]: y[t, o] = c[o] · (s[t] · Σ_i q[t, i] · k[o, i] + m[t] · Σ_i k[o, i]), the first
  sum in int32 (torch._int_mm);
- fp8, x[t, i] = s[t] · q[t, i] with q in e4m3, which has every whole number up to 16:
  y[t, o] = c[o] · s[t] · Σ_i q[t, i] · k[o, i], summed in fp32 (torch._scaled_mm).
"""

import torch
from torch import Tensor, nn

from vqdm.acceleration.activations import LEAST, token_grids
from vqdm.errors import UserError
from vqdm.weights.base import unpack_codes
from vqdm.weights.layers import QuantizedLinear, quantized_layers

BITS = 8  # of the activations
HALF = 2 ** (BITS - 1)
FLOAT8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FLOAT8).max
CODE_BITS = {"int8": BITS - 1, "fp8": 4}  # of the codes at most, so that code − zero is exact
LEAST_TOKENS, MULTIPLE = 17, 8  # what CUDA's kernel of integers asks for
FLOAT8_MULTIPLE, FLOAT8_CAPABILITY = 16, (8, 9)  # what CUDA's kernels of e4m3 ask for


def fits(layer: nn.Module, product: str) -> bool:
    """True for a Linear of scalar codes whose rows have one scale each, with code − zero exact in the product."""
    scheme = layer.weight.scheme if isinstance(layer, QuantizedLinear) else None
    if getattr(scheme, "kind", None) != "scalar" or scheme.bits > CODE_BITS[product]:
        return False
    return scheme.group_size is None and scheme.split is None


class CodeProduct(nn.Module):
    """The product of a layer, with its codes kept unpacked: `dtype` [out, in]. They are unpacked when first needed."""

    dtype: torch.dtype

    def __init__(self, weight: nn.Module):
        super().__init__()
        self._weight = (weight,)
        self._codes: Tensor | None = None

    def _apply(self, fn, recurse=True):
        self._codes = None
        return super()._apply(fn, recurse)

    def codes(self) -> Tensor:
        """code − zero [out, in]; zero points are whole numbers."""
        if self._codes is None:
            (weight,) = self._weight
            codes = unpack_codes(weight.codes, weight.scheme.bits, weight.shape)
            whole = codes.to(torch.int16) - weight.zeros.detach().to(torch.int16)
            self._codes = whole.float().to(self.dtype) if self.dtype.is_floating_point else whole.to(self.dtype)
        return self._codes

    def forward(self, inputs: Tensor, bias: Tensor | None) -> Tensor:
        (weight,) = self._weight
        product = (self.summed(inputs) * weight.scales.detach().float().flatten()).to(inputs.dtype)
        return product if bias is None else product + bias

    def summed(self, inputs: Tensor) -> Tensor:
        """Σ_i x[…, i] · k[o, i] with rounded inputs, fp32 […, out]."""
        raise NotImplementedError


class IntegerProduct(CodeProduct):
    """Inputs on a grid of 256 steps from a token's least value to its greatest."""

    dtype = torch.int8

    def summed(self, inputs: Tensor) -> Tensor:
        scales, lows = token_grids(inputs, BITS)
        whole = ((inputs - lows) / scales).round().clamp(0, 2 * HALF - 1) - HALF
        sums = integer_product(whole.to(torch.int8).flatten(0, -2), self.codes()).unflatten(0, inputs.shape[:-1])
        middles, totals = lows + HALF * scales, self.codes().sum(1, dtype=torch.int32)
        return sums.float() * scales + middles * totals.float()


class Float8Product(CodeProduct):
    """Inputs in e4m3, with a token's largest size at the largest number."""

    dtype = FLOAT8

    def summed(self, inputs: Tensor) -> Tensor:
        scales = inputs.abs().amax(-1, keepdim=True).float().clamp(min=LEAST) / LARGEST
        rounded = (inputs / scales).clamp(-LARGEST, LARGEST).to(FLOAT8)
        return float8_product(rounded.flatten(0, -2), self.codes()).unflatten(0, inputs.shape[:-1]) * scales


def integer_product(tokens: Tensor, codes: Tensor) -> Tensor:
    """tokens · codesᵀ of int8 [n, in] and [out, in], in int32 [n, out]. Devices get their tokens and sides padded."""
    if tokens.device.type == "cpu":
        return torch._int_mm(tokens, codes.t())
    rows, outputs = len(tokens), len(codes)
    size = -tokens.shape[1] % MULTIPLE
    tokens = nn.functional.pad(tokens, (0, size, 0, max(0, LEAST_TOKENS - rows)))
    codes = nn.functional.pad(codes, (0, size, 0, -outputs % MULTIPLE))
    return torch._int_mm(tokens, codes.t())[:rows, :outputs]


def float8_product(tokens: Tensor, codes: Tensor) -> Tensor:
    """tokens · codesᵀ of e4m3 [n, in] and [out, in], in fp32 [n, out], with all sides padded."""
    rows, outputs = len(tokens), len(codes)
    tokens, codes = (_filled(values, FLOAT8_MULTIPLE) for values in (tokens, codes))
    one = torch.ones((), device=tokens.device)
    return torch._scaled_mm(tokens, codes.t(), scale_a=one, scale_b=one, out_dtype=torch.float32)[:rows, :outputs]


def _filled(values: Tensor, multiple: int) -> Tensor:
    """values [n, m] of one byte each with zeros up to multiples on both sides; torch pads no e4m3."""
    rows, columns = (-size % multiple for size in values.shape)
    return nn.functional.pad(values.view(torch.uint8), (0, columns, 0, rows)).view(values.dtype)


def check_device(product: str, device: str) -> None:
    """UserError for a GPU without products of e4m3, or with another 8-bit float (ROCm)."""
    if product != "fp8" or device == "cpu":
        return
    if device != "cuda" or torch.version.hip or torch.cuda.get_device_capability() < FLOAT8_CAPABILITY:
        raise UserError(
            "activations.product=fp8 needs NVIDIA's compute capability 8.9 (RTX 40, L4, H100) or a CPU: give "
            "activations.product=int8 or simulated"
        )


def add_products(denoiser: nn.Module, names: list[str], product: str) -> list[str]:
    """Let the named layers that can compute with their codes do so; returns their names. UserError if none can."""
    layers = quantized_layers(denoiser)
    chosen = [name for name in names if name in layers and fits(layers[name], product)]
    if not chosen:
        raise UserError(
            f"activations.product={product} is for Linear layers of scalar codes of up to {CODE_BITS[product]} bits "
            "with a scale per row, as of quantize=rtn4 or gptq4: no layer has them; give activations.product=simulated"
        )
    kind = {"int8": IntegerProduct, "fp8": Float8Product}[product]
    for name in chosen:
        layers[name].product = kind(layers[name].weight)
    return chosen
