"""The world `small`: up to three things of eight shapes, three sizes and four textures, in seven layouts, 64×64.

Its colours, six of its shapes and four of its patterns are tiny's. What it never shows outside the split
`unseen_pairs`: eight pairs of a shape and a colour, three pairs of a texture and a shape.
"""

import dataclasses

import numpy as np

from vqdm.tiny.scenes import BACKGROUNDS, COLOURS, PATTERNS, SHAPES, TINY, UNSEEN_PAIRS
from vqdm.tiny.world import SOLID, Scene, Thing

IMAGE_SIZE = 64
LAYOUTS = ("single", "left", "above", "around", "row", "column", "roof")
CHANCES = (0.16, 0.14, 0.14, 0.14, 0.14, 0.14, 0.14)
TEXTURES = (SOLID, "banded", "ribbed", "speckled")
TEXTURE_CHANCES = (0.4, 0.2, 0.2, 0.2)
RADII = {"small": 5.5, "medium": 8.5, "large": 12.0}


def _centres(layout: str, rng: np.random.Generator) -> list[tuple[float, float]]:
    """Centres of the things in pixels. All of a thing of the size that its layout allows is inside the picture."""
    middle = IMAGE_SIZE / 2
    if layout == "single":
        return [tuple(middle + rng.uniform(-14, 14, 2))]
    if layout == "around":
        centre = middle + rng.uniform(-14, 14, 2)
        return [tuple(centre), tuple(centre + rng.uniform(-1, 1, 2))]
    if layout == "roof":
        top = (middle + rng.uniform(-8, 8), 17 + rng.uniform(-1.5, 1.5))
        floor = 47 + rng.uniform(-1.5, 1.5, 2)
        return [top, *zip(np.array([16.0, 48.0]) + rng.uniform(-3, 3, 2), floor, strict=True)]
    if layout in ("left", "above"):
        along = np.array([16.0, 48.0]) + rng.uniform(-1.5, 1.5, 2)
        across = middle + rng.uniform(-14, 14, 2)
    else:
        along = np.array([11.5, 32.0, 52.5]) + rng.uniform(-1, 1, 3)
        across = middle + rng.uniform(-14, 14) + rng.uniform(-3, 3, 3)
    across_first = layout in ("above", "column")
    return list(zip(across, along, strict=True) if across_first else zip(along, across, strict=True))


def _sizes(layout: str, count: int, rng: np.random.Generator) -> list[str]:
    if layout == "around":
        return ["large", "small"]
    names = tuple(RADII) if count < 3 else ("small", "medium")  # there is no room for three large things
    return [names[rng.integers(len(names))] for _ in range(count)]


def _draw(rng: np.random.Generator) -> Scene:
    layout = LAYOUTS[rng.choice(len(LAYOUTS), p=CHANCES)]
    centres = _centres(layout, rng)
    things = tuple(
        Thing(
            shape=SMALL.shapes[rng.integers(len(SMALL.shapes))],
            colour=tuple(COLOURS)[rng.integers(len(COLOURS))],
            size=size,
            x=float(x),
            y=float(y),
            texture=TEXTURES[rng.choice(len(TEXTURES), p=TEXTURE_CHANCES)],
        )
        for size, (x, y) in zip(_sizes(layout, len(centres), rng), centres, strict=True)
    )
    if layout == "around" and things[0].colour == things[1].colour:  # the inner one would not be seen
        return _draw(rng)
    background = tuple(SMALL.backgrounds)[rng.integers(len(SMALL.backgrounds))]
    return Scene(things, layout, background, SMALL.patterns[rng.integers(len(SMALL.patterns))])


RELATIONS = TINY.relations | {
    "around": ("{0} around {1}", "{0} surrounding {1}", "{1} inside {0}", "{1} within {0}"),
    "row": (
        "{0} left of {1} left of {2}",
        "{2} right of {1} right of {0}",
        "a row of {0} and {1} and {2}",
        "{0} next to {1} next to {2}",
    ),
    "column": (
        "{0} above {1} above {2}",
        "{2} below {1} below {0}",
        "{2} under {1} under {0}",
        "a column of {0} and {1} and {2}",
    ),
    "roof": (
        "{0} topping {1} and {2}",
        "{1} and {2} topped by {0}",
        "{0} resting on {1} and {2}",
        "{1} and {2} carrying {0}",
    ),
}
SMALL = dataclasses.replace(
    TINY,
    name="small",
    image_size=IMAGE_SIZE,
    shapes=(*SHAPES, "star", "moon"),
    radii=RADII,
    backgrounds=BACKGROUNDS | {"teal": (20, 125, 125), "olive": (120, 125, 45)},
    patterns=(*PATTERNS, "barred", "slanted"),
    layouts=LAYOUTS,
    relations=RELATIONS,
    size_words=TINY.size_words | {"medium": ("medium", "middling")},
    pattern_words=TINY.pattern_words | {"barred": ("barred",), "slanted": ("slanted", "tilted")},
    texture_words={
        SOLID: (),
        "banded": ("banded",),
        "ribbed": ("ribbed", "fluted"),
        "speckled": ("speckled", "flecked"),
    },
    unseen=UNSEEN_PAIRS
    | {("star", "white"), ("moon", "black"), ("banded", "cross"), ("ribbed", "triangle"), ("speckled", "circle")},
    draw=_draw,
    max_tokens=40,
)
