"""Trellis codes: every input column is one bit string, read through a window that slides by the column's rate.

Format, for a matrix [out, in] (design after QTIP's bitshift trellis; rates per column as in transform coding):
- a column's `out` values are cut into sequences of `sequence_length(out)`, the last of which may be shorter;
- a column of rate q/4 bits (q = 0 or 4 … 24) spends (q·T) // 4 bits on a sequence of T values. Value t of it is
  table[state], the state being the WINDOW_BITS bits from bit (q·t) // 4 on, least significant first, circularly within
  the sequence. So every weight is decoded on its own, by arithmetic;
- `codes` holds two parts: what is kept of the columns, then the stream: columns one after the other, each its sequences
  in order, bit i of the stream in byte i // 8 at bit i % 8. Its length follows from the shape and the scheme alone;
  bits that are left over are 0;
- WIDE columns have 5 bits of rate each, 0 for rate 0, else q − 3, padded to whole bytes, and an fp16 scale in `scales`;
- BYTE columns have a byte each, after one that says how finely scales are spaced (1: by 2^(1/4), 0: by 2^(1/2)): the
  low half r is the rate, 0 for rate 0, else q = 2 r + 2; the high half is the scale (`byte_scale`);
- `scales`: those of the rows [out], then those of WIDE columns. One tensor, as every tensor costs a file's header some
  hundred bytes;
- weight[o, j] = row_scales[o] · column_scales[j] · value; columns of rate 0 are 0.
"""

import functools
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
    BYTE,
    HIGHEST_RATE,
    LOWEST_RATE,
    RATE_BITS,
    WIDE,
    WINDOW_BITS,
    byte_scale,
    column_bits,
    columns_bytes,
    reason_to_skip,
    scales_count,
    sequence_length,
    side_of,
    stream_bytes,
)

CHUNK = 1 << 22  # weights decoded at once


