"""Which caption explains a picture to a model: search of a world's whole vocabulary for the least error of its noise.

The question of prompt inversion (EDITOR, arXiv 2506.03067), closed: candidates are captions of the world's grammar, and
a caption is as good as the noise that the model predicts with it in the picture, as in recovery. First greedily, thing
by thing, then one attribute at a time until none is better. No network but the model's own, no gradient, no sampling.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from vqdm.metrics.probes.asked import Asked
from vqdm.metrics.probes.recovery import prediction_errors, with_article
from vqdm.seeds import torch_generator
from vqdm.tiny.attributes import Seen, fidelity
from vqdm.tiny.captions import Request, RequestedThing
from vqdm.tiny.scenes import WORLD_SEED, draw_scene, render
from vqdm.tiny.world import Scene, World

SWEEPS = 3  # over all attributes, at most
Errors = Callable[[list[Request]], list[float]]


class Vocabulary:
    """Extractor of a model: columns {vocabulary_…} with a row for each prompt of its world.

    UserError for a pipeline that is not SDXL's, whose U-Net predicts noise.
    """

    def __init__(self, pipeline, world: World):
        self.asked, self.world = Asked(pipeline, "vocabulary"), world

    @torch.no_grad()
    def columns(self, prompts: list[list[str]]) -> dict[str, Tensor]:
        """Columns of prompts, each an id such as test-000017 and its caption, which is not looked at."""
        rows = [self._row(name) for name, _ in prompts]
        return {f"vocabulary_{key}": torch.tensor([row[key] for row in rows], device="cpu") for key in rows[0]}

    def _row(self, name: str) -> dict[str, float]:
        split, _, index = name.rpartition("-")
        scene = draw_scene(WORLD_SEED, split, int(index), world=self.world)
        errors, truth = self._errors(scene, name), all_of(scene, self.world)
        found = recover(errors, self.world)
        least, true = errors([found, truth])
        right, asked = (sum(counts) for counts in zip(*agreement(truth, found, self.world), strict=True))
        return {"recovered": right / asked, "exact": float(right == asked), "reached": float(least <= true)}

    def _errors(self, scene: Scene, name: str) -> Errors:
        """Errors of the predicted noise in the scene's picture, each caption asked once, all with one noise."""
        latent, known = self.asked.latents(render([scene], world=self.world)), {}

        def errors(candidates: list[Request]) -> list[float]:
            captions = [said(candidate, self.world) for candidate in candidates]
            new = [caption for caption in dict.fromkeys(captions) if caption not in known]
            if new:
                noise = torch_generator(WORLD_SEED, "vocabulary", name)
                known.update(zip(new, prediction_errors(self.asked, latent, new, noise=noise), strict=True))
            return [known[caption] for caption in captions]

        return errors


def all_of(scene: Scene, world: World) -> Request:
    """Every attribute of a scene, as a caption could ask for it."""
    things = (RequestedThing(**{kind: getattr(thing, kind) for kind in world.thing_kinds}) for thing in scene.things)
    return Request(tuple(things), scene.layout, scene.background, scene.pattern)


def agreement(truth: Request, found: Request, world: World) -> Iterable[tuple[int, int]]:
    """(recovered, there) for each kind of attribute, as fidelity counts them."""
    things = tuple(tuple(getattr(thing, kind) for kind in world.thing_kinds) for thing in found.things)
    return fidelity(truth, Seen(found.layout, things, found.background, found.pattern), world=world).values()


def said(request: Request, world: World) -> str:
    """The attributes as a caption, always in the same words; what is None goes unsaid."""
    phrases = []
    for thing in request.things:
        size = world.size_words[thing.size][:1] if thing.size else ()
        texture = world.texture_words[thing.texture][:1] if thing.texture else ()
        phrases.append(" ".join(with_article(["a", *size, *texture, thing.colour, thing.shape], 1)))
    text = phrases[0] if request.layout == "single" else world.relations[request.layout][0].format(*phrases)
    if request.background is None:
        return text
    return f"{text} on a {world.pattern_words[request.pattern][0]} {request.background} background"


