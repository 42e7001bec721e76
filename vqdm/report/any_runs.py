"""Tables of any runs, without a file of experiments/: those that are named, or the jobs of a sweep.

records = [record for name in names for record in find_records(results, name)]
print(report_runs(records, name="mine", title="…", command="python scripts/report.py …", results=results))
"""

import difflib
import fnmatch
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from vqdm.errors import UserError
from vqdm.metrics.families import FAMILIES
from vqdm.report.experiments import Row, Table
from vqdm.report.formats import table_content, write_table
from vqdm.report.paired import paired_first
from vqdm.report.records import is_finished, scores_of
from vqdm.report.report import write_report
from vqdm.report.terminal import closing, row_line, table_summary
from vqdm.runs import progress
from vqdm.runs.store import Store
from vqdm.runs.sweeps import JOB, SWEEP, jobs_of_sweep

MOST_NAMED = 12  # runs that an error lists


def finished_runs(results: Path, *, model: str | None = None) -> dict[str, dict]:
    """{NAME/FINGERPRINT: record} of every finished run, the newest last. model: only those on it."""
    found = [
        (file.stat().st_mtime, file.relative_to(results / "runs").with_suffix("").as_posix(), record)
        for file, record in Store(results).runs()
        if (model is None or record.get("model") == model) and is_finished(record, results)
    ]
    return {name: record for _, name, record in sorted(found, key=lambda one: one[:2])}


def find_records(results: Path, text: str, *, model: str | None = None) -> list[dict]:
    """The finished runs that a text names, one or several; model: only those on it.

    It may be the name of an experiment (its newest run), a glob of names, NAME/FINGERPRINT, a run record's file, a
    sweep or one of its jobs (SWEEP/2), both by name or as a folder, or a job's label, such as "quantize.bits=3".
    UserError, with the nearest names, if it is none.
    """
    records = finished_runs(results, model=model)
    folder = Path(text) if Path(text).is_dir() else results / "sweeps" / text
    jobs = [_job(folder)] if (folder / JOB).is_file() else jobs_of_sweep(folder)
    name = text.removeprefix(f"{results}/").removeprefix("runs/").removesuffix(".json")
    if found := _of_jobs(jobs, records) or [records[name] for name in [name] if name in records]:
        return found
    newest = {(r["experiment"], r["model"]): r for r in records.values() if fnmatch.fnmatchcase(r["experiment"], text)}
    called = [record for record in records.values() if record["method"] == text]
    if not newest and not called:
        raise UserError(_no_run(text, records, results, model))
    return list(newest.values()) or called[-1:]


def _job(folder: Path) -> dict:
    return json.loads((folder / JOB).read_text(encoding="utf-8"))


def _of_jobs(jobs: Iterable[dict], records: dict[str, dict]) -> list[dict]:
    """The jobs' finished runs, each called by its job's label."""
    names = [(job, (job.get("run") or "").removeprefix("runs/").removesuffix(".json")) for job in jobs]
    return [records[name] | {"method": job["label"] or job["run"]} for job, name in names if name in records]


def _no_run(text: str, records: dict[str, dict], results: Path, model: str | None) -> str:
    on = "" if model is None else f" on {model}"
    names = sorted({record["experiment"] for record in records.values()})
    if not names:
        return f"no finished run {text}{on} under {results}: there is none at all; run an experiment first"
    nearest = difflib.get_close_matches(text, names, n=MOST_NAMED, cutoff=0.3)
    listed = [*nearest, *(name for name in names if name not in nearest)][:MOST_NAMED]
    more = f" and {len(names) - len(listed)} more" if len(names) > len(listed) else ""
    return f"no finished run {text}{on} under {results}; there are {', '.join(listed)}{more}"


def list_runs(results: Path) -> str:
    """A line for every finished run, the newest last: how it is named, what it is, its size and first score."""
    from tabulate import tabulate

    rows = []
    for name, record in finished_runs(results).items():
        size, *scores = row_line(record, results).split(", ")[1:3]
        bits = f"{record['bits']['bits_per_weight']:.2f}"
        rows.append([name, record["method"], record["model"], bits, size, *scores])
    if not rows:
        return f"no finished runs under {results}; the first one: python run.py +experiment=demo"
    return tabulate(rows, headers=["run", "method", "model", "bits", "size", ""], disable_numparse=True)


def table_of(records: list[dict], results: Path, *, name: str, title: str, command: str) -> Table:
    """A table whose rows are these runs and whose columns are all that they were scored by, the paired metrics first.

    Methods of the same name get that of their experiment too.
    """
    scored = {metric for record in records for metric in scores_of(record, results)["metrics"]}
    known = [metric for family in FAMILIES.values() for metric in family.metrics if metric in scored]
    models = list(dict.fromkeys(record["model"] for record in records))
    rows = tuple(Row(record["experiment"], record["experiment"], method=record["method"]) for record in records)
    return Table(name, title, ", ".join(models), rows, tuple(paired_first(known)), made_by=command)


def told_apart(records: list[dict]) -> list[dict]:
    """The records, each once by its first name, with names that tell them apart: methods also by model, experiment or
    fingerprint.
    """
    once: dict[str, dict] = {}
    for record in records:
        once.setdefault(record["fingerprint"], record)
    records = list(once.values())
    for key in ("model", "experiment", "fingerprint"):
        values: dict[str, set[str]] = {}
        for record in records:
            values.setdefault(record["method"], set()).add(record[key])
        records = [
            record | {"method": f"{record['method']}, {record[key][:60]}"}
            if len(values[record["method"]]) > 1
            else record
            for record in records
        ]
    times = Counter(record["experiment"] for record in records)  # which names the files of a run's figures
    return [
        record | {"experiment": f"{record['experiment']}-{record['fingerprint'][:8]}"}
        if times[record["experiment"]] > 1
        else record
        for record in records
    ]


def report_runs(records: list[dict], *, name: str, title: str, command: str, results: Path, mixed: bool = False) -> str:
    """Write a table of runs, its figures and its page; returns the text to print.

    mixed: protocols may differ within a column. UserError if they do otherwise.
    """
    records = told_apart(records)
    table, rows = table_of(records, results, name=name, title=title, command=command), [[one] for one in records]
    content = table_content(table, rows, model=table.model, results=results, mixed=mixed)
    _, files = write_table(content, rows, results=results)
    with progress.step("figures and page"):
        files += write_report(content, rows, commands=[command], results=results)
    return f"{table_summary(content, file=files[0])}\n{closing(rows, results, table=files[0], page=files[-1])}"


def report_sweep(directory: Path, results: Path) -> str | None:
    """The report of a sweep's finished runs, in the order of its jobs; None if none was scored.

    Protocols may differ, since a sweep may vary them; footnotes say which run has what.
    """
    swept = json.loads((directory / SWEEP).read_text(encoding="utf-8"))
    found = _of_jobs(jobs_of_sweep(directory), finished_runs(results))
    if not found:
        return None
    title = f"Sweep over {', '.join(swept['swept']) or 'nothing'}"
    command = " ".join(["python run.py --multirun", *swept["overrides"]])
    return report_runs(found, name=directory.name, title=title, command=command, results=results, mixed=True)
