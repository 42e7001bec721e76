"""GPTQ: rounds to nearest, one input column after another, each making up for the errors of those before it.

Frantar et al. 2023 (arXiv 2210.17323) update all remaining columns through the inverse Hessian. The same targets follow
from the Hessian itself, H = R Rᵀ with R upper triangular: tr(E H Eᵀ) = ‖E R‖² for the errors E = W − Q, so column j is
best rounded from W_j + Σ_{k<j} E_k R_kj / R_jj, and its own error costs R_jj². No inverse is formed.
"""

import torch
from torch import Tensor

from vqdm.codecs.checks import check_hessian, check_matrix
from vqdm.codecs.codec import Codec, Shape, scalar_scheme_of
from vqdm.codecs.feedback import feedback_of
from vqdm.codecs.rtn import check_clip, find_grid, round_to_grid, sum_of_squares
from vqdm.config.codecs import GptqConfig
from vqdm.weights.scalar import ScalarScheme, ScalarWeight

BLOCK = 128  # columns whose feedback from all earlier columns is one matrix product


def encode(
    weight: Tensor,
    hessian: Tensor,
    *,
    bits: int,
    clip: str = "mse",
    group_size: int | None = None,
    act_order: bool = True,
    damping: float = 0.01,
    layer: str = "",
) -> ScalarWeight:
    """Quantize [out, in] to `bits` bits per weight, one scale and zero point per row or per `group_size` inputs.

    hessian: second moments [in, in] of the inputs; damping: added to its diagonal, in units of the diagonal's mean;
    act_order: take columns by falling second moment instead of from left to right. clip: for the grids, as in
    `rtn.encode`, but "hessian" weighs squared errors by the cost of a column's own error. Grids come from the original
    weights, except those of groups without act_order, which come from the targets known when their columns are reached.
    layer: the name for messages. UserError for non-finite input and a group size that does not divide `in`.
    """
    check_clip(clip, "gptq")
    scheme = ScalarScheme(codec="gptq", bits=bits, group_size=group_size)
    check_matrix(weight, layer=layer, group_size=group_size)
    check_hessian(hessian, weight, layer=layer)
    weight, hessian = weight.detach().float(), hessian.detach().float()
    order = torch.arange(weight.shape[1], device=weight.device)
    if act_order:
        order = hessian.diagonal().argsort(descending=True, stable=True)
    feedback, costs = feedback_of(hessian[order][:, order], damping=damping, layer=layer)
    rounding = _Rounding(weight.T[order], feedback, costs, bits=bits, clip=clip)
    size = group_size or weight.shape[1]
    if act_order or group_size is None:
        scales, zeros = rounding.in_fixed_groups(order, size)
    else:
        scales, zeros = rounding.in_groups_as_reached(size)
    codes = torch.empty_like(rounding.codes)
    codes[order] = rounding.codes
    return ScalarWeight.from_parts(scheme, codes.T, scales=scales.T, zeros=zeros.T)


class _Rounding:
    """The columns of a weight in the order of rounding, as rows: `columns` fp32 and `codes` uint8 [in, out]."""

    def __init__(self, columns: Tensor, feedback: Tensor, costs: Tensor, *, bits: int, clip: str):
        self.columns, self.feedback, self.costs, self.bits, self.clip = columns, feedback, costs, bits, clip
        self.errors = torch.zeros_like(columns)
        self.codes = torch.zeros_like(columns, dtype=torch.uint8)

    def in_fixed_groups(self, order: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """Round all columns on grids found beforehand; `order[j]` is the place of column j among the inputs.

        Returns scales and zeros [groups, out].
        """
        groups = [place // size for place in order.tolist()]
        by_place = order.argsort()
        scales, zeros = self._grids(self.columns[by_place], self.costs[by_place], size)
        for start in range(0, len(groups), BLOCK):
            block = slice(start, start + BLOCK)
            self._round(start, self._known(block), [(scales[group], zeros[group]) for group in groups[block]])
        return scales, zeros

    def in_groups_as_reached(self, size: int) -> tuple[Tensor, Tensor]:
        """Round all columns, each group on a grid for its targets by then; returns scales and zeros [groups, out]."""
        found = []
        for start in range(0, len(self.columns), size):
            group = slice(start, start + size)
            known = self._known(group)
            # The best weights if no column from here on were rounded; F of the group undoes their feedback.
            own = self.feedback[group, group]
            best = self.columns[group] + torch.linalg.solve_triangular(own, known, upper=False, unitriangular=True)
            scales, zeros = self._grids(best, self.costs[group], size)
            self._round(start, known, [(scales[0], zeros[0])] * size)
            found.append((scales, zeros))
        scales, zeros = (torch.cat(rows) for rows in zip(*found, strict=True))
        return scales, zeros

    def _grids(self, columns: Tensor, costs: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """Scales and zeros [groups, out] for consecutive groups of columns."""
        rows = columns.T.reshape(-1, size)
        weights = costs.view(-1, size)

        def weighted(difference: Tensor) -> Tensor:
            return (difference.view(-1, *weights.shape).square_() * weights).sum(2).flatten()

        error = weighted if self.clip == "hessian" else sum_of_squares
        scales, zeros = find_grid(rows, self.bits, self.clip, error=error)
        shape = (columns.shape[1], -1)
        return scales.view(shape).T.contiguous(), zeros.view(shape).T.contiguous()

    def _known(self, block: slice) -> Tensor:
        """The feedback that the errors of all columns before a block add to its targets."""
        return self.feedback[block, : block.start] @ self.errors[: block.start]

    def _round(self, start: int, known: Tensor, grids: list[tuple[Tensor, Tensor]]) -> None:
        for j, (scales, zeros) in enumerate(grids, start):
            target = self.columns[j] + known[j - start] + self.feedback[j, start:j] @ self.errors[start:j]
            codes = round_to_grid(target[:, None], scales, zeros, bits=self.bits)[:, 0]
            self.codes[j] = codes
            self.errors[j] = self.columns[j] - (codes - zeros) * scales


def _encode(weight: Tensor, hessian: Tensor, scheme: ScalarScheme, *, config: GptqConfig, layer: str, **_):
    return encode(
        weight,
        hessian,
        bits=scheme.bits,
        clip=config.clip,
        group_size=scheme.group_size,
        act_order=config.act_order,
        damping=config.damping,
        layer=layer,
    )


def _encoder_bytes(shape: Shape, config: GptqConfig) -> float:
    """Bytes while encoding: three Hessians while it is reordered, then factor, columns, errors and grids; fp32."""
    square, full = 4 * shape[1] ** 2, 4 * shape[0] * shape[1]
    return full + max(3 * square, square + 5.3 * full)


def _effort(shape: Shape, config: GptqConfig) -> float:
    """Weights that are searched, a step of Python's per column, and passes over the Hessian, in times of a weight."""
    out, size = shape
    return size * (out + size / 4 + 400) + size**2 * (out + size / 15) / 3600 + 60_000


GPTQ = Codec(
    encode=_encode,
    scheme=scalar_scheme_of("gptq"),
    needs_hessian=lambda config: True,
    encoder_bytes=_encoder_bytes,
    effort=_effort,
)
