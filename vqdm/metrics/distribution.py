"""Distances between two sets of features: FID, KID and CMMD. They know nothing of models or images; float64 inside.

Each is cheap to compute on resampled rows, as a bootstrap needs: FID keeps the root of the reference's covariance,
and the two kernel distances take resamples as weights of rows.
"""

import dataclasses
from collections.abc import Callable

import torch

KERNEL_ROWS = 1024  # rows of a kernel's matrix in memory at a time
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0  # Jayasumana et al. 2024, section 4


@dataclasses.dataclass(frozen=True)
class Gaussian:
    """Mean [d] and unbiased covariance [d, d] of features [n, d], float64."""

    mean: torch.Tensor
    covariance: torch.Tensor

    @classmethod
    def of(cls, features: torch.Tensor) -> "Gaussian":
        features = features.double()
        mean = features.mean(0)
        centred = features - mean
        return cls(mean, centred.T @ centred / (len(features) - 1))


class FrechetDistance:
    """Fréchet distance from sets of features to one reference (Heusel et al. 2017, eq. 6): FID, whatever the features.

    Computed by eigenvalues of symmetric matrices, since covariances of few images are singular: tr (C₁C₂)^½ is the sum
    of the roots of the eigenvalues of RᵀC₂R with C₁ = RRᵀ. NaN for a single row, which has no covariance.
    """

    def __init__(self, reference: Gaussian):
        self.reference, self.root = reference, None
        if reference.covariance.isfinite().all():
            values, vectors = torch.linalg.eigh(reference.covariance)
            self.root = vectors * values.clamp(min=0).sqrt()

    def __call__(self, features: torch.Tensor) -> float:
        if self.root is None or len(features) < 2:
            return float("nan")
        features = features.double()
        mean = features.mean(0)
        centred = (features - mean) / (len(features) - 1) ** 0.5
        seen = centred @ self.root
        gram = seen @ seen.T if len(seen) < seen.shape[1] else seen.T @ seen  # the same eigenvalues except zeros
        cross = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().sum()
        gap = (mean - self.reference.mean).square().sum()
        return float(gap + self.reference.covariance.trace() + centred.square().sum() - 2 * cross)


def kid(real: torch.Tensor, fake: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """Unbiased squared MMD with kernel (x·y/d + 1)³ (Binkowski et al. 2018) of all rows of [n, d] and [m, d].

    weights [b, m]: how often each row of `fake` occurs in each of b resamples; the result is then [b]. A row that
    occurs twice in a resample makes no pair with itself, so that resamples are unbiased too.
    """
    real, fake = real.double(), fake.double()
    return _mmd(lambda x, y: (x @ y.T / x.shape[1] + 1) ** 3, real, fake, weights=weights, unbiased=True)


def cmmd(real: torch.Tensor, fake: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """1000 × squared MMD with a Gaussian kernel of width 10 on unit vectors (Jayasumana et al. 2024, eq. 4).

    This is the biased estimator of the authors' code, in which a row's kernel with itself counts. weights as in `kid`.
    """
    real, fake = (torch.nn.functional.normalize(rows.double(), dim=1) for rows in (real, fake))

    def kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.exp((x @ y.T - 1) / CMMD_SIGMA**2)  # |x − y|² = 2 − 2 x·y

    return CMMD_SCALE * _mmd(kernel, real, fake, weights=weights, unbiased=False)


def _mmd(kernel: Callable, real: torch.Tensor, fake: torch.Tensor, *, weights, unbiased: bool) -> torch.Tensor:
    """Squared maximum mean discrepancy: a scalar, or one value for each row of weights."""
    once = torch.ones(1, len(real), dtype=torch.float64, device="cpu")
    drawn = torch.ones(1, len(fake), dtype=torch.float64, device="cpu") if weights is None else weights.double()
    between = _between(kernel, fake, real, drawn) / (drawn.sum(1) * len(real))
    found = (
        _within(kernel, fake, drawn, unbiased=unbiased) + _within(kernel, real, once, unbiased=unbiased) - 2 * between
    )
    return found[0] if weights is None else found


def _within(kernel: Callable, x: torch.Tensor, weights: torch.Tensor, *, unbiased: bool) -> torch.Tensor:
    """Mean of the kernel over pairs of rows of x, for each row of weights [b, n]; unbiased: without self-pairs."""
    pairs, alike = (torch.zeros(len(weights), dtype=torch.float64, device="cpu") for _ in range(2))
    for start in range(0, len(x), KERNEL_ROWS):
        part, values = weights[:, start : start + KERNEL_ROWS], kernel(x[start : start + KERNEL_ROWS], x)
        pairs += ((part @ values) * weights).sum(1)
        alike += part**2 @ values.diagonal(start)
    count = weights.sum(1) ** 2
    return (pairs - alike) / (count - (weights**2).sum(1)) if unbiased else pairs / count


def _between(kernel: Callable, x: torch.Tensor, y: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Sum of the kernel over rows of x and y, for each row of weights of x."""
    total = torch.zeros(len(weights), dtype=torch.float64, device="cpu")
    for start in range(0, len(x), KERNEL_ROWS):
        total += weights[:, start : start + KERNEL_ROWS] @ kernel(x[start : start + KERNEL_ROWS], y).sum(1)
    return total
