"""FID, KID and CMMD against formulas in numpy and scipy, and against torch-fidelity's and torchmetrics' own."""

import numpy as np
import pytest
import scipy.linalg
import torch
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import kernel_mmd
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from vqdm.metrics import distribution
from vqdm.metrics.distribution import FrechetDistance, Gaussian, cmmd, kid


def fid(real, fake):
    return FrechetDistance(Gaussian.of(real))(fake)


def features(n, d, *, seed, scale=1.0, shift=0.0):
    """Correlated, skewed, some columns hardly vary: like a network's features."""
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).standard_normal((d, d)) / np.sqrt(d)
    rows = np.maximum(rng.standard_normal((n, d)) @ mixing, -0.3) * np.geomspace(1, 1e-3, d)
    return torch.from_numpy(rows * scale + shift)


def frechet(real, fake):
    """|m₁ − m₂|² + tr(C₁ + C₂ − 2 (C₁ C₂)^½), with the matrix square root of scipy."""
    real, fake = real.double().numpy(), fake.double().numpy()
    first, second = np.cov(real.T), np.cov(fake.T)
    root = scipy.linalg.sqrtm(first @ second)
    gap = real.mean(0) - fake.mean(0)
    return gap @ gap + np.trace(first) + np.trace(second) - 2 * np.trace(root).real


@pytest.mark.parametrize(
    ("dtype", "shift"), [(torch.float64, 0.1), (torch.float64, 30.0), (torch.float32, 30.0), (torch.float16, 0.1)]
)
def test_fid_is_the_formula(dtype, shift):
    real = features(400, 16, seed=0, shift=shift).to(dtype)
    fake = features(300, 16, seed=1, scale=1.3, shift=shift + 0.05).to(dtype)
    assert fid(real, fake) == pytest.approx(frechet(real, fake), rel=1e-6)


def test_fid_is_that_of_torch_fidelity_and_of_torchmetrics():
    real, fake = features(400, 16, seed=0).float(), features(300, 16, seed=1, scale=1.3, shift=0.05).float()
    published = [fid_features_to_statistics(rows.double()) for rows in (real, fake)]
    expected = fid_statistics_to_metric(*published, verbose=False)[KEY_METRIC_FID]
    assert fid(real, fake) == pytest.approx(expected, rel=1e-6)
    metric = FrechetInceptionDistance(feature=_Rows(16), normalize=False).set_dtype(torch.float64)
    pictures = [rows.double() for rows in (real, fake)]
    metric.update(pictures[0], real=True)
    metric.update(pictures[1], real=False)
    assert fid(real, fake) == pytest.approx(float(metric.compute()), rel=1e-6)


class _Rows(torch.nn.Module):
    """Features that are their own network's: torchmetrics takes any."""

    def __init__(self, num_features):
        super().__init__()
        self.num_features = num_features

    def forward(self, rows):
        return rows


def singular_frechet(real, fake):
    """By eigenvalues of a symmetric matrix, as sqrtm is not made for singular ones."""
    first, second = np.cov(real.numpy().T), np.cov(fake.numpy().T)
    values, vectors = np.linalg.eigh(first)
    root = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ second @ root), 0)).sum()
    gap = (real.mean(0) - fake.mean(0)).numpy()
    return gap @ gap + np.trace(first) + np.trace(second) - 2 * cross


@pytest.mark.parametrize(("real", "fake"), [(20, 25), (400, 25), (20, 300)])
def test_fid_where_covariances_are_singular(real, fake):
    """Fewer rows than columns, of one set or of both; then another matrix with the same eigenvalues is taken."""
    pair = features(real, 32, seed=0), features(fake, 32, seed=1, shift=0.2)
    assert fid(*pair) == pytest.approx(singular_frechet(*pair), rel=1e-6)


def test_fid_of_a_shift_and_of_a_scaling_in_closed_form():
    real = features(500, 8, seed=3)
    assert fid(real, real) == pytest.approx(0, abs=1e-9)
    assert fid(real, real + 0.25) == pytest.approx(8 * 0.25**2, rel=1e-6)
    centred = real - real.mean(0)
    variance = float(centred.square().sum() / 499)
    assert fid(centred, 3 * centred) == pytest.approx((3 - 1) ** 2 * variance, rel=1e-6)


def test_one_reference_serves_many_sets():
    real = features(300, 12, seed=0)
    distance = FrechetDistance(Gaussian.of(real))
    for seed in (1, 2):
        fake = features(50 * seed, 12, seed=seed, shift=0.1)
        assert distance(fake) == pytest.approx(frechet(real, fake), rel=1e-6)


def slow_mmd(kernel, real, fake, *, biased):
    real, fake = real.double().numpy(), fake.double().numpy()

    def within(rows):
        n = len(rows)
        found = sum(kernel(rows[i], rows[j]) for i in range(n) for j in range(n) if biased or i != j)
        return found / (n * n if biased else n * (n - 1))

    return within(real) + within(fake) - 2 * np.mean([kernel(x, y) for x in real for y in fake])


