"""One pandas frame per table, from run records; every way of writing a table starts from it."""

import statistics
from pathlib import Path

from vqdm.report.experiments import Row, Table
from vqdm.report.records import flat, scores_of

PUBLISHED, DELTA, REPRODUCED = "published", "delta", "reproduced"


def frame(table: Table, rows: list[list[dict]], results: Path):
    """A pandas frame of numbers: one line per row of the table; rows: the run records of each, none = not run.

    Beside each metric stand its standard error (_se), its spread over calibration seeds (_seeds) and, if the table has
    published values, those (_published), ours minus published (_delta) and whether that is within the tolerance
    (_reproduced). "not_run" names the metrics that were not run; other empty cells do not apply.
    """
    import pandas as pd

    published = [metric for metric in table.metrics if any(metric in row.published for row in table.rows)]
    paper_bits = any("bits" in row.published for row in table.rows)
    works = any("work" in run for runs in rows for run in runs)
    lines = []
    for row, runs in zip(table.rows, rows, strict=True):
        line = {"method": runs[0]["method"] if runs else row.method or row.name}
        line |= _sizes(row, runs, paper_bits=paper_bits) | (_works(runs) if works else {})
        line |= {"calibration_seeds": len(runs)}
        scores = [scores_of(run, results) for run in runs]
        comparable = all(_as_published(table, score["protocol"]) for score in scores)
        for metric in table.metrics:
            line |= _scored(metric, [score["metrics"] for score in scores])
            if metric in published:
                tolerance = table.tolerances.get(metric) if comparable else None
                line |= compared(metric, line[metric], row.published.get(metric), tolerance)
        lines.append(line | {"not_run": " ".join(_not_run(table, scores))})
    data = pd.DataFrame(lines)
    if not any(run["bits"].get("parts") for runs in rows for run in runs):
        data = data.drop(columns="pipeline_mib", errors="ignore")
    return data if data["not_run"].any() else data.drop(columns="not_run")


def _sizes(row: Row, runs: list[dict], *, paper_bits: bool) -> dict:
    bits = runs[0]["bits"] if runs else {}
    sizes = {name: bits.get(name) for name in ("bits_per_weight", "bits_quantized")}
    if paper_bits:
        sizes |= {"bits_as_in_paper": bits.get("bits_as_in_paper"), "bits_published": row.published.get("bits")}
    sizes |= {"mib": bits["file_bytes"] / 2**20 if runs else None}
    return sizes | ({"pipeline_mib": bits["pipeline_bytes"] / 2**20} if "pipeline_bytes" in bits else {})


def _works(runs: list[dict]) -> dict:
    """Multiply-adds and bit operations of an image, relative to the original's in 16 bits.

    A run that is neither accelerated nor compared with other steps has not recorded them: its multiply-adds are 1.
    """
    work = runs[0].get("work") if runs else None
    if work is None:
        return {"macs": 1.0 if runs else None, "bit_operations": None}
    return {"macs": work["relative_macs"], "bit_operations": work["relative_bit_operations"]}


def _scored(metric: str, scores: list[dict]) -> dict:
    """Means over the runs of a row, and with several runs their spread (standard deviation)."""
    found = [score[metric]["value"] for score in scores if metric in score]
    values = [value for value in found if value is not None]  # too few images may have no value
    return {
        metric: statistics.fmean(values) if values else None,
        f"{metric}_se": next((score[metric]["se"] for score in scores if metric in score), None),
        f"{metric}_seeds": statistics.stdev(values) if len(values) > 1 else None,
    }


def _as_published(table: Table, protocol: dict) -> bool:
    shared = flat(protocol)
    return all(shared.get(key) == value for key, value in table.published_protocol.items())


def compared(metric: str, value: float | None, published: float | None, tolerance: float | None) -> dict:
    """Our value compared with the published one; None if either is missing, or if there is no tolerance."""
    delta = None if value is None or published is None else value - published
    near = None if delta is None or tolerance is None else round(abs(delta) - tolerance, 9) <= 0
    return {f"{metric}_{PUBLISHED}": published, f"{metric}_{DELTA}": delta, f"{metric}_{REPRODUCED}": near}


def _not_run(table: Table, scores: list[dict]) -> list[str]:
    """The metrics reported as not run that no run of the row has; all of them if there was no run."""
    if not scores:
        return list(table.metrics)
    return [
        metric
        for metric in table.metrics
        if all(metric not in score["metrics"] for score in scores) and any(metric in s["not_run"] for s in scores)
    ]
