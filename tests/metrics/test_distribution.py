import numpy as np
import pytest
import scipy.linalg
import torch

from vqdm.metrics.distribution import bootstrap_error, fid, kid


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


def test_fid_where_covariances_are_singular():
    """Fewer rows than columns: by eigenvalues of a symmetric matrix, as sqrtm is not made for it."""
    real, fake = features(20, 32, seed=0), features(25, 32, seed=1, shift=0.2)
    first, second = np.cov(real.numpy().T), np.cov(fake.numpy().T)
    values, vectors = np.linalg.eigh(first)
    root = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ second @ root), 0)).sum()
    gap = (real.mean(0) - fake.mean(0)).numpy()
    expected = gap @ gap + np.trace(first) + np.trace(second) - 2 * cross
    assert fid(real, fake) == pytest.approx(expected, rel=1e-6)


def test_fid_of_a_shift_and_of_a_scaling_in_closed_form():
    real = features(500, 8, seed=3)
    assert fid(real, real) == pytest.approx(0, abs=1e-9)
    assert fid(real, real + 0.25) == pytest.approx(8 * 0.25**2, rel=1e-6)
    centred = real - real.mean(0)
    variance = float(centred.square().sum() / 499)
    assert fid(centred, 3 * centred) == pytest.approx((3 - 1) ** 2 * variance, rel=1e-6)


def slow_kid(real, fake):
    real, fake = real.double().numpy(), fake.double().numpy()
    n, d = real.shape

    def kernel(x, y):
        return (x @ y / d + 1) ** 3

    within = sum(kernel(s[i], s[j]) for s in (real, fake) for i in range(n) for j in range(n) if i != j)
    between = sum(kernel(x, y) for x in real for y in fake)
    return within / (n * (n - 1)) - 2 * between / n**2


def test_kid_is_the_direct_estimator():
    real, fake = features(40, 12, seed=0), features(40, 12, seed=1, shift=0.3)
    assert kid(real, fake) == pytest.approx(slow_kid(real, fake), rel=1e-9)
    assert kid(real.float(), fake.float()) == pytest.approx(slow_kid(real.float(), fake.float()), rel=1e-9)


def test_kid_takes_the_first_rows_of_the_larger_set():
    real, fake = features(60, 12, seed=0), features(25, 12, seed=1, shift=0.3)
    assert kid(real, fake) == pytest.approx(slow_kid(real[:25], fake), rel=1e-9)
    assert kid(fake, real) == pytest.approx(slow_kid(fake, real[:25]), rel=1e-9)


def test_kid_is_unbiased_where_fid_is_not():
    """Between sets of one distribution, KID is 0 on average, and FID is not."""
    pairs = [(features(30, 6, seed=2 * i), features(30, 6, seed=2 * i + 1)) for i in range(60)]
    kids = np.array([kid(*pair) for pair in pairs])
    assert abs(kids.mean()) < 4 * kids.std() / np.sqrt(len(kids))
    assert min(fid(*pair) for pair in pairs[:5]) > 0.01


def test_bootstrap_error_of_a_mean_is_its_standard_error():
    rows = features(200, 1, seed=5)
    error = bootstrap_error(lambda r: float(r.mean()), rows, resamples=2000, seed=0)
    assert error == pytest.approx(float(rows.std(correction=0)) / np.sqrt(200), rel=0.08)  # 5 standard errors of it


def test_bootstrap_error_agrees_with_a_direct_loop_and_hangs_on_its_seed_alone():
    rows = features(150, 4, seed=6)

    def statistic(r):
        return float((r**2).mean() / r.mean())

    torch.manual_seed(1)
    error = bootstrap_error(statistic, rows, resamples=1200, seed=3)
    torch.manual_seed(2)
    assert bootstrap_error(statistic, rows, resamples=1200, seed=3) == error
    assert bootstrap_error(statistic, rows, resamples=1200, seed=4) != error
    rng = np.random.default_rng(0)
    values = [statistic(rows[torch.from_numpy(rng.integers(0, 150, 150))]) for _ in range(1200)]
    assert error == pytest.approx(np.std(values), rel=0.15)


def test_bootstrap_error_is_the_spread_of_kid_over_fresh_samples():
    real = features(120, 6, seed=100)
    fresh = [kid(real, features(120, 6, seed=i, shift=0.4)) for i in range(120)]
    errors = [
        bootstrap_error(lambda r: kid(real, r), features(120, 6, seed=i, shift=0.4), resamples=60, seed=i)
        for i in range(8)
    ]
    assert np.mean(errors) == pytest.approx(np.std(fresh), rel=0.25)
