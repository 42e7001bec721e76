"""Constants of the trellis format and the bytes that a matrix takes in it; `trellis` describes the format."""

from torch import Tensor

from vqdm.weights.bitpack import packed_bytes

WINDOW_BITS = 12
LONGEST_SEQUENCE = 320
FEWEST_OUTPUTS = 16  # shorter columns would not fill the window at 1 bit
LOWEST_RATE, HIGHEST_RATE = 4, 24  # quarter bits; below the lowest there is only 0
RATE_BITS = 5  # of a column's rate, in quarter bits: layers with WIDE columns
WIDE, BYTE = "wide", "byte"  # what a layer keeps of every column: a rate and an fp16 scale, or both in one byte
MOST_BYTE_OUTPUTS = 256  # layers of so many outputs and fewer get BYTE columns


def sequence_length(out: int) -> int:
    """Values per sequence of a column of `out`: equal parts of at most LONGEST_SEQUENCE, rounded up."""
    return -(-out // -(-out // LONGEST_SEQUENCE))


def column_bits(out: int, rate: int | Tensor) -> int | Tensor:
    """Bits of a column of `out` values at `rate` quarter bits per value (a number, or int64 of any shape)."""
    length = sequence_length(out)
    return (out // length) * (rate * length // 4) + rate * (out % length) // 4


def byte_scale(code, fine):
    """Scale of a BYTE column, exact in fp32: code 0 to 15; fine (0 or 1): four steps to an octave, else two.

    m · 2^(octave − 10), m = 64, 76, 90 or 106: from 1/16 to 0.83 in steps of 2^(1/4), or from 1/16 to 11 of 2^(1/2).
    Numbers or arrays of integers, of numpy or torch.
    """
    step = (code & 1) * 2 * (1 - fine) + (code & 3) * fine
    octave = (code >> 1) * (1 - fine) + (code >> 2) * fine
    return ((64 + 11 * step + step * step) << octave) / 1024


def side_of(shape: tuple[int, int]) -> str:
    """What new layers of this shape keep of their columns.

    Of few outputs every bit of a column's own counts; of many, finer rates and scales that train are worth more.
    """
    return BYTE if shape[0] <= MOST_BYTE_OUTPUTS else WIDE


def columns_bytes(columns: int, side: str) -> int:
    """Bytes of what `codes` hold before the stream."""
    return 1 + columns if side == BYTE else packed_bytes(columns, RATE_BITS)


def scales_count(shape: tuple[int, int], side: str) -> int:
    """Length of `scales`: those of the rows, and those of WIDE columns."""
    return shape[0] if side == BYTE else sum(shape)


def side_bytes(shape: tuple[int, int], side: str | None = None) -> int:
    """Bytes of row scales, column scales and rates; side: None is that of new layers."""
    side = side or side_of(shape)
    return 2 * scales_count(shape, side) + columns_bytes(shape[1], side)


def side_bits(shape: tuple[int, int], side: str | None = None) -> float:
    """The same in bits per weight: what a layer's bits are beyond those of its codes."""
    return 8 * side_bytes(shape, side) / (shape[0] * shape[1])


def stream_bytes(shape: tuple[int, int], bits: float, side: str | None = None) -> int:
    """Bytes of the stream: all that `bits` per weight leave beside the side information; negative where they do not."""
    return int(bits * shape[0] * shape[1] / 8 + 1e-6) - side_bytes(shape, side)


def reason_to_skip(shape: tuple[int, int], bits: float, side: str | None = None) -> str | None:
    """Why a matrix of this shape cannot be held at `bits` per weight; None if it can."""
    if shape[0] < FEWEST_OUTPUTS:
        return f"{shape[0]} outputs are too few for a trellis of {WINDOW_BITS} bits"
    if stream_bytes(shape, bits, side) <= 0:
        return f"its scales and rates alone take {side_bits(shape, side):.2f} of {bits:.2f} bits per weight"
    return None
