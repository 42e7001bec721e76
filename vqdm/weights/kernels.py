"""Decoders for the CPU, compiled by numba: packed codes straight to fp32 [out, in], one thread, no integers between.

The same products and sums in the same order as the torch arithmetic of the modules beside, hence the same bits. The
first call of each compiles it (a second or two), then it is cached on disk. Streams are read as 64-bit words.
"""

import functools

import numba
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vqdm.errors import UserError
from vqdm.weights.trellis import HIGHEST_RATE, WINDOW_BITS, column_bits, sequence_length

GROUP = 8  # values decoded from one word: 7 steps of 6 bits and a window are 54 bits
TILE = 16  # columns decoded together: a cache line of every row
LANES = 8  # weights of a codeword summed together
SPAN = (GROUP - 1) * HIGHEST_RATE // 4 + WINDOW_BITS  # bits that GROUP values read at most
_compiled = functools.partial(numba.njit, nogil=True, cache=True, error_model="numpy")


def decode_trellis(codes: Tensor, rates: Tensor, table: Tensor, *, row_scales: Tensor, column_scales: Tensor) -> Tensor:
    """row_scale · (column_scale · table[state]): uint8 [bytes], quarter bits [in], fp32 to fp32 [out, in].

    UserError where the rates are none of the format's or ask for more bits than the stream has.
    """
    out = len(row_scales)
    bits = column_bits(out, rates)
    needed = int(bits.sum())
    if needed > 8 * len(codes) or int(rates.max()) > HIGHEST_RATE:
        raise UserError(
            f"trellis: a stream of {8 * len(codes)} bits has rates for {needed}, the highest {int(rates.max())}/4: "
            "the weights are damaged, make or download them again"
        )
    weight = _empty(out, len(rates))
    _decode_trellis(
        _words(codes), rates.numpy(), (bits.cumsum(0) - bits).numpy(), sequence_length(out), _array(table),
        _array(row_scales), _array(column_scales * (rates > 0)), weight.numpy(),
    )  # fmt: skip
    return weight


def decode_additive(
    codes: Tensor, width: int, codebooks: Tensor, *, inputs: int, scales: Tensor, input_scales: Tensor | None = None
) -> Tensor:
    """scale_out · Σ_m codebook_m[code_m] · scale_in: uint8 [bytes] of codes [out_groups, in_groups, M] of `width` bits.

    codebooks: fp32 [M, codebook_size, out_group_size, in_group_size]; scales: [out]; input_scales: [in] or none.
    """
    size = codebooks.shape[3]
    words = F.pad(codebooks, (0, -size % LANES))
    columns = scales[:0] if input_scales is None else input_scales
    weight = _empty(len(scales), inputs)
    _decode_additive(_words(codes), width, _array(words), size, _array(scales), _array(columns), weight.numpy())
    return weight


def decode_scalar(codes: Tensor, width: int, *, inputs: int, scales: Tensor, zeros: Tensor) -> Tensor:
    """scale · (code − zero): uint8 [bytes] of codes [out, inputs] of `width` bits; scales, zeros: [out, groups]."""
    weight = _empty(len(scales), inputs)
    _decode_scalar(_words(codes), width, _array(scales), _array(zeros), weight.numpy())
    return weight


def _empty(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device="cpu")  # whatever the defaults are


