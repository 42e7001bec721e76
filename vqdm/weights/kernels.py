"""Decoders for the CPU and their gradients: packed codes straight to fp32 [out, in] by the loops of `compiled`.

Products and sums are formed in the same order as in the torch code, so both give the same weight bit for bit.
The first call of each function compiles it (a few seconds); the result is cached on disk.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vqdm.errors import UserError
from vqdm.weights import compiled
from vqdm.weights.trellis_format import BYTE, HIGHEST_RATE, LOWEST_RATE, column_bits, sequence_length

_BYTE_RATES = np.array([0, *(2 * code + LOWEST_RATE - 2 for code in range(1, 16))], np.int64)


def decode_trellis(
    packed: Tensor, side: str, stream: Tensor, table: Tensor, *, row_scales: Tensor, column_scales: Tensor
) -> Tensor:
    """The weight row_scale · (column_scale · table[state]), fp32 [out, in], from the parts of the codes and factors.

    UserError if the format has no such rates, or if they need more bits than the stream has.
    """
    weight = _empty(len(row_scales), len(column_scales))
    compiled.decode_trellis(*_trellis(packed, side, stream, table, row_scales, column_scales), weight.numpy())
    return weight


def trellis_gradients(
    gradient: Tensor,
    packed: Tensor,
    side: str,
    stream: Tensor,
    table: Tensor,
    *,
    row_scales: Tensor,
    column_scales: Tensor,
    of_table: bool = True,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Gradients of table (None unless `of_table`), row scales and column scales, from the weight's, fp32 [out, in].

    The other arguments and the UserError are those of `decode_trellis`.
    """
    arrays = _trellis(packed, side, stream, table, row_scales, column_scales)
    sums = _zeros(len(table) if of_table else 0), _zeros(len(row_scales)), _zeros(len(column_scales))
    compiled.trellis_gradients(_array(gradient), *arrays, *sums)
    values, rows, columns = map(_fp32, sums)
    return values if of_table else None, rows, columns


def decode_additive(
    codes: Tensor, width: int, codebooks: Tensor, *, inputs: int, scales: Tensor, input_scales: Tensor | None = None
) -> Tensor:
    """The weight scale_out · Σ_m codebook_m[code_m] · scale_in, fp32 [out, in].

    codes: uint8 [bytes], the stream of codes [out_groups, in_groups, M] of `width` bits.
    codebooks: fp32 [M, codebook_size, out_group_size, in_group_size]; scales: [out]; input_scales: [in] or none.
    """
    columns = scales[:0] if input_scales is None else input_scales
    weight = _empty(len(scales), inputs)
    compiled.decode_additive(_words(codes), width, *_padded(codebooks), _array(scales), _array(columns), weight.numpy())
    return weight


def additive_gradients(
    gradient: Tensor,
    codes: Tensor,
    width: int,
    codebooks: Tensor,
    *,
    scales: Tensor,
    input_scales: Tensor | None = None,
    of_codebooks: bool = True,
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """Gradients of codebooks (None unless `of_codebooks`), scales and input scales (None if there are none).

    gradient: the weight's, fp32 [out, in]; the other arguments are those of `decode_additive`.
    """
    words, size = _padded(codebooks)
    columns = scales.new_ones(gradient.shape[1]) if input_scales is None else input_scales
    sums = _zeros(*(words.shape if of_codebooks else (0, 0, 0, 0))), _zeros(len(scales)), _zeros(len(columns))
    compiled.additive_gradients(
        _array(gradient), _words(codes), width, words, size, _array(scales), _array(columns), *sums
    )
    codewords, rows, columns = map(_fp32, sums)
    return codewords[..., :size].contiguous() if of_codebooks else None, rows, None if input_scales is None else columns


def decode_scalar(
    codes: Tensor, width: int, *, inputs: int, scales: Tensor, zeros: Tensor, split: int | None = None
) -> Tensor:
    """The weight scale · (code − zero). codes: uint8, a stream of `width` bits each; scales, zeros: [out, groups].

    split: number of inputs in the first of two groups; None: all groups are of one size.
    """
    weight, groups = _empty(len(scales), inputs), scales.shape[1]
    edges = np.arange(groups + 1) * (inputs // groups) if split is None else np.array([0, split, inputs])
    compiled.decode_scalar(_words(codes), width, edges, _array(scales), _array(zeros), weight.numpy())
    return weight


def _empty(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device="cpu")  # whatever torch's defaults are


def _zeros(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float64)


def _fp32(sums: np.ndarray) -> Tensor:
    return torch.from_numpy(sums.astype(np.float32))


def _trellis(
    packed: Tensor, side: str, stream: Tensor, table: Tensor, row_scales: Tensor, column_scales: Tensor
) -> tuple:
    """Arguments of the loops as numpy arrays: numpy's calls cost less than torch's, which matters for small layers."""
    out = len(row_scales)
    rates = _rates(packed, side, len(column_scales))
    bits = column_bits(out, rates)
    needed, highest = int(bits.sum()), int(rates.max())
    if needed > 8 * len(stream) or highest > HIGHEST_RATE:
        raise UserError(
            f"trellis: a stream of {8 * len(stream)} bits has rates for {needed}, the highest {highest}/4: "
            "the weights are damaged, make or download them again"
        )
    return (
        _words(stream),
        rates,
        bits.cumsum() - bits,
        sequence_length(out),
        _array(table),
        _array(row_scales),
        _array(column_scales),
    )


def _rates(packed: Tensor, side: str, columns: int) -> np.ndarray:
    """The rate of every column, in quarter bits per weight: int64 [columns]."""
    if side == BYTE:
        return _BYTE_RATES[packed.numpy()[1:] & 15]
    return compiled.unpack_rates(_words(packed), columns)


def _padded(codebooks: Tensor) -> tuple[np.ndarray, int]:
    """Codebooks [M, codebook_size, out_group_size, in_group_size padded to LANES], and the size without padding."""
    size = codebooks.shape[3]
    return _array(F.pad(codebooks, (0, -size % compiled.LANES))), size


def _words(codes: Tensor) -> np.ndarray:
    """A stream as uint64, followed by at least one word of zeros."""
    words = np.zeros(len(codes) // 8 + 2, np.dtype("<u8"))
    words.view(np.uint8)[: len(codes)] = codes.numpy()
    return words


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().contiguous().numpy()
