"""Trellis codes in torch: streams to states and back, and weights from them; `trellis` describes the format."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vqdm.weights.base import widened
from vqdm.weights.bitpack import unpack
from vqdm.weights.trellis_format import (
    BYTE,
    HIGHEST_RATE,
    LOWEST_RATE,
    RATE_BITS,
    WINDOW_BITS,
    byte_scale,
    column_bits,
    columns_bytes,
    sequence_length,
)

CHUNK = 1 << 22  # weights decoded at once


@dataclass(frozen=True)
class ByteScales:
    """Scales of BYTE columns. codes: 0 to 15, uint8 [in]; fine: spaced by 2^(1/4), else by 2^(1/2)."""

    codes: Tensor
    fine: bool

    def values(self) -> Tensor:
        """fp32 [in]."""
        return byte_scale(self.codes.int(), int(self.fine)).float()


def byte_scales(packed: Tensor) -> Tensor:
    """The scales of packed BYTE columns: uint8 [1 + in] to fp32 [in]."""
    return byte_scale((packed[1:] >> 4).int(), packed[0].int()).float()


def unpack_rates(packed: Tensor, columns: int, side: str) -> Tensor:
    """Unpack the rate of every column, in quarter bits per weight: uint8 to int64 [columns]."""
    if side == BYTE:
        stored = (packed[1:] & 15).long()
        return torch.where(stored > 0, 2 * stored + LOWEST_RATE - 2, 0)
    stored = unpack(packed, RATE_BITS, columns).long()
    return torch.where(stored > 0, stored + LOWEST_RATE - 1, 0)


def split_codes(codes: Tensor, columns: int, side: str) -> tuple[Tensor, Tensor]:
    """What is kept of the columns, packed, and the stream: two views of the codes."""
    first = columns_bytes(columns, side)
    return codes[:first], codes[first:]


def split_scales(scales: Tensor, packed: Tensor, outputs: int, side: str) -> tuple[Tensor, Tensor]:
    """The scales of rows [out] and of columns [in], those of BYTE columns from what is kept of them."""
    rows, columns = scales[:outputs], scales[outputs:]
    return rows, byte_scales(packed).to(rows.dtype) if side == BYTE else columns


def decode_by_torch(codes: Tensor, table: Tensor, scales: Tensor, shape: tuple[int, int], side: str) -> Tensor:
    """Decode codes [out, in] in the dtype of table and scales, in torch."""
    packed, stream = split_codes(codes, shape[1], side)
    dtype, (table, scales) = widened(table, scales)
    rates = unpack_rates(packed, shape[1], side)
    states = unpack_states(stream, rates, shape[0])
    return decode_trellis(states, rates, table, *split_scales(scales, packed, shape[0], side)).to(dtype)


def locate(codes: Tensor, shape: tuple[int, int], side: str) -> tuple[Tensor, Tensor]:
    """The place of every column in the codes, from which kernels of devices decode.

    Returns the first bit of every column, counted in the codes, and behind them the bytes that are no whole word of 4,
    as one: int32 [in + 1]; and rates, quarter bits, uint8 [in].
    """
    packed, _ = split_codes(codes, shape[1], side)
    rates = unpack_rates(packed, shape[1], side)
    bits = column_bits(shape[0], rates)
    last = codes[len(codes) // 4 * 4 :].long()
    tail = (last << 8 * torch.arange(len(last), device=codes.device)).sum(0, keepdim=True)
    return torch.cat([bits.cumsum(0) - bits + 8 * len(packed), tail]).int(), rates.to(torch.uint8)


def decode_trellis(states: Tensor, rates: Tensor, table: Tensor, row_scales: Tensor, column_scales: Tensor) -> Tensor:
    """The weight row_scale · (column_scale · table[state]): states int [in, out] to [out, in] in the scales' dtype."""
    columns = F.embedding(states, table[:, None])[..., 0]
    return (columns * (column_scales * (rates > 0))[:, None]).T * row_scales[:, None]


