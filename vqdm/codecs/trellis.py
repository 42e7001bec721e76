"""Trellis codes with Hessian feedback: columns with water-filled rates, each searched by Viterbi.

Column after column, the errors of earlier columns are fed back into the target (feedback.py), so that the output error
tr(ΔW H ΔWᵀ) is the sum of d_j ‖target_j − decoded_j‖². Columns get bits by the logarithm of their cost (reverse
water-filling, Cover and Thomas 10.3.3); rows count by their weights in the search.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from vqdm.codecs.bit_budget import layer_bits
from vqdm.codecs.checks import check_hessian, check_matrix
from vqdm.codecs.codec import Codec, Harm, Shape
from vqdm.codecs.feedback import feedback_of
from vqdm.codecs.trellis_table import load_table, target_scale
from vqdm.codecs.viterbi import Search
from vqdm.config.codecs import TrellisConfig
from vqdm.errors import UserError
from vqdm.models.specs import LayerSpec
from vqdm.weights.base import LARGEST, STORED, Scheme
from vqdm.weights.trellis import TrellisScheme, TrellisTable, TrellisWeight, decode_trellis
from vqdm.weights.trellis_format import (
    HIGHEST_RATE,
    LOWEST_RATE,
    column_bits,
    reason_to_skip,
    sequence_length,
    side_bits,
    stream_bytes,
)

BLOCK = 128  # columns between two feedback products over all later ones
SMALL = 1 << 18  # weights; smaller layers are also coded at uniform rates, and the better result is kept


def encode(
    weight: Tensor,
    hessian: Tensor,
    *,
    bits: float,
    table: TrellisTable,
    damping: float = 0.01,
    row_exponent: float = 1.0,
    layer: str = "",
) -> TrellisWeight:
    """Quantize [out, in] to `bits` per weight, scales and rates included, against the Hessian [in, in] of its inputs.

    damping: added to the Hessian's diagonal, relative to its mean. row_exponent: rows weigh as RMS^(2·row_exponent) in
    the search; 1 is their true share of the output error, 0 gives small rows the same relative error as large ones.
    layer: the name for messages. UserError for non-finite input and for a matrix that cannot be held at `bits`.
    """
    check_matrix(weight, layer=layer)
    check_hessian(hessian, weight, layer=layer)
    scheme, shape = TrellisScheme(bits=bits), tuple(weight.shape)
    reason = reason_to_skip(shape, bits)
    if reason is not None:
        raise UserError(f"layer {layer} cannot be coded by trellis{bits:g}: {reason}; leave it out of the pattern")
    weight, hessian = weight.detach().float(), hessian.float()
    row_scales = weight.square().mean(1).sqrt().clamp(max=LARGEST)
    feedback, costs = feedback_of(hessian, damping=damping, layer=layer)
    importance = (row_scales / row_scales.max().clamp(min=1e-30)).pow(2 * row_exponent)
    columns = (weight * torch.where(row_scales > 0, 1 / row_scales, 0.0)[:, None]).T.contiguous()
    power = costs * (columns.square() @ importance)
    values = table.table.detach().float().to(weight.device)
    search = Search(values, sequence_length(shape[0]))
    budget = 8 * stream_bytes(shape, bits)

    candidates = _rate_candidates(power, shape, budget)
    found = []
    for rates in candidates:
        states, column_scales = _code(columns, feedback, rates, importance, search)
        decoded = decode_trellis(states, rates, values, torch.ones_like(row_scales), column_scales)
        scales = _fit_rows(weight, decoded, hessian, row_scales).to(STORED)
        quantized = TrellisWeight.from_parts(
            scheme, states, rates, table=table, row_scales=scales, column_scales=column_scales
        )
        if len(candidates) == 1:
            return quantized
        found.append((output_error(weight, decoded * scales[:, None].float(), hessian), len(found), quantized))
    return min(found)[2]


def _rate_candidates(power: Tensor, shape: tuple[int, int], budget: int) -> list[Tensor]:
    filled = water_filling(power, shape[0], budget)
    if shape[0] * shape[1] > SMALL:
        return [filled]
    uniform = water_filling(torch.ones_like(power), shape[0], budget)
    return [filled, uniform]


def output_error(weight: Tensor, decoded: Tensor, hessian: Tensor) -> float:
    """The output error tr(ΔW H ΔWᵀ)."""
    change = weight - decoded
    return float(((change @ hessian) * change).sum())


def water_filling(power: Tensor, out: int, budget: int) -> Tensor:
    """Quarter bits per weight of every column: int64 [in]; at most `budget` bits in all for columns of `out` values.

    power: [in], a column's cost at rate 0. While they fit, bits go where one saves most, with D(R) = power · 2^(−2R);
    fewer are left over than the cheapest step of any column takes.
    """
    steps = torch.tensor([0, *range(LOWEST_RATE, HIGHEST_RATE + 1)], device=power.device)
    cost = column_bits(out, steps).diff()  # bits that a step takes
    saved = -torch.pow(2.0, -steps.double() / 2).diff() / cost  # cost saved at unit power, per bit of the step
    gains = power.double().clamp(min=0)[:, None] * saved
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


def _code(
    columns: Tensor, feedback: Tensor, rates: Tensor, importance: Tensor, search: Search
) -> tuple[Tensor, Tensor]:
    """Code every column in turn against its feedback-corrected target: states int32 [in, out], column scales [in].

    columns: row-normalised weights [in, out]; feedback: F [in, in]. Scales are rounded as stored.
    """
    count, out = columns.shape
    targets = columns.clone()
    states = torch.zeros(count, out, dtype=torch.int32, device=columns.device)
    scales = torch.zeros(count, dtype=STORED, device=columns.device)
    total = importance.sum()
    rate_list = rates.tolist()
    for first in range(0, count, BLOCK):
        last = min(first + BLOCK, count)
        errors = columns[first:last].clone()
        for j in range(first, last):
            target = targets[j]
            if j > first:
                target = torch.addmv(target, errors[: j - first].T, feedback[j, first:j])
            if rate_list[j] == 0:
                continue
            scale = float((importance @ target.square() / total).sqrt()) / target_scale(rate_list[j])
            if not scale > 0:
                continue
            chosen, values = search(target / scale, importance, rate_list[j])
            fitted = (importance * target) @ values / ((importance * values) @ values).clamp(min=1e-30)
            states[j], scales[j] = chosen, fitted.clamp(-LARGEST, LARGEST)
            errors[j - first] -= scales[j].float() * values
        targets[last:].addmm_(feedback[last:, first:last], errors)
    return states, scales


def _fit_rows(weight: Tensor, decoded: Tensor, hessian: Tensor, row_scales: Tensor) -> Tensor:
    """The row scales of least output error, ⟨w, q⟩_H / ⟨q, q⟩_H, or the given ones where q is 0. decoded: unscaled."""
    product = decoded @ hessian
    power = (decoded * product).sum(1)
    fitted = (weight * product).sum(1) / power.clamp(min=1e-30)
    return torch.where(power > 0, fitted, row_scales).clamp(-LARGEST, LARGEST)


def _encode(
    weight: Tensor, hessian: Tensor, scheme: TrellisScheme, *, config: TrellisConfig, shared: TrellisTable, layer: str
) -> TrellisWeight:
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
    bits = layer_bits(specs, config.bits, by_harm=config.allocation == "sensitivity", harm=harm)
    return {
        spec.name: TrellisScheme(bits=bits[spec.name]) if spec.name in bits else reason_to_skip(spec.shape, 16)
        for spec in specs
    }


def _scheme_at(spec: LayerSpec, code_bits: float) -> TrellisScheme | None:
    if reason_to_skip(spec.shape, 16) is not None:
        return None
    return TrellisScheme(bits=code_bits + side_bits(spec.shape))


def _make_shared(matrices: Iterable[Tensor], scheme: TrellisScheme, config: TrellisConfig) -> TrellisTable:
    """The trellis table, the same for all models."""
    return TrellisTable.from_values(load_table())


def _encoder_bytes(shape: Shape, config: TrellisConfig) -> float:
    """Bytes while encoding: the Hessian and its factor, then the factor and bit positions as int64."""
    square, full = 4 * shape[1] ** 2, 4 * shape[0] * shape[1]
    return full + max(2 * square, square + 27 * full)


TRELLIS = Codec(
    encode=_encode,
    assign=_assign,
    scheme_at=_scheme_at,
    needs_hessian=lambda config: True,
    data_free=lambda config: config.allocation == "uniform",
    encoder_bytes=_encoder_bytes,
    make_shared=_make_shared,
)