def slow_kid(real, fake):
    return slow_mmd(lambda x, y: (x @ y / len(x) + 1) ** 3, real, fake, biased=False)


def slow_cmmd(real, fake):
    """1000 times the biased estimate, kernel exp(−|x − y|²/(2 · 10²)), of vectors of length 1."""
    real, fake = (rows.double() / rows.double().norm(dim=1, keepdim=True) for rows in (real, fake))
    return 1000 * slow_mmd(lambda x, y: np.exp(-((x - y) @ (x - y)) / 200), real, fake, biased=True)


@pytest.mark.parametrize(("direct", "slow"), [(kid, slow_kid), (cmmd, slow_cmmd)])
@pytest.mark.parametrize("rows", [(40, 40), (60, 25), (25, 60)])
def test_kernel_distances_are_the_direct_estimators_of_all_rows(direct, slow, rows):
    real, fake = features(rows[0], 12, seed=0), features(rows[1], 12, seed=1, shift=0.3)
    assert float(direct(real, fake)) == pytest.approx(slow(real, fake), rel=1e-9)
    assert float(direct(real.float(), fake.float())) == pytest.approx(slow(real.float(), fake.float()), rel=1e-9)


@pytest.mark.parametrize("distance", [kid, cmmd])
def test_memory_for_kernels_does_not_show_in_the_result(distance, monkeypatch):
    real, fake = features(40, 12, seed=0), features(33, 12, seed=1, shift=0.3)
    weights = torch.randint(0, 3, (4, 33), generator=torch.Generator().manual_seed(0)).double()
    whole = [distance(real, fake), *distance(real, fake, weights)]
    monkeypatch.setattr(distribution, "KERNEL_ROWS", 7)
    parts = [distance(real, fake), *distance(real, fake, weights)]
    assert [float(v) for v in parts] == pytest.approx([float(v) for v in whole], rel=1e-9)


def test_kid_is_that_of_torch_fidelity_and_of_torchmetrics():
    real, fake = features(64, 12, seed=0), features(64, 12, seed=1, shift=0.3)
    cubic = {"kid_kernel": "poly", "kid_kernel_poly_degree": 3, "kid_kernel_poly_gamma": None}
    expected = kernel_mmd(real.numpy(), fake.numpy(), kid_kernel_poly_coef0=1, **cubic)
    assert float(kid(real, fake)) == pytest.approx(float(expected), rel=1e-6)
    metric = KernelInceptionDistance(feature=_Rows(12), subsets=1, subset_size=64, normalize=False)
    metric.set_dtype(torch.float64)
    metric.update(real, real=True)
    metric.update(fake, real=False)
    assert float(kid(real, fake)) == pytest.approx(float(metric.compute()[0]), rel=1e-6)


def test_cmmd_is_blind_to_lengths_and_zero_for_a_set_and_itself():
    real, fake = features(40, 12, seed=0, shift=0.1), features(30, 12, seed=1, shift=0.3)
    lengths = torch.linspace(0.5, 4, 30, dtype=torch.float64)[:, None]
    assert float(cmmd(real, fake * lengths)) == pytest.approx(float(cmmd(real, fake)), rel=1e-9)
    assert float(cmmd(real, real)) == pytest.approx(0, abs=1e-9)


def test_kid_is_unbiased_where_fid_is_not():
    """Between sets of one distribution, KID is 0 on average, and FID is not."""
    pairs = [(features(30, 6, seed=2 * i), features(30, 6, seed=2 * i + 1)) for i in range(60)]
    kids = np.array([float(kid(*pair)) for pair in pairs])
    assert abs(kids.mean()) < 4 * kids.std() / np.sqrt(len(kids))
    assert min(fid(*pair) for pair in pairs[:5]) > 0.01


def test_weights_are_repeated_rows():
    """Of CMMD as if the rows stood there so often; of KID too, but that a row makes no pair with its own copy."""
    real, fake = features(30, 8, seed=0), features(20, 8, seed=1, shift=0.3)
    drawn = torch.randint(0, 20, (3, 20), generator=torch.Generator().manual_seed(1))
    weights = torch.stack([torch.bincount(rows, minlength=20) for rows in drawn])
    repeated = [slow_cmmd(real, fake[rows]) for rows in drawn]
    assert cmmd(real, fake, weights).tolist() == pytest.approx(repeated, rel=1e-9)
    assert kid(real, fake, weights).tolist() == pytest.approx(
        [kid_without_copies(real.numpy(), fake.numpy(), rows.numpy()) for rows in drawn], rel=1e-9
    )


def kid_without_copies(real, fake, rows):
    def kernel(x, y):
        return (x @ y / len(x) + 1) ** 3

    n, r = len(rows), range(len(real))
    pairs = [kernel(fake[rows[i]], fake[rows[j]]) for i in range(n) for j in range(n) if rows[i] != rows[j]]
    within = np.mean([kernel(real[i], real[j]) for i in r for j in r if i != j])
    return np.mean(pairs) + within - 2 * np.mean([kernel(x, fake[row]) for x in real for row in rows])
