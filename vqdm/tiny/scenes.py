"""The tiny world: procedural scenes of one or two coloured shapes on a patterned background, 32×32.

A scene is drawn from (seed, split, index) alone. Which split a scene may belong to is decided by a hash of
its attributes, so train, validation, test and reference share no scene. Six (shape, colour) pairs never
occur in those splits; the split `unseen_pairs` has one of them in every scene.
"""

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np

from vqdm.seeds import numpy_generator
from vqdm.tiny.world import SOLID, Scene, Thing, World

IMAGE_SIZE = 32
WORLD_SEED = 0  # seeds all scenes and captions; the tiny denoiser was trained on the split "train" of this seed

SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring")
COLOURS = {
    "red": (215, 30, 35),
    "orange": (245, 140, 20),
    "yellow": (245, 225, 40),
    "green": (35, 150, 50),
    "blue": (30, 65, 215),
    "purple": (130, 40, 160),
    "white": (250, 250, 250),
    "black": (15, 15, 15),
}
RADII = {"small": 4.5, "large": 7.0}  # pixels; the smallest object is 9 pixels wide
BACKGROUNDS = {
    "gray": (135, 135, 135),
    "pink": (240, 175, 195),
    "cyan": (130, 215, 225),
    "brown": (125, 85, 55),
}
PATTERNS = ("plain", "striped", "dotted", "checkered")
LAYOUTS = ("single", "left", "above")  # the first of two objects is left of, or above, the second

UNSEEN_PAIRS = frozenset(
    {
        ("circle", "purple"),
        ("square", "orange"),
        ("triangle", "blue"),
        ("diamond", "red"),
        ("cross", "yellow"),
        ("ring", "green"),
    }
)
_BUCKETS = {"validation": (0,), "test": (1,), "reference": (2,), "train": tuple(range(3, 16))}
SPLITS = (*_BUCKETS, "unseen_pairs")


def _bucket(scene: Scene) -> int:
    return hashlib.sha256(scene.key.encode()).digest()[0] % 16


def _belongs(scene: Scene, split: str, world: World) -> bool:
    unseen = any(thing.pairs & world.unseen for thing in scene.things)
    if split == "unseen_pairs":
        return unseen
    return not unseen and _bucket(scene) in _BUCKETS[split]


def _draw(rng: np.random.Generator) -> Scene:
    layout = LAYOUTS[rng.choice(3, p=(0.3, 0.35, 0.35))]
    middle = IMAGE_SIZE / 2
    if layout == "single":
        centres = [middle + rng.uniform(-6, 6, 2)]
    else:
        along = np.array([8.0, 24.0]) + rng.uniform(-0.75, 0.75, 2)
        across = middle + rng.uniform(-6, 6, 2)
        centres = list(zip(along, across, strict=True) if layout == "left" else zip(across, along, strict=True))
    things = tuple(
        Thing(
            shape=SHAPES[rng.integers(len(SHAPES))],
            colour=tuple(COLOURS)[rng.integers(len(COLOURS))],
            size=tuple(RADII)[rng.integers(len(RADII))],
            x=float(x),
            y=float(y),
        )
        for x, y in centres
    )
    background = tuple(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))]
    return Scene(things, layout, background, PATTERNS[rng.integers(len(PATTERNS))])


RELATIONS = {
    "left": ("{0} left of {1}", "{0} to the left of {1}", "{1} right of {0}", "{1} to the right of {0}"),
    "above": ("{0} above {1}", "{0} over {1}", "{1} below {0}", "{1} under {0}"),
}
TINY = World(
    name="tiny",
    image_size=IMAGE_SIZE,
    shapes=SHAPES,
    colours=COLOURS,
    radii=RADII,
    backgrounds=BACKGROUNDS,
    patterns=PATTERNS,
    layouts=LAYOUTS,
    relations=RELATIONS,
    size_words={"small": ("small", "tiny", "little"), "large": ("large", "big", "huge")},
    pattern_words={
        "plain": ("plain", "simple"),
        "striped": ("striped",),
        "dotted": ("dotted", "spotted"),
        "checkered": ("checkered",),
    },
    unseen=UNSEEN_PAIRS,
    draw=_draw,
)


def draw_scene(seed: int, split: str, index: int, *, world: World = TINY) -> Scene:
    """Scene number `index` of a split, drawn again until it belongs to that split."""
    rng = numpy_generator(seed, f"scene/{split}", index)
    while True:
        scene = world.draw(rng)
        if _belongs(scene, split, world):
            return scene


def draw_scenes(seed: int, split: str, indices: Iterable[int], *, world: World = TINY) -> list[Scene]:
    return [draw_scene(seed, split, index, world=world) for index in indices]


