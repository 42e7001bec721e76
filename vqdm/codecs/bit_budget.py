"""Bits of every layer from a budget for the whole model, for codes that take any number of bits: trellis codes."""

import math

from vqdm.codecs.codec import Harm
from vqdm.errors import UserError
from vqdm.models.specs import LayerSpec
from vqdm.weights.trellis_format import HIGHEST_RATE, WINDOW_BITS, reason_to_skip, side_bits, side_bytes

TABLE_BITS = 16 << WINDOW_BITS  # bits of a model's one trellis table
LEAST_CODE_BITS = 0.5  # fewest code bits per weight of a layer


def layer_bits(specs: list[LayerSpec], bits: float, *, by_harm: bool, harm: Harm | None) -> dict[str, float]:
    """Bits per weight of every layer that a trellis can hold, `bits` in all.

    harm: gives each layer its own. None: the same for all, in as many bytes as `by_harm` would take.
    """
    if harm is not None:
        return allocate([spec for spec in specs if spec.name in harm], harm, bits)
    found = uniform_bits(specs, bits)
    return _filled(specs, found, bits) if by_harm else found


def uniform_bits(specs: list[LayerSpec], bits: float) -> dict[str, float]:
    """Bits per weight of every layer, with equal bits for codes, so that scales and table included they make `bits`.

    Layers that a trellis cannot hold are left out. UserError if there is no room for codes.
    """
    fitting = [spec for spec in specs if reason_to_skip(spec.shape, 16) is None]
    weights = sum(spec.size for spec in fitting)
    side = sum(8 * side_bytes(spec.shape) for spec in fitting)
    code_bits = bits - (side + TABLE_BITS) / weights if weights else 0.0
    if code_bits < LEAST_CODE_BITS:
        raise UserError(f"quantize.bits={bits:g} is less than scales, rates and the trellis table take: raise it")
    return {spec.name: code_bits + side_bits(spec.shape) for spec in fitting}


def allocate(specs: list[LayerSpec], harm: Harm, bits: float) -> dict[str, float]:
    """Bits per weight of every layer that make the sum of harm least, and `bits` in all with the table.

    The total is exact to the byte, so that the model's size does not depend on the harm.
    harm: at two or more bit-widths; its logarithm is taken as a line. By reverse water-filling, the harm of every
    layer falls equally fast per bit spent on it.
    """
    room = bits * sum(spec.size for spec in specs) - TABLE_BITS
    least, most = (sum(_bits_range(spec)[i] * spec.size for spec in specs) for i in (0, 1))
    if room > most:
        raise UserError(f"quantize.bits={bits:g} is more than the highest rate of every layer: lower it")
    if not 0 < least <= room:
        raise UserError(f"quantize.bits={bits:g} is less than scales, rates and the trellis table take: raise it")
    lines = {spec.name: _line(harm[spec.name]) for spec in specs}
    low, high = -200.0, 200.0  # bounds on log2 of the slope that all layers share
    for _ in range(100):
        level = (low + high) / 2
        found = {spec.name: _bits_at(spec, *lines[spec.name], level) for spec in specs}
        spent = sum(found[spec.name] * spec.size for spec in specs)
        low, high = (level, high) if spent > room else (low, level)
    wanted = {spec.name: _bits_at(spec, *lines[spec.name], high) * spec.size / 8 for spec in specs}
    whole = _in_whole_bytes(wanted, int(room / 8 + 1e-6))
    return {spec.name: 8 * whole[spec.name] / spec.size for spec in specs}


def _filled(specs: list[LayerSpec], bits: dict[str, float], total: float) -> dict[str, float]:
    """Adjust bits slightly so that they take exactly as many bytes as `allocate` will."""
    sizes = {spec.name: spec.size for spec in specs if spec.name in bits}
    wanted = {name: bits[name] * size / 8 for name, size in sizes.items()}
    whole = _in_whole_bytes(wanted, int((total * sum(sizes.values()) - TABLE_BITS) / 8 + 1e-6))
    return {name: 8 * whole[name] / size for name, size in sizes.items()}


def _in_whole_bytes(wanted: dict[str, float], total: int) -> dict[str, int]:
    """Round numbers so that they add up to `total`: those with the largest fractions are rounded up."""
    whole = {name: int(value) for name, value in wanted.items()}
    left = total - sum(whole.values())
    by_fraction = sorted(wanted, key=lambda name: (whole[name] - wanted[name], name))
    return whole | {name: whole[name] + 1 for name in by_fraction[:left]}


LEAST_SLOPE = 1.0  # of −log2 harm per bit: anything below it is noise; high-rate theory says 2


def _line(points: dict[float, float]) -> tuple[float, float]:
    """Intercept and slope of the line log2 harm = intercept − slope · bits through the outermost points."""
    # slope = (log2 h_first − log2 h_last) / (b_last − b_first), at least LEAST_SLOPE; through the points' middle
    first, last = min(points), max(points)
    logs = [math.log2(max(points[at], 1e-30)) for at in (first, last)]
    slope = max(LEAST_SLOPE, (logs[0] - logs[1]) / (last - first))
    middle = (first + last) / 2
    return sum(logs) / 2 + slope * middle, slope


def _bits_at(spec: LayerSpec, intercept: float, slope: float, level: float) -> float:
    """Bits at which d harm / d (bits · size) = −2^level, within what the format can hold."""
    # harm(b) = 2^(i − s b), so d harm / d (b n) = −(s ln 2 / n) 2^(i − s b) = −2^level at
    # b = (i + log2(s ln 2 / n) − level) / s
    wanted = (intercept + math.log2(slope * math.log(2) / spec.size) - level) / slope
    least, most = _bits_range(spec)
    return min(max(wanted, least), most)


def _bits_range(spec: LayerSpec) -> tuple[float, float]:
    """Least and most bits per weight: from the fewest code bits to the highest rate in every column."""
    side = side_bits(spec.shape)
    return side + LEAST_CODE_BITS, side + HIGHEST_RATE / 4
