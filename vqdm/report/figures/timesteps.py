"""The denoiser's error against the timestep, method by method."""

import math

import numpy as np

from vqdm.report.figures.labels import Named, label_points
from vqdm.report.figures.style import COLOURS, MARKERS, PAGE, new_figure, styled


@styled
def timestep_errors(data: dict, *, label: str = "squared error of the prediction"):
    """A Figure of {"timesteps": [...], "errors": {method: [...]}} and, for some methods, "before": {method: [...]}.

    There is one error per timestep, None where a method has none. before: the same methods without distillation,
    dashed. label: text of the errors' axis.
    """
    figure = new_figure(PAGE, 3.6)
    axes = figure.add_subplot()
    axes.margins(x=0.12)  # for labels
    named, lines, before = [], [], data.get("before", {})
    for index, (method, errors) in enumerate(data["errors"].items()):
        look = {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}
        dashed = {"linestyle": "--", "markerfacecolor": "white"}
        drawn = [(method, errors, {})]
        if method in before:
            drawn.append((f"{method}, before", before[method], dashed))
        for name, own, more in drawn:
            x, y = _known(data["timesteps"], own)
            axes.plot(x, y, label=name, **look, **more)
            lines.append(np.column_stack([x, y]))
            if x:
                named.append(Named(x[0], y[0], name, look["color"]))
    axes.set_yscale("log")
    axes.invert_xaxis()  # in the direction of sampling, from noise to image
    axes.set_xlabel("timestep, from noise to image")
    axes.set_ylabel(label)
    label_points(axes, named, crossed=lines)
    return figure


def _known(timesteps: list, errors: list) -> tuple[list, list]:
    """Timesteps and errors where there is an error, so that a line continues across gaps."""
    pairs = [(t, e) for t, e in zip(timesteps, errors, strict=True) if e is not None and not math.isnan(e)]
    return [t for t, _ in pairs], [e for _, e in pairs]
