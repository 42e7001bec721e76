"""The least-error states of a tail-biting bitshift trellis, by Viterbi: compiled for the CPU, in torch elsewhere.

A sequence of T values at q quarter bits per value is a circular string of B = b_T bits, b_t = (q·t) // 4. The state of
value t is the window of L bits from bit b_t on, least significant first; it decodes to table[state], of 2^L entries.
With K_t = b_{t+1} − b_t, s_t = ((s_{t+1} << K_t) | new bits) mod 2^L, cyclically: the search, for the least
Σ w (x − table[s])², runs from the last value to the first.

Only costs before a value is coded are kept: m_t[j] for j = s_t >> K_t, the low bits of s_{t+1}. One step is
m_{t−1}[s_t mod 2^(L−K_{t−1})] = min over the top K_{t−1} bits of s_t of (m_t[s_t >> K_t] + w_t (x_t − table[s_t])²).
There are no back-pointers: the way back compares the 2^K predecessors of the one state it is in.

Tail-biting is nearly as in QTIP (Tseng et al. 2024, algorithm 4): an unconstrained search over the last and first SEAM
values, end to end, gives the state at the seam; the full search from that state round to itself is exact. A short
sequence is searched again from other places, each time from the state found there, which is never worse.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from vqdm.codecs.viterbi_compiled import check_window, choose_states_numpy, prepare, shortest_sequence


class Found(NamedTuple):
    """Result of a search. states: int32 [out], each below 2^L; values: fp32 [out], the table's at these states."""

    states: Tensor
    values: Tensor


class Search:
    """A search with one table [2^L], L >= 3, and one sequence length, for many columns; threads may share it.

    A column is cut into sequences of `sequence_length` values; the last may be shorter.
    """

    def __init__(self, table: Tensor, sequence_length: int):
        self.table = table.detach().float()
        self.sequence_length = sequence_length
        self.layouts = prepare(self.table.numpy()) if table.device.type == "cpu" else None

    def __call__(self, targets: Tensor, weights: Tensor, quarter_rate: int) -> Found:
        """Search one column; the result is the same on every run and thread of a machine.

        targets, weights: fp32 [out] on the table's device, weights >= 0. ValueError if a sequence's bits do not fill a
        window, or if the rate's shifts do not fit in it twice.
        """
        if self.layouts is not None:
            states = choose_states_numpy(
                targets.detach().float().contiguous().numpy(),
                weights.detach().float().contiguous().numpy(),
                self.layouts,
                quarter_rate=quarter_rate,
                sequence_length=self.sequence_length,
            )
            return Found(torch.from_numpy(states), torch.from_numpy(self.layouts[0][states]))
        from vqdm.codecs import viterbi_torch  # it imports from this file

        check_window(shortest_sequence(len(targets), self.sequence_length), quarter_rate, len(self.table))
        cut = len(targets) // self.sequence_length * self.sequence_length  # whole sequences, then the rest as one
        parts = [
            viterbi_torch.choose_states(x.view(n, -1), w.view(n, -1), self.table, quarter_rate=quarter_rate).flatten()
            for x, w, n in (
                (targets[:cut], weights[:cut], cut // self.sequence_length),
                (targets[cut:], weights[cut:], 1),
            )
            if len(x)
        ]
        states = torch.cat(parts)
        return Found(states, self.table[states])


def choose_states(
    targets: Tensor, weights: Tensor, table: Tensor, *, quarter_rate: int, sequence_length: int
) -> Tensor:
    """The states of one column, int32 [out], by a `Search` for this call alone."""
    return Search(table, sequence_length)(targets, weights, quarter_rate).states
