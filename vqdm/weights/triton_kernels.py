"""Decoders for GPUs in Triton: packed codes straight to the weight [out, in] in the dtype of its parameters.

Products and sums are formed in fp32 in the order of the torch code and rounded once, so both give the same weight bit
for bit (but for the sign of zeros in trellis columns of rate 0). Nothing waits for the GPU and no shape depends on
values, so that CUDA graphs can record a call. Beyond their ends, streams read as zeros: damaged codes decode to some
weight, never to other memory. With TRITON_INTERPRET=1 in the environment while this file is imported the kernels run
on tensors of the CPU. `scripts/compile_kernels.py` compiles them without a GPU and counts instructions.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqdm.weights.trellis_format import WINDOW_BITS, sequence_length

WINDOW = tl.constexpr(WINDOW_BITS)
STATES = tl.constexpr(1 << WINDOW_BITS)
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
# Values of a column, or rows and groups, that a program decodes; all powers of 2.
TRELLIS_TILE = {"GROUPS": 16, "COLUMNS": 64}  # groups of 4 values
ADDITIVE_VALUES, SCALAR_TILE = 1024, {"ROWS": 4, "OCTS": 64}


@triton.jit
def _rounded(value, dtype: tl.constexpr, BY_HAND: tl.constexpr):
    """To nearest, ties to even. BY_HAND: the interpreter cuts off what bfloat16 does not hold."""
    if BY_HAND and dtype == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        bits = bits + 0x7FFF + (bits >> 16 & 1) & 0xFFFF0000
        value = bits.to(tl.float32, bitcast=True)
    return value.to(dtype)


@triton.jit
def _bits(words, bit, whole, tail):
    """The 32 bits from every bit position on. whole: number of whole words, after which comes `tail`, then zeros."""
    bit = bit.to(tl.uint32, bitcast=True)  # so that what overflows, by damaged codes, lies beyond the end
    w, shift = (bit >> 5).to(tl.int32), bit & 31
    low = tl.load(words + w, mask=w < whole, other=0)
    high = tl.load(words + w + 1, mask=w + 1 < whole, other=0)
    low = tl.where(w == whole, tail, low).to(tl.uint32, bitcast=True)
    high = tl.where(w + 1 == whole, tail, high).to(tl.uint32, bitcast=True)
    return low >> shift | high << 1 << 31 - shift


@triton.jit
def _byte_scale(code, fine):
    """`trellis_format.byte_scale`, without integers of Python's between."""
    step = (code & 1) * 2 * (1 - fine) + (code & 3) * fine
    octave = (code >> 1) * (1 - fine) + (code >> 2) * fine
    return ((64 + 11 * step + step * step) << octave).to(tl.float32) / 1024


