"""The loops behind `kernels`, compiled by numba: over numpy arrays, in one thread, without Python's lock.

They all stand in this file, since numba renews its cache on disk when that file changes, but not when one that it
calls does. Streams are uint64 words followed by one more. Gradients are summed in a fixed order into float64 zeros.
Notation: W [out, in] is the weight, G = ∂loss/∂W its gradient, r and c are the scales of rows (o) and columns (j).
"""

import functools

import numpy as np

from vqdm.runs.compiling import njit
from vqdm.weights.trellis_format import HIGHEST_RATE, LOWEST_RATE, RATE_BITS, WINDOW_BITS

GROUP = 8  # values decoded from one word: 7 steps of 6 bits and a window are 54 bits
TILE = 16  # columns decoded together: one cache line in every row
LANES = 8  # weights of a codeword that are summed together
SPAN = (GROUP - 1) * HIGHEST_RATE // 4 + WINDOW_BITS  # the most bits that GROUP values read
_compiled = functools.partial(njit, nogil=True, cache=True, error_model="numpy")


@_compiled
def _read(stream, bit):
    """The 64 bits from a bit position on. All unsigned, since numba turns int64 with uint64 into floats."""
    i, shift = np.uint64(bit) >> np.uint64(6), np.uint64(bit) & np.uint64(63)
    return stream[i] >> shift | stream[i + np.uint64(1)] << np.uint64(1) << (np.uint64(63) - shift)


@_compiled
def unpack_rates(stream, columns):
    """Unpack the rate of every column, in quarter bits per weight: int64 [columns]."""
    rates, mask = np.zeros(columns, np.int64), np.uint64((1 << RATE_BITS) - 1)
    for j in range(columns):
        stored = np.int64(_read(stream, j * RATE_BITS) & mask)
        if stored > 0:
            rates[j] = stored + LOWEST_RATE - 1
    return rates


@_compiled
def _window(stream, start, rate, t, values):
    """The bits of GROUP values from the t-th on, in a sequence of `values` that begins at bit `start`."""
    offset = rate * t // 4
    window = _read(stream, start + offset)
    rest = rate * values // 4 - offset  # bits to the end of the sequence, where reading wraps to its start
    if rest < SPAN:
        ahead = (np.uint64(1) << np.uint64(rest)) - np.uint64(1)
        window = window & ahead | _read(stream, start) << np.uint64(rest)
    return window