def recover(errors: Errors, world: World) -> Request:
    """The caption at which the search ends: first a shape and colour, then the ground, further things, the rest."""

    def best(candidates: Iterable[Request]) -> Request:
        shown = [candidate for candidate in candidates if _is_shown(candidate, world)]
        found = errors(shown)
        return shown[found.index(min(found))]  # of equals the first

    def with_sizes(request: Request) -> Request:
        for place, kind in itertools.product(range(len(request.things)), _further(world)):
            request = best(_with(request, place, world, kind))
        return request

    def with_pairs(request: Request) -> Request:
        for place in range(len(request.things)):
            request = best([request, *_with(request, place, world, "shape", "colour")])
        return request

    nothing = Request((RequestedThing(world.shapes[0], next(iter(world.colours)), None),), "single", None, None)
    found = best(_with(nothing, 0, world, "shape", "colour"))
    found = with_sizes(best(_grounded(found, world.backgrounds, world.patterns)))
    while len(found.things) < world.most_things:
        larger = with_sizes(with_pairs(best(_larger(found, world))))
        if errors([larger]) >= errors([found]):
            break
        found = larger
    for _ in range(SWEEPS):
        before = found
        found = best([found, *_arranged(found.things, found, world)])
        if len(found.things) > 1:
            fewer = itertools.combinations(found.things, len(found.things) - 1)
            found = best([found, *(one for things in fewer for one in _arranged(things, found, world))])
        found = with_pairs(found)
        for place, kind in itertools.product(range(len(found.things)), _further(world)):
            found = best([found, *_with(found, place, world, kind)])
        found = best([found, *_grounded(found, world.backgrounds, [found.pattern])])
        found = best([found, *_grounded(found, [found.background], world.patterns)])
        if found == before:
            break
    return found


def _further(world: World) -> list[str]:
    """The kinds of attributes of a thing that a caption need not say."""
    return [kind for kind in world.thing_kinds if kind not in ("shape", "colour")]


def _layouts(world: World, things: int) -> list[str]:
    counts = {"single": 1} | {layout: len(order) for layout, order in world.readings.values()}
    return [layout for layout in world.layouts if counts[layout] == things]


def _arranged(things: tuple[RequestedThing, ...], request: Request, world: World) -> Iterator[Request]:
    """The request with these things, in every order and layout."""
    for order, layout in itertools.product(itertools.permutations(things), _layouts(world, len(things))):
        yield dataclasses.replace(request, things=order, layout=layout)


def _larger(request: Request, world: World) -> Iterator[Request]:
    """The request with one more thing, in every colour, order and layout; its shape is one that the colour has."""
    for colour in world.colours:
        shape = next(shape for shape in world.shapes if (shape, colour) not in world.unseen)
        yield from _arranged((*request.things, RequestedThing(shape, colour, None)), request, world)


def _with(request: Request, place: int, world: World, *kinds: str) -> Iterator[Request]:
    """The request with every value of some attributes of one thing."""
    for values in itertools.product(*(world.thing_kinds[kind] for kind in kinds)):
        things = list(request.things)
        things[place] = dataclasses.replace(things[place], **dict(zip(kinds, values, strict=True)))
        yield dataclasses.replace(request, things=tuple(things))


def _grounded(request: Request, backgrounds: Iterable[str], patterns: Iterable[str]) -> Iterator[Request]:
    for background, pattern in itertools.product(backgrounds, patterns):
        yield dataclasses.replace(request, background=background, pattern=pattern)


def _is_shown(request: Request, world: World) -> bool:
    """False for a request with a pair of attributes that the world never shows: no model can know how it looks."""
    pairs = {pair for thing in request.things for pair in ((thing.shape, thing.colour), (thing.texture, thing.shape))}
    return not pairs & world.unseen
