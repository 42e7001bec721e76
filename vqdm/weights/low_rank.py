"""A quantized weight plus a product of two thin 16-bit matrices, as in SVDQuant (Li et al. 2025, arXiv 2411.05007).

`base` is a weight of any other kind: its codes are decoded as ever, in one step per weight.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vqdm.errors import UserError
from vqdm.weights.additive import AdditiveWeight
from vqdm.weights.base import QuantizedWeight, Scheme, SharedPart, stored_parameter, widened
from vqdm.weights.scalar import ScalarWeight
from vqdm.weights.trellis import TrellisWeight

CODED: dict[str, type[QuantizedWeight]] = {
    kind.scheme_type.kind: kind for kind in (ScalarWeight, AdditiveWeight, TrellisWeight)
}


@dataclass(frozen=True, kw_only=True)
class LowRankScheme(Scheme):
    """Codes of another scheme beside two factors: `trellis2r4`. input_scales: every input of the codes has a scale."""

    kind: ClassVar[str] = "low_rank"
    rank: int
    input_scales: bool = False
    base: Scheme

    def __post_init__(self):
        super().__post_init__()
        if self.base.kind not in CODED:
            raise UserError(f"a low-rank branch stands beside codes of another kind, not {self.base.kind}")
        if self.rank < 1:
            raise UserError(f"{self.base.name}: a low-rank branch has a rank of 1 or more, not {self.rank}")

    @property
    def name(self) -> str:
        return f"{self.base.name}r{self.rank}" + ("i" if self.input_scales else "")

    @property
    def shared_key(self) -> str | None:
        return self.base.shared_key

    @property
    def decoder(self) -> Scheme:
        return self.base

    @property
    def format_version(self) -> int:
        return 4

    def to_dict(self) -> dict:
        own = {"kind": self.kind, "codec": self.codec, "rank": self.rank, "input_scales": self.input_scales}
        return own | {"base": self.base.to_dict()}

    def to_header(self) -> dict:
        return self.to_dict() | {"base": self.base.to_header()}


def branch_bits(shape: tuple[int, int], rank: int, *, input_scales: bool = False) -> float:
    """Bits per weight of the two factors, and of the input scales if there are any."""
    return 16 * (rank * (shape[0] + shape[1]) + input_scales * shape[1]) / (shape[0] * shape[1])


def add_product(matrix: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """The sum ((matrix + l_0 r_0) + l_1 r_1) + …, with left [out, rank] and right [rank, in], in this order.

    A matrix product would add in an order of its own, and every reader is to get the same bits.
    """
    for k in range(left.shape[1]):
        matrix = matrix + left[:, k, None] * right[k]
    return matrix


class LowRankWeight(QuantizedWeight):
    """The weight base · input_scales + left right. left: [out, rank]; right: [rank, in]; input_scales: [in] or None."""

    scheme_type = LowRankScheme

    def __init__(self, scheme: LowRankScheme, shape: tuple[int, int], shared: SharedPart | None = None):
        super().__init__(scheme, shape, shared)
        self.base = CODED[scheme.base.kind](scheme.base, shape, shared)
        self.left = stored_parameter(self.shape[0], scheme.rank)
        self.right = stored_parameter(scheme.rank, self.shape[1])
        self.register_parameter("input_scales", stored_parameter(self.shape[1]) if scheme.input_scales else None)

    @classmethod
    def from_parts(
        cls, base: QuantizedWeight, *, codec: str, left: Tensor, right: Tensor, input_scales: Tensor | None = None
    ) -> "LowRankWeight":
        """Build a weight around `base`, which becomes its own, from factors and scales, stored as fp16."""
        scheme = LowRankScheme(codec=codec, rank=left.shape[1], input_scales=input_scales is not None, base=base.scheme)
        with left.device:
            weight = cls(scheme, base.shape, *base.shared)
        weight.base = base
        weight.left.data.copy_(left)
        weight.right.data.copy_(right)
        if input_scales is not None:
            weight.input_scales.data.copy_(input_scales)
        return weight

    @property
    def codes(self) -> Tensor:
        return self.base.codes

    def forward(self) -> Tensor:
        dtype, (base, left, right, scales) = widened(self.base(), self.left, self.right, self.input_scales)
        return add_product(base if scales is None else base * scales, left, right).to(dtype)

    def product(self) -> Tensor:
        """What is added to the codes, in the computation's dtype: [out, in]."""
        _, (left, right) = widened(self.left, self.right)
        return add_product(torch.zeros((), dtype=left.dtype, device=left.device), left, right)

    def fault(self) -> str | None:
        return self.base.fault()

    def paper_bits(self) -> int:
        return self.base.paper_bits() + 16 * (self.left.numel() + self.right.numel())
