"""Constants of the trellis format, and the bytes that a matrix takes in it; `trellis` describes the format."""

from torch import Tensor

from vqdm.weights.bitpack import packed_bytes

WINDOW_BITS = 12


LONGEST_SEQUENCE = 320


FEWEST_OUTPUTS = 16  # shorter columns would not fill the window at 1 bit


LOWEST_RATE, HIGHEST_RATE = 4, 24  # quarter bits; below the lowest only 0 is possible


RATE_BITS = 5


def sequence_length(out: int) -> int:
    """Values per sequence in a column of `out` values: equal parts of at most LONGEST_SEQUENCE, rounded up."""
    return -(-out // -(-out // LONGEST_SEQUENCE))


def column_bits(out: int, rate: int | Tensor) -> int | Tensor:
    """Bits of a column of `out` values at `rate` quarter bits per value (a number, or int64 of any shape)."""
    length = sequence_length(out)
    return (out // length) * (rate * length // 4) + rate * (out % length) // 4


def rates_bytes(columns: int) -> int:
    return packed_bytes(columns, RATE_BITS)


def side_bytes(shape: tuple[int, int]) -> int:
    """Bytes of row scales, column scales and rates together."""
    return 2 * shape[0] + 2 * shape[1] + rates_bytes(shape[1])


def side_bits(shape: tuple[int, int]) -> float:
    """Bits per weight for scales and rates: a layer's bits beyond those of its codes."""
    return 8 * side_bytes(shape) / (shape[0] * shape[1])


def stream_bytes(shape: tuple[int, int], bits: float) -> int:
    """Bytes that `bits` per weight leave for the stream after scales and rates; negative if they do not cover those."""
    return int(bits * shape[0] * shape[1] / 8 + 1e-6) - side_bytes(shape)


def reason_to_skip(shape: tuple[int, int], bits: float) -> str | None:
    """Why a matrix of this shape cannot be held at `bits` per weight; None if it can."""
    if shape[0] < FEWEST_OUTPUTS:
        return f"{shape[0]} outputs are too few for a trellis of {WINDOW_BITS} bits"
    if stream_bytes(shape, bits) <= 0:
        return f"its scales and rates alone take {side_bits(shape):.2f} of {bits:.2f} bits per weight"
    return None
