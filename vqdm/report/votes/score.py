"""Results from ballots and key: who counts, every pair of systems, all systems, and the raters' agreement."""

import numpy as np
import pandas as pd

from vqdm.report.votes.ballots import Ballot, Key
from vqdm.report.votes.statistics import agreement, cluster_interval, sign_test, strength_intervals, strengths, wilson
from vqdm.seeds import numpy_generator

RATING = {"left": -1.0, "tie": 0.0, "right": 1.0}


def vote_frame(ballots: list[Ballot], key: Key) -> pd.DataFrame:
    """A frame with one row per vote, attention checks included. `win`: 1, ½ or 0 for the comparison's first system."""
    order = {frozenset(pair): pair for pair in key.comparisons}
    rows = []
    for ballot in ballots:
        for vote in ballot.votes:
            trial = key.trials[vote.pair]
            one, other = order.get(frozenset((trial.left, trial.right)), (None, None))
            right = RATING[vote.choice]
            rows.append(
                {
                    "rater": ballot.rater,
                    "pair": vote.pair,
                    "prompt": trial.prompt,
                    "one": one,
                    "other": other,
                    "win": 0.5 + right / 2 * (1 if trial.right == one else -1),
                    "rating": right,
                    "seen": RATING[vote.seen],
                    "seconds": vote.ms / 1000,
                    "check": trial.check,
                    "passed": vote.choice == trial.expected,
                }
            )
    columns = ["rater", "pair", "prompt", "one", "other", "win", "rating", "seen", "seconds", "check", "passed"]
    return pd.DataFrame(rows, columns=columns)


def rater_rows(votes: pd.DataFrame, key: Key) -> list[dict]:
    """Figures for every rater on whether to count them; `excluded`: the reason by the key's protocol, or None."""
    rows = []
    for rater, own in votes.groupby("rater", sort=True):
        checks, real = own[own["check"].notna()], own[own["check"].isna()]
        failed, seconds = int((~checks["passed"].astype(bool)).sum()), float(own["seconds"].median())
        reasons = []
        if len(checks) and failed > key.protocol.max_failed_checks * len(checks):
            reasons.append(f"failed {failed} of {len(checks)} attention checks")
        if seconds < key.protocol.min_median_seconds:
            reasons.append(f"median {seconds:.2f} s per pair")
        sided = real[real["seen"] != 0]["seen"]
        rows.append(
            {
                "rater": rater,
                "votes": len(real),
                "ties_percent": _percent((real["seen"] == 0).mean()),
                "left_percent": _percent((sided < 0).mean()),
                "median_seconds": round(seconds, 2),
                "checks": len(checks),
                "failed_checks": failed,
                "excluded": "; ".join(reasons) or None,
            }
        )
    return rows


def _percent(share: float) -> float | None:
    return None if np.isnan(share) else round(100 * float(share), 2)


def comparison_row(votes: pd.DataFrame, pair: tuple[str, str], *, everyone: pd.DataFrame, confidence: float, seed: int):
    """Results of the votes on two systems, in percentages for the first; None without votes."""
    one, other = pair
    own, whole = (frame[(frame["one"] == one) & (frame["other"] == other)] for frame in (votes, everyone))
    wins, losses, ties = (int((own["win"] == value).sum()) for value in (1, 0, 0.5))
    counts = {"votes": len(own), "raters": own["rater"].nunique(), "prompts": own["prompt"].nunique()}
    row = {"left": one, "right": other, **counts, "wins": wins, "ties": ties, "losses": losses}
    if not len(own):
        return row | {"preference_percent": None}
    prompts = own.groupby("prompt", sort=True)["win"].agg(["sum", "count"])
    generator = numpy_generator(seed, "votes/bootstrap", f"{one}/{other}")
    interval = cluster_interval(
        prompts["sum"].to_numpy(), prompts["count"].to_numpy(), generator=generator, confidence=confidence
    )
    means = prompts["sum"] / prompts["count"]
    return row | {
        "preference_percent": _percent(own["win"].mean()),
        "interval_over_prompts": [_percent(bound) for bound in interval],
        "wilson": _wilson(own["win"].sum(), len(own), confidence),
        "without_ties_percent": _percent(wins / (wins + losses)) if wins + losses else None,
        "wilson_without_ties": _wilson(wins, wins + losses, confidence),
        "p_votes": sign_test(wins, losses),
        "p_prompts": sign_test(int((means > 0.5).sum()), int((means < 0.5).sum())),
        "by_rater_percent": {rater: _percent(mean) for rater, mean in own.groupby("rater")["win"].mean().items()},
        "agreement": agreement(_ratings(own)),
        "without_exclusions_percent": _percent(whole["win"].mean()),
    }


