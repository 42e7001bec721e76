"""A table as Markdown, LaTeX and CSV, all from one frame, and a picture beside it."""

import dataclasses
from pathlib import Path

from vqdm.report.experiments import Table
from vqdm.report.footnotes import notes, refusals, sentences
from vqdm.report.numbers import DELTA, PUBLISHED, REPRODUCED, frame
from vqdm.report.preference import preference_cells, preference_frame, preference_sentences
from vqdm.report.records import check_protocols
from vqdm.runs.files import atomic_write
from vqdm.runs.texts import in_csv, in_markdown, in_one_line

WORK_COLUMNS = ("macs", "bit_operations")  # relative to the original's
SIZE_COLUMNS = (
    "bits_per_weight",
    "bits_quantized",
    "bits_as_in_paper",
    "bits_published",
    "mib",
    "pipeline_mib",
    *WORK_COLUMNS,
)
DIGITS = {
    "mib": 2, "pipeline_mib": 2, "kid": 4, "psnr_to_fp": 2, "fid_paper": 2, "fid_standard": 2, "fid_paper_to_fp": 2,
    "kid_standard": 5, "inception_score": 2, "clip_h14": 4, "clip_l14": 2, "pickscore": 4, "pickscore_scaled": 2,
    "hpsv2": 4, "edit_psnr_in": 2, "edit_psnr_out": 2, "region_psnr_in": 2, "region_psnr_out": 2,
    "reconstruction_psnr": 2, "concept_rest_psnr": 2,
}  # fmt: skip
TEXT_COLUMNS = ("method", "left", "right")
NOT_RUN, NOTHING = "not run", "–"
LATEX = {
    "\\": r"\textbackslash{}", "_": r"\_", "%": r"\%", "&": r"\&", "#": r"\#", "$": r"\$", "{": r"\{", "}": r"\}",
    "±": r"$\pm$", "Δ": r"$\Delta$", "–": "--", "✓": r"$\checkmark$", "✗": r"$\times$", "×": r"$\times$", "²": "$^2$",
    "≤": r"$\le$", "→": r"$\to$", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class TableContent:
    """Everything to write about a table.

    name: its files' name; data: the frame of numbers; cells: the same as text; below: sentences about the table;
    notes: the protocol.
    """

    name: str
    title: str
    data: object
    cells: object
    below: list[str]
    notes: list[str]


def table_content(
    table: Table, rows: list[list[dict]], *, model: str, results: Path, mixed: bool = False
) -> TableContent:
    """Everything to write about a table, from run records.

    rows: the run records of each row, one per calibration seed; none = not run.
    UserError if a column would mix protocols and neither the table nor `mixed` asks for it.
    """
    if model != table.model:  # the published values are for another model
        table = _unpublished(table)
    runs = [run for of_row in rows for run in of_row]
    check_protocols(table, runs, results, mixed=mixed)
    name = table.name if model == table.model else f"{table.name}-{model}"
    data, cells, below = _content(table, rows, results, model=model)
    lines = notes(table, runs, results, model=model) + refusals(table, rows, results)
    return TableContent(name, table.title, data, cells, below, lines)


def write_table(content: TableContent, rows: list[list[dict]], *, results: Path) -> tuple[str, list[Path]]:
    """Write tables/<name>.md, .tex and .csv, and figures/<name>.png; returns the Markdown and the files."""
    markdown = markdown_of(content)
    texts = {
        "md": markdown,
        "tex": to_latex(content.title, content.cells, content.below, content.notes, label=content.name),
        "csv": content.data.map(in_csv).to_csv(index=False, float_format="%.6g"),
    }
    files = [results / "tables" / f"{content.name}.{end}" for end in texts]
    for file, text in zip(files, texts.values(), strict=True):
        atomic_write(file, text.encode())
    return markdown, files + _picture(results / "figures" / f"{content.name}.png", rows, results)


def markdown_of(content: TableContent) -> str:
    return to_markdown(content.title, content.cells, content.below, content.notes)


def _unpublished(table: Table) -> Table:
    rows = tuple(dataclasses.replace(row, published={}) for row in table.rows)
    pairs = tuple(dataclasses.replace(pair, published=None) for pair in table.pairs)
    return dataclasses.replace(table, rows=rows, pairs=pairs, source=None, tolerances={}, published_protocol={})


def _content(table: Table, rows: list[list[dict]], results: Path, *, model: str):
    """The frame of numbers, the same as text, and the sentences below."""
    if table.pairs:
        data = preference_frame(table, results)
        return data, preference_cells(data), preference_sentences(table, data, model=model)
    data = frame(table, rows, results)
    run = sum(bool(runs) for runs in rows)
    return data, to_cells(table, data), sentences(table, data, of_runs=run, model=model)


def _picture(path: Path, rows: list[list[dict]], results: Path) -> list[Path]:
    """Make a picture from rows whose images are there: a table may be rebuilt from copied numbers alone."""
    from vqdm.report.grid import write_grid

    firsts = [runs[0] for runs in rows if runs]
    drawn = [run for run in firsts if (results / run["directories"].get("generate", "none") / "images").is_dir()]
    if not drawn:
        return []
    write_grid(path, drawn, results)
    return [path]


def to_cells(table: Table, data):
    """The frame as text, with headers for people."""
    import pandas as pd

    lines = []
    for row in data.astype(object).where(data.notna(), None).to_dict("records"):
        line = {"method": row["method"]}
        line |= {name: _number(row[name], DIGITS.get(name, 3)) for name in SIZE_COLUMNS if name in row}
        if "bits_published" in row:
            line["bits_published"] = NOTHING if row["bits_published"] is None else f"{row['bits_published']:g}"
        for metric in table.metrics:
            line[metric] = _cell(row, metric)
            if f"{metric}_{PUBLISHED}" in row:
                line[f"{metric} published"] = _number(row[f"{metric}_{PUBLISHED}"], _published_digits(table, metric))
                line[f"Δ {metric}"] = _delta(row, metric)
        lines.append(line)
    return pd.DataFrame(lines).rename(columns={"bits_published": "bits published"})


def _cell(row: dict, metric: str) -> str:
    if metric in (row.get("not_run") or "").split():
        return NOT_RUN
    digits = DIGITS.get(metric, 3)
    text = _number(row[metric], digits)
    if row[metric] is not None and row[f"{metric}_se"] is not None:
        text += f" ± {row[f'{metric}_se']:.{digits}f}"
    return text + ("" if row[f"{metric}_seeds"] is None else f" [{row[f'{metric}_seeds']:.{digits}f}]")


def _number(value: float | None, digits: int) -> str:
    return NOTHING if value is None else f"{value:.{digits}f}"


def _published_digits(table: Table, metric: str) -> int:
    """Number of decimals that were published: 19.3 beside 18.99 becomes 19.30."""
    values = [row.published[metric] for row in table.rows if metric in row.published]
    return max(len(str(value).partition(".")[2]) for value in values)


def _delta(row: dict, metric: str) -> str:
    delta, reproduced = row[f"{metric}_{DELTA}"], row[f"{metric}_{REPRODUCED}"]
    if delta is None:
        return NOTHING
    return f"{delta:+.{DIGITS.get(metric, 3)}f}" + {True: " ✓", False: " ✗"}.get(reproduced, "")


def to_markdown(title: str, cells, below: list[str], lines: list[str]) -> str:
    """The table as Markdown. below: sentences about it; lines: the protocol, one bullet each."""
    from tabulate import tabulate

    rows = [[in_markdown(cell, cell=True) for cell in row] for row in cells.values.tolist()]
    body = tabulate(rows, headers=list(cells.columns), tablefmt="github", disable_numparse=True)
    bullets = "\n".join(f"- {in_markdown(line)}" for line in lines)
    return f"# {in_markdown(title)}\n\n{body}\n\n" + "\n".join(map(in_markdown, below)) + f"\n\n{bullets}\n"


def to_latex(title: str, cells, below: list[str], lines: list[str], *, label: str) -> str:
    r"""A table environment for \usepackage{booktabs,amssymb}; notes become comments, as papers have their own words."""
    escaped = cells.map(in_one_line).map(escape_latex).rename(columns=escape_latex)
    columns = "".join("l" if name in TEXT_COLUMNS else "r" for name in cells.columns)
    caption = escape_latex(in_one_line(title))
    table = escaped.style.hide(axis="index").to_latex(
        hrules=True,
        column_format=columns,
        caption=caption,
        label=f"tab:{label}",
        position="tb",
        position_float="centering",
    )
    comments = "".join(f"% {in_one_line(line)}\n" for line in [*below, *lines])
    return f"% needs \\usepackage{{booktabs,amssymb}}\n{table}{comments}"


def escape_latex(text: str) -> str:
    return "".join(LATEX.get(character, character) for character in text)
