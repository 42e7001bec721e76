"""The parts of a procedural world: its things and scenes, and the words, sizes and rules that make it this one.

`vqdm.tiny.scenes` holds the world `tiny`, `vqdm.tiny.small` the world `small`; everything else takes the world as an
argument, tiny by default.
"""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np

SOLID = "solid"  # the texture of a thing of one colour
OPEN = frozenset(
    {"a", "and", "by", "in", "of", "on", "the", "to"}
)  # words of a relation that do not tell which one it is


@dataclasses.dataclass(frozen=True)
class Thing:
    shape: str
    colour: str
    size: str
    x: float  # centre, pixels
    y: float
    texture: str = SOLID

    @property
    def pair(self) -> tuple[str, str]:
        return self.shape, self.colour

    @property
    def pairs(self) -> set[tuple[str, str]]:
        """The pairs of attributes, each of which a world may never show outside its split `unseen_pairs`."""
        return {self.pair, (self.texture, self.shape)}


@dataclasses.dataclass(frozen=True)
class Scene:
    things: tuple[Thing, ...]
    layout: str
    background: str
    pattern: str

    @property
    def key(self) -> str:
        """The attributes without the positions: what the splits are disjoint in."""
        textures = ["" if t.texture == SOLID else f"{t.texture} " for t in self.things]
        things = [f"{t.size} {texture}{t.colour} {t.shape}" for t, texture in zip(self.things, textures, strict=True)]
        return "/".join([self.layout, *things, self.pattern, self.background])


@dataclasses.dataclass(frozen=True, eq=False)
class World:
    """What can be in a picture, and how it is said. Words of shapes, colours, … are those of the captions too.

    relations: {layout: templates of captions}, where {0} is the first thing of a scene, {1} the second, …
    draw: a scene from a generator, whichever split it may belong to.
    """

    name: str
    image_size: int  # pixels
    shapes: tuple[str, ...]
    colours: dict[str, tuple[int, int, int]]
    radii: dict[str, float]  # pixels, by the word for the size
    backgrounds: dict[str, tuple[int, int, int]]
    patterns: tuple[str, ...]
    layouts: tuple[str, ...]
    relations: dict[str, tuple[str, ...]]
    size_words: dict[str, tuple[str, ...]]
    pattern_words: dict[str, tuple[str, ...]]
    unseen: frozenset[tuple[str, str]]
    draw: Callable[[np.random.Generator], Scene]
    texture_words: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=lambda: {SOLID: ()})
    max_tokens: int = 24

    @property
    def textures(self) -> tuple[str, ...]:
        return tuple(self.texture_words)

    @functools.cached_property
    def thing_kinds(self) -> dict[str, tuple[str, ...]]:
        """{kind of attribute: its values} of a single thing, in the order in which `Seen` holds them."""
        kinds = {"shape": self.shapes, "colour": tuple(self.colours), "size": tuple(self.radii)}
        return kinds | ({"texture": self.textures} if len(self.textures) > 1 else {})

    @functools.cached_property
    def most_things(self) -> int:
        return max(len(order) for _, order in self.readings.values())

    @functools.cached_property
    def readings(self) -> dict[tuple[str, int], tuple[str, tuple[int, ...]]]:
        """{(word of a relation, number of things): (layout, place in the scene of each thing as it is named)}."""
        found = {}
        for layout, templates in self.relations.items():
            for template in templates:
                words = template.split()
                order = tuple(int(word[1]) for word in words if word[0] == "{")
                told = [word for word in words if word[0] != "{" and word not in OPEN]
                for word in told:
                    found[word, len(order)] = (layout, order)
        return found

    @property
    def relation_words(self) -> frozenset[str]:
        return frozenset(word for word, _ in self.readings)
