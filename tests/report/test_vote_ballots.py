"""Raters' files are untrusted: whatever is wrong with one is one line that names it."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vote_studies import ballot, write_ballot

from vqdm.errors import UserError
from vqdm.report.votes.ballots import Key, read_ballot, read_ballots, read_key
from vqdm.report.votes.study import Protocol, draw_trials

IMAGES = [(f"prompt-{i}", f"caption {i}", 0) for i in range(8)]
TRIALS = draw_trials([("a", "b")], IMAGES, seed=0, pages=2, checks=1, original="a")
KEY = Key("0123abcd", (("a", "b"),), {name: {"method": name} for name in "ab"}, Protocol(), {t.pair: t for t in TRIALS})


def good(rater="bob"):
    return ballot(KEY, rater, lambda trial: trial.expected or ("left" if trial.left == "a" else "right"))


def test_sides_are_those_of_the_key_whoever_votes(tmp_path):
    for rater, flipped in (("bob", True), ("cy", False)):  # the letters sum to 307 and to 220
        content = good(rater)
        assert content["mirrored"] is flipped
        read = read_ballot(write_ballot(tmp_path, content, rater), KEY)
        assert [v.choice for v in read.votes] == [
            t.expected or ("left" if t.left == "a" else "right")
            for t in map(KEY.trials.get, (v.pair for v in read.votes))
        ]
        assert [v.seen for v in read.votes] == [entry["choice"] for entry in content["votes"]]


CHANGES = {
    "other study": (lambda b: b | {"study": "ffffffff"}, "is of the study 'ffffffff'"),
    "no format": (lambda b: {k: v for k, v in b.items() if k != "format"}, "not a file of votes"),
    "a list": (lambda b: [b], "not a file of votes"),
    "a page as text": (lambda b: b | {"page": "1"}, "'page' is '1', not of type int"),
    "a page as true": (lambda b: b | {"page": True}, "'page' is True"),
    "unknown page": (lambda b: b | {"page": 3}, "page 3 is not one"),
    "page of others": (lambda b: b | {"page": 2}, "which page 2 does not have"),
    "rater as markup": (lambda b: b | {"rater": "<b>|x"}, "the rater '<b>|x' is not"),
    "rater in capitals": (lambda b: b | {"rater": "Bob"}, "the rater 'Bob' is not"),
    "another's name": (lambda b: b | {"mirrored": not b["mirrored"]}, "the file was changed"),
    "a pair twice": (lambda b: b | {"votes": [*b["votes"], b["votes"][0]]}, "twice"),
    "unknown pair": (lambda b: b | {"votes": [b["votes"][0] | {"pair": "p99"}]}, "on the pair 'p99'"),
    "pair as a list": (lambda b: b | {"votes": [b["votes"][0] | {"pair": ["p00"]}]}, "on the pair"),
    "unknown choice": (lambda b: b | {"votes": [b["votes"][0] | {"choice": "both"}]}, "is 'both', not left"),
    "choice as a list": (lambda b: b | {"votes": [b["votes"][0] | {"choice": []}]}, "not left"),
    "negative time": (lambda b: b | {"votes": [b["votes"][0] | {"ms": -1}]}, "is -1, not milliseconds"),
    "broken time": (lambda b: b | {"votes": [b["votes"][0] | {"ms": 1.5}]}, "is 1.5, not milliseconds"),
    "no number": (lambda b: b | {"votes": [b["votes"][0] | {"ms": float("nan")}]}, "is nan, not milliseconds"),
    "a field more": (lambda b: b | {"votes": [b["votes"][0] | {"x": 1}]}, "not pair, choice and ms"),
    "a vote as text": (lambda b: b | {"votes": ["left\nleft" * 100]}, "not pair, choice and ms"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_faulty_file_is_one_line_with_its_name(tmp_path, name):
    change, said = CHANGES[name]
    path = write_ballot(tmp_path, change(good()), "bad")
    with pytest.raises(UserError) as error:
        read_ballots([path], KEY)
    message = str(error.value)
    assert message.startswith(f"{path}: ") and said in message
    assert "\n" not in message and len(message) < len(str(path)) + 200
    ballots, left_out = read_ballots([write_ballot(tmp_path, good("ann"), "ann"), path], KEY, skip_faulty=True)
    assert [b.rater for b in ballots] == ["ann"] and left_out == [message]


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"format": 1, "format": 2}', b"null"])
def test_what_is_no_json_is_refused(tmp_path, data):
    path = tmp_path / "bad.json"
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"bad\.json"):
        read_ballot(path, KEY)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(field=st.sampled_from([*good(), "pair", "choice", "ms"]), value=JSON)
def test_any_value_in_any_place_is_read_or_refused(tmp_path_factory, field, value):
    content = good()
    (content if field in content else content["votes"][1])[field] = value
    path = write_ballot(tmp_path_factory.getbasetemp(), content, "any")
    try:
        read_ballot(path, KEY)
    except UserError as error:
        assert "any.json" in str(error) and "\n" not in str(error)


def test_a_missing_or_huge_file_is_refused(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"gone\.json: cannot be read"):
        read_ballot(tmp_path / "gone.json", KEY)
    monkeypatch.setattr("vqdm.report.votes.ballots.LARGEST", 100)
    with pytest.raises(UserError, match="no rater's votes have"):
        read_ballot(write_ballot(tmp_path, good(), "huge"), KEY)


def test_a_later_state_replaces_an_earlier_and_another_opinion_is_refused(tmp_path):
    whole = good()
    early = write_ballot(tmp_path, whole | {"votes": whole["votes"][:2]}, "early")
    late = write_ballot(tmp_path, whole, "late")
    for order in ([early, late], [late, early]):
        ballots, left_out = read_ballots(order, KEY)
        assert [len(b.votes) for b in ballots] == [len(whole["votes"])]
        assert left_out == [f"{early}: an earlier state, or a copy, of {late}"]
    other = whole["votes"][0] | {"ms": 1}
    changed = write_ballot(tmp_path, whole | {"votes": [other, *whole["votes"][1:]]}, "changed")
    with pytest.raises(UserError, match=r"changed\.json: bob has voted on page 1 in .*late\.json too"):
        read_ballots([late, changed], KEY)


@pytest.mark.parametrize("content", ["", "{}", json.dumps({"study": 1, "comparisons": 3})])
def test_a_key_that_is_none_is_refused(tmp_path, content):
    path = tmp_path / "key.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"is no key of a study"):
        read_key(path)
    with pytest.raises(UserError, match="cannot be read"):
        read_key(tmp_path / "none.json")
