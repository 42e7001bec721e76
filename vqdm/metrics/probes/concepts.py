"""What is left of a model's colours after an edit of what it knows: what it calls red becomes blue, and only that."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vqdm.metrics.paired import psnr
from vqdm.metrics.probes.asked import Asked
from vqdm.metrics.probes.closed_form import (
    RIDGE,
    Adapter,
    Rewriting,
    adapter,
    beside,
    changes_of_states,
    factors,
    reading_layers,
)
from vqdm.metrics.probes.drawn import Drawn
from vqdm.metrics.probes.recovery import with_article
from vqdm.tiny.captions import RequestedThing, caption_of, requested
from vqdm.tiny.scenes import WORLD_SEED, draw_scene
from vqdm.tiny.world import World

OLD, NEW = "red", "blue"
CAPTIONS = 256  # of the training split, to edit by, and as many to preserve
POWER = 0.95  # share of D's squared singular values that its factors keep


class Concepts:
    """Extractor of a model: columns {concept_…} with a row for each prompt of its world.

    evaluators: the directory of the world's attribute network. guidance: that of the model's own sampler.
    """

    def __init__(self, pipeline, world: World, evaluators: Path, *, guidance: float):
        self.drawn = Drawn(pipeline, world, evaluators, family="concepts", guidance=guidance)
        self.adapters = make_adapters(self.drawn.asked, world)

    @torch.no_grad()
    def columns(self, prompts: list[list[str]]) -> dict[str, Tensor]:
        """Columns of prompts, each an id such as test-000017 and its caption."""
        drawn, (with_old, _) = self.drawn, self._captions(prompts)
        renamed, names = [renamed_in(caption, NEW) for caption in with_old], [name for name, _ in prompts]
        said = drawn.shows(drawn.pictures(renamed, names), self._renamed_things(renamed))
        return self.edited(prompts, self.unedited(prompts)) | {"concept_said": said}

    @torch.no_grad()
    def unedited(self, prompts: list[list[str]]) -> np.ndarray:
        """Pictures of the captions without red, by the model as it is."""
        return self.drawn.pictures(self._captions(prompts)[1], [name for name, _ in prompts])

    @torch.no_grad()
    def edited(self, prompts: list[list[str]], unedited: np.ndarray) -> dict[str, Tensor]:
        """Columns of the edited model; unedited: what its pictures of captions without red are compared with."""
        drawn, names = self.drawn, [name for name, _ in prompts]
        with_old, others = self._captions(prompts)
        renamed = [renamed_in(caption, NEW) for caption in with_old]
        with beside(self.adapters):
            hit, rest = drawn.pictures(with_old, names), drawn.pictures(others, names)
        pair = (torch.from_numpy(pictures).permute(0, 3, 1, 2) for pictures in (rest, unedited))
        return {
            "concept_hit": drawn.shows(hit, self._renamed_things(renamed)),
            "concept_right": drawn.all_right(hit, renamed),
            "concept_rest": drawn.all_right(rest, others),
            "concept_rest_psnr": psnr(*pair),
        }

    def _captions(self, prompts: list[list[str]]) -> tuple[list[str], list[str]]:
        """Each caption with its first thing in red, and without any red."""
        makers = (naming_old, without_old)
        return tuple([make(caption, self.drawn.world) for _, caption in prompts] for make in makers)

    def _renamed_things(self, renamed: list[str]) -> list[RequestedThing]:
        """The thing of each caption that was red and is asked for in blue."""
        wanted = [requested(caption, world=self.drawn.world) for caption in renamed]
        return [next(thing for thing in request.things if thing.colour == NEW) for request in wanted]


def without_old(caption: str, world: World) -> str:
    """The caption with another colour for every red thing: one that no shape lacks."""
    return renamed_in(caption, next(c for c in world.colours if all(c != pair[1] for pair in world.unseen)))


def renamed_in(caption: str, colour: str) -> str:
    """The caption with this colour for red; "checkered" stays."""
    return " ".join(colour if word == OLD else word for word in caption.split())


def naming_old(caption: str, world: World) -> str:
    """The caption with its first thing in red and no other; a shape never shown in red or blue becomes another one."""
    words = without_old(caption, world).split()
    at_colour = next(i for i, word in enumerate(words) if word in world.colours)
    at_shape = next(i for i, word in enumerate(words) if i > at_colour and word in world.shapes)

    def can_be(shape: str) -> bool:
        return not {(shape, OLD), (shape, NEW)} & world.unseen

    words[at_colour] = OLD
    if not can_be(words[at_shape]):
        words[at_shape] = next(shape for shape in world.shapes if can_be(shape))
    return " ".join(with_article(words, at_colour))


def rewriting(world: World) -> Rewriting:
    """Red acts as blue: 256 captions of the training split with one red thing, and 256 without any."""
    drawn = [
        caption_of(
            draw_scene(WORLD_SEED, "train", i, world=world), seed=WORLD_SEED, split="train", index=i, world=world
        )
        for i in range(2 * CAPTIONS)
    ]
    old = [naming_old(caption, world) for caption in drawn[:CAPTIONS]]
    kept = [without_old(caption, world) for caption in drawn[CAPTIONS:]]
    return Rewriting(old, [renamed_in(text, NEW) for text in old], kept)


@torch.no_grad()
def make_adapters(asked: Asked, world: World, *, penalty: float = RIDGE, power: float = POWER) -> list[Adapter]:
    """A LoRA of each layer that reads text."""
    changes = changes_of_states(asked, rewriting(world), penalty=penalty)
    of_tokens, of_pooled = (factors(change, power=power) for change in changes)
    readers = reading_layers(asked.pipeline.unet).values()
    return [adapter(layer, *(of_pooled if pooled else of_tokens)) for layer, pooled in readers]
