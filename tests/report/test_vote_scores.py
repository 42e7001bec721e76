"""From runs to results with the two scripts, on votes whose counts are known."""

import csv
import json
import sys

import make_votes
import pytest
import scipy.stats
import score_votes
from vote_studies import ballot, write_ballot, write_run

from vqdm.report.votes.ballots import Key, read_ballots, read_key
from vqdm.report.votes.score import preference_rows, score
from vqdm.report.votes.study import Protocol, draw_trials
from vqdm.report.votes.text import to_markdown

IMAGES = [(f"prompt-{i:02d}", f"caption {i}", 0) for i in range(20)]


def key_of(*comparisons, checks=2):
    trials = draw_trials(list(comparisons), IMAGES, seed=0, pages=1, checks=checks, original=comparisons[0][0])
    systems = {name: {"method": f"method {name}"} for pair in comparisons for name in pair}
    return Key("0123abcd", comparisons, systems, Protocol(), {trial.pair: trial for trial in trials})


def side_of(trial, system):
    return "left" if trial.left == system else "right"


def by_number(wins, ties):
    """Prefers a on the first `wins` prompts, neither on the next `ties`, b on the rest; passes attention checks."""

    def prefer(trial):
        number = int(trial.prompt[-2:])
        if trial.check:
            return trial.expected
        return side_of(trial, "a") if number < wins else "tie" if number < wins + ties else side_of(trial, "b")

    return prefer


def scored(tmp_path, key, votes):
    """votes: {rater: (prefer, ms)}."""
    paths = [write_ballot(tmp_path, ballot(key, rater, prefer, ms=ms), rater) for rater, (prefer, ms) in votes.items()]
    return score(key, *read_ballots(paths, key))


def test_counts_shares_and_tests_are_those_of_the_votes(tmp_path):
    votes = {"ann": (by_number(10, 4), 2000), "bob": (by_number(12, 0), 3000), "cy": (by_number(14, 2), 4000)}
    row = scored(tmp_path, key_of(("a", "b")), votes)["comparisons"][0]
    assert (row["wins"], row["ties"], row["losses"], row["votes"], row["raters"], row["prompts"]) == (
        36,
        6,
        18,
        60,
        3,
        20,
    )
    assert row["preference_percent"] == 100 * (36 + 3) / 60
    assert row["without_ties_percent"] == pytest.approx(100 * 36 / 54, abs=0.01)
    test = scipy.stats.binomtest(36, 54)
    interval = test.proportion_ci(method="wilson")
    assert row["p_votes"] == pytest.approx(test.pvalue)
    assert row["wilson_without_ties"] == pytest.approx([100 * interval.low, 100 * interval.high], abs=0.01)
    # by prompt: 0–9 a; 10, 11 tie a a; 12, 13 tie b a (a half each way); 14, 15 b b tie; the rest b
    assert row["p_prompts"] == pytest.approx(scipy.stats.binomtest(12, 18).pvalue)
    assert row["by_rater_percent"] == {"ann": 60, "bob": 60, "cy": 75}
    low, high = row["interval_over_prompts"]
    assert low < row["wilson"][0] < 65 < row["wilson"][1] < high  # raters agree: 20 prompts say less than 60 votes


def test_the_order_in_which_systems_are_named_turns_the_result_around(tmp_path):
    votes = {"ann": (by_number(10, 4), 2000), "bob": (by_number(12, 0), 3000)}
    one = scored(tmp_path, key_of(("a", "b")), votes)["comparisons"][0]
    other = scored(tmp_path, key_of(("b", "a")), votes)["comparisons"][0]
    assert one["preference_percent"] + other["preference_percent"] == 100
    assert one["wilson"] == pytest.approx([100 - bound for bound in reversed(other["wilson"])], abs=0.011)
    assert one["p_votes"] == other["p_votes"]


def test_careless_and_hasty_raters_are_left_out_and_said_to_be(tmp_path):
    votes = {
        "ann": (by_number(15, 0), 2000),
        "bob": (by_number(15, 0), 900),  # too fast
        "cy": (lambda trial: "left", 2000),  # looks at nothing: fails both identical pairs and one destroyed
    }
    result = scored(tmp_path, key_of(("a", "b")), votes)
    assert {row["rater"]: row["excluded"] for row in result["raters"]} == {
        "ann": None,
        "bob": "median 0.90 s per pair",
        "cy": "failed 3 of 4 attention checks",
    }
    row = result["comparisons"][0]
    assert (row["raters"], row["preference_percent"]) == (1, 75)
    assert row["without_exclusions_percent"] == pytest.approx(100 * (15 + 15 + 10) / 60, abs=0.01)
    assert "failed 3 of 4 attention checks" in to_markdown(result)


def test_one_failed_check_of_four_is_forgiven(tmp_path):
    key = key_of(("a", "b"))
    first = next(trial.pair for trial in key.trials.values() if trial.check)

    def prefer(trial):
        return "left" if trial.pair == first and trial.expected != "left" else by_number(15, 0)(trial)

    assert scored(tmp_path, key, {"ann": (prefer, 2000)})["raters"][0]["excluded"] is None