@dataclass(frozen=True, kw_only=True)
class TrellisScheme(Scheme):
    """Trellis codes at `bits` per weight of the layer, scales and rates included but not the table, which all share.

    side: WIDE or BYTE, how columns are kept.
    """

    kind: ClassVar[str] = "trellis"
    told_by_shapes: ClassVar[tuple[str, ...]] = ("bits",)
    codec: str = "trellis"
    bits: float
    side: str = WIDE

    @classmethod
    def of_layer(cls, shape: tuple[int, int], bits: float) -> "TrellisScheme":
        """The scheme of a new layer [out, in]."""
        return cls(bits=bits, side=side_of(shape))

    def __post_init__(self):
        super().__post_init__()
        if self.side not in (WIDE, BYTE):
            raise UserError(f"{self.codec}: side must be {WIDE} or {BYTE}, not {self.side[:80]!r}")
        if not 0 < self.bits <= 16:
            raise UserError(f"{self.codec}: bits must be above 0 and at most 16, not {self.bits}")

    @property
    def name(self) -> str:
        return f"{self.codec}{self.bits:.4g}"

    @property
    def shared_key(self) -> str:
        return "trellis_table"

    @property
    def format_version(self) -> int:
        return 2 if self.side == BYTE else 1

    def to_dict(self) -> dict:
        """Without `side` for WIDE columns, as version 1 of the format has it."""
        fields = super().to_dict()
        return fields if self.side == BYTE else {key: value for key, value in fields.items() if key != "side"}


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
    """`codes`, uint8: columns, then the stream; `scales` of rows and WIDE columns; a TrellisTable is shared."""

    scheme_type = TrellisScheme

    def __init__(self, scheme: TrellisScheme, shape: tuple[int, int], shared: TrellisTable | None = None):
        super().__init__(scheme, shape, shared)
        reason = reason_to_skip(self.shape, scheme.bits, scheme.side)
        if reason is not None:
            raise UserError(f"{scheme.name} cannot hold a matrix {list(self.shape)}: {reason}")
        size = columns_bytes(self.shape[1], scheme.side) + stream_bytes(self.shape, scheme.bits, scheme.side)
        self.register_buffer("codes", torch.zeros(size, dtype=torch.uint8))
        self.scales = stored_parameter(scales_count(self.shape, scheme.side))

    @classmethod
    def from_parts(
        cls,
        scheme: TrellisScheme,
        states: Tensor,
        rates: Tensor,
        *,
        table: TrellisTable,
        row_scales: Tensor,
        column_scales: "Tensor | ByteScales",
    ) -> "TrellisWeight":
        """Build a weight from states int [in, out], a trellis path per sequence, and rates, quarter bits [in].

        column_scales: [in] of WIDE columns, or the codes of those of BYTE columns.
        """
        with states.device:
            weight = cls(scheme, (states.shape[1], states.shape[0]), table)
        weight.stream.copy_(pack_states(states, rates, len(weight.stream)))
        if isinstance(column_scales, ByteScales):
            weight.columns[0] = column_scales.fine
            weight.columns[1:] = (rates // 2 - 1).clamp(min=0) | column_scales.codes << 4
        else:
            weight.columns.copy_(pack((rates - LOWEST_RATE + 1).clamp(min=0), RATE_BITS))
            row_scales = torch.cat([row_scales, column_scales])
        weight.scales.data.copy_(row_scales)
        return weight

    @property
    def columns(self) -> Tensor:
        """What is kept of the columns, packed: a view of the codes."""
        return self.codes[: columns_bytes(self.shape[1], self.scheme.side)]

    @property
    def stream(self) -> Tensor:
        """The bit stream, a view of the codes."""
        return self.codes[columns_bytes(self.shape[1], self.scheme.side) :]

    @property
    def row_scales(self) -> Tensor:
        """The scales of the rows [out], a view of all scales."""
        return self.scales[: self.shape[0]]

    def unpacked_rates(self) -> Tensor:
        """The rate of every column, in quarter bits per weight: int64 [in]."""
        return unpack_rates(self.columns, self.shape[1], self.scheme.side)

    def factors(self) -> tuple[torch.dtype, Tensor, Tensor, Tensor]:
        """The dtype of the decoded weight, and the table, row scales and column scales that it is computed from."""
        dtype, (table, scales) = widened(self.shared[0](), self.scales)
        rows, columns = scales[: self.shape[0]], scales[self.shape[0] :]
        return dtype, table, rows, byte_scales(self.columns).to(rows.dtype) if self.scheme.side == BYTE else columns

    def fault(self) -> str | None:
        """A spacing of scales or a rate that the format lacks, or columns that reach beyond the stream."""
        if self.scheme.side == BYTE and int(self.columns[0]) > 1:
            return f"the spacing of its columns' scales is {int(self.columns[0])}, not 0 or 1"
        rates = self.unpacked_rates()
        if int(rates.max()) > HIGHEST_RATE:
            return f"a column's rate is {int(rates.max())} quarter bits, above {HIGHEST_RATE}"
        bits = int(column_bits(self.shape[0], rates).sum())
        held = 8 * len(self.stream)
        return f"its columns take {bits} bits where the stream holds {held}" if bits > held else None

    def forward(self) -> Tensor:
        dtype, *factors = self.factors()
        decode = decode_packed if torch.compiler.is_compiling() else DecodeTrellis.apply
        return decode(self.columns, self.scheme.side, self.stream, *factors).to(dtype)


class DecodeTrellis(torch.autograd.Function):
    """`decode_packed`, through `kernels` where they apply; its gradients need nothing but codes and parameters."""

    @staticmethod
    def forward(ctx, packed, side, stream, table, row_scales, column_scales):
        ctx.side = side
        ctx.save_for_backward(packed, stream, table, row_scales, None if side == BYTE else column_scales)
        if not kernels_apply(packed, stream, table, row_scales, column_scales):
            return decode_packed(packed, side, stream, table, row_scales, column_scales)
        from vqdm.weights import kernels  # imports numba, which is not always needed

        return kernels.decode_trellis(packed, side, stream, table, row_scales=row_scales, column_scales=column_scales)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        packed, stream, table, rows, columns = ctx.saved_tensors  # once: under checkpointing they may be asked for once
        columns = byte_scales(packed).to(rows.dtype) if ctx.side == BYTE else columns
        if not kernels_apply(gradient, packed, stream, table, rows, columns):
            decode = functools.partial(decode_packed, packed, ctx.side, stream)
            wanted = ctx.needs_input_grad[3:]
            return None, None, None, *recomputed_gradients(decode, (table, rows, columns), wanted, gradient)
        from vqdm.weights import kernels

        found = kernels.trellis_gradients(
            gradient,
            packed,
            ctx.side,
            stream,
            table,
            row_scales=rows,
            column_scales=columns,
            of_table=ctx.needs_input_grad[3],
        )
        return None, None, None, *found


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


def decode_packed(
    packed: Tensor, side: str, stream: Tensor, table: Tensor, row_scales: Tensor, column_scales: Tensor
) -> Tensor:
    """Decode the two packed parts of the codes like `decode_trellis`, in torch."""
    rates = unpack_rates(packed, len(column_scales), side)
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
