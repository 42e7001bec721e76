"""How distillation went: losses of the end-to-end training by step, errors of tuned blocks before and after."""

from vqdm.report.figures.layers import drop_overlapping, mark_blocks
from vqdm.report.figures.style import COLOURS, COLUMN, GREY, PAGE, legend_below, line_handle, new_figure, styled

_TRAINING, _VALIDATION = COLOURS[5], COLOURS[0]
_BEFORE, _AFTER = COLOURS[1], COLOURS[0]


@styled
def loss_curves(history: dict | None = None, blocks: list[dict] | None = None):
    """A Figure with axes for each of the two that is given.

    history: of a finetune stage: "losses", one per step, and "validations", {step, loss, …}, the best of which is
    ringed. blocks: of a tune_blocks stage: {block, before, after, kept}, relative squared errors, in execution order.
    """
    parts = [(draw, data) for draw, data in ((_draw_blocks, blocks), (_draw_history, history)) if data is not None]
    figure = new_figure(COLUMN if len(parts) == 1 else PAGE, 2.2)
    handles, texts = [], []
    for axes, (draw, data) in zip(figure.subplots(1, len(parts), squeeze=False)[0], parts, strict=True):
        handles += draw(axes, data)
        texts.append(axes.texts)
        axes.set_yscale("log")
    legend_below(figure, handles, columns=3 * len(parts))
    for own in texts:
        drop_overlapping(figure, own)
    return figure


def _draw_history(axes, history: dict) -> list:
    """Losses in the middle of their steps: the first of them is of the weights before step 1."""
    steps = [found["step"] for found in history["validations"]]
    losses = [found["loss"] for found in history["validations"]]
    best = min(range(len(losses)), key=lambda i: (losses[i], steps[i]))
    axes.plot(range(len(history["losses"])), history["losses"], color=_TRAINING, linewidth=0.8, label="training")
    look = {"color": _VALIDATION, "marker": "o", "markersize": 3}
    axes.plot(steps, losses, label="validation", **look)
    ring = {"color": COLOURS[1], "marker": "o", "markersize": 8, "markerfacecolor": "none", "linestyle": ""}
    axes.plot([steps[best]], [losses[best]], label="best", **ring)
    axes.set_xlabel("step of end-to-end training")
    axes.set_ylabel("loss")
    training = line_handle("loss of a batch", color=_TRAINING, linewidth=0.8)
    return [training, line_handle("validation", **look), line_handle("best, which is kept", **ring)]


def _draw_blocks(axes, blocks: list[dict]) -> list:
    """An arrow's two ends for each block that got better; a cross for one that did not and stayed as it was."""
    kept = [(i, block) for i, block in enumerate(blocks) if block["kept"]]
    stayed = [(i, block) for i, block in enumerate(blocks) if not block["kept"]]
    places = [i for i, _ in kept]
    before, after = ([block[key] for _, block in kept] for key in ("before", "after"))
    axes.vlines(places, after, before, color=GREY, linewidth=0.6)
    looks = {
        "before tuning": {"color": _BEFORE, "marker": "o", "markerfacecolor": "white", "linestyle": ""},
        "after": {"color": _AFTER, "marker": "o", "linestyle": ""},
        "stayed as it was": {"color": _BEFORE, "marker": "x", "linestyle": ""},
    }
    unchanged = ([i for i, _ in stayed], [block["before"] for _, block in stayed])
    for (label, look), points in zip(looks.items(), ((places, before), (places, after), unchanged), strict=True):
        axes.plot(*points, label=label, markersize=3, **look)
    axes.set_xlabel(f"blocks ({mark_blocks([axes], [block['block'] for block in blocks])})")
    axes.set_ylabel("relative error of the output")
    shown = looks if stayed else list(looks)[:2]
    return [line_handle(label, markersize=3, **looks[label]) for label in shown]