def _words(codes: Tensor) -> np.ndarray:
    """The stream as uint64, with at least one word of zeros behind it."""
    words = np.zeros(len(codes) // 8 + 2, np.dtype("<u8"))
    words.view(np.uint8)[: len(codes)] = codes.numpy()
    return words


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().contiguous().numpy()


@_compiled
def _read(stream, bit):
    """The 64 bits from a bit position on. All unsigned, since numba makes floats of int64 and uint64 together."""
    i, shift = np.uint64(bit) >> np.uint64(6), np.uint64(bit) & np.uint64(63)
    return stream[i] >> shift | stream[i + np.uint64(1)] << np.uint64(1) << (np.uint64(63) - shift)


@_compiled
def _decode_trellis(stream, rates, starts, length, table, row_scales, column_scales, weight):
    """By tiles of columns; starts [in]: the first bit of every column; length: of a sequence."""
    out, inputs = weight.shape
    tile = np.empty((GROUP, TILE), np.float32)
    mask = np.uint64((1 << WINDOW_BITS) - 1)
    for first in range(0, inputs, TILE):
        columns = min(TILE, inputs - first)
        for sequence in range(-(-out // length)):
            top = sequence * length
            values = min(length, out - top)
            for t in range(0, values, GROUP):
                for c in range(columns):
                    rate, scale = rates[first + c], column_scales[first + c]
                    start = starts[first + c] + sequence * (rate * length // 4)
                    offset = rate * t // 4
                    window = _read(stream, start + offset)
                    rest = rate * values // 4 - offset  # bits to the end of the sequence, which goes on at its start
                    if rest < SPAN:
                        ahead = (np.uint64(1) << np.uint64(rest)) - np.uint64(1)
                        window = window & ahead | _read(stream, start) << np.uint64(rest)
                    for k in range(GROUP):
                        tile[k, c] = table[window >> np.uint64(rate * k >> 2) & mask] * scale
                for k in range(min(GROUP, values - t)):
                    row = top + t + k
                    scale = row_scales[row]
                    if columns == TILE:  # known to the compiler, a quarter faster
                        for c in range(TILE):
                            weight[row, first + c] = tile[k, c] * scale
                    else:
                        for c in range(columns):
                            weight[row, first + c] = tile[k, c] * scale


@_compiled
def _decode_additive(stream, width, codebooks, size, scales, input_scales, weight):
    """Row by row; codebooks [M, K, out_group_size, size padded to LANES]; input_scales [in] or [0].

    Groups are written in whole LANES, the last lanes first: what is too much is overwritten, or lies behind the row.
    """
    inputs = weight.shape[1]
    count, entries, out_size, lanes = codebooks.shape
    words, word = codebooks.ravel(), np.uint64(out_size * lanes)
    row = np.empty(inputs + lanes, np.float32)
    step, mask = np.uint64(width), (np.uint64(1) << np.uint64(width)) - np.uint64(1)
    for o in range(weight.shape[0]):
        for lane in range(lanes - LANES, -1, -LANES):
            bit = np.uint64(o // out_size * (inputs // size) * count * width)
            codes, left = np.uint64(0), np.uint64(0)
            for j in range(inputs // size):
                a0 = a1 = a2 = a3 = a4 = a5 = a6 = a7 = np.float32(-0.0)  # −0 + x is x, for x = −0 too
                for m in range(count):
                    if left < step:
                        codes, left = _read(stream, bit), np.uint64(64)
                    w = ((codes & mask) + np.uint64(m * entries)) * word + np.uint64(o % out_size * lanes + lane)
                    a0, a1 = a0 + words[w], a1 + words[w + np.uint64(1)]
                    a2, a3 = a2 + words[w + np.uint64(2)], a3 + words[w + np.uint64(3)]
                    a4, a5 = a4 + words[w + np.uint64(4)], a5 + words[w + np.uint64(5)]
                    a6, a7 = a6 + words[w + np.uint64(6)], a7 + words[w + np.uint64(7)]
                    codes, left, bit = codes >> step, left - step, bit + step
                p = np.uint64(j * size + lane)
                row[p], row[p + np.uint64(1)], row[p + np.uint64(2)], row[p + np.uint64(3)] = a0, a1, a2, a3
                p += np.uint64(4)
                row[p], row[p + np.uint64(1)], row[p + np.uint64(2)], row[p + np.uint64(3)] = a4, a5, a6, a7
        for i in range(inputs):
            weight[o, i] = row[i] * scales[o]
        for i in range(len(input_scales)):
            weight[o, i] *= input_scales[i]


@_compiled
def _decode_scalar(stream, width, scales, zeros, weight):
    """Group by group of every row; scales, zeros [out, groups]."""
    out, inputs = weight.shape
    size = inputs // scales.shape[1]
    mask = (np.uint64(1) << np.uint64(width)) - np.uint64(1)
    for o in range(out):
        for group in range(scales.shape[1]):
            scale, zero = scales[o, group], zeros[o, group]
            for first in range(group * size, (group + 1) * size, GROUP):
                codes = _read(stream, (o * inputs + first) * width)
                for k in range(min(GROUP, (group + 1) * size - first)):
                    code = np.float32(np.int32(codes >> np.uint64(k * width) & mask))
                    weight[o, first + k] = (code - zero) * scale
