"""Additive vector quantization, weight ≈ scale_out · Σ_m codebook_m[code_m] · scale_in, for least output error.

The loss is tr(ΔW H ΔWᵀ) with H the mean of x xᵀ over the layer's inputs. Two recipes: `fast` (`additive_fast`) and
`paper` (`additive_paper`). Rows are normalised, so that one codebook set serves all rows of a layer, or, as
`SharedCodebooks`, all layers of a model. All work is done on the CPU.
"""

from collections.abc import Iterable

import torch
from torch import Generator, Tensor

from vqdm.codecs.additive_fast import SAMPLES, encode_fast, fit_codebooks, search
from vqdm.codecs.additive_paper import encode_paper
from vqdm.codecs.additive_steps import Parts, invert, residual_kmeans, subsample
from vqdm.codecs.checks import check_hessian, check_matrix
from vqdm.codecs.codec import Codec, Shape
from vqdm.codecs.kmeans import CHUNK as DISTANCES
from vqdm.config.codecs import AdditiveConfig
from vqdm.errors import UserError
from vqdm.models.specs import LayerSpec, group_of
from vqdm.seeds import torch_generator
from vqdm.weights.additive import AdditiveScheme, AdditiveWeight, SharedCodebooks, check_shared
from vqdm.weights.base import LARGEST, STORED

RECIPES = ("fast", "paper")
# Relative to the Hessian's mean diagonal: inputs that calibration never saw still get weights near the original ones.
DAMPING = 1e-5
REFINEMENT_BEAM, REFINEMENT_STEPS = 4, 8  # in rounds of learning shared codebooks: beam size, gradient steps


def encode(
    weight: Tensor,
    hessian: Tensor,
    *,
    num_codebooks: int,
    generator: Generator,
    codebook_bits: int = 8,
    group_size: int = 8,
    out_group_size: int = 1,
    input_scales: bool = False,
    recipe: str = "fast",
    shared: SharedCodebooks | None = None,
    shared_key: str = "codebooks",
    beam_size: int = 8,
    damping: float = 0.01,
    layer: str = "",
) -> AdditiveWeight:
    """Quantize [out, in] for inputs with second moments `hessian` [in, in], with its own codebooks or the `shared` set.

    input_scales: one more scale per input, the RMS of its column. shared_key: the set's name among the denoiser's
    shared parts. damping: of the feedback passes of recipe fast, in parts of the Hessian's mean diagonal. generator: a
    CPU one. layer: the name for messages. UserError for non-finite weights and Hessians, a group size that does not
    divide, an unknown recipe, and what a recipe cannot do.
    """
    _check_options(recipe, beam_size, out_group_size, shares=shared is not None)
    scheme = AdditiveScheme(
        num_codebooks=num_codebooks,
        codebook_bits=codebook_bits,
        group_size=group_size,
        input_scales=input_scales,
        shared=None if shared is None else shared_key,
    )
    check_matrix(weight, layer=layer, group_size=group_size)
    check_hessian(hessian, weight, layer=layer)
    check_shared(scheme, shared)
    matrix, moment = weight.detach().cpu().float(), _conditioned(hessian.detach().cpu().float())
    columns = _column_scales(matrix) if input_scales else torch.ones(matrix.shape[1], device="cpu")
    matrix, moment = (matrix / columns).contiguous(), moment * columns * columns[:, None]
    sizes = {
        "num_codebooks": num_codebooks,
        "codebook_size": 1 << codebook_bits,
        "group_size": group_size,
    }
    if recipe == "paper":
        parts = encode_paper(matrix, moment, **sizes, generator=generator, beam_size=beam_size)
    else:
        given = None if shared is None else shared.codebooks.detach().cpu().to(STORED).float()[:, :, 0].contiguous()
        parts = encode_fast(
            matrix, moment, **sizes, codebooks=given, generator=generator, beam_size=beam_size, damping=damping
        )
    return AdditiveWeight.from_parts(
        scheme,
        parts.codes.to(weight.device),
        codebooks=parts.codebooks[:, :, None] if shared is None else shared,
        scales=parts.scales,
        input_scales=columns if input_scales else None,
    )


def _check_options(recipe: str, beam_size: int, out_group_size: int, *, shares: bool) -> None:
    if recipe not in RECIPES:
        raise UserError(f"additive: recipe must be {' or '.join(RECIPES)}, not {recipe!r}")
    if recipe == "paper" and shares:
        raise UserError("additive: recipe paper learns every layer's own codebooks: use recipe fast with shared ones")
    if out_group_size != 1:
        raise UserError(f"additive: groups of {out_group_size} outputs cannot be encoded: set out_group_size to 1")
    if beam_size < 1:
        raise UserError(f"additive: beam_size must be at least 1, not {beam_size}")


def _conditioned(hessian: Tensor) -> Tensor:
    """The damped Hessian in units of its mean diagonal; the identity if no input was ever seen."""
    mean = hessian.diagonal().mean()
    if not mean > 0:
        return torch.eye(hessian.shape[0], device="cpu")
    scaled = hessian / mean
    scaled.diagonal().add_(DAMPING)
    return scaled


def _column_scales(weight: Tensor) -> Tensor:
    """RMS of every column of the row-normalised weight, rounded as fp16 stores it, 1 for a column of zeros.

    Fp32 [in].
    """
    columns = normalised_rows(weight).square().mean(0).sqrt().to(STORED).float()
    return torch.where(columns > 0, columns, 1.0)


