"""Figures of error and bits across the network: one point per quantized layer, in the order of execution."""

import itertools
import re

from vqdm.report.figures.style import COLOURS, GREY, PAGE, PALE, legend_below, line_handle, new_figure, styled

ERRORS = {"relative_output_error": "relative output error", "relative_weight_error": "relative weight error"}
_KINDS = {
    "linear": (COLOURS[0], "o"),
    "convolution": (COLOURS[1], "s"),
}  # convolutions, the fewer, above
_REGIONS = {"down_blocks": 0, "mid_block": 1, "up_blocks": 2}  # regions of a U-Net, which registers mid_block last
_UNIT = re.compile(r"(down_blocks|mid_block|up_blocks)(?:\.(\d+))?\.([a-z]+)\.(\d+)")


def execution_place(name: str) -> tuple[int, ...]:
    """Sort key for layers in the order in which a U-Net runs them; other denoisers register theirs in that order.

    In a block of a U-Net each residual unit is followed by its attention; samplers come last.
    """
    found = _UNIT.match(name)
    if found is None:
        return (0,)
    region, block, unit, number = found.groups()
    within = (int(number), int(unit == "attentions")) if unit in ("resnets", "attentions") else (10**6, 0)
    return (_REGIONS[region], int(block or 0), *within)


def block_of(name: str) -> tuple[str, str]:
    """(list of blocks, number in it) of the block with a layer: ("down_blocks", "1"), ("mid_block", "")."""
    first, *others = name.split(".")
    return first, others[0] if others and others[0].isdigit() else ""


def is_convolution(name: str) -> bool:
    """True for a convolution, judged by diffusers' names: conv1, conv_shortcut, downsamplers.0.conv."""
    return name.rsplit(".", 1)[-1].startswith("conv")


@styled
def layer_map(quantized: list[dict]):
    """A Figure of errors (upper axes) and bits (lower) by layer.

    quantized: records of a quantize stage's layers.json: name, bits, relative_weight_error and, if the codec saw data,
    relative_output_error, which is shown if every layer has it.
    """
    records = sorted(quantized, key=lambda record: execution_place(record["name"]))
    names = [record["name"] for record in records]
    error = next(key for key in ERRORS if all(key in record for record in records))
    figure = new_figure(PAGE, 3.2)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    small = {"markersize": 3 if len(records) <= 200 else 1.6, "linestyle": ""}
    handles = []
    for kind, (colour, marker) in _KINDS.items():
        places = [i for i, name in enumerate(names) if is_convolution(name) == (kind == "convolution")]
        for axes, key in ((upper, error), (lower, "bits")):
            axes.plot(places, [records[i][key] for i in places], color=colour, marker=marker, label=kind, **small)
        if places:
            handles.append(line_handle(kind, color=colour, marker=marker, linestyle=""))
    upper.set_yscale("log")
    upper.set_ylabel(ERRORS[error])
    lower.set_ylabel("bits per weight")
    lower.set_xlabel(f"layers in the order of the network ({mark_blocks([upper, lower], names)})")
    figure.align_ylabels()
    legend_below(figure, handles)
    drop_overlapping(figure, upper.texts)
    return figure


def mark_blocks(all_axes: list, names: list[str]) -> str:
    """Shade every other block behind all axes and name the blocks above the first; returns a legend of these names.

    names: the layers at 0, 1, 2, … on the horizontal axis.
    """
    start, regions = 0, {}
    for index, ((region, number), group) in enumerate(itertools.groupby(names, block_of)):
        end = start + len(list(group))
        for axes in all_axes:
            axes.grid(visible=False, axis="x")
            if index % 2:
                axes.axvspan(start - 0.5, end - 0.5, color=PALE, linewidth=0, zorder=0)
        letter = region[0].upper()
        regions[letter] = region
        first = all_axes[0]
        place = {"transform": first.get_xaxis_transform(), "ha": "center", "va": "bottom"}
        first.text((start + end - 1) / 2, 1.01, letter + number, fontsize=7, color=GREY, **place)
        start = end
    all_axes[0].set_xlim(-1, len(names))
    return ", ".join(f"{letter} {region}" for letter, region in regions.items())


def drop_overlapping(figure, texts: list) -> None:
    """Remove texts, going from left to right, that touch the one before."""
    figure.draw_without_rendering()  # does the layout: positions are known only now
    last = float("-inf")
    for text in list(texts):
        extent = text.get_window_extent()
        if extent.x0 < last + 1:
            text.remove()
        else:
            last = extent.x1
