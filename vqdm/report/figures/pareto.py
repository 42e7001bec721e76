"""Figures of size against quality: one line per family of methods, ± one standard error, published values hollow."""

import math
import re
import textwrap
from dataclasses import dataclass

import numpy as np

from vqdm.report.figures.labels import Named, label_points
from vqdm.report.figures.style import COLOURS, GREY, MARKERS, PAGE, new_figure, styled

FULL_PRECISION_BITS = 16
HEIGHT = 4.3  # inches
SIZES = {
    "bits_per_weight": "bits per weight, everything counted",
    "bits_quantized": "bits per weight of the quantized layers",
    "mib": "MiB on disk",
    "macs": "multiply-adds of an image, relative",
}
LABELS = {
    "fid": "FID ↓",
    "kid": "KID ↓",
    "cmmd": "CMMD ↓",
    "clip_score": "CLIP score ↑",
    "fidelity": "fidelity ↑",
    "all_right": "all right ↑",
    "distance_to_fp": "distance to full precision ↓",
    "agreement_with_fp": "agreement with full precision ↑",
    "fid_to_fp": "FID to full precision ↓",
    "psnr_to_fp": "PSNR to full precision, dB ↑",
    "ssim_to_fp": "SSIM to full precision ↑",
    "lpips_to_fp": "LPIPS to full precision ↓",
    "fid_paper": "FID, the paper's protocol ↓",
    "fid_standard": "FID ↓",
    "fid_paper_to_fp": "FID to full precision ↓",
    "kid_standard": "KID ↓",
    "inception_score": "Inception score ↑",
    "cmmd_l14_336": "CMMD ↓",
    "clip_h14": "CLIP ViT-H/14, cosine ↑",
    "clip_l14": "CLIP score, ViT-L/14 ↑",
    "clip_h14_similarity_to_fp": "CLIP similarity to full precision ↑",
    "pickscore": "PickScore, cosine ↑",
    "pickscore_scaled": "PickScore ↑",
    "hpsv2": "HPSv2 ↑",
}
LABEL_WIDTH = 40  # characters that fit along the height of a figure
_KIND = "fidelity_"  # scores of single attributes of the tiny world
_DISTANCES = ("fid", "kid", "cmmd", "distance", "lpips")  # metrics from 0 up, over orders of magnitude
_STEPS = (1, 2, 5)  # ticks of logarithmic axes in each decade
_DASHES = ((0, (5, 2)), (0, (5, 1.5, 1, 1.5)), (0, (5, 1.5, 1, 1.5, 1, 1.5)))
_SERIES = re.compile(r"[,(]| \d")  # ends the name of a series: "cache 2, linear", "full precision, 10 steps"
_BITS = re.compile(r"[ -]\d+(?:\.\d+)?(?:[ -]?bits?\b|$)")


def label_of(metric: str) -> str:
    """A metric's label on an axis, with an arrow towards better; an unknown metric is labelled by its name."""
    if metric.startswith(_KIND):
        return f"fidelity of {metric.removeprefix(_KIND)} ↑"
    return LABELS.get(metric, metric)


def family_of(method: str) -> tuple[str, str]:
    """(text before the bit count, text after it): "VQ 3 bit, distilled" gives ("VQ", ", distilled").

    A count is "3 bit", "2.25 bits" or, at the end, a bare number: "VQDM 3.15". Without one the second part is empty.
    """
    found = _BITS.search(method)
    return (method, "") if found is None else (method[: found.start()], method[found.end() :])


@dataclass(frozen=True)
class _Row:
    """Numbers of a row; NaN for those missing. series: what a line joins."""

    method: str
    series: str
    size: float
    value: float
    error: float
    published_size: float
    published: float
    full_precision: bool

    @property
    def is_scored(self) -> bool:
        return not math.isnan(self.size + self.value)

    @property
    def is_published(self) -> bool:
        return not math.isnan(self.published_size + self.published)


def _number(value) -> float:
    return math.nan if value is None else float(value)


def _rows(frame, metric: str, size: str, *, everything: bool = False) -> list[_Row]:
    found = []
    for row in frame.to_dict("records"):
        names = (size, metric, f"{metric}_se", f"{metric}_published", "bits_published", "bits_per_weight")
        own, value, error, published, published_bits, bits = (_number(row.get(name)) for name in names)
        full = row["method"].startswith("full precision") or bits >= FULL_PRECISION_BITS
        full = not everything and (full or published_bits >= FULL_PRECISION_BITS)
        place = own if size == "mib" or math.isnan(published_bits) else published_bits
        series = _SERIES.split(row["method"])[0] if everything else row["method"]
        found.append(_Row(row["method"], series, own, value, error, place, published, full))
    return found


def has_points(frame, metric: str, *, size: str = "bits_per_weight") -> bool:
    """True if `pareto` would show more than full precision."""
    rows = [row for row in _rows(frame, metric, size) if not row.full_precision]
    return any(row.is_scored or row.is_published for row in rows)


