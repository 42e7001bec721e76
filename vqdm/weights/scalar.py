"""Uniform scalar codes, as made by round-to-nearest, GPTQ and AdaRound."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vqdm.errors import UserError
from vqdm.weights import ops
from vqdm.weights.base import (
    FixedWidthWeight,
    Scheme,
    check_groups,
    stored_parameter,
    unpack_codes,
    widened,
)


@dataclass(frozen=True, kw_only=True)
class ScalarScheme(Scheme):
    """One uniform code per weight; a scale and zero point per row, or per part of a row: `rtn4`, `gptq3g64`.

    group_size: number of consecutive inputs that share a scale; None: the whole row.
    split: number of inputs in the first of two parts with scales of their own; None: not in two parts.
    """

    kind: ClassVar[str] = "scalar"
    codec: str = "rtn"
    bits: int
    group_size: int | None = None
    split: int | None = None

    def __post_init__(self):
        super().__post_init__()
        if not 1 <= self.bits <= 8:  # zero points up to 255 are exact in fp16 and in bf16
            raise UserError(f"{self.codec}: bits must be 1 to 8, not {self.bits}")
        if self.group_size == 0:
            raise UserError(f"{self.codec}: group_size must be 1 or more, or none for whole rows, not 0")
        if self.split is not None and self.group_size is not None:
            raise UserError(f"{self.codec}: give split={self.split} or group_size={self.group_size}, not both")

    @property
    def name(self) -> str:
        group = f"g{self.group_size}" if self.group_size else ""
        return f"{self.codec}{self.bits}{group}" + (f"s{self.split}" if self.split is not None else "")

    @property
    def format_version(self) -> int:
        return 1 if self.split is None else 2

    def to_dict(self) -> dict:
        """Without `split` where there is none, as version 1 of the format has it."""
        fields = super().to_dict()
        return fields if self.split is not None else {key: value for key, value in fields.items() if key != "split"}


def per_input(values: Tensor, inputs: int, split: int | None) -> Tensor:
    """Every input's own value, [out, in], from those of the parts of a row, [out, groups]."""
    if split is None:
        return values.repeat_interleave(inputs // values.shape[1], 1)
    first, second = values.split(1, 1)
    return torch.cat([first.expand(-1, split), second.expand(-1, inputs - split)], 1)


def decode_scalar(codes: Tensor, scales: Tensor, zeros: Tensor, *, split: int | None = None) -> Tensor:
    """The weight scale · (code − zero): int [out, in] and float [out, groups] to [out, in] in the scales' dtype."""
    if split is not None:
        scales, zeros = (per_input(values, codes.shape[1], split) for values in (scales, zeros))
        return (codes.to(scales.dtype) - zeros) * scales
    grouped = codes.view(*scales.shape, -1).to(scales.dtype)
    return ((grouped - zeros[..., None]) * scales[..., None]).view(codes.shape)


def decode_by_torch(
    codes: Tensor, scales: Tensor, zeros: Tensor, shape: tuple[int, int], width: int, split: int | None
) -> Tensor:
    """Decode packed codes of `width` bits, [out, in], like `decode_scalar`, in torch: in the parameters' dtype."""
    dtype, factors = widened(scales, zeros)
    return decode_scalar(unpack_codes(codes, width, shape), *factors, split=split).to(dtype)


def _on_cpu(codes, scales, zeros, outputs, inputs, width, split):
    from vqdm.weights import kernels  # imports numba, which is not always needed

    dtype, (scales, zeros) = widened(scales, zeros)
    return kernels.decode_scalar(codes, width, inputs=inputs, scales=scales, zeros=zeros, split=split).to(dtype)


def _on_gpu(codes, scales, zeros, outputs, inputs, width, split):
    shape = outputs, inputs
    if not ops.in_reach(codes, shape):
        return decode_by_torch(codes, scales, zeros, shape, width, split)
    from vqdm.weights import triton_kernels

    return triton_kernels.decode_scalar(codes, width, scales=scales, zeros=zeros, shape=shape, split=split)


def _fake(codes, scales, zeros, outputs, inputs, width, split):
    return scales.new_empty((outputs, inputs), dtype=torch.promote_types(scales.dtype, zeros.dtype))


def _save(ctx, inputs, output):
    codes, scales, zeros, *ctx.others = inputs
    ctx.save_for_backward(codes, scales, zeros)


def _backward(ctx, gradient):
    outputs, inputs, width, split = ctx.others
    arguments = *ctx.saved_tensors, (outputs, inputs), width, split
    wanted = *ctx.needs_input_grad[:3], False, False, False
    return *ops.recomputed_gradients(decode_by_torch, arguments, wanted, gradient)[:3], None, None, None, None


_decode = ops.operator(
    "decode_scalar(Tensor codes, Tensor scales, Tensor zeros, SymInt outputs, SymInt inputs, int width, int? split)"
    " -> Tensor",
    cpu=_on_cpu,
    gpu=_on_gpu,
    fake=_fake,
    save=_save,
    backward=_backward,
)


class ScalarWeight(FixedWidthWeight):
    """Uniform codes [out, in]; scales and integer zero points [out, groups], with two groups where a row is split."""

    scheme_type = ScalarScheme

    def __init__(self, scheme: ScalarScheme, shape: tuple[int, int], shared: None = None):
        super().__init__(scheme, shape, shared)
        check_groups(self.shape[1], group_size=scheme.group_size)
        if scheme.split is not None and not 0 < scheme.split < self.shape[1]:
            raise UserError(f"{scheme.name} splits {self.shape[1]} inputs after {scheme.split}: give a smaller number")
        groups = 2 if scheme.split is not None else self.shape[1] // (scheme.group_size or self.shape[1])
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

    def rows(self, index: Tensor) -> Tensor:
        """The decoded rows [..., in] at an index of any shape, without decoding the others."""
        if self.shape[1] % 8:  # codes are packed by eight: a row does not begin at a byte
            return self()[index]
        chosen = self.codes.view(self.shape[0], -1)[index.flatten()].flatten()
        shape = index.numel(), self.shape[1]
        own = (values[index.flatten()] for values in (self.scales, self.zeros))
        return decode_by_torch(chosen, *own, shape, self.scheme.bits, self.scheme.split).view(*index.shape, -1)

    def forward(self) -> Tensor:
        scales, zeros, scheme = self.scales, self.zeros, self.scheme
        if ops.apply_to(scales, zeros):
            return _decode(self.codes, scales, zeros, *self.shape, scheme.bits, scheme.split)
        return ops.by_torch(decode_by_torch, self.codes, scales, zeros, self.shape, scheme.bits, scheme.split)
