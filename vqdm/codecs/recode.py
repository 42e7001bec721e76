"""New codes for a quantized weight, as near to a target as its tables, scales and rates allow.

The metric is the plain squared error of the weight, without Hessian or error feedback. This is the discrete step of
PV-Tuning (Malinovskii et al. 2024, algorithm 1, "V step"); the continuous one is the training of float parameters.
Whatever a search finds, codes are replaced only where the decoded weight then lies strictly nearer to the target.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from vqdm.codecs.additive_fast import BLOCK, search
from vqdm.codecs.additive_steps import Parts
from vqdm.codecs.viterbi import Search
from vqdm.errors import UserError
from vqdm.weights.additive import AdditiveWeight, decode_additive
from vqdm.weights.base import QuantizedWeight, widened
from vqdm.weights.low_rank import LowRankWeight
from vqdm.weights.scalar import ScalarWeight, decode_scalar, per_input
from vqdm.weights.trellis import TrellisWeight
from vqdm.weights.trellis_codes import decode_trellis, pack_states, unpack_states
from vqdm.weights.trellis_format import sequence_length

BEAM_SIZE = 4  # beam size of the search over a group's codebooks
REACH = 1e3  # targets may lie within this many times a table's values: beyond it fp32 costs lose the other values
CHUNK = 1 << 18  # weights whose states are searched at once


@torch.no_grad()
def recode_(weight: QuantizedWeight, target: Tensor, *, beam_size: int = BEAM_SIZE) -> int:
    """Replace codes in place by ones that decode nearer to `target` [out, in]; returns how many changed.

    This counts weights for scalar codes, groups for additive codes and states for trellis codes. No weight, group or
    sequence of a column, respectively, gets further from the target. beam_size: for the search of additive codes.
    UserError for a target that is not finite; ValueError for a shape other than the weight's and for groups of several
    outputs.
    """
    if tuple(target.shape) != weight.shape:
        raise ValueError(f"the target must be {list(weight.shape)}, not {list(target.shape)}")
    if not bool(torch.isfinite(target).all()):
        raise UserError("the weights that codes are to follow are infinite or NaN: lower the learning rate")
    target = target.detach().contiguous()
    if isinstance(weight, LowRankWeight):  # input scales only weigh the inputs' errors: the search takes them as one
        left = target - weight.product().to(target.dtype)
        scales = weight.input_scales
        return recode_(weight.base, left if scales is None else left / scales.to(left.dtype), beam_size=beam_size)
    if isinstance(weight, TrellisWeight):
        return _recode_trellis(weight, target)
    if isinstance(weight, AdditiveWeight):
        return _recode_additive(weight, target, beam_size)
    if isinstance(weight, ScalarWeight):
        return _recode_scalar(weight, target)
    raise TypeError(f"no search for the codes of a {type(weight).__name__}")


def _divided(target: Tensor, scales: Tensor, largest: Tensor) -> Tensor:
    """target / scales in fp32, with 0 where the scale is 0, clipped to REACH times `largest`."""
    limit = REACH * largest.float()
    return torch.where(scales != 0, target / scales, 0.0).float().clamp(-limit, limit)


def _recode_scalar(weight: ScalarWeight, target: Tensor) -> int:
    dtype, (scales, zeros) = widened(weight.scales, weight.zeros)
    present = weight.unpacked_codes()
    split, inputs = weight.scheme.split, weight.shape[1]
    steps, offsets = per_input(scales, inputs, split), per_input(zeros, inputs, split)
    quotient = torch.where(steps != 0, target.to(steps.dtype) / steps, 0.0)
    chosen = torch.round(quotient + offsets).clamp(0, 2**weight.scheme.bits - 1).to(present.dtype)

    def errors(codes: Tensor) -> Tensor:
        return (target - decode_scalar(codes, scales, zeros, split=split).to(dtype)).abs()

    nearer = errors(chosen) < errors(present)
    return _replace(weight, nearer, chosen, present)


def _recode_additive(weight: AdditiveWeight, target: Tensor, beam_size: int) -> int:
    if weight.scheme.out_group_size != 1:
        raise ValueError(f"the codes of {weight.scheme.name} cannot be searched: its groups have several outputs")
    dtype, (codebooks, scales, columns) = widened(weight.effective_codebooks(), weight.scales, weight.input_scales)
    present = weight.unpacked_codes()
    products = scales[:, None] * (torch.ones_like(target[0]) if columns is None else columns)
    normalised = _divided(target, products, codebooks.abs().amax() * len(codebooks)).cpu()
    metric = torch.ones(weight.shape[1], device="cpu") if columns is None else columns.float().cpu().square()
    parts = Parts(codebooks[:, :, 0].float().cpu(), present.cpu(), torch.ones(weight.shape[0], device="cpu"))
    chosen = _search_groups(normalised, metric, parts, beam_size).to(present.device)

    def errors(codes: Tensor) -> Tensor:
        squares = (target - decode_additive(codes, codebooks, scales, columns).to(dtype)).square()
        return squares.view(*codes.shape[:2], -1).sum(2, dtype=torch.float64)

    nearer = errors(chosen) < errors(present)
    return _replace(weight, nearer[..., None], chosen, present)


def _search_groups(target: Tensor, metric: Tensor, parts: Parts, beam_size: int) -> Tensor:
    """The codes that a beam finds, starting from those of `parts`: int32 [out, groups, M]. metric [in]: error weights.

    Nothing couples the groups, so they are taken in blocks, whose coupling matrix is small.
    """
    group_size, codes = parts.codebooks.shape[2], parts.codes.clone()
    count = max(1, BLOCK // group_size)
    for first in range(0, codes.shape[1], count):
        inputs = slice(first * group_size, (first + count) * group_size)
        block = Parts(parts.codebooks, codes[:, first : first + count].contiguous(), parts.scales)
        search(target[:, inputs].contiguous(), metric[inputs].diag(), block, beam_size=beam_size)
        codes[:, first : first + count] = block.codes
    return codes


def _replace(weight: ScalarWeight | AdditiveWeight, nearer: Tensor, chosen: Tensor, present: Tensor) -> int:
    count = int(nearer.sum())
    if count:
        weight.set_codes(torch.where(nearer, chosen, present))
    return count


def _recode_trellis(weight: TrellisWeight, target: Tensor) -> int:
    rates, out = weight.unpacked_rates(), weight.shape[0]
    dtype, table, rows, columns = weight.factors()
    present = unpack_states(weight.stream, rates, out)
    length = sequence_length(out)

    def errors(states: Tensor) -> Tensor:
        """Weighted squared error of every sequence: fp64 [in, sequences]."""
        squares = (target - decode_trellis(states, rates, table, rows, columns).to(dtype)).square()
        return F.pad(squares, (0, 0, 0, -out % length)).view(-1, length, len(rates)).sum(1, dtype=torch.float64).T

    before = errors(present)
    chosen, open_columns = present.clone(), (rates > 0) & (columns != 0) & (before.sum(1) > 0)
    importance = (rows / rows.abs().max().clamp(min=1e-30)).float().square()
    step = max(1, CHUNK // out)
    for rate in rates[open_columns].unique().tolist():
        for part in (open_columns & (rates == rate)).nonzero()[:, 0].split(step):
            quotients = _divided(target.T[part], columns[part, None] * rows, table.abs().max())
            chosen[part] = _search_columns(quotients, importance, table, rate)

    nearer = errors(chosen) < before
    nearer = nearer.repeat_interleave(length, 1)[:, :out]  # whole sequences are replaced, as only these are paths
    chosen = torch.where(nearer, chosen, present)
    if bool(nearer.any()):
        weight.stream.copy_(pack_states(chosen, rates, len(weight.stream)))
    return int((chosen != present).sum())


def _search_columns(targets: Tensor, importance: Tensor, table: Tensor, rate: int) -> Tensor:
    """The states of columns of one rate, end to end: fp32 [columns, out] and weights [out] to int32 [columns, out]."""
    count, out = targets.shape
    length = sequence_length(out)
    cut = out // length * length
    states = []
    for values, size in ((slice(cut), length), (slice(cut, out), out - cut)):  # whole sequences, then a shorter one
        if size:
            search_states = Search(table, size)
            found = search_states(targets[:, values].reshape(-1), importance[values].repeat(count), rate)
            states.append(found.states.view(count, -1))
    return torch.cat(states, 1)
