"""How many bits every layer gets from a budget for the whole model, where bits may be any number: trellis codes."""

import math

from vqdm.codecs.codec import Harm
from vqdm.errors import UserError
from vqdm.models.specs import LayerSpec
from vqdm.weights.trellis_format import HIGHEST_RATE, WINDOW_BITS, reason_to_skip, side_bits, side_bytes

TABLE_BITS = 16 << WINDOW_BITS  # of the one trellis table of a model
LEAST_CODE_BITS = 0.5  # per weight of a layer


def layer_bits(specs: list[LayerSpec], bits: float, *, by_harm: bool, harm: Harm | None) -> dict[str, float]:
    """Bits per weight of every layer that a trellis can hold, `bits` in all.

    harm: gives each layer its own. None: the same for all, in as many bytes as it would take `by_harm`.
    """
    if harm is not None:
        return allocate([spec for spec in specs if spec.name in harm], harm, bits)
    found = uniform_bits(specs, bits)
    return _filled(specs, found, bits) if by_harm else found


def uniform_bits(specs: list[LayerSpec], bits: float) -> dict[str, float]:
    """Bits per weight of every layer, the same for codes in all, so that with scales and table they are `bits` in all.

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
    """Bits per weight of every layer, so that with the table they are `bits` in all and the harm's sum is least.

    To the byte: how many bytes the model takes does not depend on the harm.
    harm: at two or more bit-widths; its logarithm is taken as a line. Reverse water-filling: the harm of every layer
    falls equally fast per bit spent on it.
    """
    room = bits * sum(spec.size for spec in specs) - TABLE_BITS
    least, most = (sum(_bits_range(spec)[i] * spec.size for spec in specs) for i in (0, 1))
    if room > most:
        raise UserError(f"quantize.bits={bits:g} is more than the highest rate of every layer: lower it")
    if not 0 < least <= room:
        raise UserError(f"quantize.bits={bits:g} is less than scales, rates and the trellis table take: raise it")
    lines = {spec.name: _line(harm[spec.name]) for spec in specs}
    low, high = -200.0, 200.0  # log2 of the slope that all layers share
    for _ in range(100):
        level = (low + high) / 2
        found = {spec.name: _bits_at(spec, *lines[spec.name], level) for spec in specs}
        spent = sum(found[spec.name] * spec.size for spec in specs)
        low, high = (level, high) if spent > room else (low, level)
    wanted = {spec.name: _bits_at(spec, *lines[spec.name], high) * spec.size / 8 for spec in specs}
    whole = _in_whole_bytes(wanted, int(room / 8 + 1e-6))
    return {spec.name: 8 * whole[spec.name] / spec.size for spec in specs}


def _filled(specs: list[LayerSpec], bits: dict[str, float], total: float) -> dict[str, float]:
    """Nearly the same bits, in exactly the bytes that `allocate` will take."""
    sizes = {spec.name: spec.size for spec in specs if spec.name in bits}
    wanted = {name: bits[name] * size / 8 for name, size in sizes.items()}
    whole = _in_whole_bytes(wanted, int((total * sum(sizes.values()) - TABLE_BITS) / 8 + 1e-6))
    return {name: 8 * whole[name] / size for name, size in sizes.items()}


def _in_whole_bytes(wanted: dict[str, float], total: int) -> dict[str, int]:
    """The numbers rounded so that they make up `total`; those with the largest fractions are rounded up."""
    whole = {name: int(value) for name, value in wanted.items()}
    left = total - sum(whole.values())
    by_fraction = sorted(wanted, key=lambda name: (whole[name] - wanted[name], name))
    return whole | {name: whole[name] + 1 for name in by_fraction[:left]}


LEAST_SLOPE = 1.0  # of −log2 harm per bit: below it the measurement is noise; 2 is the high-rate theory


def _line(points: dict[float, float]) -> tuple[float, float]:
    """log2 harm = intercept − slope · bits through the outermost points."""
    first, last = min(points), max(points)
    logs = [math.log2(max(points[at], 1e-30)) for at in (first, last)]
    slope = max(LEAST_SLOPE, (logs[0] - logs[1]) / (last - first))
    middle = (first + last) / 2
    return sum(logs) / 2 + slope * middle, slope


def _bits_at(spec: LayerSpec, intercept: float, slope: float, level: float) -> float:
    """Where d harm / d (bits · size) = −2^level, within what the format can hold."""
    wanted = (intercept + math.log2(slope * math.log(2) / spec.size) - level) / slope
    least, most = _bits_range(spec)
    return min(max(wanted, least), most)


def _bits_range(spec: LayerSpec) -> tuple[float, float]:
    """From the fewest bits for codes to the highest rate in every column."""
    side = side_bits(spec.shape)
    return side + LEAST_CODE_BITS, side + HIGHEST_RATE / 4
