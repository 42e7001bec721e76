"""Uniform scalar codes: what round-to-nearest, GPTQ and AdaRound make."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vqdm.errors import UserError
from vqdm.weights.base import FixedWidthWeight, Scheme, check_groups, kernels_apply, stored_parameter, widened


@dataclass(frozen=True, kw_only=True)
class ScalarScheme(Scheme):
    """One uniform code per weight, scale and zero point per row or per group of a row: `rtn4`, `gptq3g64`."""

    kind: ClassVar[str] = "scalar"
    codec: str = "rtn"
    bits: int
    group_size: int | None = None  # consecutive inputs that share a scale; None: the whole row

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
    """weight = scale · (code − zero): int [out, in], float [out, groups] twice, to [out, in] in the scales' dtype."""
    grouped = codes.view(*scales.shape, -1).to(scales.dtype)
    return ((grouped - zeros[..., None]) * scales[..., None]).view(codes.shape)


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
        """codes: int [out, in]; scales, zeros: [out, groups], stored as fp16."""
        with codes.device:
            weight = cls(scheme, tuple(codes.shape))
        weight.set_codes(codes)
        weight.scales.data.copy_(scales)
        weight.zeros.data.copy_(zeros)
        return weight

    def forward(self) -> Tensor:
        dtype, (scales, zeros) = widened(self.scales, self.zeros)
        if kernels_apply(self.codes, scales, zeros):
            from vqdm.weights import kernels  # imports numba, which not everyone needs

            weight = kernels.decode_scalar(
                self.codes, self.code_width, inputs=self.shape[1], scales=scales, zeros=zeros
            )
        else:
            weight = decode_scalar(self.unpacked_codes(), scales, zeros)
        return weight.to(dtype)
