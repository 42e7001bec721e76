"""K-means on vectors: seeded, bounded in memory, and bit for bit the same on every processor.

Points and centroids lie on a grid so coarse (2^-20 of the largest number) that fp64 holds squared distances exactly.
Whatever order a processor's kernels add them in, the nearest centroid is the same.
"""

import math

import torch
from torch import Generator, Tensor

CHUNK = 1 << 22  # distances held at once (fp64: 32 MB)
GRID_BITS = 20  # 2 · GRID_BITS + 2 bits of a squared difference, and log2(d) of their sum, are at most 53 for d <= 2048


def kmeans(points: Tensor, k: int, *, iterations: int, generator: Generator) -> Tensor:
    """Lloyd's algorithm from a k-means++ start; stops early once no point changes its cluster.

    points: [n, d]; returns fp32 centroids [k, d] on the same device, on the points' grid. `generator` is a CPU
    generator. With n <= k the points themselves are the centroids, repeated in turn. ValueError for no points.
    """
    points = points.float()
    n = points.shape[0]
    if n == 0:
        raise ValueError("k-means needs at least one point")
    if n <= k:
        return points[torch.arange(k, device=points.device) % n].clone()
    unit = _unit(points)
    points = _on_grid(points, unit)
    centroids = _plus_plus(points, k, generator)
    labels = None
    for _ in range(iterations):
        previous, (labels, errors) = labels, _nearest(points, centroids)
        if previous is not None and torch.equal(previous, labels):
            break
        centroids = _on_grid(_means(points, labels, errors, k=k, unit=unit), unit)
    return centroids.float()


def assign(points: Tensor, centroids: Tensor) -> Tensor:
    """The index of the nearest centroid of every point: [n, d], [k, d] to int64 [n]; the lowest index wins ties."""
    unit = _unit(torch.cat([points.float(), centroids.float()]))
    return _nearest(_on_grid(points, unit), _on_grid(centroids, unit))[0]


def _unit(numbers: Tensor) -> float:
    """The spacing of the grid for these numbers: a power of two, so that dividing by it is exact."""
    largest = float(numbers.abs().max()) if numbers.numel() else 0.0
    return 2.0 ** (math.frexp(largest)[1] - GRID_BITS)


def _on_grid(numbers: Tensor, unit: float) -> Tensor:
    """The nearest multiples of `unit`, in fp64; fp32 holds them too."""
    return (numbers.double() / unit).round() * unit


def _nearest(points: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Index and squared distance of the nearest centroid: int64 [n], fp64 [n]; exact on a grid of `_unit`."""
    norms = centroids.square().sum(1)
    labels = torch.empty(points.shape[0], dtype=torch.int64, device=points.device)
    errors = torch.empty(points.shape[0], dtype=torch.float64, device=points.device)
    step = max(1, CHUNK // centroids.shape[0])
    for start in range(0, points.shape[0], step):
        part = points[start : start + step]
        nearest, label = torch.addmm(norms, part, centroids.T, alpha=-2).min(dim=1)
        labels[start : start + step] = label
        errors[start : start + step] = (nearest + part.square().sum(1)).clamp_(min=0)
    return labels, errors


def _plus_plus(points: Tensor, k: int, generator: Generator) -> Tensor:
    """Draw starting centroids, each with probability ∝ its squared distance (Arthur and Vassilvitskii 2007)."""
    draws = torch.rand(k, generator=generator, dtype=torch.float64, device="cpu").to(points.device)
    chosen = torch.empty(k, dtype=torch.int64, device=points.device)
    chosen[0] = (draws[0] * points.shape[0]).long()
    errors = torch.full_like(points[:, 0], torch.inf)
    for i in range(1, k):
        errors = torch.minimum(errors, (points - points[chosen[i - 1]]).square().sum(1))
        mass = errors.cumsum(0)  # one after another on a CPU, whichever it is
        chosen[i] = torch.searchsorted(mass, draws[i] * mass[-1], right=True).clamp(max=points.shape[0] - 1)
    return points[chosen]


def _means(points: Tensor, labels: Tensor, errors: Tensor, *, k: int, unit: float) -> Tensor:
    """The mean of every cluster, fp64 [k, d]; an empty cluster takes the worst-served point that is left.

    Sums are counted in units of the points' grid: integer additions commute, also a GPU's atomic ones.
    """
    sums = torch.zeros(k, points.shape[1], dtype=torch.int64, device=points.device)
    sums.index_add_(0, labels, (points / unit).long())
    counts = torch.bincount(labels, minlength=k)
    means = sums.double() * unit / counts.clamp(min=1)[:, None]
    empty = (counts == 0).nonzero()[:, 0]
    if len(empty):
        means[empty] = points[errors.topk(len(empty)).indices]
    return means
