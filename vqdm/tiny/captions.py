"""Captions of the tiny world, and the way back: the attributes that a caption asks for.

The grammar is small, but leaves things out as people do: a size or the background may go unsaid.
`requested` reads a caption back, so an evaluator needs the text alone.
"""

import dataclasses
import functools

import numpy as np

from vqdm.seeds import numpy_generator
from vqdm.tiny.scenes import TINY
from vqdm.tiny.world import Scene, Thing, World

OPENINGS = ("", "", "", "a picture of", "a drawing of", "there is", "we see", "this is", "here is", "an image of")
GROUNDS = ("on a {} background", "in front of a {} wall", "on a {} floor", "against a {} background")


@dataclasses.dataclass(frozen=True)
class RequestedThing:
    shape: str
    colour: str
    size: str | None
    texture: str | None = None


@dataclasses.dataclass(frozen=True)
class Request:
    """The attributes that a caption asks for; None where it leaves them open."""

    things: tuple[RequestedThing, ...]
    layout: str
    background: str | None
    pattern: str | None


def _pick(rng: np.random.Generator, options):
    return options[rng.integers(len(options))]


def _noun_phrase(thing: Thing, rng: np.random.Generator, world: World) -> str:
    size = _pick(rng, world.size_words[thing.size]) + " " if rng.random() < 0.75 else ""
    words = world.texture_words[thing.texture]
    texture = _pick(rng, words) + " " if words and rng.random() < 0.75 else ""
    phrase = f"{size}{texture}{thing.colour} {thing.shape}"
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def describe(scene: Scene, rng: np.random.Generator, *, world: World = TINY) -> str:
    """A caption for a scene, at most 22 words in tiny and 30 in small."""
    things = [_noun_phrase(thing, rng, world) for thing in scene.things]
    text = things[0] if scene.layout == "single" else _pick(rng, world.relations[scene.layout]).format(*things)
    if rng.random() < 0.85:
        ground = f"{_pick(rng, world.pattern_words[scene.pattern])} {scene.background}"
        if rng.random() < 0.5:
            ground = " ".join(reversed(ground.split()))
        text = f"{text} {_pick(rng, GROUNDS).format(ground)}"
    return f"{_pick(rng, OPENINGS)} {text}".strip()


def caption_of(scene: Scene, *, seed: int, split: str, index: int, world: World = TINY) -> str:
    """The caption of scene number `index` of a split: the same in training, calibration and evaluation."""
    return describe(scene, numpy_generator(seed, f"caption/{split}", index), world=world)


def requested(caption: str, *, world: World = TINY) -> Request | None:
    """The attributes that a caption asks for, or None if it is not a caption of the world."""
    if (read := _read(caption, world)) is None:
        return None
    places_and_things, relation, said = read
    things = [thing for _, thing in places_and_things]
    ground = {"background": said.get("background"), "pattern": said.get("pattern")}
    if len(things) == 1 and relation is None:
        return Request(tuple(things), "single", **ground)
    if (relation, len(things)) not in world.readings:
        return None
    layout, places = world.readings[relation, len(things)]
    return Request(tuple(things[places.index(i)] for i in range(len(things))), layout, **ground)


def said_things(caption: str, *, world: World) -> list[tuple[int, RequestedThing]]:
    """The things of a caption as they are said, each with the place among its words of the last of the thing's."""
    read = _read(caption, world)
    if read is None:
        raise ValueError(f"no caption of the world {world.name}: {caption!r}")
    return read[0]


def _read(caption: str, world: World) -> tuple[list[tuple[int, RequestedThing]], str | None, dict[str, str]] | None:
    """(things and the places of their last words, word of the relation, what is said behind the last thing)."""
    lexicon = _lexicon(world)
    things: list[tuple[int, RequestedThing]] = []
    said: dict[str, str] = {}  # since the last thing, and of the background
    relation = None
    for place, word in enumerate(caption.lower().split()):
        if word not in lexicon:
            return None
        kind, value = lexicon[word]
        if kind == "shape":
            if "colour" not in said:
                return None
            about = {name: said.pop(name, None) for name in ("colour", "size", "texture")}
            things.append((place, RequestedThing(value, **about)))
        elif kind == "relation":
            relation = word
        elif kind != "":
            said[kind] = value
    return things, relation, said


@functools.cache
def _lexicon(world: World) -> dict[str, tuple[str, str]]:
    """{word: (the kind of attribute it names, its value)} of every word a caption can hold; ("", "") names none."""
    phrases = [*OPENINGS, *GROUNDS, *(p for group in world.relations.values() for p in group)]
    lexicon = {word: ("", "") for phrase in [*phrases, "a an"] for word in phrase.split() if "{" not in word}
    lexicon |= {word: ("relation", word) for word in world.relation_words}
    for kind, words in (
        ("size", world.size_words),
        ("texture", world.texture_words),
        ("pattern", world.pattern_words),
        *((kind, {v: (v,) for v in values}) for kind, values in (("shape", world.shapes), ("colour", world.colours))),
        ("background", {v: (v,) for v in world.backgrounds}),
    ):
        lexicon |= {word: (kind, value) for value, group in words.items() for word in group}
    return lexicon


def vocabulary(world: World = TINY) -> list[str]:
    """Every word a caption can hold, sorted."""
    return sorted(_lexicon(world))
