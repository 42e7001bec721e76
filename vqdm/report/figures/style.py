"""The look of figures and how they are saved: one style for all, the same bytes for the same data.

The sizes are those of a two-column paper, where text of 7 and 8 points is as large as the captions. The background is
white and opaque, since dark text on a transparent one vanishes on a dark page. Text in an SVG is drawn as paths, since
a device without the font would use a wider one. A user's matplotlibrc is not read.
"""

import functools
import io
import math
from pathlib import Path

from vqdm.runs.files import atomic_write

COLUMN, PAGE = 3.4, 7.0  # inches
# Okabe and Ito (2008): told apart with any common colour blindness. Without their yellow, which is too pale on white
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p")
GREY, PALE = "#595959", "#EFEFEF"
_STYLE = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, so it is the same everywhere
    "font.size": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "legend.handlelength": 2.4,  # long enough to show a dash and its gap
    "legend.columnspacing": 1.2,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.5,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "lines.linewidth": 1.1,
    "lines.markersize": 4,
    "errorbar.capsize": 1.5,
    "figure.facecolor": "white",
    "savefig.dpi": 300,
    "svg.fonttype": "path",
    "svg.hashsalt": "vqdm",  # otherwise names inside an SVG are random
}
_METADATA = {"svg": {"Date": None, "Creator": None}, "png": {"Software": None}}


def _styled():
    """Context with this style over matplotlib's own defaults."""
    import matplotlib.style

    return matplotlib.style.context(_STYLE, after_reset=True)


def styled(draw):
    """Decorate a drawing function so that its figure has this style and a settled layout."""

    @functools.wraps(draw)
    def drawn(*args, **kwargs):
        with _styled():
            figure = draw(*args, **kwargs)
            figure.draw_without_rendering()
            figure.set_layout_engine("none")  # otherwise each saving would lay out again, starting from the last result
        return figure

    return drawn


def new_figure(width: float, height: float):
    """An empty figure, sized in inches, that pyplot does not keep: it is freed with its last user."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save(figure, path: Path) -> list[Path]:
    """Write `<path>.svg` and `<path>.png`, each whole or not at all; returns them."""
    files = []
    for kind, metadata in _METADATA.items():
        buffer = io.BytesIO()
        with _styled():
            figure.savefig(buffer, format=kind, metadata=metadata)
        files.append(path.with_name(f"{path.name}.{kind}"))  # with_suffix would cut "vq2.5-layers"
        atomic_write(files[-1], buffer.getvalue())
    return files


def legend_below(figure, handles: list, *, columns: int = 4) -> None:
    """Put a legend below all axes in as many columns as the width holds; the figure grows by its rows."""
    labels = [handle.get_label() for handle in handles]
    for rows in range(math.ceil(len(handles) / columns), len(handles) + 1):
        count = math.ceil(len(handles) / rows)  # number of columns, for rows as even as possible
        legend = figure.legend(handles, labels, loc="outside lower center", ncols=count)
        if count == 1 or legend.get_window_extent().width <= figure.bbox.width:
            break
        legend.remove()
    figure.set_figheight(figure.get_figheight() + legend.get_window_extent().height / figure.dpi)


def line_handle(label: str, **look):
    """A legend entry that is not a line of the axes."""
    from matplotlib.lines import Line2D

    return Line2D([], [], label=label, **look)
