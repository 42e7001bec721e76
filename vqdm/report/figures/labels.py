"""Labels beside the points and lines that they name, where they touch neither points nor each other.

Each label takes the cheapest of places in rings around its point, given the labels before it; one that is pushed far
away has a thin line to its point. All of it is arithmetic on boxes in pixels, and so the same every time.
"""

import itertools
import math
import textwrap
from dataclasses import dataclass

import numpy as np

from vqdm.report.figures.style import GREY

WIDTH = 30  # characters of a line
RADII = (5, 9, 14, 20, 28, 38, 50, 64, 80)  # points between a label's edge and its point
ANGLES, ALONG = 16, 20  # places in a ring, and along a level
TIED = 11  # points from which a line ties a label to its point
LOOK = {"fontsize": 8, "ha": "left", "va": "bottom", "linespacing": 1.0}
SHADE = 0.7  # of the point's colour, so that pale ones can be read on white
HARD, SOFT = 1000.0, 6.0  # points of distance that touching a point or label costs, and crossing a line or error bar
CROSSED, MOST = 3.0, 4  # pixels between the dots of what is crossed, and how many of them count


@dataclass(frozen=True)
class Named:
    """A point in data coordinates and its name, in the colour of its marker. x None: a level across the axes."""

    x: float | None
    y: float
    text: str
    colour: str


def label_points(axes, named: list[Named], *, crossed: list[np.ndarray] = ()) -> None:
    """Write the names beside their points. Scales and limits of the axes must stand; `styled` settles the rest.

    crossed: polylines [n, 2] in data coordinates that labels had better not lie on.
    """
    axes.figure.draw_without_rendering()  # does the layout: sizes in pixels are known only now
    pixel, inside = axes.figure.dpi / 72, axes.get_window_extent().extents
    points = axes.transData.transform([(p.x, p.y) for p in named if p.x is not None] or np.empty((0, 2)))
    taken = [np.concatenate([point - 3.5 * pixel, point + 3.5 * pixel]) for point in points]
    soft = [_dots(axes.transData.transform(line)) for line in crossed]
    for name in named:
        text = textwrap.fill(name.text, WIDTH)
        place = axes.transData.transform((axes.get_xlim()[0] if name.x is None else name.x, name.y))
        boxes, distances = (_along if name.x is None else _around)(place, *_size(axes, text), pixel, inside)
        costs = _costs(place, boxes, distances, np.array(taken), np.concatenate(soft or [points[:0]]), inside)
        best = boxes[costs.argmin()]
        tied = name.x is not None and distances[costs.argmin()] > TIED
        taken.append(best)
        if tied:
            soft.append(_dots(np.array([place, place.clip(best[:2], best[2:])])))
        _write(axes, name, text, (best - np.tile(place, 2)) / pixel, tied=tied)


def _size(axes, text: str) -> tuple[float, float]:
    """Width and height of a text in pixels."""
    trial = axes.text(0, 0, text, **LOOK)
    extent = trial.get_window_extent()
    trial.remove()
    return extent.width, extent.height


def _write(axes, name: Named, text: str, box: np.ndarray, *, tied: bool) -> None:
    """Write a text into its box, in points from its point; a line from the box's nearest edge may tie it to that."""
    from matplotlib.colors import to_rgb
    from matplotlib.patheffects import withStroke

    nearest = (-box[:2] / (box[2:] - box[:2])).clip(0, 1)
    line = {"arrowstyle": "-", "color": GREY, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 3, "relpos": tuple(nearest)}
    written = axes.annotate(
        text, (axes.get_xlim()[0] if name.x is None else name.x, name.y), box[:2], textcoords="offset points",
        arrowprops=line if tied else None, color=tuple(SHADE * part for part in to_rgb(name.colour)), zorder=5,
        path_effects=[withStroke(linewidth=1.5, foreground="white")], **LOOK,
    )  # fmt: skip
    written.set_in_layout(False)


def _around(place: np.ndarray, width: float, height: float, pixel: float, inside: np.ndarray) -> tuple:
    """All places of a label around a point: boxes [n, 4] of x0, y0, x1, y1 in pixels, and distances [n] in points.

    A box touches its ring from outside, with the corner or the edge's middle that faces the point.
    """
    radii, angles = np.array(RADII)[:, None], np.arange(ANGLES) * 2 * math.pi / ANGLES
    across, up = np.cos(angles), np.sin(angles)
    left = place[0] + radii * pixel * across - width * (1 - across) / 2
    low = place[1] + radii * pixel * up - height * (1 - up) / 2
    boxes = np.stack([left, low, left + width, low + height], -1).reshape(-1, 4)
    beside = np.where(np.abs(up) > 0.1, 0.3, 0.0)  # rather than above or below
    return boxes, (radii + beside).reshape(-1)


def _along(place: np.ndarray, width: float, height: float, pixel: float, inside: np.ndarray) -> tuple:
    """All places of a label above and below a level, from right to left, as `_around` gives them."""
    left = np.linspace(inside[2] - width - 2 * pixel, inside[0] + 2 * pixel, ALONG)
    low = np.array([place[1] + pixel, place[1] - height - pixel])[:, None]
    corner = np.stack(np.broadcast_arrays(left, low), -1).reshape(-1, 2)
    distances = np.arange(ALONG) + np.array([0.0, 0.5])[:, None]
    return np.concatenate([corner, corner + np.array([width, height])], 1), distances.reshape(-1)


def _costs(place, boxes: np.ndarray, distances: np.ndarray, taken: np.ndarray, soft: np.ndarray, inside) -> np.ndarray:
    """What each place costs, in points of distance.

    taken: boxes [m, 4] that are points' or labels'; soft: dots [k, 2] of lines; inside: the axes' box.
    """
    own = boxes[:, None]
    outside = ((boxes[:, :2] < inside[:2]) | (boxes[:, 2:] > inside[2:])).any(1)
    touching, covered = np.zeros(len(boxes)), 0
    if len(taken):
        touching = ((own[..., :2] < taken[:, 2:]) & (taken[:, :2] < own[..., 2:])).all(-1).sum(1)
        nearest = place.clip(boxes[:, :2], boxes[:, 2:])
        ties = place + (nearest - place)[:, None] * np.linspace(0.3, 1, 8)[:, None]  # [places, 8, 2]
        within = (ties[:, :, None] > taken[:, :2]) & (ties[:, :, None] < taken[:, 2:])
        covered = (within.all(-1).any(1).sum(1)) * (distances > TIED)
    crossing = ((soft > own[..., :2]) & (soft < own[..., 2:])).all(-1).sum(1)
    return distances + HARD * (touching + outside) + SOFT * (4 * covered + np.minimum(crossing, MOST))


def _dots(line: np.ndarray) -> np.ndarray:
    """Points along a polyline [n, 2] in pixels."""
    parts = [
        start + (end - start) * np.linspace(0, 1, max(2, math.ceil(math.dist(start, end) / CROSSED)))[:, None]
        for start, end in itertools.pairwise(line)
    ]
    return np.concatenate(parts) if parts else line
