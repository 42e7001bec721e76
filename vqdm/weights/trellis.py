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

import weakref
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vqdm.errors import UserError
from vqdm.weights import ops, trellis_op
from vqdm.weights.base import (
    QuantizedWeight,
    Scheme,
    SharedPart,
    state_of,
    stored_parameter,
    widened,
)
from vqdm.weights.bitpack import pack
from vqdm.weights.trellis_codes import (
    ByteScales,
    decode_by_torch,
    gradients_by_torch,
    locate,
    pack_states,
    split_codes,
    split_scales,
    unpack_rates,
)
from vqdm.weights.trellis_format import (
    BYTE,
    HIGHEST_RATE,
    LOWEST_RATE,
    RATE_BITS,
    WIDE,
    WINDOW_BITS,
    column_bits,
    columns_bytes,
    reason_to_skip,
    scales_count,
    side_of,
    stream_bytes,
)


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
        self._starts = self._rates = self._located_codes = None  # of `located`
        self._located_state: tuple = ()

    @classmethod
    def from_parts(
        cls,
        scheme: TrellisScheme,
        states: Tensor,
        rates: Tensor,
        *,
        table: TrellisTable,
        row_scales: Tensor,
        column_scales: Tensor | ByteScales,
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
        return split_codes(self.codes, self.shape[1], self.scheme.side)[0]

    @property
    def stream(self) -> Tensor:
        """The bit stream, a view of the codes."""
        return split_codes(self.codes, self.shape[1], self.scheme.side)[1]

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
        return dtype, table, *split_scales(scales, self.columns, self.shape[0], self.scheme.side)

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

    def located(self) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """What `locate` finds, for kernels of devices (none on a CPU); made anew when codes are moved or written to.

        It is renewed in place, so that a recorded CUDA graph reads the new one. A traced call takes what is there:
        after writing to codes, call the weight or this once outside.
        """
        codes, traced = self.codes, torch.compiler.is_compiling()
        if codes.device.type == "cpu":
            return None, None
        there = self._starts is not None and self._starts.device == codes.device
        if traced and there:
            return self._starts, self._rates
        if traced:
            return locate(codes, self.shape, self.scheme.side)
        state = state_of(codes)
        if not there or self._located_codes() is not codes or self._located_state != state:
            with torch.inference_mode(False), torch.no_grad():
                starts, rates = locate(codes, self.shape, self.scheme.side)
                if there and type(codes) is type(self._starts) is Tensor:
                    starts, rates = self._starts.copy_(starts), self._rates.copy_(rates)
            self._starts, self._rates = starts, rates
            self._located_codes, self._located_state = weakref.ref(codes), state
        return self._starts, self._rates

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        if self.codes.device.type != "meta":
            self.located()  # before a compiled call asks
        return self

    def __getstate__(self):
        return {**self.__dict__, "_starts": None, "_rates": None, "_located_codes": None}

    def forward(self) -> Tensor:
        table, scales, side = self.shared[0](), self.scales, self.scheme.side
        if ops.apply_to(table, scales):
            return trellis_op.decode(self.codes, *self.located(), table, scales, *self.shape, side)
        return ops.by_torch(decode_by_torch, self.codes, table, scales, self.shape, side, gradients=gradients_by_torch)