@triton.jit
def trellis_kernel(
    codes,
    starts,
    rates,
    table,
    scales,
    weight,
    outputs,
    inputs,
    length,
    parts,
    whole,
    BYTE: tl.constexpr,
    BY_HAND: tl.constexpr,
    GROUPS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """4 · GROUPS values of COLUMNS columns, within one of the sequences, each of which is `parts` programs."""
    words = codes.to(tl.pointer_type(tl.int32))
    sequence, part = tl.program_id(1) // parts, tl.program_id(1) % parts
    top = sequence * length
    values = tl.minimum(length, outputs - top)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    there = column < inputs
    rate = tl.load(rates + column, mask=there, other=0).to(tl.int32)
    begin = tl.load(starts + column, mask=there, other=0) + sequence * (rate * length >> 2)
    tail = tl.load(starts + inputs)
    if BYTE:
        kept = tl.load(codes + 1 + column, mask=there, other=0).to(tl.int32)
        scale = _byte_scale(kept >> 4, tl.load(codes).to(tl.int32))
    else:
        scale = tl.load(scales + outputs + column, mask=there, other=0).to(tl.float32)
    scale = tl.where(rate > 0, scale, 0.0)
    # Four values of a column, t = 4 g … 4 g + 3, read bits q g … q g + ⌊3 q / 4⌋ + 11 of their sequence: at most 30
    group = part * GROUPS + tl.arange(0, GROUPS)
    offset = group[:, None] * rate[None, :]
    window = _bits(words, begin[None, :] + offset, whole, tail)
    head = _bits(words, begin, whole, tail)
    rest = (rate * values >> 2)[None, :] - offset  # bits to the end of the sequence, where reading wraps to its start
    rest = tl.minimum(tl.maximum(rest, 0), 31).to(tl.uint32)
    window = window & (tl.full((1, 1), 1, tl.uint32) << rest) - 1 | head[None, :] << rest
    k = tl.arange(0, 4)
    step = (k[:, None] * rate[None, :] >> 2).to(tl.uint32)
    state = (window[None, :, :] >> step[:, None, :]).to(tl.int32) & (STATES - 1)
    # W[o, j] = r_o · (c_j · table[s_oj]), the table in shared memory
    every = tl.load(table + tl.arange(0, STATES)).to(tl.float32)
    found = tl.gather(every, tl.reshape(state, (4 * GROUPS * COLUMNS,)), 0)
    t = k[:, None] + 4 * group[None, :]
    row, inside = top + t, t < values
    row_scale = tl.load(scales + row, mask=inside, other=0).to(tl.float32)
    value = tl.reshape(found, (4, GROUPS, COLUMNS)) * scale[None, None, :] * row_scale[:, :, None]
    place = row[:, :, None] * inputs + column[None, None, :]
    value = _rounded(value, weight.dtype.element_ty, BY_HAND)
    tl.store(weight + place, value, mask=inside[:, :, None] & there[None, None, :])


@triton.jit
def _code(codes, bit, size, there, WIDTH: tl.constexpr):
    """The integer of WIDTH bits at every bit position of a stream of `size` bytes: of one, two or three of them."""
    byte = bit >> 3
    value = tl.load(codes + byte, mask=there, other=0).to(tl.int32)
    if 8 % WIDTH != 0:
        for extra in tl.static_range(1, (WIDTH + 14) // 8):
            more = tl.load(codes + byte + extra, mask=there & (byte + extra < size), other=0).to(tl.int32)
            value = value | more << 8 * extra
    return value >> (bit & 7) & (1 << WIDTH) - 1


@triton.jit
def additive_kernel(
    codes,
    codebooks,
    scales,
    input_scales,
    weight,
    outputs,
    groups,
    out_size,
    size,
    HAS_INPUT_SCALES: tl.constexpr,
    BY_HAND: tl.constexpr,
    WIDTH: tl.constexpr,
    BOOKS: tl.constexpr,
    SIZE: tl.constexpr,
    LANES: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """ROWS rows of GROUPS groups of SIZE inputs; `groups` in a row, blocks of out_size outputs; LANES ≥ SIZE."""
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    lane = tl.arange(0, LANES)
    there = (row < outputs)[:, None] & (group < groups)[None, :]
    inside = there[:, :, None] & (lane < SIZE)[None, None, :]
    first = ((row // out_size)[:, None] * groups + group[None, :]) * BOOKS
    # W[o, i] = (Σ_m codebook_m[code_m] · scale_out[o]) · scale_in[i]
    for m in tl.static_range(BOOKS):
        code = _code(codes, (first + m) * WIDTH, size, there, WIDTH)
        word = ((code + (m << WIDTH)) * out_size + (row % out_size)[:, None]) * SIZE
        values = tl.load(codebooks + word[:, :, None] + lane[None, None, :], mask=inside, other=0).to(tl.float32)
        if m == 0:
            total = values
        else:
            total += values
    scale = tl.load(scales + row, mask=row < outputs, other=0).to(tl.float32)
    total *= scale[:, None, None]
    column = group[:, None] * SIZE + lane[None, :]
    if HAS_INPUT_SCALES:
        known = (group < groups)[:, None] & (lane < SIZE)[None, :]
        total *= tl.load(input_scales + column, mask=known, other=0).to(tl.float32)[None, :, :]
    place = row[:, None, None] * (groups * SIZE) + column[None, :, :]
    tl.store(weight + place, _rounded(total, weight.dtype.element_ty, BY_HAND), mask=inside)


@triton.jit
def scalar_kernel(
    codes,
    scales,
    zeros,
    weight,
    outputs,
    inputs,
    group_size,
    groups,
    size,
    SPLIT: tl.constexpr,
    ALIGNED: tl.constexpr,
    BY_HAND: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    OCTS: tl.constexpr,
):
    """ROWS rows of OCTS · 8 inputs. SPLIT: the first of two groups has group_size inputs.

    ALIGNED: eight inputs in a line share their bytes and their scale.
    """
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    oct = tl.program_id(0) * OCTS + tl.arange(0, OCTS)
    column = oct[:, None] * 8 + tl.arange(0, 8)[None, :]
    inside = (row < outputs)[:, None, None] & (column < inputs)[None, :, :]
    place = row[:, None, None] * inputs + column[None, :, :]
    if ALIGNED:
        first, chosen = oct[None, :] * 8, (row < outputs)[:, None] & (oct * 8 < inputs)[None, :]
        line = row[:, None]
        byte = (row[:, None] * (inputs // 8) + oct[None, :]) * WIDTH
        word = tl.load(codes + byte, mask=chosen, other=0).to(tl.uint32 if WIDTH <= 4 else tl.uint64)
        for extra in tl.static_range(1, WIDTH):
            word = word | tl.load(codes + byte + extra, mask=chosen, other=0).to(word.dtype) << 8 * extra
        shift = (tl.arange(0, 8) * WIDTH).to(word.dtype)
        code = (word[:, :, None] >> shift[None, None, :]).to(tl.int32) & (1 << WIDTH) - 1
    else:
        first, chosen, line = column[None, :, :], inside, row[:, None, None]
        code = _code(codes, place * WIDTH, size, inside, WIDTH)
    group = (first >= group_size).to(tl.int32) if SPLIT else first // group_size
    scale = tl.load(scales + line * groups + group, mask=chosen, other=0).to(tl.float32)
    zero = tl.load(zeros + line * groups + group, mask=chosen, other=0).to(tl.float32)
    if ALIGNED:
        scale, zero = scale[:, :, None], zero[:, :, None]
    # W[o, i] = (code_oi − zero_og) · scale_og, with g the group of input i
    value = (code.to(tl.float32) - zero) * scale
    tl.store(weight + place, _rounded(value, weight.dtype.element_ty, BY_HAND), mask=inside)


INTERPRETED = not isinstance(trellis_kernel, triton.JITFunction)


def decode_trellis(
    codes: Tensor, starts: Tensor, rates: Tensor, *, table: Tensor, scales: Tensor, shape: tuple[int, int], byte: bool
) -> Tensor:
    """Decode trellis codes, [out, in]. starts: int32 [in + 1] and rates: uint8 [in], from `trellis.locate`.

    byte: columns are kept in bytes.
    """
    outputs, inputs = shape
    weight = _empty(shape, table, scales)
    codes = codes if codes.data_ptr() % 4 == 0 else codes.clone()  # it is read by words
    length = sequence_length(outputs)
    parts = triton.cdiv(length, 4 * TRELLIS_TILE["GROUPS"])
    sequences = triton.cdiv(outputs, length)
    grid = triton.cdiv(inputs, TRELLIS_TILE["COLUMNS"]), sequences * parts
    with torch.cuda.device_of(codes):
        trellis_kernel[grid](
            codes, starts, rates, table, scales, weight, outputs, inputs, length, parts, codes.numel() // 4,
            BYTE=byte, BY_HAND=INTERPRETED, **TRELLIS_TILE, **OPTIONS,
        )  # fmt: skip
    return weight


def decode_additive(
    codes: Tensor, width: int, codebooks: Tensor, *, scales: Tensor, input_scales: Tensor | None, shape: tuple[int, int]
) -> Tensor:
    """Decode additive codes of `width` bits, [out, in], like `kernels.decode_additive`."""
    books, _, out_size, size = codebooks.shape
    factors = (codebooks, scales) if input_scales is None else (codebooks, scales, input_scales)
    weight = _empty(shape, *factors)
    groups, lanes = shape[1] // size, triton.next_power_of_2(size)
    tile = {"LANES": lanes, "ROWS": 4, "GROUPS": max(1, ADDITIVE_VALUES // (4 * lanes))}
    grid = triton.cdiv(groups, tile["GROUPS"]), triton.cdiv(shape[0], tile["ROWS"])
    with torch.cuda.device_of(codes):
        additive_kernel[grid](
            codes, codebooks, scales, factors[-1], weight, shape[0], groups, out_size, codes.numel(),
            HAS_INPUT_SCALES=input_scales is not None, BY_HAND=INTERPRETED, WIDTH=width, BOOKS=books, SIZE=size,
            **tile, **OPTIONS,
        )  # fmt: skip
    return weight


def decode_scalar(
    codes: Tensor, width: int, *, scales: Tensor, zeros: Tensor, shape: tuple[int, int], split: int | None
) -> Tensor:
    """Decode scalar codes of `width` bits, [out, in], like `kernels.decode_scalar`."""
    weight, groups = _empty(shape, scales, zeros), scales.shape[1]
    size = shape[1] // groups if split is None else split
    grid = triton.cdiv(shape[1], 8 * SCALAR_TILE["OCTS"]), triton.cdiv(shape[0], SCALAR_TILE["ROWS"])
    with torch.cuda.device_of(codes):
        scalar_kernel[grid](
            codes, scales, zeros, weight, shape[0], shape[1], size, groups, codes.numel(), SPLIT=split is not None,
            ALIGNED=shape[1] % 8 == 0 and size % 8 == 0, BY_HAND=INTERPRETED, WIDTH=width, **SCALAR_TILE, **OPTIONS,
        )  # fmt: skip
    return weight


def _empty(shape: tuple[int, int], *factors: Tensor) -> Tensor:
    dtype = factors[0].dtype
    for factor in factors[1:]:
        dtype = torch.promote_types(dtype, factor.dtype)
    return torch.empty(shape, dtype=dtype, device=factors[0].device)
