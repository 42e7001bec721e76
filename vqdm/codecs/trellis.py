"""Trellis codes with Hessian feedback: columns with water-filled rates, each searched by Viterbi.

Column after column, the errors of earlier columns are fed back into the target (feedback.py), so that the output error
tr(ΔW H ΔWᵀ) is the sum of d_j ‖target_j − decoded_j‖². Columns get bits by the logarithm of their cost (reverse
water-filling, Cover and Thomas 10.3.3); rows count by their weights in the search.
"""

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vqdm.codecs import gptq
from vqdm.codecs.bit_budget import layer_bits
from vqdm.codecs.checks import check_hessian, check_matrix
from vqdm.codecs.codec import Codec, Harm, Shape
from vqdm.codecs.feedback import feedback_of
from vqdm.codecs.trellis_table import load_table, target_scale
from vqdm.codecs.viterbi import Search
from vqdm.config.codecs import TrellisConfig
from vqdm.errors import UserError
from vqdm.models.specs import LayerSpec
from vqdm.weights.base import LARGEST, STORED, QuantizedWeight, Scheme
from vqdm.weights.scalar import ScalarScheme
from vqdm.weights.trellis import TrellisScheme, TrellisTable, TrellisWeight
from vqdm.weights.trellis_codes import ByteScales, decode_trellis
from vqdm.weights.trellis_format import (
    BYTE,
    FEWEST_OUTPUTS,
    HIGHEST_RATE,
    LOWEST_RATE,
    WIDE,
    byte_scale,
    column_bits,
    reason_to_skip,
    sequence_length,
    side_bits,
    stream_bytes,
)

BLOCK = 128  # columns between two feedback products over all later ones
SMALL = 1 << 18  # weights; smaller layers are also coded at uniform rates, and the better result is kept
ROW_STEPS = 4  # per octave: row scales that are tried for rows with large weights
ROOM = 1.5  # between the largest scale of a grid and the largest column
COARSE = 0.025  # of the error: what spacing scales by 2^(1/2) instead of 2^(1/4) adds
NARROW = ScalarScheme(codec="gptq", bits=TrellisConfig.scalar_bits)  # codes of layers under FEWEST_OUTPUTS
RATES = {WIDE: (0, *range(LOWEST_RATE, HIGHEST_RATE + 1)), BYTE: (0, *range(LOWEST_RATE, HIGHEST_RATE + 1, 2))}


def encode(
    weight: Tensor,
    hessian: Tensor,
    *,
    bits: float,
    table: TrellisTable,
    damping: float = 0.003,
    row_exponent: float = 1.0,
    layer: str = "",
) -> TrellisWeight:
    """Quantize [out, in] to `bits` per weight, scales and rates included, against the Hessian [in, in] of its inputs.

    damping: added to the Hessian's diagonal, relative to its mean. row_exponent: rows weigh as size^(2·row_exponent) in
    the search; 1 is their true share of the output error, 0 gives small rows the same relative error as large ones.
    layer: the name for messages. UserError for non-finite input and for a matrix that cannot be held at `bits`.
    """
    check_matrix(weight, layer=layer)
    check_hessian(hessian, weight, layer=layer)
    shape = tuple(weight.shape)
    reason = reason_to_skip(shape, bits)
    if reason is not None:
        raise UserError(f"layer {layer} cannot be coded by trellis{bits:g}: {reason}; leave it out of the pattern")
    scheme = TrellisScheme.of_layer(shape, bits)
    weight, hessian = weight.detach().float(), hessian.float()
    feedback, costs = feedback_of(hessian, damping=damping, layer=layer)
    values = table.table.detach().float().to(weight.device)
    search = Search(values, sequence_length(shape[0]))
    rows, candidates = _rows_and_rates(
        weight, costs, scheme, row_exponent=row_exponent, reach=float(values.abs().max())
    )

    found = []
    for rates in candidates:
        grid = _grid_of(rows, costs, rates) if scheme.side == BYTE else None
        states, column_scales = _code(rows, feedback, rates, search, grid)
        stored = column_scales if grid is None else ByteScales(column_scales, grid.fine)
        factors = stored if grid is None else stored.values().to(weight.device)
        decoded = decode_trellis(states, rates, values, torch.ones_like(rows.scales), factors)
        scales = _fit_rows(weight, decoded, hessian, rows.scales).to(STORED)
        quantized = TrellisWeight.from_parts(
            scheme, states, rates, table=table, row_scales=scales, column_scales=stored
        )
        if len(candidates) == 1:
            return quantized
        found.append((output_error(weight, decoded * scales[:, None].float(), hessian), len(found), quantized))
    return min(found)[2]


