"""Uniform scalar codes, as made by round-to-nearest, GPTQ and AdaRound."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vqdm.errors import UserError
from vqdm.weights.base import (
    FixedWidthWeight,
    Scheme,
    check_groups,
    kernels_apply,
    recomputed_gradients,
    stored_parameter,
    unpack_codes,
    widened,
)


@dataclass(frozen=True, kw_only=True)
class ScalarScheme(Scheme):
    """One uniform code per weight; a scale and zero point per row or per group of a row: `rtn4`, `gptq3g64`."""

    kind: ClassVar[str] = "scalar"
    codec: str = "rtn"
    bits: int
    group_size: int | None = None  # number of consecutive inputs that share a scale; None: the whole row

    def __post_init__(self):
        super().__post_init__()
        if not 1 <= self.bits <= 8:  # zero points up to 255 are exact in fp16 and in bf16
            raise UserError(f"{self.codec}: bits must be 1 to 8, not {self.bits}")
        if self.group_size == 0:
            raise UserError(f"{self.codec}: group_size must be 1 or more, or none for whole rows, not 0")

    @property
    def name(self) -> str:
        return f"{self.codec}{self.bits}" + (f"g{self.group_size}" if self.group_size else "")


def decode_scalar(codes: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """The weight scale · (code − zero): int [out, in] and float [out, groups] to [out, in] in the scales' dtype."""
    grouped = codes.view(*scales.shape, -1).to(scales.dtype)
    return ((grouped - zeros[..., None]) * scales[..., None]).view(codes.shape)


def decode_packed(codes: Tensor, width: int, shape: tuple[int, int], scales: Tensor, zeros: Tensor) -> Tensor:
    """Decode packed codes of `width` bits and this shape like `decode_scalar`, in torch."""
    return decode_scalar(unpack_codes(codes, width, shape), scales, zeros)


class DecodeScalar(torch.autograd.Function):
    """`decode_packed`, through `kernels` where they apply; its gradients need nothing but its arguments."""

    @staticmethod
    def forward(ctx, codes, width, shape, scales, zeros):
        ctx.width, ctx.shape = width, shape
        ctx.save_for_backward(codes, scales, zeros)
        if not kernels_apply(codes, scales, zeros):
            return decode_packed(codes, width, shape, scales, zeros)
        from vqdm.weights import kernels  # imports numba, which is not always needed

        return kernels.decode_scalar(codes, width, inputs=shape[1], scales=scales, zeros=zeros)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        codes, scales, zeros = ctx.saved_tensors
        arguments = codes, ctx.width, ctx.shape, scales, zeros
        return recomputed_gradients(decode_packed, arguments, ctx.needs_input_grad, gradient)


class ScalarWeight(FixedWidthWeight):
    """Uniform codes [out, in]; scales and integer zero points [out, groups]."""

    scheme_type = ScalarScheme

    def __init__(self, scheme: ScalarScheme, shape: tuple[int, int], shared: None = None):
        super().__init__(scheme, shape, shared)
        check_groups(self.shape[1], group_size=scheme.group_size)
        groups = self.shape[1] // (scheme.group_size or self.shape[1])
        self._add_codes(self.shape, scheme.bits)
        self.scales = stored_parameter(self.shape[0], groups)
        self.zeros = stored_parameter(self.shape[0], groups)

    @classmethod
    def from_parts(cls, scheme: ScalarScheme, codes: Tensor, *, scales: Tensor, zeros: Tensor) -> "ScalarWeight":
        """Build a weight from codes int [out, in] and from scales and zeros [out, groups], stored as fp16."""
        with codes.device:
            weight = cls(scheme, tuple(codes.shape))
        weight.set_codes(codes)
        weight.scales.data.copy_(scales)
        weight.zeros.data.copy_(zeros)
        return weight

    def forward(self) -> Tensor:
        dtype, (scales, zeros) = widened(self.scales, self.zeros)
        decode = decode_packed if torch.compiler.is_compiling() else DecodeScalar.apply
        return decode(self.codes, self.code_width, self.shape, scales, zeros).to(dtype)