@_compiled
def decode_trellis(stream, rates, starts, length, table, row_scales, column_scales, weight):
    """Decode a trellis weight by tiles of columns. starts [in]: first bit of every column; length: of a sequence."""
    out, inputs = weight.shape
    tile = np.empty((GROUP, TILE), np.float32)
    mask = np.uint64((1 << WINDOW_BITS) - 1)
    # W[o, j] = r_o · (c_j · table[s_oj]), with s_oj the WINDOW_BITS bits of column j's sequence from bit ⌊q_j t / 4⌋ on
    # (read circularly; t: place of row o in the sequence; q_j: rate in quarter bits; W[o, j] = 0 where q_j = 0)
    for first in range(0, inputs, TILE):
        columns = min(TILE, inputs - first)
        for sequence in range(-(-out // length)):
            top = sequence * length
            values = min(length, out - top)
            for t in range(0, values, GROUP):
                for c in range(columns):
                    rate = rates[first + c]
                    scale = column_scales[first + c] * np.float32(rate > 0)
                    window = _window(stream, starts[first + c] + sequence * (rate * length // 4), rate, t, values)
                    for k in range(GROUP):
                        tile[k, c] = table[window >> np.uint64(rate * k >> 2) & mask] * scale
                for k in range(min(GROUP, values - t)):
                    row = top + t + k
                    scale = row_scales[row]
                    if columns == TILE:  # the constant lets the compiler make it a quarter faster
                        for c in range(TILE):
                            weight[row, first + c] = tile[k, c] * scale
                    else:
                        for c in range(columns):
                            weight[row, first + c] = tile[k, c] * scale


@_compiled
def trellis_gradients(
    gradient, stream, rates, starts, length, table, row_scales, column_scales, table_sum, row_sum, column_sum
):
    """Add gradients to the last three arguments, by tiles, the last filled up with zeros; table_sum may be [0]."""
    out, inputs = gradient.shape
    mask = np.uint64((1 << WINDOW_BITS) - 1)
    for first in range(0, inputs, TILE):
        columns = min(TILE, inputs - first)
        states, values = np.zeros((GROUP, TILE), np.uint16), np.zeros((GROUP, TILE), np.float32)
        scales, given = np.zeros(TILE, np.float32), np.zeros(TILE, np.float32)
        for c in range(columns):
            scales[c] = column_scales[first + c] * np.float32(rates[first + c] > 0)
        of_columns = np.zeros(TILE, np.float64)
        for sequence in range(-(-out // length)):
            top = sequence * length
            count = min(length, out - top)
            for t in range(0, count, GROUP):
                for c in range(columns):
                    rate = rates[first + c]
                    window = _window(stream, starts[first + c] + sequence * (rate * length // 4), rate, t, count)
                    for k in range(GROUP):
                        state = window >> np.uint64(rate * k >> 2) & mask
                        states[k, c], values[k, c] = state, table[state]
                # with v_oj = table[s_oj]: ∂loss/∂c_j = Σ_o G_oj v_oj r_o,  ∂loss/∂r_o = Σ_j G_oj v_oj c_j,
                # ∂loss/∂table[s] = Σ over (o, j) with s_oj = s of G_oj c_j r_o
                for k in range(min(GROUP, count - t)):
                    row = top + t + k
                    for c in range(columns):
                        given[c] = gradient[row, first + c]
                    scale, of_row = row_scales[row], np.float32(0)
                    for c in range(TILE):
                        product = given[c] * values[k, c]
                        of_columns[c] += product * scale
                        of_row += product * scales[c]
                    row_sum[row] += of_row
                    if len(table_sum):
                        for c in range(TILE):
                            table_sum[states[k, c]] += given[c] * scales[c] * scale
        for c in range(columns):
            column_sum[first + c] = of_columns[c] * np.float64(rates[first + c] > 0)


@_compiled
def _sum_codewords(stream, width, codebooks, size, o, inputs, row):
    """Sum the codewords of row o, before any scale, into `row` [inputs + padded size].

    Groups are written in whole LANES, the last lanes first: any excess is overwritten, or lies beyond the row.
    """
    count, entries, out_size, lanes = codebooks.shape
    words, word = codebooks.ravel(), np.uint64(out_size * lanes)
    step, mask = np.uint64(width), (np.uint64(1) << np.uint64(width)) - np.uint64(1)
    # row[j · size + i] = Σ_m codebook_m[code of (⌊o / out_size⌋, j, m)][o mod out_size, i]
    for lane in range(lanes - LANES, -1, -LANES):
        bit = np.uint64(o // out_size * (inputs // size) * count * width)
        codes, left = np.uint64(0), np.uint64(0)
        for j in range(inputs // size):
            a0 = a1 = a2 = a3 = a4 = a5 = a6 = a7 = np.float32(-0.0)  # −0 + x = x also for x = −0
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


@_compiled
def decode_additive(stream, width, codebooks, size, scales, input_scales, weight):
    """Decode additive codes. codebooks [M, K, out_group_size, size padded to LANES]; input_scales [in] or [0]."""
    inputs = weight.shape[1]
    row = np.empty(inputs + codebooks.shape[3], np.float32)
    # W[o, i] = scale_out[o] · Σ_m codebook_m[code_m] · scale_in[i]
    for o in range(weight.shape[0]):
        _sum_codewords(stream, width, codebooks, size, o, inputs, row)
        for i in range(inputs):
            weight[o, i] = row[i] * scales[o]
        for i in range(len(input_scales)):
            weight[o, i] *= input_scales[i]


@_compiled
def _add_to_codewords(stream, width, sums, size, o, inputs, row):
    """Add a row of gradients to the codewords it was summed from: the transpose of `_sum_codewords`.

    Values that end up in the padding mean nothing.
    """
    count, entries, out_size, lanes = sums.shape
    flat, word = sums.ravel(), np.uint64(out_size * lanes)
    step, mask = np.uint64(width), (np.uint64(1) << np.uint64(width)) - np.uint64(1)
    # codebook_m[code of (⌊o / out_size⌋, j, m)][o mod out_size, i] += row[j · size + i], for every m
    for lane in range(0, lanes, LANES):
        bit = np.uint64(o // out_size * (inputs // size) * count * width)
        codes, left = np.uint64(0), np.uint64(0)
        for j in range(inputs // size):
            part = row[j * size + lane : j * size + lane + LANES]
            for m in range(count):
                if left < step:
                    codes, left = _read(stream, bit), np.uint64(64)
                w = ((codes & mask) + np.uint64(m * entries)) * word + np.uint64(o % out_size * lanes + lane)
                for i in range(LANES):
                    flat[w + np.uint64(i)] += part[i]
                codes, left, bit = codes >> step, left - step, bit + step


@_compiled
def additive_gradients(
    gradient, stream, width, codebooks, size, scales, input_scales, codebook_sum, scale_sum, input_sum
):
    """Add gradients to the last three arguments; codebook_sum may be [0, 0, 0, 0], else it is shaped like codebooks."""
    out, inputs = gradient.shape
    row = np.empty(inputs + codebooks.shape[3], np.float32)
    # with u_oi the sum of codewords: ∂loss/∂scale_out[o] = Σ_i G_oi u_oi scale_in[i],
    # ∂loss/∂scale_in[i] = Σ_o G_oi u_oi scale_out[o],  ∂loss/∂u_oi = G_oi scale_in[i] scale_out[o]
    for o in range(out):
        _sum_codewords(stream, width, codebooks, size, o, inputs, row)
        scale, of_row = scales[o], 0.0
        for i in range(inputs):
            product = gradient[o, i] * row[i]
            of_row += product * input_scales[i]
            input_sum[i] += product * scale
        scale_sum[o] = of_row
        if len(codebook_sum):
            for i in range(inputs):
                row[i] = gradient[o, i] * input_scales[i] * scale
            _add_to_codewords(stream, width, codebook_sum, size, o, inputs, row)


@_compiled
def decode_scalar(stream, width, edges, scales, zeros, weight):
    """Decode scalar codes, row by row and group by group. edges [groups + 1]; scales, zeros [out, groups]."""
    out, inputs = weight.shape
    mask = (np.uint64(1) << np.uint64(width)) - np.uint64(1)
    # W[o, i] = (code_oi − zero_og) · scale_og, with g the group of input i
    for o in range(out):
        for group in range(scales.shape[1]):
            scale, zero = scales[o, group], zeros[o, group]
            for first in range(edges[group], edges[group + 1], GROUP):
                codes = _read(stream, (o * inputs + first) * width)
                for k in range(min(GROUP, edges[group + 1] - first)):
                    code = np.float32(np.int32(codes >> np.uint64(k * width) & mask))
                    weight[o, first + k] = (code - zero) * scale
