"""Edits of pictures that a model did not make: a render's first thing gets another colour, by caption alone.

By inversion: the picture's latent is taken up DDIM's way without guidance, and from four fifths of the way sampled down
with the other caption. By region: the same from seven tenths, with the kept latents put back outside a mask. The world
renders the truth of every edit, and its attribute network reads the result; no image of another model is needed.
"""

import dataclasses
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vqdm.metrics.paired import SMALLEST_ERROR, psnr
from vqdm.metrics.probes.asked import Asked
from vqdm.metrics.probes.drawn import STEPS, Drawn, shares
from vqdm.metrics.probes.inversion import Ddim
from vqdm.metrics.probes.recovery import other_captions
from vqdm.seeds import numpy_generator
from vqdm.tiny.attributes import as_seen
from vqdm.tiny.captions import requested
from vqdm.tiny.scenes import WORLD_SEED, draw_scene, render
from vqdm.tiny.world import Scene, World

START, REGION_START = 16, 14  # levels from which an edit goes down: strengths .8 and .7


@dataclasses.dataclass(frozen=True)
class Edit:
    """A scene and its caption, and both as they should be after the edit. slot: the thing that changes."""

    scene: Scene
    caption: str
    edited: Scene
    asked: str
    slot: int


def draw_edit(name: str, caption: str, world: World) -> Edit:
    """Draw the edit of a prompt, such as test-000017: another colour, never into a pair that the world never shows."""
    split, _, index = name.rpartition("-")
    scene = draw_scene(WORLD_SEED, split, int(index), world=world)
    others = other_captions(caption, "colour", world)
    asked = others[numpy_generator(WORLD_SEED, f"edits/{split}", int(index)).integers(len(others))]
    before, after = (requested(text, world=world).things for text in (caption, asked))
    slot = next(i for i, (one, other) in enumerate(zip(before, after, strict=True)) if one != other)
    things = list(scene.things)
    things[slot] = dataclasses.replace(things[slot], colour=after[slot].colour)
    return Edit(scene, caption, dataclasses.replace(scene, things=tuple(things)), asked, slot)


class Edits:
    """Extractor of a model: columns {edit_…, region_…, reconstruction_psnr} with a row for each prompt of its world.

    evaluators: the directory of the world's attribute network. guidance: that of the model's own sampler.
    """

    def __init__(self, pipeline, world: World, evaluators: Path, *, guidance: float):
        self.drawn = Drawn(pipeline, world, evaluators, family="edits", guidance=guidance)

    @torch.no_grad()
    def columns(self, prompts: list[list[str]]) -> dict[str, Tensor]:
        """Columns of prompts, each an id such as test-000017 and its caption."""
        drawn, world = self.drawn, self.drawn.world
        edits = [draw_edit(name, caption, world) for name, caption in prompts]
        before = render([edit.scene for edit in edits], world=world)
        truth = render([edit.edited for edit in edits], world=world)
        captions = [edit.caption for edit in edits], [edit.asked for edit in edits]
        changed = (before != truth).any(-1)
        found = edit_pictures(drawn.asked, drawn.ddim, before, captions, changed=changed, guidance=drawn.guidance)
        scores = {
            score: column
            for name, pictures in found.edited.items()
            for score, column in self._scores(name, pictures, edits, truth, regions=found.regions).items()
        }
        return scores | {"reconstruction_psnr": found.reconstruction}

    def _scores(
        self, name: str, pictures: np.ndarray, edits: list[Edit], truth: np.ndarray, *, regions: dict[str, np.ndarray]
    ) -> dict[str, Tensor]:
        """Scores of edited pictures against the truth: what the attribute network sees, and PSNR in each region."""
        seen, world = self.drawn.seen(pictures), self.drawn.world
        wanted = [as_seen(edit.edited, world=world) for edit in edits]
        at = list(world.thing_kinds).index("colour")
        success = [
            len(one.things) > edit.slot and one.things[edit.slot][at] == edit.edited.things[edit.slot].colour
            for one, edit in zip(seen, edits, strict=True)
        ]
        return {
            f"{name}_success": shares(success),
            f"{name}_exact": shares(one == other for one, other in zip(seen, wanted, strict=True)),
            **{f"{name}_psnr_{where}": psnr_where(mask, pictures, truth) for where, mask in regions.items()},
        }


@dataclasses.dataclass(frozen=True)
class EditedPictures:
    """Pictures [n, h, w, 3] after both ways of editing, and where they were to change.

    edited: by inversion ("edit") and by region ("region"). regions: masks [n, h, w] of the pixels that had to change
    ("in") and of those in latent cells where none had to ("out"). reconstruction: dB [n] of the unedited picture after
    DDIM up and down without guidance, to its decoded latent.
    """

    edited: dict[str, np.ndarray]
    regions: dict[str, np.ndarray]
    reconstruction: Tensor


def edit_pictures(
    asked: Asked,
    ddim: Ddim,
    before: np.ndarray,
    captions: tuple[list[str], list[str]],
    *,
    changed: np.ndarray,
    guidance: float,
) -> EditedPictures:
    """Edit pictures uint8 [n, h, w, 3] from their captions to others, in the pixels [n, h, w] that have to change."""
    unguided, guided = asked.noise_with(captions[0]), asked.noise_with(captions[1], guidance)
    kept = ddim.invert(asked.latents(before), unguided)
    side = before.shape[1] // kept[0].shape[-1]
    cells = cells_of(changed, side)
    mask = torch.from_numpy(cells)[:, None].to(asked.device)
    edited = {
        "edit": ddim.sample(kept, guided, start=START),
        "region": ddim.sample(kept, guided, start=REGION_START, mask=mask),
    }
    again = ddim.sample(kept, unguided, start=STEPS)
    both = (torch.from_numpy(asked.pictures(latents)).permute(0, 3, 1, 2) for latents in (again, kept[0]))
    return EditedPictures(
        edited={name: asked.pictures(latents) for name, latents in edited.items()},
        regions={"in": changed, "out": ~cells.repeat(side, 1).repeat(side, 2)},
        reconstruction=psnr(*both),
    )


def cells_of(changed: np.ndarray, side: int) -> np.ndarray:
    """The latent cells [n, h / side, w / side], of `side`² pixels each, in which any pixel [n, h, w] changed."""
    n, height, width = changed.shape
    return changed.reshape(n, height // side, side, width // side, side).any((2, 4))


def psnr_where(mask: np.ndarray, pictures: np.ndarray, truth: np.ndarray) -> Tensor:
    """PSNR in dB over the pixels of each picture where its mask [n, h, w] is True: float64 [n], at most 58.9."""
    squares = np.square(pictures.astype(np.float64) - truth).mean(-1)
    error = np.where(mask, squares, 0).sum((1, 2)) / np.maximum(mask.sum((1, 2)), 1)
    return torch.from_numpy(-10 * np.log10(np.maximum(error / 255**2, SMALLEST_ERROR)))