@dataclass(frozen=True)
class _Rows:
    """A weight whose rows are divided by scales. columns: [in, out]; importance: what rows weigh in the search."""

    scales: Tensor
    columns: Tensor
    importance: Tensor

    @classmethod
    def divided(cls, weight: Tensor, scales: Tensor, row_exponent: float) -> "_Rows":
        importance = (scales / scales.max().clamp(min=1e-30)).pow(2 * row_exponent)
        columns = (weight * torch.where(scales > 0, 1 / scales, 0.0)[:, None]).T.contiguous()
        return cls(scales, columns, importance)

    def power(self) -> Tensor:
        """The sum of squares of every column, rows by their importance: [in]."""
        return self.columns.square() @ self.importance


def _rows_and_rates(
    weight: Tensor, costs: Tensor, scheme: TrellisScheme, *, row_exponent: float, reach: float
) -> tuple[_Rows, list[Tensor]]:
    """Rows divided by their RMS, or by more where that loses less, and the column rates to try."""
    shape = tuple(weight.shape)
    rms = weight.square().mean(1).sqrt().clamp(max=LARGEST)
    rows = _Rows.divided(weight, rms, row_exponent)
    budget = 8 * stream_bytes(shape, scheme.bits, scheme.side)
    fill = functools.partial(water_filling, out=shape[0], budget=budget, rates=RATES[scheme.side])
    rates = fill(costs * rows.power())
    scales = _robust_scales(rows, costs, rates, reach)
    if not torch.equal(scales, rms):
        rows = _Rows.divided(weight, scales, row_exponent)
        rates = fill(costs * rows.power())
    if shape[0] * shape[1] > SMALL:
        return rows, [rates]
    return rows, [rates, fill(torch.ones_like(costs))]


def _robust_scales(rows: _Rows, costs: Tensor, rates: Tensor, reach: float) -> Tensor:
    """Row scales [out] that balance two errors: of weights beyond the table's reach, and of all others' coarser codes.

    A column of scale c reaches ± reach · c · s in a row of scale s. With s raised by a factor f, the row's error is

        Σ_j d_j max(|w_j| − f · reach · c_j · s, 0)² + f² s² Σ_j d_j c_j² 2^(−2 R_j),

    summed over the columns that have bits (d_j: costs, R_j: bits). f is the best of steps of 2^(1/4) from 1 on.
    """
    coded = rates > 0
    squares = rows.power() / rows.importance.sum().clamp(min=1e-30)
    granular = float((costs * squares * torch.pow(2.0, -rates / 2)).sum())
    limits = reach * squares.sqrt()
    excess = torch.where(coded[:, None], rows.columns.abs() / limits.clamp(min=1e-30)[:, None], 0.0).amax(0)
    scales = rows.scales.clone()
    for row in (excess > 1).nonzero().flatten().tolist():
        steps = torch.arange(math.ceil(ROW_STEPS * math.log2(float(excess[row]))) + 1, device=scales.device)
        factors = torch.pow(2.0, steps / ROW_STEPS)
        beyond = (rows.columns[:, row].abs() - factors[:, None] * limits).clamp(min=0).square() @ (costs * coded)
        scales[row] *= factors[(beyond + factors.square() * granular).argmin()]
    return scales.clamp(max=LARGEST)


def output_error(weight: Tensor, decoded: Tensor, hessian: Tensor) -> float:
    """The output error tr(ΔW H ΔWᵀ)."""
    change = weight - decoded
    return float(((change @ hessian) * change).sum())


