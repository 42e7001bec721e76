"""The denoiser's error against the timestep, method by method."""

import math

from vqdm.report.figures.style import COLOURS, COLUMN, GREY, MARKERS, legend_below, line_handle, new_figure, styled


@styled
def timestep_errors(data: dict, *, label: str = "squared error of the prediction"):
    """A Figure of {"timesteps": [...], "errors": {method: [...]}} and, for some methods, "before": {method: [...]}.

    There is one error per timestep, None where a method has none. before: the same methods without distillation,
    dashed. label: text of the errors' axis.
    """
    figure = new_figure(COLUMN, 2.2)
    axes = figure.add_subplot()
    handles, before = [], data.get("before", {})
    for index, (method, errors) in enumerate(data["errors"].items()):
        look = {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}
        axes.plot(*_known(data["timesteps"], errors), label=method, **look)
        handles.append(line_handle(method, **look))
        if method in before:
            x, y = _known(data["timesteps"], before[method])
            axes.plot(x, y, label=f"{method}, before", linestyle="--", markerfacecolor="white", **look)
    if before:
        handles.append(line_handle("dashed: before distillation", color=GREY, linestyle="--"))
    axes.set_yscale("log")
    axes.invert_xaxis()  # in the direction of sampling, from noise to image
    axes.set_xlabel("timestep, from noise to image")
    axes.set_ylabel(label)
    legend_below(figure, handles)
    return figure


def _known(timesteps: list, errors: list) -> tuple[list, list]:
    """Timesteps and errors where there is an error, so that a line continues across gaps."""
    pairs = [(t, e) for t, e in zip(timesteps, errors, strict=True) if e is not None and not math.isnan(e)]
    return [t for t, _ in pairs], [e for _, e in pairs]