@styled
def pareto(frame, metric: str, *, size: str = "bits_per_weight", label: str | None = None, everything: bool = False):
    """A Figure of `metric` against `size` (a key of SIZES) for the rows of a table.

    frame: pandas, with columns method, bits_per_weight, `size`, `metric`, <metric>_se and, for published values,
    <metric>_published and bits_published: these stand at the bits that their authors count. A row of 16 bits or more is
    a dashed line with a band; with `everything` it is a point as others are, and lines join all rows whose methods
    begin alike. label: text of the metric's axis.
    Lines join the points of a family (`family_of`) whose text after the count is the same.
    """
    rows = _rows(frame, metric, size, everything=everything)
    figure = new_figure(PAGE, HEIGHT)
    axes = figure.add_subplot()
    axes.margins(x=0.12)  # for labels
    levels = _draw_full_precision(axes, [row for row in rows if row.full_precision])
    named, lines = _draw_lines(axes, [row for row in rows if not row.full_precision])
    _scale(axes, metric, rows)
    axes.set_xlabel(SIZES[size])
    axes.set_ylabel(textwrap.fill(label or label_of(metric), LABEL_WIDTH))
    left, right = axes.get_xlim()
    axes.set_xlim(left, right)
    lines += [np.array([(left, level.y), (right, level.y)]) for level in levels]
    label_points(axes, named + levels, crossed=lines)
    return figure


def _looks(lines: list[tuple[str, str]]) -> dict[tuple[str, str], dict]:
    """Colour and marker of each line: both its own or, with many lines from few families, the family's colour."""
    families, variants = (list(dict.fromkeys(line[part] for line in lines)) for part in (0, 1))
    if len(lines) > len(COLOURS) and 1 < len(families) <= len(COLOURS) and len(variants) <= len(MARKERS):
        numbers = [(families.index(family), variants.index(variant)) for family, variant in lines]
    else:
        numbers = [(i % len(COLOURS), i % len(MARKERS)) for i in range(len(lines))]
    looks = [{"color": COLOURS[colour], "marker": MARKERS[marker]} for colour, marker in numbers]
    return dict(zip(lines, looks, strict=True))


def _draw_lines(axes, rows: list[_Row]) -> tuple[list[Named], list[np.ndarray]]:
    """Draw a line with error bars for each family; returns the points with their names, and what labels had better
    leave free: lines and error bars.
    """
    members: dict[tuple[str, str], list[_Row]] = {}
    for row in rows:
        members.setdefault(family_of(row.series), []).append(row)
    named, lines = [], []
    for line, look in _looks(list(members)).items():
        own = sorted((row for row in members[line] if row.is_scored), key=lambda row: row.size)
        published = [row for row in members[line] if row.is_published]
        if own:
            errors = [0 if math.isnan(row.error) else row.error for row in own]
            axes.errorbar([row.size for row in own], [row.value for row in own], errors, elinewidth=0.8, **look)
            lines.append(np.array([(row.size, row.value) for row in own]))
            ends = zip(own, errors, strict=True)
            lines += [np.array([(row.size, row.value - e), (row.size, row.value + e)]) for row, e in ends]
        if published:
            x, y = [row.published_size for row in published], [row.published for row in published]
            axes.plot(x, y, linestyle="", markerfacecolor="white", zorder=3, **look)
        named += [Named(row.size, row.value, row.method, look["color"]) for row in own]
        named += [
            Named(row.published_size, row.published, f"{row.method}, published", look["color"]) for row in published
        ]
    return named, lines


def _draw_full_precision(axes, rows: list[_Row]) -> list[Named]:
    """Draw full precision as dashed lines with a band of ± one standard error; published values are dotted."""
    levels = []
    for index, row in enumerate(rows):
        if not math.isnan(row.value):
            axes.axhline(row.value, color=GREY, linestyle=_DASHES[index % len(_DASHES)], zorder=1)
            levels.append(Named(None, row.value, row.method, GREY))
            if not math.isnan(row.error):
                axes.axhspan(row.value - row.error, row.value + row.error, color=GREY, alpha=0.15, linewidth=0)
        if not math.isnan(row.published):
            axes.axhline(row.published, color=GREY, linestyle=":", zorder=1)
            levels.append(Named(None, row.published, f"{row.method}, published", GREY))
    return levels


def _scale(axes, metric: str, rows: list[_Row]) -> None:
    """Set a logarithmic axis for a distance that spans a factor of 3 or more, linear near 0 where errors reach it."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

    values = [v for row in rows for v in (row.value, row.published) if not math.isnan(v)]
    scored = [row for row in rows if not math.isnan(row.value + row.error)]
    errors = [row.error for row in scored if row.error > 0]
    lowest = min(values + [row.value - row.error for row in scored])
    highest = max(values + [row.value + row.error for row in scored])
    if not metric.startswith(_DISTANCES) or max(values) < 3 * min(values):
        return
    if lowest > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=_STEPS))
    elif errors and max(values) > 10 * min(errors):
        linear, *others = _round_numbers(min(errors), highest)
        axes.set_yscale("symlog", linthresh=linear)
        ticks = [0, linear, *others]
        axes.yaxis.set_major_locator(FixedLocator(ticks + [-tick for tick in ticks[1:] if -tick >= lowest]))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        return
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _round_numbers(low: float, high: float) -> list[float]:
    """Ticks at 1, 2 and 5 times powers of ten, from the first not below `low`, which is always included, to `high`."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    first, *others = (n for n in (step * 10.0**decade for decade in decades for step in _STEPS) if n >= low)
    return [first, *(number for number in others if number <= high)]
