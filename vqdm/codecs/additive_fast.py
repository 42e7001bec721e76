"""The fast recipe for additive codes: error feedback to start, then least squares and exact group searches in turn.

The loss is tr((W − Q) H (W − Q)ᵀ) with Q = scale · Σ codewords. Every step finds the exact minimum over its own
unknowns, or descends towards it. Only feedback passes may raise the loss, and then the state before is kept.
"""

import torch
from torch import Generator, Tensor

from vqdm.codecs import additive_kernels as kernels
from vqdm.codecs.additive_steps import (
    Parts,
    codeword_tables,
    decode,
    decode_transposed,
    group_blocks,
    invert,
    padded_words,
    residual_kmeans,
    row_losses,
    subsample,
)
from vqdm.codecs.feedback import feedback_of
from vqdm.weights.base import LARGEST, STORED

SAMPLES, KMEANS_ITERATIONS = 16384, 10  # number of groups from which the first codebooks are learned
FEEDBACK_PASSES = 5  # all but the last use half the beam
ROUNDS = 6
LEAST_GAIN = 0.006  # the recipe ends after a round that gains less
GRADIENT_STEPS = 3  # conjugate gradient steps in a round
BLOCK = 128  # inputs whose running product is formed at once
CONVERGED = 1e-9  # relative squared residual at which fp32 ends
RIDGE = 1e-4  # in the preconditioner, relative to its mean diagonal, for codewords that no group uses


def encode_fast(
    weight: Tensor,
    hessian: Tensor,
    *,
    num_codebooks: int,
    codebook_size: int,
    group_size: int,
    generator: Generator,
    beam_size: int,
    damping: float,
    codebooks: Tensor | None = None,
) -> Parts:
    """Codes, codebooks and scales, the last two as fp16 stores them, for a weight [out, in] and a Hessian [in, in].

    codebooks: fixed ones [M, K, g]; None: they are learned. damping: for feedback passes, as in `feedback_coupling`.
    """
    energy = group_blocks(hessian, group_size).diagonal(dim1=1, dim2=2).sum(1)
    order = energy.argsort(descending=True, stable=True)  # strong groups first: their errors are fed back to weak ones
    columns = (order[:, None] * group_size + torch.arange(group_size, device="cpu")).flatten()
    weight, hessian = weight[:, columns].contiguous(), hessian[columns][:, columns].contiguous()

    learned = codebooks is None
    scales = weight.square().mean(1).sqrt().clamp(max=LARGEST).to(STORED).float()
    if learned:
        points = (weight * invert(scales)[:, None]).view(-1, group_size)
        points = subsample(points, SAMPLES, generator)
        codebooks = residual_kmeans(
            points, num_codebooks, codebook_size, iterations=KMEANS_ITERATIONS, generator=generator
        )
    codes = torch.zeros(weight.shape[0], len(order), num_codebooks, dtype=torch.int32, device="cpu")
    parts = Parts(codebooks, codes, scales)
    coupling = feedback_coupling(hessian, group_size, damping)
    parts = _feedback_passes(weight, hessian, coupling, parts, learned=learned, beam_size=beam_size)
    parts = _rounds(weight, hessian, parts, learned=learned, beam_size=beam_size)
    parts = round_parts(weight, hessian, parts, beam_size=beam_size)
    parts.codes = parts.codes[:, order.argsort()].contiguous()
    return parts


