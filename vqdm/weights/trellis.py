"""Trellis codes: every input column is one bit string, read through a window that slides by the column's rate.

Format, for a matrix [out, in] (design after QTIP's bitshift trellis; rates per column as in transform coding):
- a column's `out` values are cut into sequences of `sequence_length(out)`, the last of which may be shorter;
- a column of rate q/4 bits (q = 0 or 4 … 24) spends (q·T) // 4 bits on a sequence of T values. Value t of it is
  table[state], the state being the WINDOW_BITS bits from bit (q·t) // 4 on, least significant first, circularly within
  the sequence. So every weight is decoded on its own, by arithmetic;
- `codes` holds two parts. The rates first: 5 bits a column, 0 for rate 0, else q − 3, padded to whole bytes. Then the
  stream: columns one after the other, each its sequences in order, bit i of the stream in byte i // 8 at bit i % 8.
  Its length follows from the shape and `TrellisScheme.bits` alone; bits that are left over are 0;
- `scales` [out + in]: those of the rows, then those of the columns. One tensor, as every tensor costs a file's header
  some hundred bytes;
- weight[o, j] = row_scales[o] · column_scales[j] · value; columns of rate 0 are 0.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from vqdm.errors import UserError
from vqdm.weights.base import (
    QuantizedWeight,
    Scheme,
    SharedPart,
    kernels_apply,
    recomputed_gradients,
    stored_parameter,
    widened,
)
from vqdm.weights.bitpack import pack, unpack
from vqdm.weights.trellis_format import (
    HIGHEST_RATE,
    LOWEST_RATE,
    RATE_BITS,
    WINDOW_BITS,
    column_bits,
    rates_bytes,
    reason_to_skip,
    sequence_length,
    stream_bytes,
)

CHUNK = 1 << 22  # weights decoded at once


@dataclass(frozen=True, kw_only=True)
class TrellisScheme(Scheme):
    """Trellis codes at `bits` per weight of the layer, scales and rates included but not the table, which all share."""

    kind: ClassVar[str] = "trellis"
    told_by_shapes: ClassVar[tuple[str, ...]] = ("bits",)
    codec: str = "trellis"
    bits: float

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.bits <= 16:
            raise UserError(f"{self.codec}: bits must be above 0 and at most 16, not {self.bits}")

    @property
    def name(self) -> str:
        return f"{self.codec}{self.bits:.4g}"

    @property
    def shared_key(self) -> str:
        return "trellis_table"


class TrellisTable(SharedPart):
    """The value of every state, shared by the whole model: fp16 [2^WINDOW_BITS], for data of unit variance."""

    def __init__(self, scheme: TrellisScheme | None = None):
        super().__init__()
        self.table = stored_parameter(1 << WINDOW_BITS)

    @classmethod
    def from_values(cls, values: Tensor) -> "TrellisTable":
        with values.device:
            table = cls()
        table.table.data.copy_(values)
        return table


class TrellisWeight(QuantizedWeight):
    """`codes`, uint8: packed rates, then the stream; `scales` [out + in]; values from a shared TrellisTable."""

    scheme_type = TrellisScheme

    def __init__(self, scheme: TrellisScheme, shape: tuple[int, int], shared: TrellisTable | None = None):
        super().__init__(scheme, shape, shared)
        reason = reason_to_skip(self.shape, scheme.bits)
        if reason is not None:
            raise UserError(f"{scheme.name} cannot hold a matrix {list(self.shape)}: {reason}")
        size = rates_bytes(self.shape[1]) + stream_bytes(self.shape, scheme.bits)
        self.register_buffer("codes", torch.zeros(size, dtype=torch.uint8))
        self.scales = stored_parameter(sum(self.shape))

    @classmethod
    def from_parts(
        cls,
        scheme: TrellisScheme,
        states: Tensor,
        rates: Tensor,
        *,
        table: TrellisTable,
        row_scales: Tensor,
        column_scales: Tensor,
    ) -> "TrellisWeight":
        """Build a weight from states int [in, out], a trellis path per sequence, and rates, quarter bits [in]."""
        with states.device:
            weight = cls(scheme, (states.shape[1], states.shape[0]), table)
        weight.stream.copy_(pack_states(states, rates, len(weight.stream)))
        weight.packed_rates.copy_(pack((rates - LOWEST_RATE + 1).clamp(min=0), RATE_BITS))
        weight.scales.data.copy_(torch.cat([row_scales, column_scales]))
        return weight

    @property
    def packed_rates(self) -> Tensor:
        """The packed rates, a view of the codes."""
        return self.codes[: rates_bytes(self.shape[1])]

    @property
    def stream(self) -> Tensor:
        """The bit stream, a view of the codes."""
        return self.codes[rates_bytes(self.shape[1]) :]

    @property
    def row_scales(self) -> Tensor:
        """The scales of the rows [out], a view of all scales."""
        return self.scales[: self.shape[0]]

    @property
    def column_scales(self) -> Tensor:
        """The scales of the columns [in], a view of all scales."""
        return self.scales[self.shape[0] :]

    def unpacked_rates(self) -> Tensor:
        """The rate of every column, in quarter bits per weight: int64 [in]."""
        return unpack_rates(self.packed_rates, self.shape[1])

    def fault(self) -> str | None:
        """Rates that no column may have, or columns that reach beyond the stream."""
        rates = self.unpacked_rates()
        if int(rates.max()) > HIGHEST_RATE:
            return f"a column's rate is {int(rates.max())} quarter bits, above {HIGHEST_RATE}"
        bits = int(column_bits(self.shape[0], rates).sum())
        held = 8 * len(self.stream)
        return f"its columns take {bits} bits where the stream holds {held}" if bits > held else None

    def forward(self) -> Tensor:
        dtype, (table, scales) = widened(self.shared[0](), self.scales)
        decode = decode_packed if torch.compiler.is_compiling() else DecodeTrellis.apply
        return decode(self.packed_rates, self.stream, table, *scales.split(self.shape)).to(dtype)


class DecodeTrellis(torch.autograd.Function):
    """`decode_packed`, through `kernels` where they apply; its gradients need nothing but its arguments."""

    @staticmethod
    def forward(ctx, packed_rates, stream, table, row_scales, column_scales):
        ctx.save_for_backward(packed_rates, stream, table, row_scales, column_scales)
        if not kernels_apply(packed_rates, stream, table, row_scales, column_scales):
            return decode_packed(packed_rates, stream, table, row_scales, column_scales)
        from vqdm.weights import kernels  # imports numba, which is not always needed

        return kernels.decode_trellis(packed_rates, stream, table, row_scales=row_scales, column_scales=column_scales)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        saved = ctx.saved_tensors  # only once: under gradient checkpointing they may not be asked for again
        if not kernels_apply(gradient, *saved):
            return recomputed_gradients(decode_packed, saved, ctx.needs_input_grad, gradient)
        from vqdm.weights import kernels

        *stored, rows, columns = saved
        found = kernels.trellis_gradients(
            gradient, *stored, row_scales=rows, column_scales=columns, of_table=ctx.needs_input_grad[2]
        )
        return None, None, *found


def unpack_rates(packed: Tensor, columns: int) -> Tensor:
    """Unpack the rate of every column, in quarter bits per weight: uint8 to int64 [columns]."""
    stored = unpack(packed, RATE_BITS, columns).long()
    return torch.where(stored > 0, stored + LOWEST_RATE - 1, 0)


def decode_packed(
    packed_rates: Tensor, stream: Tensor, table: Tensor, row_scales: Tensor, column_scales: Tensor
) -> Tensor:
    """Decode the two packed parts of the codes like `decode_trellis`, in torch."""
    rates = unpack_rates(packed_rates, len(column_scales))
    return decode_trellis(unpack_states(stream, rates, len(row_scales)), rates, table, row_scales, column_scales)


def decode_trellis(states: Tensor, rates: Tensor, table: Tensor, row_scales: Tensor, column_scales: Tensor) -> Tensor:
    """The weight row_scale · (column_scale · table[state]): states int [in, out] to [out, in] in the scales' dtype."""
    columns = F.embedding(states, table[:, None])[..., 0]
    return (columns * (column_scales * (rates > 0))[:, None]).T * row_scales[:, None]


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