def water_filling(power: Tensor, out: int, budget: int, rates: Sequence[int] = RATES[WIDE]) -> Tensor:
    """Quarter bits per weight of every column: int64 [in]; at most `budget` bits in all for columns of `out` values.

    power: [in], a column's cost at rate 0. rates: the possible ones, rising from 0. While they fit, bits go where one
    saves most, with D(R) = power · 2^(−2R); fewer are left over than the cheapest step of any column takes.
    """
    steps = torch.tensor(rates, device=power.device)
    cost = column_bits(out, steps).diff()  # bits of a step
    saved = -torch.pow(2.0, -steps.double() / 2).diff() / cost  # of unit power, per bit of it
    gains = power.double().clamp(min=0)[:, None] * saved.cummin(0).values  # no step before those it builds on
    order = gains.flatten().argsort(descending=True, stable=True)
    spent = cost[order % len(cost)].cumsum(0)
    fitting = int((spent <= budget).sum())
    taken = torch.bincount(order[:fitting] // len(cost), minlength=len(power))
    left = budget - (int(spent[fitting - 1]) if fitting else 0)
    return steps[_take_the_rest(taken.tolist(), cost.tolist(), order[fitting:].tolist(), left, power.device)]


def _take_the_rest(taken: list[int], cost: list[int], order: list[int], left: int, device) -> Tensor:
    """Take further steps in order, skipping those that no longer fit (and those that build on them)."""
    cheapest = min(cost)
    for step in order:
        if left < cheapest:
            break
        column, number = divmod(step, len(cost))
        if taken[column] == number and cost[number] <= left:
            taken[column] += 1
            left -= cost[number]
    return torch.tensor(taken, device=device)


@dataclass(frozen=True)
class _Grid:
    """The sixteen scales that BYTE columns of a layer choose from: unit · byte_scale(code, fine)."""

    unit: float
    fine: bool

    def nearest(self, scale: float) -> tuple[int, float]:
        """The code whose scale is nearest, by their ratio, and its scale."""
        steps = (math.log2(max(scale, 1e-30) / self.unit) + 4) * (4 if self.fine else 2)
        code = min(max(round(steps), 0), 15)
        return code, self.unit * byte_scale(code, int(self.fine))


def _grid_of(rows: _Rows, costs: Tensor, rates: Tensor) -> _Grid:
    """The grid from the largest column, with room for what feedback adds to it, down: fine if that reaches low enough.

    A column of scale c_j below the lowest of the grid, m, is coded like one of scale m. With its bits R_j and cost d_j
    this adds d_j (m² − c_j²) 2^(−2 R_j) to the error Σ_j d_j c_j² 2^(−2 R_j); coarser scales add COARSE of it.
    """
    squares = rows.power() / rows.importance.sum().clamp(min=1e-30)  # c_j²
    errors = costs * torch.pow(2.0, -rates / 2) * (rates > 0)
    if not bool((errors * squares).sum() > 0):
        return _Grid(1.0, True)
    top = ROOM * float(squares[rates > 0].max().sqrt())
    lowest = top * byte_scale(0, 1) / byte_scale(15, 1)
    added = (errors * (lowest**2 - squares).clamp(min=0)).sum()
    fine = bool(added <= COARSE * (errors * squares).sum())
    return _Grid(top / byte_scale(15, int(fine)), fine)


def _code(rows: _Rows, feedback: Tensor, rates: Tensor, search: Search, grid: _Grid | None) -> tuple[Tensor, Tensor]:
    """Code every column in turn against its feedback-corrected target: states int32 [in, out], column scales [in].

    feedback: F [in, in]. Scales are fp16, or codes of the grid, uint8. Where there is a grid, the search takes its
    scales: codes make up for their coarseness. A column whose target is 0 gets the rate 0, in place.
    """
    count, out = rows.columns.shape
    importance, targets = rows.importance, rows.columns.clone()
    states = torch.zeros(count, out, dtype=torch.int32, device=targets.device)
    scales = torch.zeros(count, dtype=STORED if grid is None else torch.uint8, device=targets.device)
    total = importance.sum()
    rate_list = rates.tolist()
    for first in range(0, count, BLOCK):
        last = min(first + BLOCK, count)
        errors = rows.columns[first:last].clone()
        for j in range(first, last):
            target = targets[j]
            if j > first:
                target = torch.addmv(target, errors[: j - first].T, feedback[j, first:j])
            if rate_list[j] == 0:
                continue
            scale = float((importance @ target.square() / total).sqrt()) / target_scale(rate_list[j])
            if not scale > 0:
                rates[j] = 0
                continue
            if grid is not None:
                _, scale = grid.nearest(scale)
            states[j], values = search(target / scale, importance, rate_list[j])
            fitted = (importance * target) @ values / ((importance * values) @ values).clamp(min=1e-30)
            if grid is None:
                scales[j] = fitted.clamp(-LARGEST, LARGEST)
                errors[j - first] -= scales[j].float() * values
            else:
                scales[j], scale = grid.nearest(float(fitted))
                errors[j - first] -= scale * values
        targets[last:].addmm_(feedback[last:, first:last], errors)
    return states, scales


def _fit_rows(weight: Tensor, decoded: Tensor, hessian: Tensor, row_scales: Tensor) -> Tensor:
    """The row scales of least output error, ⟨w, q⟩_H / ⟨q, q⟩_H, or the given ones where q is 0. decoded: unscaled."""
    product = decoded @ hessian
    power = (decoded * product).sum(1)
    fitted = (weight * product).sum(1) / power.clamp(min=1e-30)
    return torch.where(power > 0, fitted, row_scales).clamp(-LARGEST, LARGEST)


def _encode(
    weight: Tensor,
    hessian: Tensor,
    scheme: TrellisScheme | ScalarScheme,
    *,
    config: TrellisConfig,
    shared: TrellisTable | None,
    layer: str,
) -> QuantizedWeight:
    if isinstance(scheme, ScalarScheme):
        return gptq.encode(weight, hessian, bits=scheme.bits, clip="hessian", damping=config.damping, layer=layer)
    return encode(
        weight,
        hessian,
        bits=scheme.bits,
        table=shared,
        damping=config.damping,
        row_exponent=config.row_exponent,
        layer=layer,
    )


def _assign(specs: list[LayerSpec], config: TrellisConfig, harm: Harm | None) -> dict[str, Scheme | str]:
    narrow = [spec for spec in specs if _takes_scalar_codes(spec.shape)]
    fitting = [spec for spec in specs if reason_to_skip(spec.shape, 16) is None]
    left = _bits_left(narrow, fitting, config)
    bits = layer_bits(fitting, left, by_harm=config.allocation == "sensitivity", harm=harm)
    found: dict[str, Scheme | str] = {spec.name: reason_to_skip(spec.shape, 16) for spec in specs}
    found |= {spec.name: NARROW for spec in narrow}
    return found | {spec.name: TrellisScheme.of_layer(spec.shape, bits[spec.name]) for spec in fitting}


def _takes_scalar_codes(shape: Shape) -> bool:
    """True for layers of too few outputs for a trellis, unless scalar codes save nothing there."""
    return shape[0] < FEWEST_OUTPUTS and _scalar_bits(shape) < 16


def _scalar_bits(shape: Shape) -> float:
    """Bits per weight of NARROW codes: a scale and a zero point, of 16 bits each, per row."""
    return NARROW.bits + 32 / shape[1]


def _bits_left(narrow: list[LayerSpec], fitting: list[LayerSpec], config: TrellisConfig) -> float:
    """Bits per weight that `narrow` layers leave to those of a trellis, so that all together take `config.bits`.

    UserError if that is nothing.
    """
    if not narrow:
        return config.bits
    size = sum(spec.size for spec in fitting)
    total = config.bits * (size + sum(spec.size for spec in narrow))
    left = (total - sum(_scalar_bits(spec.shape) * spec.size for spec in narrow)) / max(size, 1)
    if left <= 0:
        raise UserError(
            f"quantize.bits={config.bits:g} is less than layers of fewer than {FEWEST_OUTPUTS} outputs take, in "
            f"{NARROW.bits} bits: leave them out by model.min_size={FEWEST_OUTPUTS}"
        )
    return left


def _scheme_at(spec: LayerSpec, code_bits: float) -> TrellisScheme | None:
    if reason_to_skip(spec.shape, 16) is not None:
        return None
    return TrellisScheme.of_layer(spec.shape, code_bits + side_bits(spec.shape))


def _make_shared(matrices: Iterable[Tensor], scheme: TrellisScheme, config: TrellisConfig) -> TrellisTable:
    """The trellis table, the same for all models."""
    return TrellisTable.from_values(load_table())


def _encoder_bytes(shape: Shape, config: TrellisConfig) -> float:
    """Bytes while encoding: the Hessian and its factor, then the factor and bit positions as int64."""
    square, full = 4 * shape[1] ** 2, 4 * shape[0] * shape[1]
    return full + max(2 * square, square + 27 * full)


def _effort(shape: Shape, config: TrellisConfig) -> float:
    """Weights, and the steps of every column, which take as long as 110 rows."""
    return shape[1] * (shape[0] + 110)


TRELLIS = Codec(
    encode=_encode,
    assign=_assign,
    scheme_at=_scheme_at,
    needs_hessian=lambda config: True,
    data_free=lambda config: config.allocation == "uniform",
    encoder_bytes=_encoder_bytes,
    effort=_effort,
    make_shared=_make_shared,
)