def _feedback_passes(
    weight: Tensor, hessian: Tensor, coupling: Tensor, parts: Parts, *, learned: bool, beam_size: int
) -> Parts:
    """Choose all codes anew FEEDBACK_PASSES times, each time with codebooks and scales fitted to the codes before."""
    search(weight, coupling, parts, beam_size=max(1, beam_size // 2))
    loss = float(row_losses(weight, parts.decoded(), hessian).sum())
    for remaining in reversed(range(FEEDBACK_PASSES - 1)):
        trial = Parts(parts.codebooks, parts.codes.clone(), parts.scales)
        fit(weight, hessian, trial, learned=learned)
        search(weight, coupling, trial, beam_size=max(1, beam_size // 2) if remaining else beam_size)
        trial_loss = float(row_losses(weight, trial.decoded(), hessian).sum())
        if not trial_loss < loss:
            break
        parts, loss = trial, trial_loss
    return parts


def _rounds(weight: Tensor, hessian: Tensor, parts: Parts, *, learned: bool, beam_size: int) -> Parts:
    """Fit and search in turn until a round gains less than LEAST_GAIN; changes and returns `parts`."""
    loss = float(row_losses(weight, parts.decoded(), hessian).sum())
    for _ in range(ROUNDS):
        fit(weight, hessian, parts, learned=learned)
        search(weight, hessian, parts, beam_size=beam_size)
        before, loss = loss, float(row_losses(weight, parts.decoded(), hessian).sum())
        if not loss < (1 - LEAST_GAIN) * before:
            break
    return parts


def fit(weight: Tensor, hessian: Tensor, parts: Parts, *, learned: bool) -> None:
    """Fit codebooks (if they are learned) and scales to the present codes; changes `parts`."""
    if learned:
        parts.codebooks = fit_codebooks(weight, hessian, parts, steps=GRADIENT_STEPS)
    parts.scales = fit_scales(weight, hessian, parts)


def round_parts(weight: Tensor, hessian: Tensor, parts: Parts, *, beam_size: int) -> Parts:
    """Round codebooks and scales to fp16, search codes that make up for it, and keep each row's better scale."""
    codebooks = parts.codebooks.clamp(-LARGEST, LARGEST).to(STORED).float()
    rounded = Parts(codebooks, parts.codes.clone(), parts.scales.to(STORED).float())
    rounded.scales = fit_scales(weight, hessian, rounded).to(STORED).float()
    search(weight, hessian, rounded, beam_size=beam_size)
    normalised = rounded.normalised()
    scales = fit_scales(weight, hessian, rounded).to(STORED).float()
    old, new = (row_losses(weight, s[:, None] * normalised, hessian) for s in (rounded.scales, scales))
    rounded.scales = torch.where(new < old, scales, rounded.scales)
    return rounded


def feedback_coupling(hessian: Tensor, group_size: int, damping: float) -> Tensor:
    """The matrix K [in, in] that makes `search` a pass of block LDLQ: codes group after group, errors fed back.

    With H + damping = R Rᵀ, R upper triangular, the loss is Σ_j ‖(δ R)_j‖² over groups j, and (δ R)_j depends on the
    errors δ_k of groups k <= j only: K_kj = R_kj R_jjᵀ, zero for k > j; K_jj is the metric of group j if all later
    groups make up for its error as well as they can. damping: in parts of the Hessian's mean diagonal.
    """
    size = hessian.shape[0]
    factor, costs = feedback_of(hessian, damping=damping)
    upper = (factor.T * costs.sqrt()).contiguous()
    blocks = group_blocks(upper, group_size)
    coupling = torch.einsum("ijd,jed->ije", upper.reshape(size, -1, group_size), blocks)
    return coupling.reshape(size, size).contiguous()


def search(weight: Tensor, coupling: Tensor, parts: Parts, *, beam_size: int) -> None:
    """Find new codes for one group after another with all other groups fixed; changes `parts.codes`.

    coupling: the Hessian, for which the loss cannot rise, or a `feedback_coupling`. The product error · coupling is
    formed for BLOCK inputs at a time and kept up to date within them.
    """
    group_size = parts.codebooks.shape[2]
    codebooks, words = parts.codebooks.contiguous(), padded_words(parts.codebooks)
    inverse, error = invert(parts.scales), weight - parts.decoded()
    width = max(1, BLOCK // group_size) * group_size
    for start in range(0, weight.shape[1], width):
        inputs = slice(start, start + width)
        groups = slice(start // group_size, (start + width) // group_size)
        inner = coupling[inputs, inputs].contiguous()
        images, norms = codeword_tables(codebooks, group_blocks(inner, group_size))
        codes, block_error = parts.codes[:, groups].contiguous(), error[:, inputs].contiguous()
        arrays = (error @ coupling[:, inputs], inner, inverse, parts.scales, codebooks, words, images, norms)
        kernels.search_groups(*(a.numpy() for a in (*arrays, codes, block_error)), beam_size)
        parts.codes[:, groups], error[:, inputs] = codes, block_error


def fit_codebooks(weight: Tensor, hessian: Tensor, parts: Parts, *, steps: int) -> Tensor:
    """Codebooks [M, K, g] with less loss for the present codes and scales, by `steps` of conjugate gradients.

    The normal equations are singular: codebooks may trade constants (g (M − 1) directions), and some codewords are
    unused. Starting from the present codebooks, with single codewords' blocks as the preconditioner, this does no harm.
    It computes in the Hessian's dtype: in fp64, processors that add in other orders find the same fp32 numbers.
    """
    codes, scales, size = parts.codes, parts.scales[:, None].to(hessian.dtype), parts.codebooks.shape[1]
    metrics = codeword_metrics(hessian, parts)
    metrics.diagonal(dim1=2, dim2=3).add_(RIDGE * metrics.diagonal(dim1=2, dim2=3).mean().clamp(min=1e-30))
    inverse = torch.linalg.inv(metrics)

    def gradient(error: Tensor) -> Tensor:
        return decode_transposed(scales * (error @ hessian), codes, size)

    codebooks = parts.codebooks.to(hessian.dtype, copy=True)
    residual = gradient((weight - parts.decoded()).to(hessian.dtype))
    direction = torch.zeros_like(residual)
    first = power = None
    for _ in range(steps):
        conditioned = (residual[:, :, None] @ inverse)[:, :, 0]
        before, power = power, float((residual * conditioned).sum())
        first = first or power
        if power <= CONVERGED * first:
            break
        direction = conditioned + (power / before if before else 0) * direction
        image = gradient(scales * decode(direction, codes))
        curvature = float((direction * image).sum())
        codebooks += power / curvature * direction
        residual -= power / curvature * image
    return codebooks.float()


def codeword_metrics(hessian: Tensor, parts: Parts) -> Tensor:
    """Metric of every codeword, Σ scale_o² H_jj over the groups (o, j) that use it: [M, K, g, g]."""
    metrics = group_blocks(hessian, parts.codebooks.shape[2])
    sums = hessian.new_zeros(*parts.codebooks.shape, parts.codebooks.shape[2])
    flat = sums.view(*parts.codebooks.shape[:2], -1)
    arrays = (metrics.flatten(1), parts.codes, parts.scales.square().to(sums), flat)
    kernels.codeword_metrics(*(a.numpy() for a in arrays))
    return sums


def fit_scales(weight: Tensor, hessian: Tensor, parts: Parts) -> Tensor:
    """The row scales of least loss, w H qᵀ / q H qᵀ; a row with q = 0 or scale 0 keeps its scale."""
    normalised = parts.normalised()
    images = normalised @ hessian
    power = (normalised * images).sum(1)
    fitted = (weight * images).sum(1) / power.clamp(min=1e-30)
    return torch.where((power > 0) & (parts.scales != 0), fitted, parts.scales).clamp(-LARGEST, LARGEST)
