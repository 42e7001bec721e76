"""Round to nearest: asymmetric uniform codes, with the range of every row or group clipped for least error."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from vqdm.codecs.checks import check_hessian, check_matrix
from vqdm.codecs.codec import Codec, Shape, scalar_scheme_of
from vqdm.config.codecs import RtnConfig
from vqdm.errors import UserError
from vqdm.weights.base import STORED
from vqdm.weights.scalar import ScalarScheme, ScalarWeight

CHUNK = 1 << 22  # weights searched at once
SMALLEST_SCALE, LARGEST_SCALE = 2.0**-24, 65504.0  # fp16's
# Both ends shrink together first, down to a tenth for heavy tails; then each end alone around the best.
JOINT_FACTORS = torch.linspace(1.0, 0.1, 37, device="cpu").tolist()
END_FACTORS = [0.7, 0.75, 0.8, 0.85, 0.9, 0.925, 0.95, 0.975, 1.025, 1.05, 1.075, 1.1, 1.15, 1.2, 1.3]


def encode(
    weight: Tensor,
    hessian: Tensor | None = None,
    *,
    bits: int,
    clip: str = "mse",
    group_size: int | None = None,
    layer: str = "",
) -> ScalarWeight:
    """Quantize [out, in] to `bits` bits per weight, one scale and zero point per row or per `group_size` inputs.

    clip: "minmax" spans the row's extremes and 0; "mse" searches the clipped range of least squared error; "hessian"
    that of least Δ H Δᵀ, with Δ the row's error and H the second moments [in, in] of the inputs, group after group.
    layer: the name for messages. UserError for non-finite weights and second moments, a group size that does not
    divide `in`, and clip="hessian" without second moments.
    """
    check_clip(clip, "rtn")
    scheme = ScalarScheme(codec="rtn", bits=bits, group_size=group_size)
    check_matrix(weight, layer=layer, group_size=group_size)
    if hessian is not None:
        check_hessian(hessian, weight, layer=layer)
    elif clip == "hessian":
        raise UserError("rtn: clip=hessian needs the second moments of the layer's inputs: give them, or take mse")
    weight = weight.detach()
    if clip == "hessian":
        encode_rows = partial(_encode_by_hessian, hessian=hessian.detach().float(), size=group_size or weight.shape[1])
        rows = weight
    else:
        encode_rows, rows = partial(_encode_rows, clip=clip), weight.reshape(-1, group_size or weight.shape[1])
    parts = [encode_rows(part.float(), bits=bits) for part in rows.split(max(1, CHUNK // rows.shape[1]))]
    codes, scales, zeros = (torch.cat(column) for column in zip(*parts, strict=True))
    per_group = (weight.shape[0], -1)
    return ScalarWeight.from_parts(
        scheme, codes.view(weight.shape), scales=scales.view(per_group), zeros=zeros.view(per_group)
    )


def encode_split(weight: Tensor, split: int, *, bits: int, clip: str = "mse", layer: str = "") -> ScalarWeight:
    """Quantize [out, in] as `encode` does, with a scale and zero point for the first `split` inputs and one for others.

    It is for inputs of two sources with ranges of their own: the shortcut-splitting of Q-Diffusion (Li et al. 2023).
    """
    check_matrix(weight, layer=layer)
    parts = [encode(part, bits=bits, clip=clip, layer=layer) for part in weight.tensor_split([split], 1)]
    return ScalarWeight.from_parts(
        ScalarScheme(codec="rtn", bits=bits, split=split),
        torch.cat([part.unpacked_codes() for part in parts], 1),
        scales=torch.cat([part.scales for part in parts], 1),
        zeros=torch.cat([part.zeros for part in parts], 1),
    )


def check_clip(clip: str, codec: str) -> None:
    if clip not in ("hessian", "mse", "minmax"):
        raise UserError(f"{codec}: clip must be hessian, mse or minmax, not {clip!r}")


def _encode_rows(rows: Tensor, *, bits: int, clip: str) -> tuple[Tensor, Tensor, Tensor]:
    scales, zeros = find_grid(rows, bits, clip)
    return round_to_grid(rows, scales, zeros, bits=bits).to(torch.uint8), scales, zeros


def _encode_by_hessian(rows: Tensor, *, bits: int, hessian: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [n, in], scales and zeros [n, groups] of fp32 rows [n, in].

    A group's grid minimises the row's error given the errors of the groups before it, which it may make up for, such as
    a shift of the output's mean. The search takes as long as the second moments of 68·n tokens.
    """
    errors = torch.zeros_like(rows)
    parts = []
    for start in range(0, rows.shape[1], size):
        group = slice(start, start + size)
        given = 2 * errors[:, :start] @ hessian[:start, group]
        scales, zeros = find_grid(
            rows[:, group], bits, "hessian", error=partial(_quadratic, hessian=hessian[group, group], given=given)
        )
        codes = round_to_grid(rows[:, group], scales, zeros, bits=bits)
        parts.append((codes.to(torch.uint8), scales[:, None], zeros[:, None]))
        errors[:, group] = _decode(codes, scales, zeros).sub_(rows[:, group])
    codes, scales, zeros = (torch.cat(column, 1) for column in zip(*parts, strict=True))
    return codes, scales, zeros


