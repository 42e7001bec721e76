"""A table's numbers as one small file for others: with protocols, device, versions and hashes, without images or paths.

    results/share/<table>.json      {"format", "table", "title", "model", "rows": [row, …], "sha256"}
    row     {"name", "method", "runs": [run, …]}, a run for each calibration seed
    run     {"fingerprint", "bits", "protocol", "metrics": {name: {"value", "se", "protocol"}}, "not_run", "made"}

Files of others are untrusted: numbers and one-line texts are taken, everything else is refused.
"""

import json
import math
import re
from pathlib import Path

from vqdm.errors import UserError
from vqdm.report.experiments import Table
from vqdm.report.formats import TableContent
from vqdm.report.records import differing, flat, scores_of
from vqdm.runs.files import read_sealed, write_sealed
from vqdm.runs.texts import in_markdown, in_one_line

FORMAT = 1
LARGEST = 20 * 10**6  # bytes of a file of others
_PLACE = re.compile(r"(?<![\w:/.])(?:~|\.{1,2}|[A-Za-z]:|[\w.-]+)?(?:[/\\][\w.+-]+)+(?=$|[\s,;:)])")


def write_share(table: Table, content: TableContent, rows: list[list[dict]], *, model: str, results: Path) -> Path:
    """Write share/<table>.json from the rows' run records; returns the file."""
    found = [
        {"name": row.name, "method": runs[0]["method"], "runs": [_run(run, results) for run in runs]}
        for row, runs in zip(table.rows, rows, strict=True)
        if runs
    ]
    file = results / "share" / f"{content.name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    about = {"format": FORMAT, "table": table.name, "title": table.title, "model": model}
    write_sealed(file, without_places(about | {"rows": found}))
    return file


def _run(run: dict, results: Path) -> dict:
    scores = scores_of(run, results)
    metrics = {
        name: {key: score.get(key) for key in ("value", "se", "protocol")} for name, score in scores["metrics"].items()
    }
    manifest = results / run["directories"]["evaluate"] / "manifest.json"
    made = json.loads(manifest.read_text(encoding="utf-8")) if manifest.is_file() else {}
    return {
        "fingerprint": run["fingerprint"],
        "bits": run["bits"],
        "protocol": scores["protocol"],
        "metrics": metrics,
        "not_run": sorted(scores["not_run"]),  # the reasons name places of this machine
        "made": {key: made.get(key) for key in ("versions", "git_sha", "dirty")},
    }


def without_places(value):
    """The same value with file names in the place of paths."""
    if isinstance(value, dict):
        return {key: without_places(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [without_places(inner) for inner in value]
    if not isinstance(value, str):
        return value
    return _PLACE.sub(lambda found: found[0] if _is_name(found[0]) else re.split(r"[/\\]", found[0])[-1], value)


def _is_name(text: str) -> bool:
    """True for words with a slash that are no paths, such as ViT-L/14 and owner/name."""
    return text.count("/") == 1 and not text.startswith(("/", "~", ".")) and "." not in text


def read_share(file: Path) -> dict:
    """Read a file of `write_share`. UserError for anything else."""
    try:
        too_large = file.stat().st_size > LARGEST
        content = None if too_large else read_sealed(file)
    except (OSError, ValueError):
        content = None
    if content is None or content.get("format") != FORMAT:
        raise UserError(f"{file} is no whole file of results/share (format {FORMAT}); ask for it again")
    try:
        for row in content["rows"]:
            _check_row(row)
        texts = [content[key] for key in ("table", "title", "model")]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(
            f"{file}: its rows are not as results/share has them ({in_one_line(str(error))[:80]})"
        ) from error
    if not all(isinstance(text, str) for text in texts):
        raise UserError(f"{file}: table, title and model must be texts")
    return content


def _check_row(row: dict) -> None:
    if not isinstance(row["name"], str) or not isinstance(row["method"], str) or not row["runs"]:
        raise ValueError("a row needs name, method and runs")
    for run in row["runs"]:
        flat(run["protocol"])
        for name, score in run["metrics"].items():
            if not all(_is_number(score[key]) for key in ("value", "se")):
                raise ValueError(f"{name} is no number")
            flat(score["protocol"])


def _is_number(value) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value))


def beside(table: Table, rows: list[list[dict]], theirs: dict, *, results: Path, name: str) -> str:
    """Markdown with our numbers, theirs and the differences, row by row, then the keys in which protocols differ."""
    if theirs["table"] != table.name:
        raise UserError(f"{name} holds the table {in_one_line(theirs['table'])[:60]}, not {table.name}")
    known = {row["name"]: row["runs"][0] for row in theirs["rows"]}
    lines = [f"# {in_markdown(table.title)}", "", f"Ours beside {in_markdown(name)}: ours / theirs (difference).", ""]
    lines += ["| method | " + " | ".join(table.metrics) + " |", "|---|" + "---|" * len(table.metrics)]
    notes: dict[str, None] = {}
    for row, runs in zip(table.rows, rows, strict=True):
        ours, other = _run(runs[0], results) if runs else None, known.get(row.name)
        cells = [_pair(ours, other, metric) for metric in table.metrics]
        lines.append(f"| {in_markdown(row.method or row.name, cell=True)} | " + " | ".join(cells) + " |")
        if ours is not None and other is not None:
            notes |= dict.fromkeys(_differences(ours, other, table.metrics))
    apart = [f"- {in_markdown(note)}" for note in notes] or ["- protocols: alike"]
    return "\n".join([*lines, "", *apart, ""])


def _pair(ours: dict | None, theirs: dict | None, metric: str) -> str:
    one, other = (None if run is None else run["metrics"].get(metric, {}).get("value") for run in (ours, theirs))
    texts = ["–" if value is None else f"{value:.4g}" for value in (one, other)]
    apart = "" if one is None or other is None else f" ({one - other:+.3g})"
    return " / ".join(texts) + apart


def _differences(ours: dict, theirs: dict, metrics: tuple[str, ...]) -> list[str]:
    """Sentences on keys of the protocols that differ, ours as it would be shared."""
    ours = without_places(ours)
    found = [("", differing(flat(ours["protocol"]), flat(theirs["protocol"])))]
    both = [metric for metric in metrics if metric in ours["metrics"] and metric in theirs["metrics"]]
    for metric in both:
        own, other = (flat(run["metrics"][metric]["protocol"] or {}) for run in (ours, theirs))
        found.append((f"{metric}: ", differing(own, other)))
    return [f"{of}{key}: {one} / {other}" for of, keys in found for key, (one, other) in keys.items()]
