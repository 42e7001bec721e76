"""All figures that the run records of a table allow, drawn into results/figures/."""

import json
from pathlib import Path

from vqdm.report.figures.layers import layer_map
from vqdm.report.figures.losses import loss_curves
from vqdm.report.figures.pareto import has_points, label_of, pareto
from vqdm.report.figures.style import save
from vqdm.report.figures.timesteps import timestep_errors
from vqdm.stages.layout import ERRORS_FILE


def figures_of(table_name: str, frame, records: list[dict], results: Path) -> list[tuple[str, Path]]:
    """Draw and save all figures; returns (title, path without suffix) of each, in the order in which a page shows them.

    table_name: the name of the table's files, `-<model>` included. frame: as for `pareto`; metrics are those with a
    column <metric>_se. records: as in results/runs.
    """
    model = next((r["model"] for r in records if table_name.endswith(f"-{r['model']}")), None)
    suffix = "" if model is None else f"-{model}"  # so runs on another model do not overwrite the figures either
    named = [(record, f"{record['experiment']}{suffix}") for record in records]
    drawn = _paretos(table_name, frame) + _timesteps(table_name, records, results)
    drawn += _layers(named, results) + _losses(named, results)
    made = []
    for title, name, figure in drawn:
        path = results / "figures" / name
        save(figure, path)
        made.append((title, path))
    return made


PAIRED = "psnr_to_fp"  # what rows with fewer multiply-adds are judged by


def _paretos(table_name: str, frame) -> list[tuple]:
    metrics = [name for name in frame.columns if f"{name}_se" in frame.columns]
    if "bits_per_weight" not in frame.columns:  # a table of votes
        return []
    drawn = [
        (f"Size against {label_of(metric).rstrip(' ↑↓')}", f"{table_name}-pareto-{metric}", pareto(frame, metric))
        for metric in metrics
        if has_points(frame, metric)
    ]
    if "macs" not in frame.columns or PAIRED not in metrics:
        return drawn
    for size, what in (("macs", "Multiply-adds"), ("mib", "Bytes")):
        title = f"{what} against {label_of(PAIRED).rstrip(' ↑↓')}"
        drawn.append((title, f"{table_name}-{size}-{PAIRED}", pareto(frame, PAIRED, size=size, everything=True)))
    return drawn


def _read(record: dict, stage: str, file: str, results: Path):
    """The JSON that a run's stage left; None if the run has no such stage, or if it was removed since."""
    path = results / record["directories"].get(stage, "") / file
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _layers(named: list[tuple[dict, str]], results: Path) -> list[tuple]:
    """Layer maps, one per quantize stage, named after the first run that has it: distillation changes no records."""
    drawn: dict[str, tuple] = {}
    for record, name in named:
        layers = _read(record, "quantize", "layers.json", results)
        directory = record["directories"].get("quantize")
        if layers is not None and layers["quantized"] and directory not in drawn:
            title = f"Error and bits by layer: {record['method']}"
            drawn[directory] = (title, f"{name}-layers", layer_map(layers["quantized"]))
    return list(drawn.values())


def _losses(named: list[tuple[dict, str]], results: Path) -> list[tuple]:
    drawn = []
    for record, name in named:
        history = _read(record, "finetune", "history.json", results)
        blocks = _read(record, "tune_blocks", "blocks.json", results)
        if history is not None or blocks is not None:
            drawn.append((f"Distillation: {record['method']}", f"{name}-losses", loss_curves(history, blocks)))
    return drawn


def _timesteps(table_name: str, records: list[dict], results: Path) -> list[tuple]:
    """Errors by timestep, as measured by the denoisers' stages; those in one figure share the calibration's calls."""
    comparable: dict[str, dict] = {}
    for record in records:
        stages = ("finetune", "tune_blocks", "quantize")
        found = next((f for stage in stages if (f := _read(record, stage, ERRORS_FILE, results)) is not None), None)
        if found is not None:
            errors = dict(zip(found["timesteps"], found["relative_output_errors"], strict=True))
            comparable.setdefault(record["directories"]["calibrate"], {})[record["method"]] = errors
    drawn = []
    for number, by_method in enumerate(comparable.values(), 1):
        timesteps = sorted({timestep for errors in by_method.values() for timestep in errors})
        data = {"timesteps": timesteps, "errors": {m: [e.get(t) for t in timesteps] for m, e in by_method.items()}}
        name = f"{table_name}-timesteps" + ("" if number == 1 else f"-{number}")
        drawn.append(("Error by timestep", name, timestep_errors(data, label="relative output error")))
    return drawn