def _quadratic(difference: Tensor, *, hessian: Tensor, given: Tensor) -> Tensor:
    """The quadratic Δ H Δᵀ + g Δᵀ of every row: Δ and g [n, k], H [k, k], to [n]."""
    return ((difference @ hessian + given) * difference).sum(1)


def round_to_grid(rows: Tensor, scales: Tensor, zeros: Tensor, *, bits: int) -> Tensor:
    """The nearest code of every weight: fp32 [n, k], scales and zeros [n], to integers in fp32 [n, k]."""
    return (torch.round(rows / scales[:, None]) + zeros[:, None]).clamp_(0, 2**bits - 1)


def _decode(codes: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """Decode fp32 codes [n, k], overwriting them by weights."""
    return codes.sub_(zeros[:, None]).mul_(scales[:, None])


Error = Callable[[Tensor], Tensor]  # differences decoded − weight, fp32 [n, k] -> the error to minimise, [n]


def sum_of_squares(difference: Tensor) -> Tensor:
    return difference.square().sum(1)


def find_grid(rows: Tensor, bits: int, clip: str, *, error: Error = sum_of_squares) -> tuple[Tensor, Tensor]:
    """Scales (rounded to fp16) and integer zero points of fp32 rows [n, k]: fp32 [n] each. `clip` as in `encode`.

    error: minimised by every clip but "minmax".
    """
    low, high = rows.amin(1).clamp(max=0), rows.amax(1).clamp(min=0)
    if clip == "minmax":
        return _grid(low, high, bits)
    return _grid(*_search(rows, low, high, bits=bits, error=error), bits)


def _grid(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The grid spanning [low, high] ∋ 0 as it will be stored: fp16 scale, zero point among the codes."""
    levels = 2**bits - 1
    scales = ((high - low) / levels).clamp(SMALLEST_SCALE, LARGEST_SCALE).to(STORED).float()
    return scales, torch.round(-low / scales).clamp_(0, levels)


def _search(
    rows: Tensor, low: Tensor, high: Tensor, *, bits: int, error: Error = sum_of_squares
) -> tuple[Tensor, Tensor]:
    """The range [low, high] of least error on the grid that is stored, found by scans over shrink factors."""
    best = (low, high, _squared_error(rows, low, high, bits=bits, error=error))
    scans = [[(f, f) for f in JOINT_FACTORS], [(f, 1.0) for f in END_FACTORS], [(1.0, f) for f in END_FACTORS]]
    for scan in scans:
        low, high, _ = best  # a scan's factors apply to the best range of the scan before
        for low_factor, high_factor in scan:
            trial = (low * low_factor, high * high_factor)
            best = _better(best, (*trial, _squared_error(rows, *trial, bits=bits, error=error)))
    return best[0], best[1]


def _better(best: tuple[Tensor, ...], trial: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """For each row, whichever of two (low, high, error) has the smaller error; the first in a tie."""
    wins = trial[2] < best[2]
    return tuple(torch.where(wins, new, old) for new, old in zip(trial, best, strict=True))


def _squared_error(rows: Tensor, low: Tensor, high: Tensor, *, bits: int, error: Error = sum_of_squares) -> Tensor:
    """The error, Σ (decoded − weight)² by default, of every row on the grid that is stored: fp32 [n]."""
    scales, zeros = _grid(low, high, bits)
    return error(_decode(round_to_grid(rows, scales, zeros, bits=bits), scales, zeros).sub_(rows))


def _encode(weight: Tensor, hessian: Tensor | None, scheme: ScalarScheme, *, config: RtnConfig, layer: str, **_):
    return encode(weight, hessian, bits=scheme.bits, clip=config.clip, group_size=scheme.group_size, layer=layer)


def _needs_hessian(config: RtnConfig) -> bool:
    return config.clip == "hessian"


def _encoder_bytes(shape: Shape, config: RtnConfig) -> float:
    """Bytes while encoding, measured in tests/stages/plan/test_memory.py; 1.75 Hessians are for the check for NaN."""
    square, full = 4 * shape[1] ** 2, 4 * shape[0] * shape[1]
    return full + (max(1.75 * square, 5.1 * full) if _needs_hessian(config) else 2.7 * full)


def _effort(shape: Shape, config: RtnConfig) -> float:
    """Weights that are searched, and the calls of a layer, which take as long as 25,000."""
    return shape[0] * shape[1] + 25_000


RTN = Codec(
    encode=_encode,
    scheme=scalar_scheme_of("rtn"),
    needs_hessian=_needs_hessian,
    data_free=lambda config: not _needs_hessian(config),
    encoder_bytes=_encoder_bytes,
    effort=_effort,
)
