"""A table's report: its figures, and one HTML page with the table, the figures, the images and how it was made."""

import json
from pathlib import Path

from vqdm.report.figures.collection import figures_of
from vqdm.report.figures.pareto import LABELS
from vqdm.report.formats import TableContent
from vqdm.report.gallery import PageMethod
from vqdm.report.marks import marks_of
from vqdm.report.page import PageContent, write_page
from vqdm.report.paired import HOW, findings
from vqdm.report.plot import plot_data
from vqdm.report.records import images_of, scores_of
from vqdm.stages.layout import IMAGES_FILE, captions_of

HEADERS = LABELS | {"mib": "MiB", "bits_quantized": "bits of quantized layers"}


def write_report(content: TableContent, rows: list[list[dict]], *, commands: list[str], results: Path) -> list[Path]:
    """Write figures/<name>-*.{svg,png} and reports/<name>.html from the rows' runs; returns the files.

    rows: the run records of each row, as for the table; with several calibration seeds the first is shown.
    """
    firsts = [runs[0] for runs in rows if runs]
    figures = figures_of(content.name, content.data, firsts, results)
    page = results / "reports" / f"{content.name}.html"
    write_page(page, _page(content, rows, figures, commands=commands, results=results))
    return [*(path.with_name(f"{path.name}.svg") for _, path in figures), page]


def _page(content: TableContent, rows: list[list[dict]], figures, *, commands: list[str], results: Path) -> PageContent:
    runs = [own[0] for own in rows if own]
    shown = _comparable(runs, results)
    protocol = scores_of(shown[0], results)["protocol"] if shown else {"images_per_prompt": 1}
    places = iter(range(len(shown)))
    plot = plot_data(content.data, [next(places) if own and own[0] in shown else None for own in rows])
    drawn = [(title, path) for title, path in figures if plot is None or "-pareto-" not in path.name]
    found = findings(rows, results)
    return PageContent(
        title=content.title,
        findings=found,
        summary=" ".join([*([HOW] if found else []), *content.below]).replace("`", ""),
        table_header=[HEADERS.get(name, name.replace("_", " ")) for name in content.cells.columns],
        table_rows=content.cells.values.tolist(),
        marks=marks_of(content.data, list(content.cells.columns)),
        notes=content.notes,
        plot=plot,
        figures=[(title, path.with_name(f"{path.name}.svg")) for title, path in drawn],
        methods=[_method(run, results, images=run in shown) for run in runs],
        prompts=_prompts(shown, protocol, results),
        images_per_prompt=protocol["images_per_prompt"],
        commands=commands,
        versions=_versions(runs, results),
        score_labels=LABELS,
    )


def _comparable(runs: list[dict], results: Path) -> list[dict]:
    """The runs whose images are there and have the same captions and as many images of each as the first run."""
    there = [run for run in runs if (results / run["directories"].get("generate", "none") / "images").is_dir()]
    keys = ("prompts_sha256", "images_per_prompt", "image_seed")
    asked = [tuple(scores_of(run, results)["protocol"].get(key) for key in keys) for run in there]
    return [run for run, of_run in zip(there, asked, strict=True) if of_run == asked[0]]


def _method(run: dict, results: Path, *, images: bool) -> PageMethod:
    places, bits = run["directories"], run["bits"]
    layers = results / places["quantize"] / "layers.json" if "quantize" in places else None
    scores = results / places["evaluate"] / IMAGES_FILE
    return PageMethod(
        name=run["method"],
        images=results / places["generate"] if images else None,
        scores=scores if images and scores.is_file() else None,
        layers=layers if layers is not None and layers.is_file() else None,
        size=f"{bits['bits_per_weight']:.2f} bits, {bits['file_bytes'] / 2**20:.2f} MiB",
    )


def _prompts(shown: list[dict], protocol: dict, results: Path) -> list[str]:
    if not shown:
        return []
    images = images_of(protocol)
    captions = captions_of(results / shown[0]["directories"]["generate"], len(images))
    return [caption for caption, (_, copy) in zip(captions, images, strict=False) if copy == 0]


def _versions(runs: list[dict], results: Path) -> dict[str, str]:
    """Commit and library versions, from the first run whose manifest has them."""
    for run in runs:
        file = results / run["directories"]["evaluate"] / "manifest.json"
        if file.is_file():
            manifest = json.loads(file.read_text(encoding="utf-8"))
            commit = {"commit": f"{manifest['git_sha']}{' and changes' if manifest['dirty'] else ''}"}
            return {name: str(version) for name, version in (commit | manifest["versions"]).items()}
    return {}
