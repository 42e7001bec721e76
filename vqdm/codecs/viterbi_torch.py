"""The search of `vqdm.codecs.viterbi`, described there, for many sequences at once on any device."""

from itertools import pairwise

import torch
from torch import Tensor

from vqdm.codecs.viterbi_compiled import SEAM, SHORT_TURNS, turn_start


def choose_states(targets: Tensor, weights: Tensor, table: Tensor, *, quarter_rate: int) -> Tensor:
    """The states of n sequences, int32 [n, T], for fp32 targets and weights [n, T] and a table [2^L]."""
    length = targets.shape[1]
    bounds = [quarter_rate * t // 4 for t in range(length + 1)]
    shifts = [after - before for before, after in pairwise(bounds)]
    problem = targets, weights, table, shifts

    seam = [t % length for t in range(-SEAM, SEAM)]
    costs, origins = _costs(*problem, seam, targets.new_zeros(len(targets), len(table) >> shifts[seam[-1]]))
    state = costs.argmin(1) << shifts[seam[0]]
    found = {0: _way_back(state, origins[:SEAM], [shifts[t] for t in seam[:SEAM]], table)[-1]}
    for turn in range(1, 1 + (SHORT_TURNS if length <= SEAM else 1)):
        first = turn_start(turn, length)
        circle = [*range(first, length), *range(first)]
        ends = torch.full((len(targets), len(table) >> shifts[first - 1]), torch.inf, device=targets.device)
        ends.scatter_(1, found[first][:, None] & (ends.shape[1] - 1), 0.0)
        _, origins = _costs(*problem, circle, ends)
        states = _way_back(found[first], origins, [shifts[t] for t in circle[:-1]], table)
        found = dict(zip(circle, states, strict=True))
    return torch.stack([found[t] for t in range(length)], 1).int()


def _costs(targets, weights, table, shifts, values, costs):
    """Costs m at the first of `values` from those at the last, fp32 [n, 2^(L−K)]; each step's best top bits, uint8."""
    origins = []
    for after, t in zip(values[-2::-1], values[:0:-1], strict=True):
        error = weights[:, t, None] * (targets[:, t, None] - table).square()
        total = costs.repeat_interleave(1 << shifts[t], dim=1) + error
        costs, origin = total.view(len(total), 1 << shifts[after], -1).min(1)
        origins.append(origin.byte())
    return costs, origins[::-1]


def _way_back(state, origins, shifts, table):
    """Yield the states [n] of all values, from the given one on."""
    states = [state]
    for origin, shift in zip(origins, shifts, strict=True):
        low = states[-1] >> shift
        states.append(low | (origin.gather(1, low[:, None])[:, 0].long() * (len(table) >> shift)))
    return states
