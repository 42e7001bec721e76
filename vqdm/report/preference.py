"""The table of human preference: pairs of rows, with our votes beside the published percentages.

Votes are read from votes/*/human_preference.json of the results, as scripts/score_votes.py writes them: a list of
{left, right, preference_for_left_percent, low, high, n_votes, n_raters, n_prompts}, systems named as runs.
"""

import json
from pathlib import Path

from vqdm.errors import UserError
from vqdm.report.experiments import Table
from vqdm.report.footnotes import about_making, about_published
from vqdm.report.numbers import DELTA, PUBLISHED, REPRODUCED, compared

METRIC = "preference"  # % of votes for the left one, with a tie as half a vote
COUNTS = ("n_votes", "n_raters", "n_prompts")


def preference_frame(table: Table, results: Path):
    """A pandas frame of numbers: one line per pair of the table, with the study that its votes come from."""
    import pandas as pd

    votes = read_votes(results)
    lines = []
    for pair in table.pairs:
        line = {side: _method(table, getattr(pair, side)) for side in ("left", "right")}
        found = votes.get((pair.left, pair.right), {})
        line |= {name: found.get(name) for name in (METRIC, "low", "high")}
        line |= compared(METRIC, line[METRIC], pair.published, table.tolerances.get(METRIC))
        lines.append(line | {name: found.get(name) for name in (*COUNTS, "study")})
    return pd.DataFrame(lines)


def _method(table: Table, name: str) -> str:
    return table.row(name).method or name


def read_votes(results: Path) -> dict[tuple[str, str], dict]:
    """{(left, right): preference in % with interval, counts, study}, both ways round; the newest study counts."""
    found: dict[tuple[str, str], dict] = {}
    for file in sorted((results / "votes").glob("*/human_preference.json"), key=lambda file: file.stat().st_mtime):
        try:
            for row in json.loads(file.read_text(encoding="utf-8")):
                counts = {name: row[name] for name in COUNTS} | {"study": file.parent.name}
                share, low, high = row["preference_for_left_percent"], row["low"], row["high"]
                found[row["left"], row["right"]] = {METRIC: share, "low": low, "high": high} | counts
                turned = {METRIC: 100 - share, "low": 100 - high, "high": 100 - low}
                found[row["right"], row["left"]] = turned | counts
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{file}: no scored votes; make it again with scripts/score_votes.py, or delete it"
            ) from error
    return found


def preference_cells(data):
    """The frame as text, with headers for people."""
    import pandas as pd

    lines = []
    for row in data.astype(object).where(data.notna(), None).to_dict("records"):
        voted = row[METRIC] is not None
        share = f"{row[METRIC]:.1f} [{row['low']:.1f}, {row['high']:.1f}]" if voted else "not run"
        line = {"left": row["left"], "right": row["right"], "for the left one, %": share}
        if data[f"{METRIC}_{PUBLISHED}"].notna().any():
            line |= {"published": f"{row[f'{METRIC}_{PUBLISHED}']:.1f}", "Δ": _delta(row)}
        counts = {name.removeprefix("n_"): f"{row[name]:.0f}" if voted else "–" for name in COUNTS}
        lines.append(line | counts)
    return pd.DataFrame(lines)


def _delta(row: dict) -> str:
    delta, near = row[f"{METRIC}_{DELTA}"], row[f"{METRIC}_{REPRODUCED}"]
    return "–" if delta is None else f"{delta:+.1f}" + {True: " ✓", False: " ✗"}.get(near, "")


def preference_sentences(table: Table, data, *, model: str) -> list[str]:
    voted = int(data[METRIC].notna().sum())
    found = []
    if voted < len(data):
        found.append(
            f"{voted} of {len(data)} pairs were voted on; `{table.command(model)}` makes the images, "
            "scripts/make_votes.py the page for raters, scripts/score_votes.py the result."
        )
    found.append("Votes for the left one, a tie as half a vote; in brackets the interval over prompts.")
    studies = ", ".join(data["study"].dropna().unique())
    found += [f"Studies: {studies}."] if studies else []
    return found + about_published(table) + about_making(table, model)
