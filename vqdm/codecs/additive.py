"""Additive vector quantization without a Hessian: residual k-means, joint refinement, beam search on plain MSE.

weight ≈ scale_out · Σ_m codebook_m[code_m] over groups of consecutive inputs. Rows are normalised by their RMS, so that
one codebook set serves all rows of a layer, or, as `SharedCodebooks`, all layers of a model.
"""

from collections.abc import Iterable

import torch
from torch import Generator, Tensor

from vqdm.codecs.checks import check_matrix
from vqdm.errors import UserError
from vqdm.kmeans import assign, kmeans
from vqdm.weights.additive import AdditiveScheme, AdditiveWeight, SharedCodebooks, check_shared, sum_codewords
from vqdm.weights.base import STORED

CHUNK = 1 << 22  # distances held at once by the beam search
REFINED_CODEWORDS = 4096  # in all: beyond it the normal equations (fp64, squared) take more than 128 MB
# The ridge, of a codeword's mean count, fixes unused codewords and the gauge (codebooks may trade constants).
RIDGE = 1e-4


def encode(
    weight: Tensor,
    *,
    num_codebooks: int,
    generator: Generator,
    codebook_bits: int = 8,
    group_size: int = 8,
    shared: SharedCodebooks | None = None,
    samples: int = 32768,
    iterations: int = 20,
    refinements: int = 10,
    beam_size: int = 8,
    layer: str = "",
) -> AdditiveWeight:
    """Quantize [out, in] with codebooks of its own, learned from `samples` of its groups, or with the `shared` set.

    iterations: of k-means per codebook; refinements: rounds of joint least squares after it; generator: a CPU one;
    layer: the name for messages. UserError for non-finite weights and a group size that does not divide `in`.
    """
    scheme = AdditiveScheme(
        num_codebooks=num_codebooks,
        codebook_bits=codebook_bits,
        group_size=group_size,
        shared=None if shared is None else "codebooks",
    )
    check_matrix(weight, layer=layer, group_size=group_size)
    check_shared(scheme, shared)
    scales, groups = normalised_groups(weight.detach(), group_size)
    if shared is None:
        sample = _subsample(groups, samples, generator)
        codebooks = learn_codebooks(
            sample, scheme, generator=generator, iterations=iterations, refinements=refinements
        ).to(STORED)  # rounded before codes are chosen, so that codes make up for it
    else:
        codebooks = shared.codebooks.detach().to(groups.device)
    codes = choose_codes(groups, codebooks.float(), beam_size=beam_size).view(weight.shape[0], -1, num_codebooks)
    scales = fit_scales(weight.detach().float(), sum_codewords(codes, codebooks.float()), scales)
    return AdditiveWeight.from_parts(
        scheme, codes, codebooks=codebooks if shared is None else shared, scales=scales.to(STORED)
    )


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
    """One codebook set for all layers of a model, learned from row-normalised groups of every weight [out, in].

    Weights are taken one at a time, in order. UserError if there is none, and as in `encode`.
    """
    scheme = AdditiveScheme(
        num_codebooks=num_codebooks, codebook_bits=codebook_bits, group_size=group_size, shared="codebooks"
    )
    parts = []
    for i, weight in enumerate(weights):
        check_matrix(weight, layer=f"number {i}", group_size=group_size)
        parts.append(_subsample(normalised_groups(weight.detach(), group_size)[1], samples_per_weight, generator))
    if not parts:
        raise UserError("shared codebooks need at least one layer to learn from: the pattern selects none")
    sample = _subsample(torch.cat(parts), samples, generator)
    codebooks = learn_codebooks(sample, scheme, generator=generator, iterations=iterations, refinements=refinements)
    return SharedCodebooks.from_codebooks(scheme, codebooks)


