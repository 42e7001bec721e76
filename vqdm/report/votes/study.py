"""The questions of a study: which two images of a caption are shown, on which page, in which order, on which side.

All of it is drawn from the study's seed. A page shows a trial's images and caption; the key says what they are.
"""

from dataclasses import dataclass
from itertools import combinations

import numpy as np

from vqdm.errors import UserError
from vqdm.seeds import numpy_generator

IDENTICAL, DESTROYED = "identical", "destroyed"  # attention checks: nothing to choose between, or an obvious choice
QUESTION = "Which of the two images do you prefer for this caption?"


@dataclass(frozen=True)
class Protocol:
    """Rules settled before the first vote and kept in the key: when to leave a rater out, the intervals' confidence."""

    max_failed_checks: float = 0.25  # a rater who fails a larger part of the attention checks is left out
    min_median_seconds: float = 1.0  # so is one whose median time per pair is shorter
    confidence: float = 0.95
    question: str = QUESTION


@dataclass(frozen=True)
class Trial:
    """One pair of images with its sides as listed; for every second rater the page swaps them (`mirrored`)."""

    pair: str  # its name in pages and ballots: numbered as drawn, so that it tells nothing
    page: int  # counted from 1
    prompt: str  # the prompt's id
    caption: str
    copy: int  # which of the prompt's images
    left: str  # system, or DESTROYED
    right: str
    check: str | None = None  # IDENTICAL or DESTROYED

    @property
    def expected(self) -> str | None:
        """The choice that passes an attention check."""
        if self.check is None:
            return None
        return "tie" if self.check == IDENTICAL else ("right" if self.left == DESTROYED else "left")


def mirrored(rater: str) -> bool:
    """True if this rater sees the pairs in reverse order with swapped sides; page.js computes the same."""
    return sum(rater.encode("ascii")) % 2 == 1


def comparisons_of(systems: list[str], pairs: list[str] | None) -> list[tuple[str, str]]:
    """Pairs of systems to compare: all, in the order given, or those named ONE:OTHER; UserError for unknown names."""
    if len(set(systems)) != len(systems) or len(systems) < 2:
        raise UserError(f"a vote needs two or more different runs; given: {', '.join(systems) or 'none'}")
    if pairs is None:
        return list(combinations(systems, 2))
    found = [tuple(pair.split(":")) for pair in pairs]
    for pair, text in zip(found, pairs, strict=True):
        if len(pair) != 2 or not set(pair) <= set(systems) or pair[0] == pair[1]:
            raise UserError(f"--pairs {text} must be ONE:OTHER, two of the runs {', '.join(systems)}")
    if len({frozenset(pair) for pair in found}) != len(found):
        raise UserError(f"--pairs names two runs twice: {' '.join(pairs)}")
    return found


def draw_trials(
    comparisons: list[tuple[str, str]],
    images: list[tuple[str, str, int]],
    *,
    seed: int,
    pages: int,
    checks: int,
    original: str,
) -> list[Trial]:
    """Draw all trials, in the order in which they are shown, page after page.

    images: (prompt id, caption, copy) of every image to compare. Each comparison has its first system on the left in
    half of its pairs. checks: number of attention checks of each kind per page, made from the images of `original`.
    """
    generator = numpy_generator(seed, "votes", "order")
    drawn = [trial for pair in comparisons for trial in _balanced(pair, images, generator)]
    drawn = [drawn[i] for i in generator.permutation(len(drawn))]
    if not 1 <= pages <= len(drawn):
        raise UserError(f"{len(drawn)} pairs cannot be split into {pages} pages")
    trials: list[Trial] = []
    for page, part in enumerate(np.array_split(np.arange(len(drawn)), pages), start=1):
        shown = [drawn[i] for i in part]
        for check in _checks(original, images, checks, generator):
            shown.insert(int(generator.integers(1, len(shown) + 1)), check)
        trials += [Trial(pair="", page=page, **fields) for fields in shown]
    width = len(str(len(trials)))
    return [Trial(**{**vars(trial), "pair": f"p{i:0{width}d}"}) for i, trial in enumerate(trials)]


def _fields(image: tuple[str, str, int], left: str, right: str, check: str | None = None) -> dict:
    prompt, caption, copy = image
    return {"prompt": prompt, "caption": caption, "copy": copy, "left": left, "right": right, "check": check}


def _balanced(pair: tuple[str, str], images: list, generator: np.random.Generator) -> list[dict]:
    swapped = generator.permutation(np.arange(len(images)) % 2 == 1)
    return [_fields(image, *(pair[::-1] if swap else pair)) for image, swap in zip(images, swapped, strict=True)]


def _checks(system: str, images: list, count: int, generator: np.random.Generator) -> list[dict]:
    """Draw `count` identical pairs, and as many with one image destroyed, half of them on the left."""
    chosen = [images[i] for i in generator.integers(len(images), size=2 * count)]
    identical = [_fields(image, system, system, IDENTICAL) for image in chosen[:count]]
    return identical + [
        {**fields, "check": DESTROYED} for fields in _balanced((system, DESTROYED), chosen[count:], generator)
    ]