def test_three_systems_have_strengths_in_the_order_of_preference(tmp_path):
    key = key_of(("a", "b"), ("b", "c"), ("a", "c"), checks=0)
    wins = {frozenset("ab"): 13, frozenset("bc"): 14, frozenset("ac"): 17}

    def prefer(trial):
        better = min(trial.left, trial.right)
        won = int(trial.prompt[-2:]) * 7 % 20 < wins[frozenset((trial.left, trial.right))]
        return side_of(trial, better) if won else side_of(trial, max(trial.left, trial.right))

    result = scored(tmp_path, key, {"ann": (prefer, 2000), "bob": (prefer, 2000)})
    assert [row["system"] for row in result["strengths"]] == ["a", "b", "c"]
    assert all(row["low"] < row["strength"] < row["high"] for row in result["strengths"])
    assert result["agreement"] == {"ordinal": pytest.approx(1), "nominal": pytest.approx(1)}
    assert [row["preference_for_left_percent"] for row in preference_rows(result)] == [65, 70, 85]


def test_a_study_without_votes_has_results_without_numbers(tmp_path):
    key = key_of(("a", "b"), ("a", "c"))
    result = score(key, [], [])
    assert preference_rows(result) == [] and result["strengths"] is None
    assert "no votes" in to_markdown(result)
    json.dumps(result, allow_nan=False)
    one = ballot(key, "ann", lambda trial: trial.expected or "left")
    one["votes"] = [vote for vote in one["votes"] if not key.trials[vote["pair"]].check][:1]
    result = score(key, *read_ballots([write_ballot(tmp_path, one, "ann")], key))
    json.dumps(result, allow_nan=False)
    assert len(preference_rows(result)) == 1 and "no votes" in to_markdown(result)


@pytest.fixture
def runs(tmp_path):
    for name in ("fp", "vq3", "rtn4"):
        write_run(tmp_path, name, copies=2)
    return tmp_path


def call(monkeypatch, script, *arguments):
    monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, arguments)])
    script.main()


def test_the_scripts_from_runs_to_the_tables_rows(runs, monkeypatch, capsys):
    arguments = ["fp", "vq3", "rtn4", "--pairs", "vq3:fp", "vq3:rtn4", "--n", 10, "--results", runs, "--study", "s"]
    call(monkeypatch, make_votes, *arguments, "--pages", 2)
    folder = runs / "votes" / "s"
    pages = sorted(folder.glob("votes-*.html"))
    said = capsys.readouterr().out
    assert all(str(page) in said for page in pages) and len(pages) == 2 and str(folder / "key.json") in said
    key = read_key(folder / "key.json")
    assert len([trial for trial in key.trials.values() if trial.check is None]) == 2 * 10 * 2

    def prefer(trial):
        return trial.expected or side_of(trial, "vq3")

    files = [
        write_ballot(runs / "in", ballot(key, rater, prefer, page=page), f"{rater}-{page}")
        for rater in ("ann", "bob")
        for page in (1, 2)
    ]
    call(monkeypatch, score_votes, folder / "key.json", *files)
    assert "method of vq3 over method of fp" in capsys.readouterr().out
    rows = list(csv.DictReader((folder / "human_preference.csv").open()))
    counts = {"n_votes": "40", "n_raters": "2", "n_prompts": "10"}
    low = f"{100 * scipy.stats.binomtest(10, 10).proportion_ci(method='wilson').low:.2f}"
    shares = {"preference_for_left_percent": "100.0", "low": low, "high": "100.0"}
    assert rows == [{"left": "vq3", "right": other} | shares | counts for other in ("fp", "rtn4")]
    assert json.loads((folder / "human_preference.json").read_text())[0]["n_votes"] == 40
    assert json.loads((folder / "score.json").read_text())["raters"][0]["checks"] == 8
    bad = write_ballot(runs / "in", {"format": "x"}, "bad")
    with pytest.raises(SystemExit, match=r"error: .*bad\.json: is not a file of votes"):
        call(monkeypatch, score_votes, folder / "key.json", *files, bad)
    call(monkeypatch, score_votes, folder / "key.json", *files, bad, "--skip-faulty")
    assert "bad.json" in (folder / "score.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["fp"], "two or more different runs"),
        (["fp", "gone"], "no finished run gone"),
        (["fp", "vq3", "--n", "0"], "--n 0 must be at least 1"),
        (["fp", "vq3", "--quality", "101"], "must be 1 to 100"),
        (["fp", "vq3", "--study", "../x"], "cannot be a file's name"),
        (["fp", "vq3", "--pages", "99"], "cannot be split into 99 pages"),
    ],
)
def test_a_study_that_cannot_be_made_is_one_line(runs, monkeypatch, arguments, said):
    with pytest.raises(SystemExit) as stopped:
        call(monkeypatch, make_votes, *arguments, "--results", runs)
    assert str(stopped.value).startswith("error: ") and said in str(stopped.value)
    assert not (runs / "votes").exists()
