"""What a run, a table and a sweep end with on the terminal: at most 100 columns, what can be trusted first.

print(run_summary(record, results))                      # scores and, where there is one, the paired difference
print(table_summary(content, file=…), *closing(content, page=…), sep="\\n")
"""

import textwrap
from collections.abc import Iterable
from pathlib import Path

from vqdm.report.formats import DIGITS, NOTHING, TableContent
from vqdm.report.paired import (
    SAME_IMAGES,
    SAME_NUMBERS,
    compare_images,
    findings,
    image_scores,
    paired_first,
)
from vqdm.report.records import is_finished, scores_of
from vqdm.runs.store import Store
from vqdm.runs.texts import in_one_line
from vqdm.stages.layout import IMAGES_FILE

WIDTH = 100
LEADING = ("bits_per_weight", "bits published", "mib")  # columns between what a row is called and its metrics
LEFT_OUT = ("bits_quantized", "bits_as_in_paper")
SHORT = {  # in the order in which they are shown
    "bits_per_weight": "bits", "mib": "MiB", "psnr_to_fp": "PSNR", "lpips_to_fp": "LPIPS", "ssim_to_fp": "SSIM",
    "distance_to_fp": "distance", "fid_to_fp": "FID to fp", "fid_paper_to_fp": "FID to fp",
    "agreement_with_fp": "agreement",
}  # fmt: skip
PARTS = "fidelity_"  # scores of single attributes of the tiny world


def short_name(metric: str) -> str:
    return SHORT.get(metric, metric.replace("_", " "))


def in_order(metrics: Iterable[str]) -> list[str]:
    """Metrics as they are shown: the paired ones first, and of those PSNR."""
    known = list(SHORT)
    return paired_first(sorted(metrics, key=lambda name: known.index(name) if name in known else len(known)))


def table_summary(content: TableContent, *, file: Path) -> str:
    """The table's first columns that fit: what a row is called, its size, the paired metrics, then the others.

    file: where all of them are.
    """
    from tabulate import tabulate

    names = list(content.cells.columns)
    texts = [name for name in names if name in ("method", "left", "right")]
    sizes = [name for name in LEADING if name in names]
    others = [name for name in names if name not in (*texts, *sizes, *LEFT_OUT)]
    order = texts + sizes + in_order(others)
    columns = {name: [_narrow(cell) for cell in content.cells[name]] for name in order}
    if "bits_per_weight" in columns:
        columns["bits_per_weight"] = [
            f"{bits:.2f}" if bits == bits else NOTHING for bits in content.data["bits_per_weight"].astype(float)
        ]
    widths = {name: max(len(short_name(name)) + 2, *map(len, cells)) for name, cells in columns.items()}  # as tabulate
    shown, room = [], WIDTH
    for name in order:
        room -= widths[name] + 2 * bool(shown)
        if room < 0:
            break
        shown.append(name)
    rows = list(zip(*(columns[name] for name in shown), strict=True))
    align = ["left" if name in texts else "right" for name in shown]
    body = tabulate(rows, headers=[short_name(name) for name in shown], colalign=align, disable_numparse=True)
    more = len(order) - len(shown)
    left = f"\n{more} more column{'s' if more > 1 else ''}: {file}" if more else ""
    fits = "\n".join(line[:WIDTH].rstrip() for line in body.splitlines())
    return f"{content.title}\n\n{fits}{left}"


def _narrow(cell: str) -> str:
    """A cell in as few characters as can be read: 29.95 ±0.28."""
    return in_one_line(cell).replace(" ± ", " ±")


def wrapped(sentences: Iterable[str]) -> list[str]:
    """Lines of sentences, each of which begins a line."""
    return [line for sentence in sentences for line in textwrap.wrap(sentence, WIDTH, subsequent_indent="  ")]


def closing(rows: list[list[dict]], results: Path, *, table: Path, page: Path) -> str:
    """What won, from the paired comparison, and where to look next."""
    return "\n".join(["", *wrapped(findings(rows, results)), f"protocol: {table}", f"open {page}"])


def row_line(record: dict, results: Path) -> str:
    """A run in a few words: its size and what it scores in the first paired metric."""
    metrics = scores_of(record, results)["metrics"]
    first = in_order(metrics)[:1]
    return ", ".join([_size(record), *(f"{short_name(name)} {_value(metrics[name], name)}" for name in first)])


def _size(record: dict) -> str:
    return f"{record['bits']['bits_per_weight']:.2f} bits, {record['bits']['file_bytes'] / 2**20:.2f} MiB"


def _value(score: dict, metric: str, *, signed: bool = False) -> str:
    if score["value"] is None:
        return NOTHING
    digits = DIGITS.get(metric, 3)
    error = "" if score.get("se") is None else f" ± {score['se']:.{digits}f}"
    return f"{score['value']:{'+' if signed else ''}.{digits}f}{error}"


def run_summary(record: dict, results: Path) -> str:
    """A finished run: its size, and its scores, the paired ones first.

    Where full precision was run on the same captions and noise, image by image the difference to it.
    """
    from tabulate import tabulate

    scores = scores_of(record, results)
    metrics, reference = scores["metrics"], full_precision_of(record, results)
    differences = {} if reference is None else _differences(record, reference, results)
    rows = [
        [short_name(name), _value(metrics[name], name), _value(differences[name], name, signed=True)]
        if name in differences
        else [short_name(name), _value(metrics[name], name), ""]
        for name in in_order(metrics)
        if not name.startswith(PARTS)
    ]
    headers = ["metric", "score", "difference to full precision" if differences else ""]
    body = tabulate(rows, headers=headers, colalign=["left", "right", "right"], disable_numparse=True)
    notes = [f"not run: {', '.join(scores['not_run'])}"] if scores["not_run"] else []
    count = f"{scores['protocol']['n']} captions"
    head = f"{record['method']} on {record['model']}: {_size(record)}, {count}; ± one standard error"
    lines = [line.rstrip() for line in body.splitlines()]
    return "\n".join([head, "", *lines, *notes, f"protocol: {_scores_place(record, results)}"])


def _scores_place(record: dict, results: Path) -> Path:
    return results / record["directories"]["evaluate"] / "metrics.json"


def full_precision_of(record: dict, results: Path) -> dict | None:
    """The newest finished run of the model as it is, on the same captions and noise; None for such a run itself."""
    if "quantize" not in record["directories"]:
        return None
    wanted = _protocol(record, results)
    found = [
        (file.stat().st_mtime, other)
        for file, other in Store(results).runs()
        if other.get("model") == record["model"]
        and "quantize" not in other.get("directories", {"quantize": None})
        and is_finished(other, results)
        and _protocol(other, results) == wanted
    ]
    return max(found, key=lambda one: one[0])[1] if found else None


def _protocol(record: dict, results: Path) -> list:
    protocol = scores_of(record, results)["protocol"]
    return [protocol.get(key) for key in (*SAME_IMAGES, *SAME_NUMBERS)]


def _differences(record: dict, reference: dict, results: Path) -> dict[str, dict]:
    """{metric: {value, se}} of the run less full precision, for the metrics that are means over images of both."""
    files = [results / run["directories"]["evaluate"] / IMAGES_FILE for run in (record, reference)]
    if not all(file.is_file() for file in files):
        return {}
    rows = compare_images(*(image_scores([file]) for file in files))
    return {row["metric"]: {"value": row["difference"], "se": row["paired_se"]} for row in rows}
