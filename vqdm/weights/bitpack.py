"""Integers of 1 to 16 bits as a stream of bytes, little-endian: how every code is stored.

Code k occupies bits [k*width, (k+1)*width) of the stream; bit b of the stream is bit b % 8 of byte b // 8.
Eight codes fill exactly `width` bytes, so both directions work on rows of eight codes with fixed shifts.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_WIDTH = 16


def packed_bytes(count: int, width: int) -> int:
    """The number of bytes that hold `count` codes of `width` bits."""
    if not 1 <= width <= MAX_WIDTH:
        raise ValueError(f"codes have 1 to {MAX_WIDTH} bits, not {width}")
    return (count * width + 7) // 8


def pack(codes: Tensor, width: int) -> Tensor:
    """Pack integer codes of any shape, taken in row-major order.

    Returns uint8 [packed_bytes(codes.numel(), width)] on the same device. ValueError for a code outside [0, 2**width).
    """
    size = packed_bytes(codes.numel(), width)
    flat = codes.reshape(-1)
    if flat.is_floating_point() or flat.dtype == torch.bool:
        raise ValueError(f"codes must be integers, not {flat.dtype}")
    lowest, highest = (int(flat.min()), int(flat.max())) if flat.numel() else (0, 0)
    if lowest < 0 or highest >= 1 << width:
        raise ValueError(f"codes from {lowest} to {highest} do not fit into {width} bits")
    rows = F.pad(flat.to(torch.int32), (0, -flat.numel() % 8)).view(-1, 8)
    packed = torch.empty(rows.shape[0], width, dtype=torch.uint8, device=codes.device)
    for byte in range(width):
        packed[:, byte] = _byte_of_row(rows, byte, width).to(torch.uint8)
    return packed.view(-1)[:size].clone()


def _byte_of_row(rows: Tensor, byte: int, width: int) -> Tensor:
    """Bits [8*byte, 8*byte + 8) of the rows of eight codes: int32 [n, 8] to int32 [n]."""
    value = torch.zeros_like(rows[:, 0])
    for k in range(8 * byte // width, min(8, (8 * byte + 7) // width + 1)):
        shift = k * width - 8 * byte
        value |= rows[:, k] << shift if shift >= 0 else rows[:, k] >> -shift
    return value & 255


def unpack(packed: Tensor, width: int, count: int) -> Tensor:
    """The first `count` codes of a stream made by `pack`: uint8 [bytes] to int32 [count] on the same device.

    ValueError if the stream does not have the length of `count` codes.
    """
    size = packed_bytes(count, width)
    if packed.dtype != torch.uint8 or packed.shape != (size,):
        raise ValueError(f"{count} codes of {width} bits are uint8 [{size}], not {packed.dtype} {list(packed.shape)}")
    if width == 8:
        return packed.to(torch.int32)
    rows = F.pad(packed, (0, -size % width)).view(-1, width).to(torch.int32)
    codes = torch.stack([_code_of_row(rows, k, width) for k in range(8)], dim=1)
    return codes.view(-1)[:count]


def _code_of_row(rows: Tensor, k: int, width: int) -> Tensor:
    """Code k of eight: int32 [n, width] bytes to int32 [n]. At most three bytes hold it, so 32 bits suffice."""
    first, shift = divmod(k * width, 8)
    value = rows[:, first]
    for extra in range(1, (shift + width + 7) // 8):
        value = value | rows[:, first + extra] << 8 * extra
    return value >> shift & (1 << width) - 1
