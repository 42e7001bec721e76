"""A second reader of quantized checkpoints, from docs/format.md alone: numpy, json and struct, nothing of vqdm.

It is what tests hold vqdm's own decoders against, and what a reader in another language may start from.
"""

import hashlib
import json
import math
import struct
from pathlib import Path

import numpy as np

WINDOW = 12
LONGEST_SEQUENCE = 320
DTYPES = {"U8": "u1", "F16": "<f2", "BF16": "<u2", "F32": "<f4", "I64": "<i8"}


class FormatError(Exception):
    """The file is not what docs/format.md describes."""


def read(*paths: Path) -> dict[str, np.ndarray]:
    """Every quantized layer of a checkpoint, all its shards given: name -> fp32 weight in its original shape."""
    about, tensors = load(*paths)
    verify(about, tensors)
    layers = {}
    for group in about["groups"]:
        for name in group["layers"]:
            layers[name] = decode(group["scheme"], group["shape"], name, tensors)
    return layers


def load(*paths: Path) -> tuple[dict, dict[str, tuple[str, list[int], bytes]]]:
    """What the metadata says, and the tensors by name: (dtype, shape, bytes)."""
    abouts, tensors = [], {}
    for path in paths:
        content = Path(path).read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
        abouts.append(header.pop("__metadata__")["vqdm"])
        for name, entry in header.items():
            start, end = entry["data_offsets"]
            tensors[name] = entry["dtype"], entry["shape"], data[start:end]
    if len(set(abouts)) != 1:
        raise FormatError("shards of different checkpoints")
    about = json.loads(abouts[0])
    if about["version"] not in (1, 2, 3, 4):
        raise FormatError(f"version {about['version']}")
    return about, tensors


def verify(about: dict, tensors: dict[str, tuple[str, list[int], bytes]]) -> None:
    """FormatError, with its name, for a tensor that is not as it was saved."""
    sums = about["checksums"]
    if len(sums) != 16 * len(tensors):
        raise FormatError(f"{len(sums)} digits of checksums for {len(tensors)} tensors")
    for i, name in enumerate(sorted(tensors)):
        dtype, shape, data = tensors[name]
        hashed = f"{name} {dtype} [{', '.join(str(n) for n in shape)}]\n".encode() + data
        if hashlib.sha256(hashed).hexdigest()[:16] != sums[16 * i : 16 * i + 16]:
            raise FormatError(f"tensor {name} does not match its checksum")


def decode(scheme: dict, shape: list[int], name: str, tensors: dict) -> np.ndarray:
    """One layer's weight, fp32, in its original shape."""
    out, inputs = shape[0], math.prod(shape[1:])

    def part(key: str, at: str = f"{name}.weight.") -> np.ndarray:
        dtype, sizes, data = tensors[at + key]
        values = np.frombuffer(data, DTYPES[dtype]).reshape(sizes)
        return values.astype(np.float32) if dtype == "F16" else values

    if scheme["kind"] == "low_rank":
        matrix = decode_low_rank(scheme, (out, inputs), part, f"{name}.weight.base.")
    else:
        matrix = decode_codes(scheme, (out, inputs), part)
    if len(shape) == 2:
        return matrix
    _, channels, rows, columns = shape
    return np.ascontiguousarray(matrix.reshape(out, rows, columns, channels).transpose(0, 3, 1, 2))


def decode_codes(scheme: dict, shape: tuple[int, int], part) -> np.ndarray:
    if scheme["kind"] == "scalar":
        return decode_scalar(scheme, shape, part)
    if scheme["kind"] == "additive":
        return decode_additive(scheme, shape, part)
    if scheme["kind"] == "trellis":
        return decode_trellis(scheme.get("side"), shape, part)
    raise FormatError(f"codes of kind {scheme['kind']}")


def decode_low_rank(scheme: dict, shape: tuple[int, int], part, base: str) -> np.ndarray:
    matrix = decode_codes(scheme["base"], shape, lambda key, at=base: part(key, at))
    if scheme["input_scales"]:
        matrix = matrix * part("input_scales")
    left, right = part("left"), part("right")
    for k in range(scheme["rank"]):
        matrix = matrix + left[:, k, None] * right[k]
    return matrix


