"""Comparisons of runs image by image, on the same captions and noise, and the sentences that they allow.

    for sentence in findings(rows, results):   # what won in a table, at how many bits
        print(sentence)
    print(verdict_sentence("trellis 3 bit", "RTN 4 bit", compare_images(one, other)))

Paired metrics are those against the full-precision image of the same caption and noise. One method is better than
another in a metric where the 95 % interval of their paired difference, over prompts, leaves out 0.
"""

import itertools
import json
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from vqdm.errors import UserError
from vqdm.metrics.families import FAMILIES
from vqdm.report.records import LOWER_IS_BETTER, is_finished, scores_of
from vqdm.stages.layout import IMAGES_FILE

PAIRED = frozenset(metric for family in FAMILIES.values() for metric in family.against_originals)
SAME_IMAGES = ("n", "images_per_prompt", "prompts_sha256", "image_seed")
SAME_NUMBERS = ("sampler", "dtype", "device")
RANKED_BY = ("psnr_to_fp", "lpips_to_fp", "ssim_to_fp", "distance_to_fp")  # the first that there is orders methods
IN_WORDS = {"psnr_to_fp": "PSNR {:.2f} dB", "lpips_to_fp": "LPIPS {:.3f}", "ssim_to_fp": "SSIM {:.3f}"}
MOST_UPSETS = 3
HOW = "Better: the 95 % interval of the paired difference, over prompts, leaves out 0; calibration is not varied."


def is_paired(metric: str) -> bool:
    """True for a metric against the full-precision image of the same caption and noise."""
    return metric in PAIRED


def paired_first(metrics: Iterable[str]) -> list[str]:
    """Metrics in the order in which they should be read: the paired ones, then the others, else as they were."""
    return sorted(metrics, key=lambda metric: metric not in PAIRED)


def image_scores(files: Iterable[Path]):
    """A frame of scores by prompt and copy from the images.csv of a row's runs; the mean over its calibration seeds."""
    import pandas as pd

    frames = [pd.read_csv(file, index_col=["prompt", "copy"]) for file in files]
    return sum(frames) / len(frames)


def compare_images(one, other) -> list[dict]:
    """Differences of two frames of `image_scores`, one for each metric that both have.

    d = mean over prompts of (mean over copies of first − second), ± its standard deviation / √prompts.
    """
    if list(one.index) != list(other.index):
        raise UserError("the two runs were scored on other captions; run them with the same evaluate.prompts")
    rows = []
    for metric in (name for name in one.columns if name in other.columns):
        difference = (one[metric] - other[metric]).groupby(level="prompt", sort=False).mean().to_numpy()
        error = difference.std(ddof=1) / len(difference) ** 0.5
        low, high = difference.mean() - 1.96 * error, difference.mean() + 1.96 * error
        rows.append(difference_row(metric, one[metric].mean(), other[metric].mean(), error, low=low, high=high))
    return rows


def difference_row(
    metric: str, first: float, second: float, error: float, *, low: float, high: float, bias: float = 0.0
) -> dict:
    """A difference of two runs in one metric, with its paired standard error and 95 % interval."""
    sign = -1 if LOWER_IS_BETTER.fullmatch(metric) else 1
    return {
        "metric": metric,
        "first": first,
        "second": second,
        "difference": first - second,
        "paired_se": error,
        "low95": low,
        "high95": high,
        "bias": bias,
        "better_by_se": sign * (first - second) / error if error else 0.0,
    }


@dataclass(frozen=True)
class Verdict:
    """The number of paired metrics in which the first of two methods is better and worse, of how many."""

    better: int
    worse: int
    of: int

    @property
    def won(self) -> bool:
        """True if the first is better in more than half of the paired metrics, and worse in none."""
        return 2 * self.better > self.of and not self.worse

    @property
    def in_words(self) -> str:
        worse = f", worse in {self.worse}" if self.worse else ""
        return f"in {self.better} of {self.of} paired metrics{worse}"


def verdict(rows: list[dict]) -> Verdict:
    """Count the paired metrics among rows of `compare_images` whose interval leaves out 0, on either side."""
    signs = [_sign(row) for row in rows if row["metric"] in PAIRED]
    return Verdict(signs.count(1), signs.count(-1), len(signs))


def _sign(row: dict) -> int:
    """1 if the first is better beyond its interval, −1 if worse, else 0."""
    if row["low95"] <= 0 <= row["high95"]:
        return 0
    return 1 if row["better_by_se"] > 0 else -1


