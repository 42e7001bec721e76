"""Pairs, sides, order and checks of a study, as they are drawn."""

from collections import Counter

import pytest

from vqdm.errors import UserError
from vqdm.report.votes.study import DESTROYED, IDENTICAL, comparisons_of, draw_trials, mirrored

IMAGES = [(f"prompt-{i}", f"caption {i}", copy) for i in range(16) for copy in range(2)]
COMPARISONS = [("a", "b"), ("a", "c"), ("b", "c")]


def draw(**changes):
    return draw_trials(COMPARISONS, IMAGES, **{"seed": 0, "pages": 3, "checks": 2, "original": "c"} | changes)


def test_every_pair_is_drawn_once_with_either_system_left_in_half():
    trials = [trial for trial in draw() if trial.check is None]
    shown = Counter((frozenset((t.left, t.right)), t.prompt, t.copy) for t in trials)
    assert len(shown) == len(trials) == 96 and set(shown.values()) == {1}
    sides = Counter((t.left, t.right) for t in trials)
    assert set(sides.values()) == {16} and len(sides) == 6


def test_pages_share_the_pairs_and_have_their_own_checks():
    trials = draw()
    for page in (1, 2, 3):
        own = [trial for trial in trials if trial.page == page]
        assert Counter(t.check for t in own) == {None: 32, IDENTICAL: 2, DESTROYED: 2}
        assert own[0].check is None
        assert all(t.expected == "tie" and t.left == t.right == "c" for t in own if t.check == IDENTICAL)
        destroyed = [t for t in own if t.check == DESTROYED]
        assert all(getattr(t, t.expected) == "c" for t in destroyed)
        assert Counter(t.expected for t in destroyed) == {"left": 1, "right": 1}
    assert [t.pair for t in trials] == [f"p{i:03d}" for i in range(len(trials))]


def test_the_order_says_nothing_of_the_system_and_comes_from_the_seed():
    trials = draw(checks=0, pages=1)
    assert trials == draw(checks=0, pages=1) != draw(checks=0, pages=1, seed=1)
    positions = {name: [i for i, t in enumerate(trials) if t.left == name] for name in "abc"}
    means = [sum(found) / len(found) for found in positions.values()]
    assert max(means) - min(means) < 20  # of 96; drawn, its standard error is about 7


def test_half_of_the_raters_see_everything_mirrored():
    names = [f"rater{i}" for i in range(100)]
    assert sum(map(mirrored, names)) == 50
    assert mirrored("a") and not mirrored("b")  # 97 and 98


def test_comparisons_are_all_or_those_that_are_named():
    assert comparisons_of(["a", "b", "c"], None) == COMPARISONS
    assert comparisons_of(["a", "b", "c"], ["c:a"]) == [("c", "a")]


@pytest.mark.parametrize(
    ("systems", "pairs", "said"),
    [
        (["a"], None, "two or more"),
        (["a", "a"], None, "two or more"),
        (["a", "b"], ["a:x"], "--pairs a:x"),
        (["a", "b"], ["a:a"], "--pairs a:a"),
        (["a", "b"], ["ab"], "--pairs ab"),
        (["a", "b"], ["a:b", "b:a"], "twice"),
    ],
)
def test_comparisons_that_make_no_sense_are_refused(systems, pairs, said):
    with pytest.raises(UserError, match=said):
        comparisons_of(systems, pairs)


def test_more_pages_than_pairs_are_refused():
    with pytest.raises(UserError, match="cannot be split into 97 pages"):
        draw(pages=97)
