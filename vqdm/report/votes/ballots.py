"""Ballots: JSON files from raters, checked against the study's key before anything is counted."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from vqdm.errors import UserError
from vqdm.report.votes.study import Protocol, Trial, mirrored

FORMAT = "vqdm-votes-1"
LARGEST = 16 * 2**20  # bytes; 100,000 votes have 7 MiB
LONGEST = 7 * 24 * 3600 * 1000  # ms, the longest time for one vote
CHOICES = ("left", "tie", "right")
SWAPPED = dict(zip(CHOICES, reversed(CHOICES), strict=True))
FIELDS = {"format": str, "study": str, "page": int, "rater": str, "mirrored": bool, "votes": list}


@dataclass(frozen=True)
class Key:
    """The organiser's key to a study, which says what its pairs are."""

    study: str
    comparisons: tuple[tuple[str, str], ...]
    systems: dict[str, dict]
    protocol: Protocol
    trials: dict[str, Trial]  # by the pair's name


@dataclass(frozen=True)
class Vote:
    pair: str
    choice: str  # in terms of the sides listed in the key
    seen: str  # in terms of the sides that this rater saw
    ms: int


@dataclass(frozen=True)
class Ballot:
    file: str
    rater: str
    page: int
    votes: tuple[Vote, ...]


def read_key(path: Path) -> Key:
    try:
        content = json.loads(path.read_bytes())
        return Key(
            study=content["study"],
            comparisons=tuple((one, other) for one, other in content["comparisons"]),
            systems=content["systems"],
            protocol=Protocol(**content["protocol"]),
            trials={fields["pair"]: Trial(**fields) for fields in content["trials"]},
        )
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); give the key.json of the study") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is no key of a study ({error!r}); give the key.json that make_votes.py wrote"
        ) from error


def read_ballots(paths: list[Path], key: Key, *, skip_faulty: bool = False) -> tuple[list[Ballot], list[str]]:
    """Read ballots, at most one per rater and page; also returns a line for each file that was left out.

    A second file for a rater's page replaces the first if it continues it, as one saved later does. Anything else that
    is wrong with a file is a UserError that names it; with `skip_faulty` the file is left out.
    """
    ballots: dict[tuple[str, int], Ballot] = {}
    left_out: list[str] = []
    for path in paths:
        try:
            ballot = read_ballot(path, key)
            there = ballots.get((ballot.rater, ballot.page), ballot)
            shorter, longer = sorted((there, ballot), key=lambda b: len(b.votes))
            if longer.votes[: len(shorter.votes)] != shorter.votes:
                raise UserError(
                    f"{path}: {ballot.rater} has voted on page {ballot.page} in {there.file} too, and not alike; "
                    "keep one of them"
                )
        except UserError as fault:
            if not skip_faulty:
                raise
            left_out.append(str(fault))
            continue
        if there is not ballot:
            left_out.append(f"{shorter.file}: an earlier state, or a copy, of {longer.file}")
        ballots[ballot.rater, ballot.page] = longer
    return sorted(ballots.values(), key=lambda b: (b.rater, b.page)), left_out


def read_ballot(path: Path, key: Key) -> Ballot:
    """Read one file; whatever its content, a fault is a UserError of one line that names it."""
    try:
        return _ballot(_json(path), path, key)
    except _FaultError as fault:
        raise UserError(f"{path}: {fault}") from None


class _FaultError(Exception):
    """A fault in a ballot. Values from the file are quoted and cut, as they may be anything."""


def _quoted(value) -> str:
    text = ascii(value)
    return text if len(text) <= 40 else f"{text[:40]}…"


def _json(path: Path):
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST + 1)
    except OSError as error:
        raise _FaultError(f"cannot be read ({error.strerror})") from error
    if len(data) > LARGEST:
        raise _FaultError(f"has more than {LARGEST >> 20} MiB, no rater's votes have")
    try:
        return json.loads(data, object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise _FaultError("is not readable as JSON; ask the rater to save it again") from error


def _without_repeats(pairs: list[tuple]) -> dict:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a key twice")
    return dict(pairs)


def _ballot(content, path: Path, key: Key) -> Ballot:
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise _FaultError(f"is not a file of votes (format {FORMAT})")
    for name, kind in FIELDS.items():
        if type(content.get(name)) is not kind:
            raise _FaultError(f"{name!r} is {_quoted(content.get(name))}, not of type {kind.__name__}")
    study, rater, page = content["study"], content["rater"], content["page"]
    if study != key.study:
        raise _FaultError(f"is of the study {_quoted(study)}, and the key of {key.study}; give the key it belongs to")
    if not re.fullmatch(r"[a-z0-9_-]{1,32}", rater):
        raise _FaultError(f"the rater {_quoted(rater)} is not 1 to 32 of a–z, 0–9, - and _")
    if page not in {trial.page for trial in key.trials.values()}:
        raise _FaultError(f"page {_quoted(page)} is not one of this study")
    if content["mirrored"] != mirrored(rater):
        raise _FaultError(f"'mirrored' is not what it is for the rater {rater}: the file was changed")
    votes = [_vote(entry, i, page, key, flip=content["mirrored"]) for i, entry in enumerate(content["votes"])]
    seen: set[str] = set()
    for vote in votes:
        if vote.pair in seen:
            raise _FaultError(f"has the pair {vote.pair} twice")
        seen.add(vote.pair)
    return Ballot(str(path), rater, page, tuple(votes))


def _vote(entry, position: int, page: int, key: Key, *, flip: bool) -> Vote:
    if not isinstance(entry, dict) or set(entry) != {"pair", "choice", "ms"}:
        raise _FaultError(f"vote {position} is {_quoted(entry)}, not pair, choice and ms")
    pair, choice, ms = entry["pair"], entry["choice"], entry["ms"]
    trial = key.trials.get(pair) if isinstance(pair, str) else None
    if trial is None or trial.page != page:
        raise _FaultError(f"vote {position} is on the pair {_quoted(pair)}, which page {page} does not have")
    if not isinstance(choice, str) or choice not in CHOICES:
        raise _FaultError(f"the choice for {pair} is {_quoted(choice)}, not left, tie or right")
    if type(ms) is not int or not 0 <= ms <= LONGEST:
        raise _FaultError(f"the time for {pair} is {_quoted(ms)}, not milliseconds from 0 to {LONGEST}")
    return Vote(pair, SWAPPED[choice] if flip else choice, choice, ms)