def verdict_sentence(first: str, second: str, rows: list[dict]) -> str:
    """One sentence on two methods; it begins with the better one."""
    found = verdict(rows)
    if not found.of:
        return f"{first} and {second} have no paired metric in common."
    if not found.better and not found.worse:
        return f"No paired metric of {found.of} tells {first} from {second}."
    if found.worse > found.better:
        first, second, found = second, first, Verdict(found.worse, found.better, found.of)
    return f"{first} is better than {second} {found.in_words}."


@dataclass(frozen=True, eq=False)
class _Method:
    """A compressed row of a table: its name, bits per weight, protocol, and scores by image."""

    name: str
    bits: float
    protocol: str
    scores: object

    def __str__(self) -> str:
        return f"{self.name} ({self.bits:.2f} bits)"


def findings(rows: list[list[dict]], results: Path) -> list[str]:
    """Sentences on what came closest to full precision, and on what won against more bits; [] where nothing is paired.

    rows: the run records of each row, one per calibration seed. Only rows of one protocol are compared; a table of
    several, such as numbers of steps, has sentences for each.
    """
    methods = [method for runs in rows if (method := _method(runs, results)) is not None]
    by_protocol = operator.attrgetter("protocol")
    groups = [list(group) for _, group in itertools.groupby(sorted(methods, key=by_protocol), by_protocol)]
    groups.sort(key=lambda group: methods.index(group[0]))  # in the order of the table
    return [sentence for group in groups if len(group) > 1 for sentence in _group_findings(group)]


def _method(runs: list[dict], results: Path) -> _Method | None:
    """None for a row without paired scores: full precision, one not run, or numbers without their images' scores."""
    if not runs or not all(is_finished(run, results) for run in runs):
        return None
    files = [results / run["directories"]["evaluate"] / IMAGES_FILE for run in runs]
    if not all(file.is_file() for file in files):
        return None
    scores = image_scores(files)
    paired = scores[[name for name in scores.columns if name in PAIRED]].dropna(axis="columns", how="all")
    if paired.columns.empty:
        return None
    protocol = scores_of(runs[0], results)["protocol"]
    shared = json.dumps([protocol.get(key) for key in (*SAME_IMAGES, *SAME_NUMBERS)], sort_keys=True)
    return _Method(runs[0]["method"], runs[0]["bits"]["bits_per_weight"], shared, paired)


def _group_findings(methods: list[_Method]) -> list[str]:
    """Sentences on methods of one protocol."""
    shared = [name for name in methods[0].scores.columns if all(name in one.scores for one in methods)]
    if not shared:
        return []
    metric = next((name for name in RANKED_BY if name in shared), shared[0])
    sign = -1 if LOWER_IS_BETTER.fullmatch(metric) else 1
    ranked = sorted(methods, key=lambda one: -sign * one.scores[metric].mean())

    def against(one: _Method, other: _Method) -> Verdict:
        return verdict(compare_images(one.scores[shared], other.scores[shared]))

    return [_closest(*ranked[:2], metric, verdict=against(*ranked[:2])), *_upsets(ranked, against)]


def _closest(first: _Method, second: _Method, metric: str, *, verdict: Verdict) -> str:
    """The sentence on the first two by one metric."""
    value = IN_WORDS.get(metric, f"{metric} {{:.4g}}").format(first.scores[metric].mean())
    if not verdict.better and not verdict.worse:
        return f"{first} comes closest to full precision, {value}; no paired metric tells it from the next, {second}."
    return f"{first} comes closest to full precision, {value}: better than the next, {second}, {verdict.in_words}."


def _upsets(ranked: list[_Method], against: Callable[[_Method, _Method], Verdict]) -> list[str]:
    """Sentences on methods that win against others of more bits: of those that win against one, the smallest.

    ranked: from best to worst, so that only those before another can have won against it.
    """
    won: dict[_Method, list[tuple[_Method, _Method, Verdict]]] = {}
    for place, loser in enumerate(ranked):
        for winner in sorted(ranked[:place], key=lambda one: one.bits):
            if winner.bits < loser.bits and (found := against(winner, loser)).won:
                won.setdefault(winner, []).append((winner, loser, found))
                break
    largest = [max(pairs, key=lambda pair: pair[1].bits) for pairs in won.values()]
    largest.sort(key=lambda pair: pair[0].bits / pair[1].bits)
    return [_upset(*pair, others=len(won[pair[0]]) - 1) for pair in largest[:MOST_UPSETS]]


def _upset(winner: _Method, loser: _Method, found: Verdict, *, others: int) -> str:
    more = {0: "", 1: ", and than one other of more bits"}.get(others, f", and than {others} others of more bits")
    return f"{winner} is better than {loser} {found.in_words}{more}."
