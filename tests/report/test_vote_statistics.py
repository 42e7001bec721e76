"""Statistics of votes against scipy, statsmodels, the likelihood's maximum, published values and simulation."""

import numpy as np
import pytest
import scipy.optimize
import scipy.stats
from statsmodels.stats.proportion import proportion_confint

from vqdm.report.votes.statistics import agreement, cluster_interval, sign_test, strength_intervals, strengths, wilson
from vqdm.seeds import numpy_generator

STUDIES = 1000
SYSTEMS = ["a", "b", "c"]
COMPARISONS = [("a", "b"), ("a", "c"), ("b", "c")]


@pytest.mark.parametrize(("wins", "votes"), [(0, 1), (3, 10), (10, 10), (93, 100), (260, 512)])
@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_wilson_is_scipys(wins, votes, confidence):
    expected = scipy.stats.binomtest(wins, votes).proportion_ci(confidence, method="wilson")
    assert wilson(wins, votes, confidence=confidence) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_of_half_wins_is_statsmodels():
    assert wilson(7.5, 20) == pytest.approx(proportion_confint(7.5, 20, method="wilson"), abs=1e-12)


def test_wilson_holds_the_truth_as_often_as_it_says():
    generator = numpy_generator(0, "test", "wilson")
    share = generator.uniform(0.2, 0.8, STUDIES)
    low, high = wilson(generator.binomial(400, share), 400)
    assert 0.93 <= np.mean((low <= share) & (share <= high)) <= 0.97


def test_the_sign_test_is_binomial():
    assert sign_test(8, 2) == pytest.approx(2 * (1 + 10 + 45) / 2**10)  # counted by hand: Pascal's triangle
    assert sign_test(5, 5) == sign_test(0, 0) == 1


def simulated_study(generator, prompts, raters):
    """Votes on one prompt lean together, and so do those of one rater. Returns wins and votes by prompt."""
    own = np.linspace(-0.6, 0.6, raters)
    lean = generator.normal(0.4, 1.2, prompts)  # of the prompt
    taste = (
        lean[:, None]
        + own
        + generator.normal(0, 0.5, (prompts, raters))
        + generator.logistic(0, 0.5, (prompts, raters))
    )
    seen = generator.random((prompts, raters)) < 0.9  # some stop before the end
    seen[:, 0] = True
    votes = np.where(taste > 0.3, 1.0, np.where(taste < -0.3, 0.0, 0.5))
    return (votes * seen).sum(1), seen.sum(1)


@pytest.mark.parametrize(("prompts", "raters"), [(20, 3), (60, 5)])
def test_the_interval_over_prompts_holds_the_truth_as_often_as_it_says(prompts, raters):
    truth_generator = numpy_generator(1, "test", "truth")
    wins, votes = simulated_study(truth_generator, 400_000, raters)
    truth = wins.sum() / votes.sum()
    held = independent = 0
    for study in range(STUDIES):
        generator = numpy_generator(2, f"test/{prompts}/{raters}", study)
        wins, votes = simulated_study(generator, prompts, raters)
        low, high = cluster_interval(wins, votes, generator=generator, resamples=1000)
        held += low <= truth <= high
        low, high = wilson(wins.sum(), votes.sum())
        independent += low <= truth <= high
    assert 0.93 <= held / STUDIES <= 0.97
    assert independent / STUDIES < 0.93  # which is why prompts are resampled


def test_the_bootstrap_agrees_with_the_normal_limit():
    generator = numpy_generator(3, "test", "normal")
    votes = np.full(2000, 3.0)
    wins = generator.binomial(3, generator.beta(3, 2, 2000)).astype(float)
    error = (wins / 3).std(ddof=1) / np.sqrt(2000)
    low, high = cluster_interval(wins, votes, generator=generator)
    assert (low, high) == pytest.approx(scipy.stats.norm.interval(0.95, wins.sum() / 6000, error), abs=0.03 * 4 * error)


def test_where_all_prompts_agree_the_interval_still_has_a_width():
    low, high = cluster_interval(np.full(16, 3.0), np.full(16, 3.0), generator=numpy_generator(0, "test"))
    assert (low, high) == pytest.approx(scipy.stats.binomtest(16, 16).proportion_ci(method="wilson"))
    one_prompt = cluster_interval(np.array([2.0]), np.array([3.0]), generator=numpy_generator(0, "test"))
    assert one_prompt[0] < 0.2 and one_prompt[1] > 0.9