def _wilson(wins: float, votes: int, confidence: float) -> list[float] | None:
    return [_percent(bound) for bound in wilson(wins, votes, confidence=confidence)] if votes else None


def _ratings(votes: pd.DataFrame) -> np.ndarray:
    """Ratings [raters, pairs] by the sides as listed, which were drawn, so that neither side is more frequent."""
    return votes.pivot(index="rater", columns="pair", values="rating").to_numpy(float)


def strength_rows(votes: pd.DataFrame, key: Key, *, seed: int) -> list[dict] | None:
    """Bradley–Terry for more than two systems, strongest first; None for two, or without votes."""
    systems = [system for system in key.systems if any(system in pair for pair in key.comparisons)]
    if len(systems) < 3 or votes.empty:
        return None
    names = [f"{one}/{other}" for one, other in key.comparisons]
    table = votes.assign(pair=votes["one"] + "/" + votes["other"]).pivot_table(
        index="prompt", columns="pair", values="win", aggfunc=["sum", "count"], fill_value=0
    )
    wins, counts = (table[kind].reindex(columns=names, fill_value=0).to_numpy(float) for kind in ("sum", "count"))
    found = strengths(wins.sum(0), counts.sum(0), list(key.comparisons), systems)
    if found is None:
        return [{"system": system, "strength": None, "low": None, "high": None} for system in systems]
    generator = numpy_generator(seed, "votes/bootstrap", "strengths")
    bounds = strength_intervals(
        wins, counts, list(key.comparisons), systems, generator=generator, confidence=key.protocol.confidence
    )
    rows = [
        {"system": system, "strength": float(found[i])}
        | {
            "low": None if bounds is None else float(bounds[i, 0]),
            "high": None if bounds is None else float(bounds[i, 1]),
        }
        for i, system in enumerate(systems)
    ]
    return sorted(rows, key=lambda row: -row["strength"])


def score(key: Key, ballots: list[Ballot], left_out: list[str], *, seed: int = 0) -> dict:
    """Everything that score_votes.py writes, as JSON values."""
    everything = vote_frame(ballots, key)
    raters = rater_rows(everything, key)
    excluded = {row["rater"] for row in raters if row["excluded"]}
    everyone = everything[everything["check"].isna()]
    votes = everyone[~everyone["rater"].isin(excluded)]
    confidence = key.protocol.confidence
    rows = [
        comparison_row(votes, pair, everyone=everyone, confidence=confidence, seed=seed) for pair in key.comparisons
    ]
    return {
        "study": key.study,
        "question": key.protocol.question,
        "confidence": confidence,
        "exclusion": {
            "max_failed_checks": key.protocol.max_failed_checks,
            "min_median_seconds": key.protocol.min_median_seconds,
        },
        "systems": {name: about["method"] for name, about in key.systems.items()},
        "files": [ballot.file for ballot in ballots],
        "left_out": left_out,
        "raters": raters,
        "comparisons": rows,
        "strengths": strength_rows(votes, key, seed=seed),
        "agreement": {
            level: agreement(_ratings(votes), level=level) if len(votes) else None for level in ("ordinal", "nominal")
        },
    }


def preference_rows(result: dict) -> list[dict]:
    """Results in the form of the table human_preference, without comparisons that have no votes."""
    return [
        {
            "left": row["left"],
            "right": row["right"],
            "preference_for_left_percent": row["preference_percent"],
            "low": row["interval_over_prompts"][0],
            "high": row["interval_over_prompts"][1],
            "n_votes": row["votes"],
            "n_raters": row["raters"],
            "n_prompts": row["prompts"],
        }
        for row in result["comparisons"]
        if row["votes"]
    ]
