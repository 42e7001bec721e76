"""Captions of the tiny world, and the way back: the attributes that a caption asks for.

The grammar is small, but leaves things out as people do: a size or the background may go unsaid.
`requested` reads a caption back, so an evaluator needs the text alone.
"""

import dataclasses
import functools

import numpy as np

from vqdm.seeds import numpy_generator
from vqdm.tiny.scenes import BACKGROUNDS, COLOURS, PATTERNS, SHAPES, Scene, Thing

SIZE_WORDS = {"small": ("small", "tiny", "little"), "large": ("large", "big", "huge")}
OPENINGS = ("", "", "", "a picture of", "a drawing of", "there is", "we see", "this is", "here is", "an image of")
# {0} is the left (upper) thing, {1} the right (lower) one
RELATIONS = {
    "left": ("{0} left of {1}", "{0} to the left of {1}", "{1} right of {0}", "{1} to the right of {0}"),
    "above": ("{0} above {1}", "{0} over {1}", "{1} below {0}", "{1} under {0}"),
}
GROUNDS = ("on a {} background", "in front of a {} wall", "on a {} floor", "against a {} background")
PATTERN_WORDS = {
    "plain": ("plain", "simple"),
    "striped": ("striped",),
    "dotted": ("dotted", "spotted"),
    "checkered": ("checkered",),
}
_SIZE_OF = {word: size for size, words in SIZE_WORDS.items() for word in words}
_PATTERN_OF = {word: pattern for pattern, words in PATTERN_WORDS.items() for word in words}
_SWAPS = {"right", "below", "under"}  # the thing named first is the second one
_LAYOUT_OF = {"left": "left", "right": "left", "above": "above", "over": "above", "below": "above", "under": "above"}


@dataclasses.dataclass(frozen=True)
class RequestedThing:
    shape: str
    colour: str
    size: str | None


@dataclasses.dataclass(frozen=True)
class Request:
    """The attributes that a caption asks for; None where it leaves them open."""

    things: tuple[RequestedThing, ...]
    layout: str
    background: str | None
    pattern: str | None


def _pick(rng: np.random.Generator, options):
    return options[rng.integers(len(options))]


def _noun_phrase(thing: Thing, rng: np.random.Generator) -> str:
    size = _pick(rng, SIZE_WORDS[thing.size]) + " " if rng.random() < 0.75 else ""
    phrase = f"{size}{thing.colour} {thing.shape}"
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def describe(scene: Scene, rng: np.random.Generator) -> str:
    """A caption for a scene, at most 22 words."""
    things = [_noun_phrase(thing, rng) for thing in scene.things]
    text = things[0] if scene.layout == "single" else _pick(rng, RELATIONS[scene.layout]).format(*things)
    if rng.random() < 0.85:
        ground = f"{_pick(rng, PATTERN_WORDS[scene.pattern])} {scene.background}"
        if rng.random() < 0.5:
            ground = " ".join(reversed(ground.split()))
        text = f"{text} {_pick(rng, GROUNDS).format(ground)}"
    return f"{_pick(rng, OPENINGS)} {text}".strip()


def caption_of(scene: Scene, *, seed: int, split: str, index: int) -> str:
    """The caption of scene number `index` of a split: the same in training, calibration and evaluation."""
    return describe(scene, numpy_generator(seed, f"caption/{split}", index))


def requested(caption: str) -> Request | None:
    """The attributes that a caption asks for, or None if it is not a caption of the tiny world."""
    things: list[RequestedThing] = []
    size = colour = background = pattern = relation = None
    words = caption.lower().split()
    if not set(words) <= _words():
        return None
    for word in words:
        if word in _SIZE_OF:
            size = _SIZE_OF[word]
        elif word in COLOURS:
            colour = word
        elif word in SHAPES:
            if colour is None:
                return None
            things.append(RequestedThing(word, colour, size))
            size = colour = None
        elif word in BACKGROUNDS:
            background = word
        elif word in _PATTERN_OF:
            pattern = _PATTERN_OF[word]
        elif word in _LAYOUT_OF:
            relation = word
    if len(things) == 1 and relation is None:
        return Request(tuple(things), "single", background, pattern)
    if len(things) == 2 and relation is not None:
        ordered = tuple(reversed(things)) if relation in _SWAPS else tuple(things)
        return Request(ordered, _LAYOUT_OF[relation], background, pattern)
    return None


@functools.cache
def _words() -> frozenset[str]:
    return frozenset(vocabulary())


def vocabulary() -> list[str]:
    """Every word a caption can hold, sorted."""
    phrases = [*OPENINGS, *GROUNDS, *(p for group in RELATIONS.values() for p in group)]
    words = {w for p in phrases for w in p.split() if "{" not in w}
    words |= {"a", "an", *SHAPES, *COLOURS, *BACKGROUNDS, *PATTERNS, *_SIZE_OF, *_PATTERN_OF}
    return sorted(words)