def likelihood_maximum(wins, votes):
    def loss(free):
        s = dict(zip(SYSTEMS, [0, *free], strict=True))
        chance = np.array([1 / (1 + np.exp(s[b] - s[a])) for a, b in COMPARISONS])
        return -(wins * np.log(chance) + (votes - wins) * np.log(1 - chance)).sum()

    found = np.array([0, *scipy.optimize.minimize(loss, [0, 0], tol=1e-12).x])
    return found - found.mean()


def test_strengths_maximise_the_likelihood():
    wins, votes = np.array([30.5, 42.0, 25.5]), np.array([44.0, 48.0, 43.0])
    found = strengths(wins, votes, COMPARISONS, SYSTEMS)
    assert found == pytest.approx(likelihood_maximum(wins, votes), abs=1e-4)
    assert found.sum() == pytest.approx(0)


def test_strengths_of_two_systems_are_the_log_odds():
    a, b = strengths(np.array([75.0]), np.array([100.0]), [("a", "b")], ["a", "b"])
    assert a - b == pytest.approx(np.log(3), abs=1e-6)


def test_strengths_that_the_votes_do_not_bound_are_none():
    votes = np.array([10.0, 10.0, 10.0])
    assert strengths(np.array([10.0, 10.0, 5.0]), votes, COMPARISONS, SYSTEMS) is None  # a never loses
    assert strengths(np.array([5.0, 0, 0]), np.array([10.0, 0, 0]), COMPARISONS, SYSTEMS) is None  # c was never shown
    nearly = np.zeros((12, 3))
    nearly[0] = (0.5, 0.5, 0.5)  # one tie each is all that bounds them
    wins = np.where(np.arange(12)[:, None] == 0, nearly, np.array([1.0, 1.0, 1.0]))
    generator = numpy_generator(0, "test")
    assert strengths(wins.sum(0), np.full(3, 12.0), COMPARISONS, SYSTEMS) is not None
    assert strength_intervals(wins, np.ones((12, 3)), COMPARISONS, SYSTEMS, generator=generator, resamples=100) is None


def test_intervals_of_strengths_hold_the_truth():
    truth = np.array([0.6, 0.1, -0.7])
    chance = np.array([1 / (1 + np.exp(-(truth[SYSTEMS.index(a)] - truth[SYSTEMS.index(b)]))) for a, b in COMPARISONS])
    held = []
    for study in range(60):
        generator = numpy_generator(4, "test/strengths", study)
        wins = generator.binomial(3, chance, size=(40, 3)).astype(float)
        bounds = strength_intervals(
            wins, np.full((40, 3), 3.0), COMPARISONS, SYSTEMS, generator=generator, resamples=100
        )
        held.append((bounds[:, 0] <= truth) & (truth <= bounds[:, 1]))
    assert 0.85 <= np.mean(held) <= 1  # 180 intervals of 95 %


KRIPPENDORFF_2011 = """\
1 2 3 3 2 1 4 1 2 . . .
1 2 3 3 2 2 4 1 2 5 . 3
. 3 3 3 2 3 4 2 2 5 1 .
1 2 3 3 2 4 4 1 2 5 1 ."""  # "Computing Krippendorff's Alpha-Reliability", part C: four observers, twelve units


@pytest.mark.parametrize(("level", "expected"), [("nominal", 0.743), ("ordinal", 0.815)])
def test_agreement_is_krippendorffs_own_example(level, expected):
    rows = [
        [float("nan") if cell == "." else float(cell) for cell in row.split()] for row in KRIPPENDORFF_2011.split("\n")
    ]
    assert agreement(np.array(rows), level=level) == pytest.approx(expected, abs=5e-4)


def test_agreement_wants_two_raters_and_two_answers():
    nan = float("nan")
    assert agreement(np.array([[1.0, -1.0, nan], [nan, nan, 0.0]])) is None
    assert agreement(np.array([[1.0, 1.0], [1.0, 1.0]])) is None
    assert agreement(np.array([[1.0, -1.0, 0], [1.0, -1.0, 0]])) == pytest.approx(1)
