"""Standard errors against brute force: slow loops over prompts, and fresh samples of the same distribution."""

import numpy as np
import pytest
import scipy.stats
import torch

from vqdm.metrics.distribution import FrechetDistance, Gaussian, kid
from vqdm.metrics.resampling import Resamples, bootstrap, mean_and_error, ratio_and_error, with_error


def rows(n, d, *, seed, shift=0.0):
    return torch.from_numpy(np.random.default_rng(seed).gamma(2.0, size=(n, d)) + shift)


def test_a_draw_takes_as_many_prompts_as_there_are_with_all_their_images():
    resamples = Resamples(7, copies=3, count=5)
    for drawn, images in zip(resamples.draws(), resamples.rows(), strict=True):
        assert len(drawn) == 7 and set(drawn.tolist()) <= set(range(7))
        assert images.reshape(7, 3).tolist() == [[3 * p, 3 * p + 1, 3 * p + 2] for p in drawn.tolist()]


def test_weights_count_the_rows_of_every_draw():
    resamples = Resamples(9, copies=2, count=6, seed=1)
    counted = [np.bincount(images.numpy(), minlength=18) for images in resamples.rows()]
    assert np.array_equal(resamples.weights().numpy(), np.array(counted))


def test_draws_hang_on_their_seed_alone_and_all_prompts_come_equally_often():
    torch.manual_seed(1)
    draws = Resamples(10, count=2000, seed=3).draws()
    torch.manual_seed(2)
    assert torch.equal(draws, Resamples(10, copies=4, count=2000, seed=3).draws())
    assert not torch.equal(draws, Resamples(10, count=2000, seed=4).draws())
    assert scipy.stats.chisquare(np.bincount(draws.flatten().numpy())).pvalue > 1e-4


def test_bootstrap_is_a_slow_loop():
    features, resamples = rows(12, 3, seed=0), Resamples(6, copies=2, count=20)
    found = bootstrap(lambda r: float(r.prod(1).mean()), features, resamples)
    slow = []
    for drawn in resamples.draws().tolist():
        picked = [features[2 * prompt + copy].numpy() for prompt in drawn for copy in (0, 1)]
        slow.append(np.mean([np.prod(row) for row in picked]))
    assert found.dtype == torch.float64 and found.tolist() == pytest.approx(slow)


def test_with_error_is_the_spread_of_the_draws_and_how_far_they_lie_above():
    draws = torch.tensor([3.0, 5.0, 7.0], dtype=torch.float64)
    assert with_error(4.5, draws) == pytest.approx({"value": 4.5, "se": 2.0, "bias": 0.5})


def test_error_of_a_mean_is_its_standard_error():
    values = rows(200, 1, seed=5)
    error = with_error(0.0, bootstrap(lambda r: float(r.mean()), values, Resamples(200, count=2000)))["se"]
    assert error == pytest.approx(float(values.std(correction=0)) / np.sqrt(200), rel=0.08)  # 5 standard errors of it


def test_error_of_kid_is_its_spread_over_fresh_samples():
    real = rows(120, 6, seed=1000)
    fresh = [float(kid(real, rows(120, 6, seed=i, shift=0.4))) for i in range(120)]
    errors = []
    for i in range(8):
        fake = rows(120, 6, seed=i, shift=0.4)
        errors.append(with_error(0.0, kid(real, fake, Resamples(120, count=60, seed=i).weights()))["se"])
    assert np.mean(errors) == pytest.approx(np.std(fresh), rel=0.25)


def test_resamples_of_kid_are_unbiased_and_those_of_fid_lie_above():
    real, fake = rows(300, 6, seed=0), rows(60, 6, seed=1, shift=0.2)
    resamples = Resamples(60, count=400)
    drawn = with_error(float(kid(real, fake)), kid(real, fake, resamples.weights()))
    assert abs(drawn["bias"]) < 4 * drawn["se"] / np.sqrt(400)
    distance = FrechetDistance(Gaussian.of(real))
    assert with_error(distance(fake), bootstrap(distance, fake, resamples))["bias"] > 0


def by_brute_force(statistic, prompts, *, times=4000):
    rng = np.random.default_rng(0)
    return np.std([statistic(rng.integers(0, prompts, prompts)) for _ in range(times)])


def alike(prompts, copies, *, seed):
    """Values of images that share most with the other images of their prompt."""
    rng = np.random.default_rng(seed)
    return (rng.gamma(2.0, size=(prompts, 1)) + 0.3 * rng.standard_normal((prompts, copies))).flatten()


@pytest.mark.parametrize("copies", [1, 4])
def test_mean_has_the_error_of_a_bootstrap_over_prompts(copies):
    values = alike(250, copies, seed=3)
    score = mean_and_error(values, copies)
    by_prompt = values.reshape(250, copies)
    assert score["value"] == pytest.approx(values.mean())
    assert score["se"] == pytest.approx(scipy.stats.sem(by_prompt.mean(1)))
    assert score["se"] == pytest.approx(by_brute_force(lambda i: by_prompt[i].mean(), 250), rel=0.06)
    if copies > 1:  # as if all images were prompts of their own, it would come out far too small
        assert score["se"] > 1.7 * scipy.stats.sem(values)


def test_mean_of_few_values():
    assert mean_and_error(np.float32([0.1, 0.3]))["value"] == pytest.approx(0.2)
    assert np.isnan(mean_and_error([4.0])["se"])


@pytest.mark.parametrize("copies", [1, 3])
def test_ratio_has_the_error_of_a_bootstrap_over_prompts(copies):
    rng = np.random.default_rng(1)
    asked = rng.integers(2, 9, 300).astype(float).repeat(copies)  # a caption asks the same of all its images
    found = rng.binomial(asked.astype(int), rng.beta(4, 2, 300).repeat(copies)).astype(float)  # right or wrong together
    score = ratio_and_error(found, asked, copies)
    both = found.reshape(300, copies).sum(1), asked.reshape(300, copies).sum(1)
    assert score["value"] == pytest.approx(found.sum() / asked.sum())
    assert score["se"] == pytest.approx(by_brute_force(lambda i: both[0][i].sum() / both[1][i].sum(), 300), rel=0.06)


def test_ratio_where_many_images_ask_for_nothing():
    rng = np.random.default_rng(2)
    asked = rng.integers(0, 2, 400).astype(float)
    found = asked * (rng.random(400) < 0.7)
    score = ratio_and_error(found, asked)
    assert score["se"] == pytest.approx(by_brute_force(lambda i: found[i].sum() / asked[i].sum(), 400), rel=0.06)
    share, n = found.sum() / asked.sum(), asked.sum()
    assert score["se"] == pytest.approx(np.sqrt(share * (1 - share) / n), rel=0.02)  # binomial


def test_ratio_of_nothing_is_no_number():
    assert all(np.isnan(value) for value in ratio_and_error(np.zeros(5), np.zeros(5)).values())


def test_ratio_of_one_prompt_has_no_error():
    found = ratio_and_error(np.array([2.0, 1.0]), np.array([3.0, 3.0]), copies=2)
    assert found["value"] == 0.5 and np.isnan(found["se"])
