"""Round to nearest: asymmetric uniform codes; the range of every row (or group of a row) is clipped for least error."""

import torch
from torch import Tensor

from vqdm.codecs.checks import check_matrix
from vqdm.errors import UserError
from vqdm.weights.base import STORED
from vqdm.weights.scalar import ScalarScheme, ScalarWeight

CHUNK = 1 << 22  # weights searched at once
SMALLEST_SCALE, LARGEST_SCALE = 2.0**-24, 65504.0  # of fp16
# Both ends shrink together first, down to a tenth for heavy tails; then each end on its own around the best.
JOINT_FACTORS = torch.linspace(1.0, 0.1, 37).tolist()
END_FACTORS = [0.7, 0.75, 0.8, 0.85, 0.9, 0.925, 0.95, 0.975, 1.025, 1.05, 1.075, 1.1, 1.15, 1.2, 1.3]


def encode(
    weight: Tensor, *, bits: int, clip: str = "mse", group_size: int | None = None, layer: str = ""
) -> ScalarWeight:
    """Quantize [out, in] to `bits` bits per weight, one scale and zero point per row or per `group_size` inputs.

    clip: "minmax" spans the row's extremes and 0; "mse" searches the clipped range of least squared error.
    layer: the name for messages. UserError for non-finite weights and a group size that does not divide `in`.
    """
    if clip not in ("mse", "minmax"):
        raise UserError(f"rtn: clip must be mse or minmax, not {clip!r}")
    scheme = ScalarScheme(codec="rtn", bits=bits, group_size=group_size)
    check_matrix(weight, layer=layer, group_size=group_size)
    weight = weight.detach()
    rows = weight.reshape(-1, group_size or weight.shape[1])
    parts = [_encode_rows(part, bits, clip) for part in rows.split(max(1, CHUNK // rows.shape[1]))]
    codes, scales, zeros = (torch.cat(column) for column in zip(*parts, strict=True))
    per_group = (weight.shape[0], -1)
    return ScalarWeight.from_parts(
        scheme, codes.view(weight.shape), scales=scales.view(per_group), zeros=zeros.view(per_group)
    )


def _encode_rows(rows: Tensor, bits: int, clip: str) -> tuple[Tensor, Tensor, Tensor]:
    scales, zeros = find_grid(rows.float(), bits, clip)
    return round_to_grid(rows.float(), scales, zeros, bits=bits).to(torch.uint8), scales, zeros


def round_to_grid(rows: Tensor, scales: Tensor, zeros: Tensor, *, bits: int) -> Tensor:
    """The nearest code of every weight: fp32 [n, k], scales and zeros [n], to integers in fp32 [n, k]."""
    return (torch.round(rows / scales[:, None]) + zeros[:, None]).clamp_(0, 2**bits - 1)


def find_grid(rows: Tensor, bits: int, clip: str) -> tuple[Tensor, Tensor]:
    """Scales (rounded to fp16) and integer zero points of fp32 rows [n, k]: fp32 [n] each. `clip` as in `encode`."""
    low, high = rows.amin(1).clamp(max=0), rows.amax(1).clamp(min=0)
    if clip == "minmax":
        return _grid(low, high, bits)
    return _grid(*_search(rows, low, high, bits=bits), bits)


def _grid(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The grid that spans [low, high] ∋ 0, as it will be stored: fp16 scale, zero point among the codes."""
    levels = 2**bits - 1
    scales = ((high - low) / levels).clamp(SMALLEST_SCALE, LARGEST_SCALE).to(STORED).float()
    return scales, torch.round(-low / scales).clamp_(0, levels)


def _search(rows: Tensor, low: Tensor, high: Tensor, *, bits: int) -> tuple[Tensor, Tensor]:
    """The range [low, high] of least squared error on the grid that is stored, found by scans over shrink factors."""
    best = (low, high, _squared_error(rows, low, high, bits=bits))
    scans = [[(f, f) for f in JOINT_FACTORS], [(f, 1.0) for f in END_FACTORS], [(1.0, f) for f in END_FACTORS]]
    for scan in scans:
        low, high, _ = best  # factors of one scan apply to the best range of the scan before
        for low_factor, high_factor in scan:
            trial = (low * low_factor, high * high_factor)
            best = _better(best, (*trial, _squared_error(rows, *trial, bits=bits)))
    return best[0], best[1]


def _better(best: tuple[Tensor, ...], trial: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Row by row, whichever of two (low, high, error) has the smaller error; the first in a tie."""
    wins = trial[2] < best[2]
    return tuple(torch.where(wins, new, old) for new, old in zip(trial, best, strict=True))


def _squared_error(rows: Tensor, low: Tensor, high: Tensor, *, bits: int) -> Tensor:
    """Σ (decoded − weight)² of every row on the grid that is stored: fp32 [n]."""
    scales, zeros = _grid(low, high, bits)
    decoded = round_to_grid(rows, scales, zeros, bits=bits).sub_(zeros[:, None]).mul_(scales[:, None])
    return decoded.sub_(rows).square_().sum(1)