def normalised_groups(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """The RMS of every row as fp16 stores it, fp32 [out], and the rows divided by it, cut up: fp32 [out·groups, size].

    A row whose RMS is 0 in fp16 stays as zeros.
    """
    rows = weight.float()
    scales = rows.square().mean(1).sqrt().clamp(max=65504.0).to(STORED).float()
    inverse = torch.where(scales > 0, 1 / scales, 0.0)
    return scales, (rows * inverse[:, None]).reshape(-1, group_size)


def fit_scales(weight: Tensor, normalised: Tensor, scales: Tensor) -> Tensor:
    """The row scales of least squared error, ⟨w, q⟩ / ⟨q, q⟩ ([out, in] twice); the given ones [out] where q = 0."""
    power = normalised.square().sum(1)
    fitted = (weight * normalised).sum(1) / power.clamp(min=1e-30)
    return torch.where((power > 0) & (scales > 0), fitted, scales).clamp(-65504.0, 65504.0)


def learn_codebooks(
    points: Tensor, scheme: AdditiveScheme, *, generator: Generator, iterations: int, refinements: int
) -> Tensor:
    """Codebooks for groups fp32 [n, group_size]: residual k-means, then rounds of joint refinement.

    More than REFINED_CODEWORDS codewords in all, or one codebook alone, are not refined. Returns fp32
    [num_codebooks, codebook_size, 1, group_size].
    """
    residual, found = points, []
    for _ in range(scheme.num_codebooks):
        found.append(kmeans(residual, 1 << scheme.codebook_bits, iterations=iterations, generator=generator))
        residual = residual - found[-1][assign(residual, found[-1])]
    codebooks = torch.stack(found)
    if refinements and scheme.num_codebooks > 1 and scheme.num_codebooks << scheme.codebook_bits <= REFINED_CODEWORDS:
        codebooks = _refine(points, codebooks, choose_codes(points, codebooks[:, :, None], beam_size=1), refinements)
    return codebooks[:, :, None]


def _refine(points: Tensor, codebooks: Tensor, codes: Tensor, rounds: int) -> Tensor:
    """Alternate the codebooks of least squares, given codes, and one cyclic exact search of codes, given codebooks.

    Neither step can raise the error (but for the ridge). points [n, d], codebooks [M, K, d], codes [n, M].
    """
    for _ in range(rounds):
        codebooks = _least_squares(points, codebooks, codes)
        codes = _cyclic_search(points, codebooks, codes)
    return _least_squares(points, codebooks, codes)


def _least_squares(points: Tensor, codebooks: Tensor, codes: Tensor) -> Tensor:
    """All codebooks at once by ridge regression towards the present ones: fp64 normal equations of M·K unknowns."""
    count, size, _ = codebooks.shape
    n = points.shape[0]
    columns = codes + size * torch.arange(count, device=codes.device)  # [n, M] columns of the one-hot design matrix
    pairs = columns[:, :, None] * (count * size) + columns[:, None, :]
    gram = torch.bincount(pairs.flatten(), minlength=(count * size) ** 2).view(count * size, -1).double()
    gram.diagonal().add_(RIDGE * max(1.0, n / size))
    residual = (points - _sum_words(codebooks, codes)).double()
    right = torch.zeros(count * size, points.shape[1], dtype=torch.float64, device=points.device)
    for m in range(count):
        right.index_add_(0, columns[:, m], residual)
    change = torch.cholesky_solve(right, torch.linalg.cholesky(gram))
    return codebooks + change.view_as(codebooks).float()


def _cyclic_search(points: Tensor, codebooks: Tensor, codes: Tensor) -> Tensor:
    """For each codebook in turn, the best codeword given the others'."""
    codes = codes.clone()
    residual = points - _sum_words(codebooks, codes)
    for m, words in enumerate(codebooks):
        target = residual + words[codes[:, m]]
        codes[:, m] = assign(target, words)
        residual = target - words[codes[:, m]]
    return codes


def _sum_words(codebooks: Tensor, codes: Tensor) -> Tensor:
    """Σ_m codebook_m[code_m]: [M, K, d], [n, M] to [n, d]."""
    return sum_codewords(codes[:, None], codebooks[:, :, None])


def choose_codes(groups: Tensor, codebooks: Tensor, *, beam_size: int) -> Tensor:
    """Codes of least squared error by beam search over the codebooks, then one cyclic pass: int64 [n, M].

    groups: fp32 [n, group_size]; codebooks: fp32 [M, K, 1, group_size]. A beam of 1 is greedy search.
    """
    words = codebooks.flatten(2)
    step = max(1, CHUNK // (beam_size * words.shape[1]))
    return torch.cat([_beam_search(part, words, beam_size) for part in groups.split(step)])


def _beam_search(points: Tensor, codebooks: Tensor, beam_size: int) -> Tensor:
    """The codes [n, M] of points [n, d]: hypotheses are extended codebook by codebook, the `beam_size` best kept."""
    n = points.shape[0]
    residuals = points[:, None]  # [n, beam, d]
    errors = points.square().sum(1)[:, None]
    codes = torch.empty(n, 1, 0, dtype=torch.int64, device=points.device)
    for words in codebooks:
        costs = errors[..., None] + words.square().sum(1) - 2 * residuals @ words.T  # [n, beam, K]
        width = min(beam_size, costs[0].numel())
        errors, flat = costs.flatten(1).topk(width, largest=False)
        parent, code = flat // words.shape[0], flat % words.shape[0]
        codes = torch.cat([codes.gather(1, parent[..., None].expand(-1, -1, codes.shape[2])), code[..., None]], 2)
        residuals = residuals.gather(1, parent[..., None].expand(-1, -1, points.shape[1])) - words[code]
    return _cyclic_search(points, codebooks, codes[torch.arange(n, device=codes.device), errors.argmin(1)])


def _subsample(points: Tensor, count: int, generator: Generator) -> Tensor:
    """`count` different rows of [n, d] in random order, or all of them if there are fewer."""
    if points.shape[0] <= count:
        return points
    return points[torch.randperm(points.shape[0], generator=generator)[:count].to(points.device)]
