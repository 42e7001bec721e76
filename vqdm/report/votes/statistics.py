"""Statistics of votes: intervals, tests, strengths and agreement."""

import numpy as np
import scipy.stats

RESAMPLES = 10_000
STRENGTH_RESAMPLES = 1_000  # each of them is a fit


def wilson(wins, votes, *, confidence: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """Score interval for a share of independent votes (Wilson 1927), elementwise; ties may count as half wins."""
    z = scipy.stats.norm.ppf(0.5 + confidence / 2)
    wins, votes = np.asarray(wins, float), np.asarray(votes, float)
    share = wins / votes
    centre = (share + z**2 / (2 * votes)) / (1 + z**2 / votes)
    half = z / (1 + z**2 / votes) * np.sqrt(share * (1 - share) / votes + z**2 / (4 * votes**2))
    return np.clip(centre - half, 0, 1), np.clip(centre + half, 0, 1)


def sign_test(wins: int, losses: int) -> float:
    """Two-sided p of the binomial test that wins and losses are equally likely; 1 if there are none."""
    return float(scipy.stats.binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def cluster_interval(
    wins: np.ndarray,
    votes: np.ndarray,
    *,
    generator: np.random.Generator,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
) -> tuple[float, float]:
    """Bootstrap interval of Σ wins / Σ votes over whole prompts, as votes on one prompt are not independent.

    wins, votes: [prompts]. Percentiles are widened as Student's t is against the normal (Hesterberg 2015, section
    3.4.1), since a bootstrap over few prompts is too narrow. If all prompts agree it has no width, and Wilson's
    interval with one vote per prompt is returned.
    """
    share, prompts = wins.sum() / votes.sum(), len(votes)
    if prompts < 2 or np.allclose(wins, share * votes):
        low, high = wilson(share * prompts, prompts, confidence=confidence)
        return float(low), float(high)
    counts = generator.multinomial(prompts, np.full(prompts, 1 / prompts), size=resamples)
    shares = (counts @ wins) / (counts @ votes)
    wider = scipy.stats.t.ppf(0.5 + confidence / 2, prompts - 1) * np.sqrt(prompts / (prompts - 1))
    upper = scipy.stats.norm.cdf(wider)
    low, high = np.quantile(shares, [1 - upper, upper])
    return float(low), float(high)


def strengths(
    wins: np.ndarray, votes: np.ndarray, comparisons: list[tuple[str, str]], systems: list[str]
) -> np.ndarray | None:
    """Bradley–Terry log-strengths [systems], mean 0, ties as half a win to both: P(a over b) = σ(a − b).

    wins, votes: [comparisons], for the first of each two systems. None if the likelihood has no maximum because some
    systems never lose to the others, or are never compared with them.
    """
    import evalica
    import pandas as pd

    first = np.array([systems.index(one) for one, _ in comparisons])
    second = np.array([systems.index(other) for _, other in comparisons])
    if not _connected(wins, votes, first, second, len(systems)):
        return None
    xs, ys = [one for one, _ in comparisons] * 2, [other for _, other in comparisons] * 2
    outcome = [evalica.Winner.X] * len(comparisons) + [evalica.Winner.Y] * len(comparisons)
    found = evalica.bradley_terry(
        xs, ys, outcome, weights=[*wins, *(votes - wins)], index=pd.Index(systems), tolerance=1e-9, limit=10_000
    )
    logs = np.log(found.scores.loc[systems].to_numpy())
    return logs - logs.mean()


def _connected(wins: np.ndarray, votes: np.ndarray, first: np.ndarray, second: np.ndarray, count: int) -> bool:
    """True if every system beats every other, directly or through others (Ford 1957)."""
    from scipy.sparse.csgraph import connected_components

    beats = np.zeros((count, count))
    np.add.at(beats, (first, second), wins)
    np.add.at(beats, (second, first), votes - wins)
    return connected_components(beats > 0, connection="strong")[0] == 1


def strength_intervals(
    wins: np.ndarray,
    votes: np.ndarray,
    comparisons: list[tuple[str, str]],
    systems: list[str],
    *,
    generator: np.random.Generator,
    confidence: float = 0.95,
    resamples: int = STRENGTH_RESAMPLES,
) -> np.ndarray | None:
    """Bootstrap intervals of strengths [systems, low and high] over whole prompts; wins, votes: [prompts, comparisons].

    None if more resamples have no strengths than an interval leaves out: the data then do not bound them.
    """
    prompts = len(votes)
    draws = generator.multinomial(prompts, np.full(prompts, 1 / prompts), size=resamples)
    fits = [strengths(draw @ wins, draw @ votes, comparisons, systems) for draw in draws]
    finite = [fit for fit in fits if fit is not None]
    if len(finite) < (1 + confidence) / 2 * resamples:
        return None
    return np.quantile(finite, [0.5 - confidence / 2, 0.5 + confidence / 2], axis=0).T


def agreement(ratings: np.ndarray, *, level: str = "ordinal") -> float | None:
    """Krippendorff's α of ratings [raters, pairs]: −1 left, 0 tie, 1 right, NaN no vote.

    None without two different votes on pairs that two raters saw.
    """
    import krippendorff

    shared = ratings[:, (~np.isnan(ratings)).sum(0) >= 2]
    if shared.size == 0 or len(np.unique(shared[~np.isnan(shared)])) < 2:
        return None
    return float(krippendorff.alpha(reliability_data=shared, level_of_measurement=level))