def normalised_rows(weight: Tensor) -> Tensor:
    """The weight in fp32 divided by the RMS of each row as fp16 stores it; rows whose RMS is 0 there become zeros."""
    scales = weight.square().mean(1).sqrt().clamp(max=LARGEST).to(STORED).float()
    return weight * invert(scales)[:, None]


def train_shared_codebooks(
    weights: Iterable[Tensor],
    *,
    num_codebooks: int,
    generator: Generator,
    codebook_bits: int = 8,
    group_size: int = 8,
    samples: int = 65536,
    samples_per_weight: int = 4096,
    iterations: int = 20,
    refinements: int = 10,
) -> SharedCodebooks:
    """Learn one codebook set for all layers of a model from row-normalised groups of every weight [out, in].

    Weights are taken one at a time, in order. UserError if there are none, and as in `encode`.
    """
    scheme = AdditiveScheme(
        num_codebooks=num_codebooks, codebook_bits=codebook_bits, group_size=group_size, shared="codebooks"
    )
    parts = []
    for i, weight in enumerate(weights):
        check_matrix(weight, layer=f"number {i}", group_size=group_size)
        groups = normalised_rows(weight.detach().cpu().float()).view(-1, group_size)
        parts.append(subsample(groups, samples_per_weight, generator))
    if not parts:
        raise UserError("shared codebooks need at least one layer to learn from: the pattern selects none")
    sample = subsample(torch.cat(parts), samples, generator)
    codebooks = learn_codebooks(sample, scheme, generator=generator, iterations=iterations, refinements=refinements)
    return SharedCodebooks.from_codebooks(scheme, codebooks[:, :, None])


def learn_codebooks(
    points: Tensor, scheme: AdditiveScheme, *, generator: Generator, iterations: int, refinements: int
) -> Tensor:
    """Learn codebooks [M, K, g] for groups fp32 [n, g]: residual k-means, then rounds of code search and least squares.

    Each group is treated as a row of its own, with the identity as the Hessian. The same on every processor: k-means
    and searches are exact, and least squares are solved in fp64 and rounded.
    """
    size = 1 << scheme.codebook_bits
    codebooks = residual_kmeans(points, scheme.num_codebooks, size, iterations=iterations, generator=generator)
    codes = torch.zeros(len(points), 1, scheme.num_codebooks, dtype=torch.int32, device="cpu")
    parts, identity = (
        Parts(codebooks, codes, torch.ones(len(points), device="cpu")),
        torch.eye(points.shape[1], device="cpu"),
    )
    for _ in range(refinements):
        search(points, identity, parts, beam_size=REFINEMENT_BEAM)
        parts.codebooks = fit_codebooks(points, identity.double(), parts, steps=REFINEMENT_STEPS)
    return parts.codebooks


def _encode(
    weight: Tensor,
    hessian: Tensor,
    scheme: AdditiveScheme,
    *,
    config: AdditiveConfig,
    shared: SharedCodebooks | None,
    layer: str,
) -> AdditiveWeight:
    return encode(
        weight,
        hessian,
        num_codebooks=scheme.num_codebooks,
        codebook_bits=scheme.codebook_bits,
        group_size=scheme.group_size,
        input_scales=scheme.input_scales,
        shared=shared,
        shared_key=scheme.shared,
        recipe=config.recipe,
        beam_size=config.beam_size,
        damping=config.damping,
        generator=torch_generator(config.seed, "encode", layer),
        layer=layer,
    )


def _scheme(spec: LayerSpec, config: AdditiveConfig) -> AdditiveScheme:
    shared = {"layer": None, "model": "codebooks", "block": f"codebooks_{group_of(spec.name).replace('.', '_')}"}
    return AdditiveScheme(
        num_codebooks=config.num_codebooks,
        codebook_bits=config.codebook_bits,
        group_size=config.group_size,
        input_scales=config.input_scales,
        shared=shared[config.codebooks],
    )


def _make_shared(matrices: Iterable[Tensor], scheme: AdditiveScheme, config: AdditiveConfig) -> SharedCodebooks:
    """Learn shared codebooks from all the layers' weights."""
    return train_shared_codebooks(
        matrices,
        num_codebooks=scheme.num_codebooks,
        codebook_bits=scheme.codebook_bits,
        group_size=scheme.group_size,
        generator=torch_generator(config.seed, "codebooks", scheme.shared_key),
    )


def _encoder_bytes(shape: Shape, config: AdditiveConfig) -> float:
    """Bytes while encoding.

    Six Hessians to make the coupling, then three and running products or k-means' distances.
    """
    square, full = 4 * shape[1] ** 2, 4 * shape[0] * shape[1]
    if config.recipe == "paper":
        tables = 4 * shape[1] * config.num_codebooks << config.codebook_bits
        return full + square + max(8 * full, 8 * DISTANCES + 7 * full) + 2 * tables
    distances = 8 * min(DISTANCES, SAMPLES << config.codebook_bits)
    return full + max(6 * square + 2.75 * full, 3 * square + 8.25 * full, 2 * square + 3.6 * full + distances)


ADDITIVE = Codec(
    encode=_encode,
    scheme=_scheme,
    needs_hessian=lambda config: True,
    data_free=lambda config: True,
    encoder_bytes=_encoder_bytes,
    make_shared=_make_shared,
)
