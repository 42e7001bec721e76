"""Run records and their scores, as tables, figures and pages read them: results/**.json only."""

import json
import re
from collections.abc import Iterable
from pathlib import Path

from vqdm.errors import UserError
from vqdm.prompts import ImageList
from vqdm.report.experiments import Table
from vqdm.runs.stage import Stage
from vqdm.runs.store import Store
from vqdm.stages.layout import SCORES_FILE

LOWER_IS_BETTER = re.compile(r"fid(?!elity).*|kid.*|cmmd.*|distance_to_fp|lpips.*|recovery_error")  # names of metrics


def scores_of(record: dict, results: Path) -> dict:
    """{metrics: {name: {value, se, protocol, …}}, protocol, not_run: {name: reason}} of a run record."""
    return json.loads(_scores_file(record, results).read_text(encoding="utf-8"))


def images_of(protocol: dict) -> ImageList:
    """The images that a run was scored on, by the numbers of their prompts; protocol: as `scores_of` has it."""
    return ImageList(range(protocol["n"]), protocol["images_per_prompt"])


def _scores_file(record: dict, results: Path) -> Path:
    return results / record["directories"]["evaluate"] / SCORES_FILE


def is_finished(record: dict, results: Path) -> bool:
    """True if the run was scored and the scores are still there."""
    return "bits" in record and "evaluate" in record["directories"] and _scores_file(record, results).is_file()


def read_record(store: Store, experiment: str, last: Stage) -> dict | None:
    """The record of the run that ends in the stage `last`; None if there is none, or it is no JSON."""
    file = store.root / "runs" / experiment / f"{last.short}.json"
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None


def newest_records(table: Table, results: Path, *, model: str | None = None) -> list[list[dict]]:
    """Finished run records of each row, the newest for each calibration seed; an empty list: not run.

    model: None = the table's own. Records are found by the experiment's name, so a newer run of the row with other
    options takes its place.
    """
    newest: dict[str, tuple[float, dict]] = {}
    for file, record in Store(results).runs():
        if record.get("model") != (model or table.model) or not is_finished(record, results):
            continue
        made, name = file.stat().st_mtime, record["experiment"]
        if name not in newest or made > newest[name][0]:
            newest[name] = (made, record)
    return [[newest[name][1] for name in row.names_of_runs() if name in newest] for row in table.rows]


def flat(protocol: dict, prefix: str = "") -> dict:
    """{"sampler": {"steps": 4}} as {"sampler.steps": 4}"""
    found: dict = {}
    for key, value in protocol.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def protocols_of(record: dict, results: Path, metrics: Iterable[str]) -> tuple[dict, dict[str, dict]]:
    """Protocol that all metrics of a run share, flat, and each metric's own part: {metric: protocol}."""
    scores = scores_of(record, results)
    made = [metric for metric in metrics if metric in scores["metrics"]]
    return flat(scores["protocol"]), {m: flat(scores["metrics"][m]["protocol"]) for m in made}


def check_protocols(table: Table, records: list[dict], results: Path, *, mixed: bool = False) -> None:
    """Raise UserError, naming two runs, metric and key, if a column would hold two protocols.

    Keys in table.mixed may differ, and with `mixed` all may: footnotes then say which run has what.
    """
    first: dict[str, tuple[str, dict, dict]] = {}
    for record in [] if mixed else records:
        common, own = protocols_of(record, results, table.metrics)
        for metric, protocol in own.items():
            name, *expected = first.setdefault(metric, (record["experiment"], common, protocol))
            found = differing(expected[0], common) | differing(expected[1], protocol)
            key = next((key for key in found if not _may_differ(key, table.mixed)), None)
            if key is not None:
                one, other = found[key]
                raise UserError(
                    f"table {table.name}: {metric} of {name} and of {record['experiment']} have different protocols: "
                    f"{key} is {one} and {other}; run both alike, or ask for one table of both with mixed=true "
                    "(scripts/make_tables.py: --mixed)"
                )


def differing(one: dict, other: dict) -> dict[str, tuple]:
    """{key: both values} for keys in which two flat protocols differ."""
    pairs = {key: (one.get(key, "not stated"), other.get(key, "not stated")) for key in one | other}
    return {key: values for key, values in pairs.items() if values[0] != values[1]}


def _may_differ(key: str, mixed: tuple[str, ...]) -> bool:
    return any(f"{key}.".startswith(f"{allowed}.") for allowed in mixed)
