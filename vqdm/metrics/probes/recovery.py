"""What a word of the caption is worth to a model: its noise prediction on a real image with the right word and others.

The error of the prediction is the mean of (ε̂ − ε)² over the latent, two noise levels and one noise for all captions of
an image; no guidance, no sampling. The gap is the least error of a wrong word minus the right word's. It falls as a
model forgets what the word means, and, unlike the ratio of the errors, not with the noise that codes add to all words.
"""

import torch
from torch import Tensor

from vqdm.metrics.probes.asked import Asked
from vqdm.seeds import torch_generator
from vqdm.tiny.scenes import WORLD_SEED, draw_scene, render
from vqdm.tiny.world import World

KINDS = ("colour", "shape")
TIMESTEPS = (201, 401)  # of 1,000; at 601 and above hardly any word matters (docs/probes.md)


class Recovery:
    """Extractor of a model: columns {gap_<kind>, right_<kind>, error} with a row for each prompt of its world.

    UserError for a pipeline that is not SDXL's, whose U-Net predicts noise.
    """

    def __init__(self, pipeline, world: World):
        self.asked, self.world = Asked(pipeline, "recovery"), world

    @torch.no_grad()
    def columns(self, prompts: list[list[str]]) -> dict[str, Tensor]:
        """Columns of prompts, each an id such as test-000017 and its caption."""
        rows = [self._row(name, caption) for name, caption in prompts]
        return {key: torch.tensor([row[key] for row in rows], device="cpu") for key in rows[0]}

    def _row(self, name: str, caption: str) -> dict[str, float]:
        split, _, index = name.rpartition("-")
        scene = draw_scene(WORLD_SEED, split, int(index), world=self.world)
        latent = self.asked.latents(render([scene], world=self.world))
        others = {kind: other_captions(caption, kind, self.world) for kind in KINDS}
        noise = torch_generator(WORLD_SEED, "recovery", name)
        captions = [caption, *(text for texts in others.values() for text in texts)]
        errors = prediction_errors(self.asked, latent, captions, noise=noise)
        right, wrong = errors[0], errors[1:]
        found = {"error": right}
        for kind, texts in others.items():
            own, wrong = wrong[: len(texts)], wrong[len(texts) :]
            found |= {f"gap_{kind}": min(own) - right, f"right_{kind}": float(right < min(own))}
        return found


def prediction_errors(asked: Asked, latent: Tensor, captions: list[str], *, noise: torch.Generator) -> list[float]:
    """Mean squared error of the noise predicted with each caption in one latent [1, …], over the noise levels."""
    drawn = torch.randn(latent.shape, generator=noise, device="cpu").to(latent)
    predict, alphas = asked.noise_with(captions), asked.pipeline.scheduler.alphas_cumprod
    total = torch.zeros(len(captions), device=latent.device)
    for timestep in TIMESTEPS:
        kept = alphas[timestep].to(latent)
        noisy = (kept.sqrt() * latent + (1 - kept).sqrt() * drawn).repeat(len(captions), 1, 1, 1)
        total += (predict(noisy, timestep) - drawn).float().square().mean((1, 2, 3))
    return (total / len(TIMESTEPS)).tolist()


def other_captions(caption: str, kind: str, world: World) -> list[str]:
    """The caption with its first thing's colour or shape replaced by every other one.

    Pairs of shape and colour that the world never shows are left out: no model can know what they look like.
    """
    words = caption.split()
    at_colour = next(i for i, word in enumerate(words) if word in world.colours)
    at_shape = next(i for i, word in enumerate(words) if i > at_colour and word in world.shapes)
    found = []
    for other in world.colours if kind == "colour" else world.shapes:
        changed = list(words)
        changed[at_colour if kind == "colour" else at_shape] = other
        if changed != words and (changed[at_shape], changed[at_colour]) not in world.unseen:
            found.append(" ".join(with_article(changed, at_colour)))
    return found


def with_article(words: list[str], at: int) -> list[str]:
    """Say "an" before a vowel where the article stands right before the word."""
    if at and words[at - 1] in ("a", "an"):
        words[at - 1] = "an" if words[at][0] in "aeiou" else "a"
    return words