def decode_scalar(scheme: dict, shape: tuple[int, int], part) -> np.ndarray:
    columns = np.arange(shape[1])
    group = columns >= scheme["split"] if "split" in scheme else columns // (scheme["group_size"] or shape[1])
    codes = unpack(part("codes"), scheme["bits"], math.prod(shape)).reshape(shape).astype(np.float32)
    return (codes - part("zeros")[:, group.astype(int)]) * part("scales")[:, group.astype(int)]


def decode_additive(scheme: dict, shape: tuple[int, int], part) -> np.ndarray:
    shared = scheme["shared"]
    codebooks = part("codebooks") if shared is None else part("codebooks", f"shared.{shared}.")
    count, _, out_size, in_size = codebooks.shape
    groups = shape[0] // out_size, shape[1] // in_size
    codes = unpack(part("codes"), scheme["codebook_bits"], math.prod(groups) * count).reshape(*groups, count)
    total = codebooks[0][codes[..., 0]]
    for m in range(1, count):
        total = total + codebooks[m][codes[..., m]]
    matrix = total.transpose(0, 2, 1, 3).reshape(shape) * part("scales")[:, None]
    return matrix * part("input_scales") if scheme["input_scales"] else matrix


def columns_of(side: str | None, inputs: int, codes: np.ndarray, scales: np.ndarray) -> tuple[list[int], list, int]:
    """Rates in quarter bits and scales of all columns, and the bytes of `codes` that say them."""
    if side is None:
        size = (5 * inputs + 7) // 8
        return [int(code) + 3 if code else 0 for code in unpack(codes[:size], 5, inputs)], list(scales[-inputs:]), size
    if side != "byte":
        raise FormatError(f"columns of kind {side}")
    fine, own = int(codes[0]), [int(byte) for byte in codes[1 : 1 + inputs]]
    steps = [(s % 4, s // 4) if fine else (2 * (s % 2), s // 2) for s in (byte // 16 for byte in own)]
    values = [np.float32((64, 76, 90, 106)[k] * 2**e / 1024) for k, e in steps]
    return [2 * (byte % 16) + 2 if byte % 16 else 0 for byte in own], values, 1 + inputs


def decode_trellis(side: str | None, shape: tuple[int, int], part) -> np.ndarray:
    out, inputs = shape
    table, scales, codes = part("table", "shared.trellis_table."), part("scales"), part("codes")
    rates, factors, size = columns_of(side, inputs, codes, scales)
    stream = np.unpackbits(codes[size:], bitorder="little").astype(np.int64)
    longest = math.ceil(out / math.ceil(out / LONGEST_SEQUENCE))
    matrix, position = np.zeros(shape, np.float32), 0
    for column, q in enumerate(rates):
        if q > 24:
            raise FormatError(f"a column of {q} quarter bits")
        for first in range(0, out if q else 0, longest):
            values = min(longest, out - first)
            length = q * values // 4
            bits = stream[position : position + length]
            position += length
            starts = q * np.arange(values) // 4
            windows = bits[(starts[:, None] + np.arange(WINDOW)) % length]
            states = windows @ (1 << np.arange(WINDOW))
            matrix[first : first + values, column] = table[states] * factors[column]
    return matrix * scales[:out, None]


def unpack(data: np.ndarray, width: int, count: int) -> np.ndarray:
    """`count` codes of `width` bits, the first in the lowest bits."""
    if len(data) != (count * width + 7) // 8:
        raise FormatError(f"{len(data)} bytes for {count} codes of {width} bits")
    bits = np.unpackbits(data, bitorder="little")[: count * width].reshape(count, width)
    return bits.astype(np.int64) @ (1 << np.arange(width))


def fingerprint(weight: np.ndarray) -> str:
    """sha256 of a decoded weight's bytes, row by row, little-endian; −0 counts as 0."""
    return hashlib.sha256((weight + np.float32(0)).astype("<f4").tobytes()).hexdigest()