def gradients_of(
    gradient: Tensor, states: Tensor, table: Tensor, row_scales: Tensor, column_scales: Tensor, *, of_table: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Gradients of table (None unless `of_table`), row scales and column scales: all weights at once, in 20 launches.

    gradient: the weight's, [out, in]; states: int [out, in]; column_scales: 0 in columns of rate 0, which are to get no
    gradient from here. All in one dtype.
    """
    values = F.embedding(states, table[:, None])[..., 0]
    products = gradient * values
    # with v_oj = table[s_oj]: ∂loss/∂r_o = Σ_j G_oj v_oj c_j and ∂loss/∂c_j = Σ_o G_oj v_oj r_o
    of_rows, of_columns = products @ column_scales, row_scales @ products
    if not of_table:
        return None, of_rows, of_columns
    # ∂loss/∂table[s] = Σ over (o, j) with s_oj = s of G_oj r_o c_j
    parts = gradient * row_scales[:, None] * column_scales
    return torch.zeros_like(table).index_add_(0, states.flatten(), parts.flatten()), of_rows, of_columns


def gradients_from_states(
    gradient: Tensor,
    states: Tensor,
    rates: Tensor,
    *,
    codes: Tensor,
    table: Tensor,
    scales: Tensor,
    side: str,
    of_table,
) -> tuple[Tensor | None, Tensor]:
    """Gradients of table (None unless `of_table`) and scales, in their dtypes, by what is read from the codes.

    states: int [out, in]; rates: [in].
    """
    packed, _ = split_codes(codes, states.shape[1], side)
    _, (values, computed) = widened(table, scales)
    rows, columns = split_scales(computed, packed, len(states), side)
    used = rates > 0
    of_values, of_rows, of_columns = gradients_of(
        gradient.to(rows.dtype), states, values.to(rows.dtype), rows, columns * used, of_table=of_table
    )
    of_scales = of_rows if side == BYTE else torch.cat([of_rows, of_columns * used])
    return None if of_values is None else of_values.to(table.dtype), of_scales.to(scales.dtype)


def gradients_by_torch(arguments: Sequence, wanted: Sequence[bool], gradient: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients for the arguments of `decode_by_torch`."""
    codes, table, scales, shape, side = arguments
    packed, stream = split_codes(codes, shape[1], side)
    rates = unpack_rates(packed, shape[1], side)
    states = unpack_states(stream, rates, shape[0]).T
    found = gradients_from_states(
        gradient, states, rates, codes=codes, table=table, scales=scales, side=side, of_table=wanted[1]
    )
    return None, *found, None, None


def _positions(rates: Tensor, out: int) -> tuple[Tensor, Tensor, Tensor]:
    """Place of every window: first bit of its sequence, offset in it, the sequence's length in bits; int64 [in, out].

    The offset is (rate · t) // 4; the other two broadcast over the values of a sequence.
    """
    length = sequence_length(out)
    rows = torch.arange(out, device=rates.device)
    sequence, t = rows // length, rows % length
    lengths = (out - sequence * length).clamp(max=length)  # length of the sequence that each row is in
    column_starts = column_bits(out, rates).cumsum(0) - column_bits(out, rates)
    starts = column_starts[:, None] + sequence * (rates * length // 4)[:, None]
    return starts, rates[:, None] * t // 4, rates[:, None] * lengths // 4


def unpack_states(codes: Tensor, rates: Tensor, out: int) -> Tensor:
    """Unpack the state of every weight, each on its own: uint8 [bytes] and quarter bits [in] to int32 [in, out]."""
    padded = F.pad(codes, (0, 3)).to(torch.int32)
    words = padded[:-2] | padded[1:-1] << 8 | padded[2:] << 16  # the 24 bits from every byte on
    ends = column_bits(out, rates).cumsum(0)
    step = max(1, CHUNK // out)
    parts = []
    for first in range(0, len(rates), step):
        part = rates[first : first + step]
        start = 0 if first == 0 else ends[first - 1]
        parts.append(_states(words, part, out, start))
    return torch.cat(parts)


def _states(words: Tensor, rates: Tensor, out: int, first_bit: int | Tensor) -> Tensor:
    """The states of neighbouring columns whose bits begin at `first_bit`: int32 [columns, out]."""
    starts, offsets, lengths = _positions(rates, out)
    starts = starts + first_bit
    ahead = lengths - offsets  # bits from here to the end of the sequence, where reading wraps to its start
    window = _read(words, starts + offsets)
    rest = ahead.clamp(max=WINDOW_BITS)  # the whole window, or what is left of it before it wraps
    tail = window & ((1 << rest) - 1)
    # for all windows, not only those that wrap: shapes that depend on data stall a GPU and break torch.compile
    return (tail | _read(words, starts) << rest & (1 << WINDOW_BITS) - 1).to(torch.int32)


def _read(words: Tensor, bit: Tensor) -> Tensor:
    """The WINDOW_BITS bits from every bit position on: int32."""
    return words[bit >> 3] >> (bit & 7).to(torch.int32) & (1 << WINDOW_BITS) - 1


def pack_states(states: Tensor, rates: Tensor, size: int) -> Tensor:
    """Pack states int [in, out] into a stream of `size` bytes: from each state, the bits that its successor drops.

    ValueError if the stream is too short, or if the states are not a path of the trellis.
    """
    total = int(column_bits(states.shape[1], rates).sum())
    if total > 8 * size:
        raise ValueError(f"{total} bits do not fit into {size} bytes")
    bits = torch.zeros(8 * size, dtype=torch.uint8, device=states.device)
    starts, offsets, lengths = _positions(rates, states.shape[1])
    following = torch.cat([offsets[:, 1:], lengths[:, -1:]], 1)
    following = torch.where(following <= offsets, lengths, following)  # the sequence's end follows its last window
    for k in range(-(-HIGHEST_RATE // 4)):
        new = offsets + k < following
        bits[(starts + offsets + k)[new]] = (states >> k & 1)[new].to(torch.uint8)
    weights = 1 << torch.arange(8, dtype=torch.uint8, device=states.device)
    codes = (bits.view(-1, 8) * weights).sum(1, dtype=torch.uint8)
    used = rates > 0
    if not torch.equal(unpack_states(codes, rates, states.shape[1])[used], states[used].to(torch.int32)):
        raise ValueError("the states are no path of the trellis")
    return codes
