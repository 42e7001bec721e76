"""K-means on vectors: seeded, bounded in memory, and the same on every run on one device."""

import torch
from torch import Generator, Tensor

CHUNK = 1 << 22  # distances held at once (fp32: 16 MB)


def kmeans(points: Tensor, k: int, *, iterations: int, generator: Generator) -> Tensor:
    """Lloyd's algorithm from a k-means++ start; stops early once no point changes its cluster.

    points: [n, d]; returns fp32 centroids [k, d] on the same device. `generator` is a CPU generator. With n <= k the
    points themselves are the centroids, repeated in turn. ValueError for no points.
    """
    points = points.float()
    n = points.shape[0]
    if n == 0:
        raise ValueError("k-means needs at least one point")
    if n <= k:
        return points[torch.arange(k, device=points.device) % n].clone()
    centroids = _plus_plus(points, k, generator)
    labels = None
    for _ in range(iterations):
        previous, (labels, errors) = labels, _nearest(points, centroids)
        if previous is not None and torch.equal(previous, labels):
            break
        centroids = _means(points, labels, errors, k=k)
    return centroids


def assign(points: Tensor, centroids: Tensor) -> Tensor:
    """The index of the nearest centroid of every point: [n, d], [k, d] to int64 [n]; the lowest index wins ties."""
    return _nearest(points, centroids)[0]


def _nearest(points: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Index and squared distance of the nearest centroid: int64 [n], fp32 [n]."""
    points, centroids = points.float(), centroids.float()
    norms = centroids.square().sum(1)
    labels = torch.empty(points.shape[0], dtype=torch.int64, device=points.device)
    errors = torch.empty(points.shape[0], device=points.device)
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
        mass = errors.double().cumsum(0)
        chosen[i] = torch.searchsorted(mass, draws[i] * mass[-1], right=True).clamp(max=points.shape[0] - 1)
    return points[chosen]


def _means(points: Tensor, labels: Tensor, errors: Tensor, *, k: int) -> Tensor:
    """The mean of every cluster, [k, d]; an empty cluster takes the worst-served point that is left.

    Sums are in fixed point, since integer additions commute and a GPU's atomics then give the same sum every time.
    """
    unit = points.abs().max().double().clamp(min=1e-30) / 2**38  # leaves room for 2**25 points
    sums = torch.zeros(k, points.shape[1], dtype=torch.int64, device=points.device)
    sums.index_add_(0, labels, (points.double() / unit).round().long())
    counts = torch.bincount(labels, minlength=k)
    means = (sums.double() * unit / counts.clamp(min=1)[:, None]).float()
    empty = (counts == 0).nonzero()[:, 0]
    if len(empty):
        means[empty] = points[errors.topk(len(empty)).indices]
    return means
