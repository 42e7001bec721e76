"""Pictures that a model of a tiny world draws or edits by DDIM, and what the world's attribute network sees in them."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vqdm.metrics.probes.asked import Asked
from vqdm.metrics.probes.inversion import Ddim
from vqdm.seeds import torch_generator
from vqdm.tiny.attributes import Seen, fidelity, seen_by
from vqdm.tiny.captions import RequestedThing, requested
from vqdm.tiny.evaluator import TinyWorld
from vqdm.tiny.scenes import WORLD_SEED
from vqdm.tiny.world import World

STEPS = 20  # of DDIM, up and down


class Drawn:
    """A pipeline of a tiny world, asked for pictures in 20 steps of DDIM, and the world's attribute network.

    family: of metrics, which errors and noise are named by. evaluators: the directory of the attribute network.
    guidance: that of the model's own sampler.
    """

    def __init__(self, pipeline, world: World, evaluators: Path, *, family: str, guidance: float):
        self.asked, self.world, self.family, self.guidance = Asked(pipeline, family), world, family, guidance
        self.ddim = Ddim(pipeline.scheduler, steps=STEPS, device=self.asked.device)
        self.evaluator = TinyWorld(evaluators)

    def pictures(self, captions: list[str], names: list[str]) -> np.ndarray:
        """Pictures uint8 [n, height, width, 3] of captions, each sampled from the noise of its prompt's name."""
        unet = self.asked.pipeline.unet
        size = (unet.config.in_channels, *[unet.config.sample_size] * 2)
        generators = [torch_generator(WORLD_SEED, self.family, name) for name in names]
        noise = torch.stack([torch.randn(size, generator=one, device="cpu") for one in generators])
        kept = [noise.to(self.asked.device, unet.dtype)] * (STEPS + 1)
        return self.asked.pictures(self.ddim.sample(kept, self.asked.noise_with(captions, self.guidance), start=STEPS))

    def seen(self, pictures: np.ndarray) -> list[Seen]:
        """The attributes that the network sees in each picture."""
        return seen_by(self.evaluator.columns(list(pictures))["labels"], world=self.world)

    def shows(self, pictures: np.ndarray, things: list[RequestedThing]) -> Tensor:
        """1 for each picture in which a thing of that shape and colour is seen, else 0: float64 [n]."""
        pairs = zip(things, self.seen(pictures), strict=True)
        return shares((thing.shape, thing.colour) in {one[:2] for one in seen.things} for thing, seen in pairs)

    def all_right(self, pictures: np.ndarray, captions: list[str]) -> Tensor:
        """1 for each picture in which every attribute of its caption is seen, else 0: float64 [n]."""
        pairs = zip(captions, self.seen(pictures), strict=True)
        tallies = (fidelity(requested(text, world=self.world), seen, world=self.world) for text, seen in pairs)
        return shares(all(found == asked for found, asked in tally.values()) for tally in tallies)


def shares(true) -> Tensor:
    """Truth values as float64 [n], whose mean is their share."""
    return torch.tensor(list(true), dtype=torch.float64, device="cpu")
