"""Tables from run records and metrics.json: one frame, written as Markdown and CSV, and a picture beside them."""

import json
import statistics
from dataclasses import dataclass
from pathlib import Path

from vqdm.atomic import atomic_write
from vqdm.errors import UserError

SIZE_COLUMNS = ("bits_per_weight", "bits_quantized", "mib")
DIGITS = {"bits_per_weight": 3, "bits_quantized": 3, "mib": 2, "fid": 3, "kid": 4, "psnr_to_fp": 2, "fid_to_fp": 3}


@dataclass(frozen=True)
class Row:
    """One experiment, or, with `seeds` above 1, as many that differ in their calibration and distillation only."""

    name: str  # of its run record
    experiment: str  # of conf/experiment/
    method: str | None = None  # as the table calls it; None: as the experiment does
    overrides: tuple[str, ...] = ()
    seeds: int = 1

    def overrides_of_runs(self) -> list[list[str]]:
        """For each run, what it composes beside the user's own overrides."""
        common = [f"+experiment={self.experiment}", *self.overrides]
        if self.method is not None:
            quoted = self.method.replace("'", r"\'")
            common.append(f"method='{quoted}'")
        return [[*common, f"name={self.name}", *_calibration_seed(self.name, seed)] for seed in range(self.seeds)]


def _calibration_seed(name: str, seed: int) -> list[str]:
    """Other prompts, other noise, other draws of the codec; the images to score keep theirs."""
    if seed == 0:
        return []
    own = ("calibration.seed", "calibration.noise_seed", "quantize.seed", "finetune.seed")
    captions = f"finetune.trajectories.seed={1 + seed}"  # 1 is the default, and none of the calibration's seeds
    noise = f"finetune.trajectories.noise_seed={seed}"
    return [f"name={name}_seed{seed}", "calibration.order=shuffled", *(f"{key}={seed}" for key in own), captions, noise]


@dataclass(frozen=True)
class Table:
    """A file of experiments/: rows are experiments, metrics are columns."""

    name: str
    title: str
    model: str  # of its rows; a run on another model writes <name>-<model>
    rows: tuple[Row, ...]
    metrics: tuple[str, ...]


def read_table(path: Path) -> Table:
    from omegaconf import OmegaConf

    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in path.parent.glob("*.yaml")))
        raise UserError(f"there is no table {path.stem!r}; experiments/ holds {known}")
    content = OmegaConf.to_container(OmegaConf.load(path))
    if not isinstance(content, dict) or not {"title", "model", "rows", "metrics"} <= set(content):
        raise UserError(f"{path} must give title, model, rows and metrics")
    rows = tuple(_read_row(row, path) for row in content["rows"])
    return Table(path.stem, content["title"], content["model"], rows, tuple(content["metrics"]))


def _read_row(row, path: Path) -> Row:
    """The name of an experiment, or a mapping of Row's fields."""
    if isinstance(row, str):
        return Row(row, row)
    try:
        return Row(**{**row, "overrides": tuple(row.get("overrides", ()))})
    except (AttributeError, TypeError) as error:
        raise UserError(f"{path}: {row} is no row; give an experiment, or name, experiment, …: {error}") from error


def _scored(record: dict, results: Path) -> dict:
    """{metrics, protocol} of a run record."""
    return json.loads((results / record["directories"]["evaluate"] / "metrics.json").read_text())


def _row(table: Table, runs: list[dict], results: Path) -> dict:
    """Means over the runs of a row; their spread (standard deviation) beside each, where there are several."""
    bits, scores = runs[0]["bits"], [_scored(run, results)["metrics"] for run in runs]
    row = {
        "method": runs[0]["method"],
        "bits_per_weight": bits["bits_per_weight"],
        "bits_quantized": bits["bits_quantized"],
        "mib": bits["file_bytes"] / 2**20,
        "calibration_seeds": len(runs),
    }
    for metric in table.metrics:
        values = [score[metric]["value"] for score in scores if metric in score]  # none for the full-precision row
        row[metric] = statistics.fmean(values) if values else None
        row[f"{metric}_se"] = scores[0][metric]["se"] if values else None
        row[f"{metric}_seeds"] = statistics.stdev(values) if len(values) > 1 else None
    return row


def frame(table: Table, rows: list[list[dict]], results: Path):
    """A pandas frame: one row per list of run records, in the table's order; empty where a metric does not apply."""
    import pandas as pd

    return pd.DataFrame([_row(table, runs, results) for runs in rows])


def _cell(row, metric: str) -> str:
    value, error = row[metric], row[f"{metric}_se"]
    if value is None or value != value:
        return "–"
    digits = DIGITS.get(metric, 3)
    text = f"{value:.{digits}f} ± {error:.{digits}f}" if error is not None and error == error else f"{value:.{digits}f}"
    return text + (f" [{row[f'{metric}_seeds']:.{digits}f}]" if row["calibration_seeds"] > 1 else "")


def to_markdown(table: Table, data, protocol: dict, *, of: int) -> str:
    """The table with its protocol as footnotes; `of` rows in all, if some are still to come."""
    from tabulate import tabulate

    rows = [
        [row["method"], *(f"{row[c]:.{DIGITS[c]}f}" for c in SIZE_COLUMNS), *(_cell(row, m) for m in table.metrics)]
        for row in data.to_dict("records")
    ]
    body = tabulate(rows, headers=["method", *SIZE_COLUMNS, *table.metrics], tablefmt="github", disable_numparse=True)
    notes = "\n".join(f"- {name}: {value}" for name, value in protocol.items())
    seeds = "In brackets, where a row is the mean of several calibration seeds, their standard deviation.\n"
    several = seeds if (data["calibration_seeds"] > 1).any() else ""
    to_come = f"{len(rows)} of {of} rows; the same command goes on.\n\n" if len(rows) < of else ""
    return f"# {table.title}\n\n{body}\n\n{to_come}± is one standard error over images.\n{several}\n{notes}\n"


def _protocol(records: list[dict], results: Path) -> dict:
    """The one protocol of all rows; rows that differ in it cannot stand in one table."""
    protocols = [_scored(record, results)["protocol"] for record in records]
    different = next((r["experiment"] for r, p in zip(records, protocols, strict=True) if p != protocols[0]), None)
    if different is not None:
        raise UserError(
            f"{different} and {records[0]['experiment']} were scored by different protocols; run them alike"
        )
    return {"model": records[0]["model"], **protocols[0]}


def write_table(table: Table, rows: list[list[dict]], *, of: int, model: str, results: Path) -> tuple[str, list[Path]]:
    """Write tables/<name>.csv, .md and figures/<name>.png; returns the Markdown table and the files.

    rows: the run records of each row that is finished, one per calibration seed, of `of` rows in all.
    """
    from vqdm.report.grid import write_grid

    name = table.name if model == table.model else f"{table.name}-{model}"
    data = frame(table, rows, results)
    markdown = to_markdown(table, data, _protocol([run for runs in rows for run in runs], results), of=of)
    csv_file, md_file = results / "tables" / f"{name}.csv", results / "tables" / f"{name}.md"
    picture = results / "figures" / f"{name}.png"
    for folder in (csv_file.parent, picture.parent):
        folder.mkdir(parents=True, exist_ok=True)
    atomic_write(csv_file, data.to_csv(index=False, float_format="%.6g").encode())
    atomic_write(md_file, markdown.encode())
    write_grid(picture, [runs[0] for runs in rows], results)
    return markdown, [csv_file, md_file, picture]
