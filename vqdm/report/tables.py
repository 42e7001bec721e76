"""Tables from run records and metrics.json: one frame, written as Markdown and CSV, and a picture beside them."""

import json
from dataclasses import dataclass
from pathlib import Path

from vqdm.atomic import atomic_write
from vqdm.errors import UserError

SIZE_COLUMNS = ("bits_per_weight", "bits_quantized", "mib")
DIGITS = {"bits_per_weight": 3, "bits_quantized": 3, "mib": 2, "fid": 3, "kid": 4, "psnr_to_fp": 2, "fid_to_fp": 3}


@dataclass(frozen=True)
class Table:
    """A file of experiments/: rows are experiments, metrics are columns."""

    name: str
    title: str
    model: str  # of its rows; a run on another model writes <name>-<model>
    rows: tuple[str, ...]
    metrics: tuple[str, ...]


def read_table(path: Path) -> Table:
    from omegaconf import OmegaConf

    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in path.parent.glob("*.yaml")))
        raise UserError(f"there is no table {path.stem!r}; experiments/ holds {known}")
    content = OmegaConf.to_container(OmegaConf.load(path))
    if not isinstance(content, dict) or not {"title", "model", "rows", "metrics"} <= set(content):
        raise UserError(f"{path} must give title, model, rows and metrics")
    rows, metrics = tuple(content["rows"]), tuple(content["metrics"])
    return Table(path.stem, content["title"], content["model"], rows, metrics)


def _scored(record: dict, results: Path) -> dict:
    """{metrics, protocol} of a run record."""
    return json.loads((results / record["directories"]["evaluate"] / "metrics.json").read_text())


def _row(table: Table, record: dict, results: Path) -> dict:
    bits, scores = record["bits"], _scored(record, results)["metrics"]
    row = {
        "method": record["method"],
        "bits_per_weight": bits["bits_per_weight"],
        "bits_quantized": bits["bits_quantized"],
        "mib": bits["file_bytes"] / 2**20,
    }
    for metric in table.metrics:
        score = scores.get(metric, {"value": None, "se": None})  # the full-precision row has none against itself
        row |= {metric: score["value"], f"{metric}_se": score["se"]}
    return row


def frame(table: Table, records: list[dict], results: Path):
    """A pandas frame: one row per run record, in the table's order; empty cells where a metric does not apply."""
    import pandas as pd

    return pd.DataFrame([_row(table, record, results) for record in records])


def _cell(row, metric: str) -> str:
    value, error = row[metric], row[f"{metric}_se"]
    if value is None or value != value:
        return "–"
    digits = DIGITS.get(metric, 3)
    return f"{value:.{digits}f} ± {error:.{digits}f}" if error is not None and error == error else f"{value:.{digits}f}"


def to_markdown(table: Table, data, protocol: dict) -> str:
    """The table with its protocol as footnotes."""
    from tabulate import tabulate

    rows = [
        [row["method"], *(f"{row[c]:.{DIGITS[c]}f}" for c in SIZE_COLUMNS), *(_cell(row, m) for m in table.metrics)]
        for row in data.to_dict("records")
    ]
    body = tabulate(rows, headers=["method", *SIZE_COLUMNS, *table.metrics], tablefmt="github", disable_numparse=True)
    notes = "\n".join(f"- {name}: {value}" for name, value in protocol.items())
    return f"# {table.title}\n\n{body}\n\n± is one standard error.\n\n{notes}\n"


def _protocol(records: list[dict], results: Path) -> dict:
    """The one protocol of all rows; rows that differ in it cannot stand in one table."""
    protocols = [_scored(record, results)["protocol"] for record in records]
    different = next((r["experiment"] for r, p in zip(records, protocols, strict=True) if p != protocols[0]), None)
    if different is not None:
        raise UserError(
            f"{different} and {records[0]['experiment']} were scored by different protocols; run them alike"
        )
    return {"model": records[0]["model"], **protocols[0]}


def write_table(table: Table, records: list[dict], *, model: str, results: Path) -> tuple[str, list[Path]]:
    """Write tables/<name>.csv, .md and figures/<name>.png; returns the Markdown table and the files."""
    from vqdm.report.grid import write_grid

    name = table.name if model == table.model else f"{table.name}-{model}"
    data = frame(table, records, results)
    markdown = to_markdown(table, data, _protocol(records, results))
    csv_file, md_file = results / "tables" / f"{name}.csv", results / "tables" / f"{name}.md"
    picture = results / "figures" / f"{name}.png"
    for folder in (csv_file.parent, picture.parent):
        folder.mkdir(parents=True, exist_ok=True)
    atomic_write(csv_file, data.to_csv(index=False, float_format="%.6g").encode())
    atomic_write(md_file, markdown.encode())
    write_grid(picture, records, results)
    return markdown, [csv_file, md_file, picture]