def _signed_distance(shape: str, dx: np.ndarray, dy: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Distance to the outline in pixels, negative inside (exact on the axes, close enough elsewhere)."""
    ax, ay = np.abs(dx), np.abs(dy)
    if shape == "circle":
        return np.hypot(dx, dy) - radius
    if shape == "square":
        return np.maximum(ax, ay) - 0.86 * radius
    if shape == "diamond":
        return (ax + ay - 1.15 * radius) / np.sqrt(2)
    if shape == "triangle":  # point up; the image's y axis points down
        return np.maximum(dy - 0.75 * radius, (1.8 * ax - dy - 0.95 * radius) / 2.06)
    if shape == "cross":
        arm = 0.32 * radius
        return np.minimum(np.maximum(ax - arm, ay - radius), np.maximum(ax - radius, ay - arm))
    if shape == "ring":
        return np.abs(np.hypot(dx, dy) - 0.74 * radius) - 0.28 * radius
    if shape == "star":  # five points, one of them up
        return 0.6 * (np.hypot(dx, dy) - radius * (0.73 + 0.37 * np.cos(5 * np.arctan2(dx, -dy))))
    if shape == "moon":  # waning: the light side on the left
        return np.maximum(np.hypot(dx, dy) - radius, 0.82 * radius - np.hypot(dx - 0.55 * radius, dy))
    raise ValueError(f"unknown shape {shape!r}")


def _pattern_tile(pattern: str, size: int) -> np.ndarray:
    """A mask [size, size] of 0 and 1 that says where the background is darkened."""
    y, x = np.mgrid[0:size, 0:size]
    if pattern == "plain":
        return np.zeros((size, size), np.float32)
    if pattern == "striped":
        return (y % 8 < 4).astype(np.float32)
    if pattern == "dotted":
        return (np.hypot(x % 8 - 3.5, y % 8 - 3.5) < 2.2).astype(np.float32)
    if pattern == "checkered":
        return ((x // 8 + y // 8) % 2).astype(np.float32)
    if pattern == "barred":
        return (x % 8 < 4).astype(np.float32)
    if pattern == "slanted":
        return ((x + y) % 12 < 6).astype(np.float32)
    raise ValueError(f"unknown pattern {pattern!r}")


def _texture_mask(texture: str, dx: np.ndarray, dy: np.ndarray) -> np.ndarray:
    """Where a thing has its second shade, from the distances to its centre in pixels; the period is 4 pixels."""
    if texture == "banded":
        return (dy % 4 < 2) & (dx == dx)
    if texture == "ribbed":
        return (dx % 4 < 2) & (dy == dy)
    if texture == "speckled":
        return np.hypot(dx % 4 - 2, dy % 4 - 2) < 1.3
    raise ValueError(f"unknown texture {texture!r}")


def _second_shade(colour: np.ndarray) -> np.ndarray:
    """A darker shade of a light colour, a lighter one of a dark colour."""
    luminance = colour @ np.array([0.299, 0.587, 0.114], np.float32)
    return np.where(luminance[..., None] > 90, 0.5 * colour, colour + 0.45 * (255 - colour))


def _colours(things: Sequence[Thing], dx: np.ndarray, dy: np.ndarray, world: World) -> np.ndarray:
    """Colours of things without their outlines: float32 [n, 1, 1, 3], or [n, size, size, 3] where one has a texture."""
    colour = np.array([world.colours[t.colour] for t in things], np.float32)[:, None, None, :]
    if all(t.texture == SOLID for t in things):
        return colour
    masks = np.zeros((len(things), world.image_size, world.image_size, 1), bool)
    for i, thing in enumerate(things):
        if thing.texture != SOLID:
            masks[i, ..., 0] = _texture_mask(thing.texture, dx[i], dy[i])
    return np.where(masks, _second_shade(colour), colour)


def render(scenes: Sequence[Scene], *, world: World = TINY) -> np.ndarray:
    """Render scenes as uint8 [n, size, size, 3], with antialiased edges; later things cover earlier ones."""
    tiles = np.stack([_pattern_tile(pattern, world.image_size) for pattern in world.patterns])
    base = np.array([world.backgrounds[s.background] for s in scenes], np.float32)
    dark = tiles[[world.patterns.index(s.pattern) for s in scenes]]
    images = base[:, None, None, :] * (1 - 0.28 * dark[..., None])
    centres = np.arange(world.image_size, dtype=np.float32) + 0.5
    for slot in range(world.most_things):
        there = [i for i, s in enumerate(scenes) if len(s.things) > slot]
        for shape in dict.fromkeys(scenes[i].things[slot].shape for i in there):
            rows = [i for i in there if scenes[i].things[slot].shape == shape]
            things = [scenes[i].things[slot] for i in rows]
            dx = centres[None, None, :] - np.array([t.x for t in things], np.float32)[:, None, None]
            dy = centres[None, :, None] - np.array([t.y for t in things], np.float32)[:, None, None]
            radius = np.array([world.radii[t.size] for t in things], np.float32)[:, None, None]
            cover = np.clip(0.5 - _signed_distance(shape, dx, dy, radius), 0, 1)[..., None]
            images[rows] = images[rows] * (1 - cover) + _colours(things, dx, dy, world) * cover
    return np.rint(images).astype(np.uint8)
