"""Figures of distillation: losses of end-to-end training by step, errors of tuned blocks before and after."""

from vqdm.report.figures.layers import drop_overlapping, mark_blocks
from vqdm.report.figures.style import COLOURS, COLUMN, GREY, PAGE, legend_below, line_handle, new_figure, styled

_TRAINING, _VALIDATION, _BEST = COLOURS[5], COLOURS[0], COLOURS[1]


@styled
def loss_curves(history: dict | None = None, blocks: list[dict] | None = None):
    """A Figure with axes for the history, the blocks, or both.

    history: a finetune stage's "losses", one per step, and "validations", {step, loss, …}, with a ring around the best.
    blocks: a tune_blocks stage's {block, before, after, kept}, relative squared errors, in execution order.
    """
    parts = [(draw, data) for draw, data in ((_draw_blocks, blocks), (_draw_history, history)) if data is not None]
    figure = new_figure(COLUMN if len(parts) == 1 else PAGE, 2.2)
    handles, texts = [], []
    for axes, (draw, data) in zip(figure.subplots(1, len(parts), squeeze=False)[0], parts, strict=True):
        handles += draw(axes, data)
        texts.append(axes.texts)
    legend_below(figure, handles, columns=3 * len(parts))
    for own in texts:
        drop_overlapping(figure, own)
    return figure


def _draw_history(axes, history: dict) -> list:
    """Draw losses by step: a step's loss belongs to the weights before it, so the first stands at 0."""
    steps = [found["step"] for found in history["validations"]]
    losses = [found.get("loss", found.get("distance")) for found in history["validations"]]  # distance: of matching
    best = min(range(len(losses)), key=lambda i: (losses[i], steps[i]))
    axes.plot(range(len(history["losses"])), history["losses"], color=_TRAINING, linewidth=0.8, label="training")
    look = {"color": _VALIDATION, "marker": "o", "markersize": 3}
    axes.plot(steps, losses, label="validation", **look)
    ring = {"color": _BEST, "marker": "o", "markersize": 8, "markerfacecolor": "none", "linestyle": ""}
    axes.plot([steps[best]], [losses[best]], label="best", **ring)
    axes.set_yscale("log")
    axes.set_xlabel("step of end-to-end training")
    axes.set_ylabel("loss")
    training = line_handle("loss of a batch", color=_TRAINING, linewidth=0.8)
    return [training, line_handle("validation", **look), line_handle("best, which is kept", **ring)]


def _draw_blocks(axes, blocks: list[dict]) -> list:
    """Draw ratios of errors, since most change little; a cross at 1 marks a block that stayed as it was."""
    ratios = [block["after"] / block["before"] if block["kept"] else 1.0 for block in blocks]
    looks = {
        "block, better": {"color": COLOURS[2], "marker": "o", "linestyle": "", "markersize": 3},
        "not better, so left as it was": {"color": GREY, "marker": "x", "linestyle": "", "markersize": 4},
    }
    handles = []
    for kept, (label, look) in zip((True, False), looks.items(), strict=True):
        places = [i for i, block in enumerate(blocks) if block["kept"] == kept]
        axes.plot(places, [ratios[i] for i in places], label=label, **look)
        if places:
            handles.append(line_handle(label, **look))
    axes.set_xlabel(f"blocks ({mark_blocks([axes], [block['block'] for block in blocks])})")
    axes.set_ylabel("error, after ÷ before")
    return handles
