"""Scenes in memory for training, and on disk in official COCO annotation format."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from vqdm.tiny.captions import caption_of
from vqdm.tiny.scenes import TINY, WORLD_SEED, draw_scenes, render
from vqdm.tiny.world import World


class SceneSet:
    """n scenes of a split from `start` on: their renders as uint8, and one caption each."""

    def __init__(self, *, seed: int, split: str, n: int, start: int = 0, world: World = TINY):
        self.world = world
        self.scenes = draw_scenes(seed, split, range(start, start + n), world=world)
        self.pixels = np.concatenate([render(self.scenes[i : i + 1024], world=world) for i in range(0, n, 1024)])
        numbered = enumerate(self.scenes, start)
        self.captions = [caption_of(s, seed=seed, split=split, index=i, world=world) for i, s in numbered]

    def __len__(self) -> int:
        return len(self.scenes)

    def pick(self, count: int, generator: torch.Generator) -> torch.Tensor:
        return torch.randint(len(self), (count,), generator=generator, device="cpu")

    def images(self, indices: torch.Tensor) -> torch.Tensor:
        """Chosen renders as float [n, 3, size, size] in [-1, 1]."""
        return torch.from_numpy(self.pixels[indices.numpy()]).permute(0, 3, 1, 2).float() / 127.5 - 1


def scene_pixels(prompt_id: str, *, world: World = TINY) -> np.ndarray:
    """The render of the scene behind a prompt id `<split>-<index>` of a world: uint8 [size, size, 3]."""
    split, _, index = prompt_id.rpartition("-")
    return render(draw_scenes(WORLD_SEED, split, [int(index)], world=world), world=world)[0]


def write_coco(directory: Path, *, seed: int, split: str, n: int, world: World = TINY) -> Path:
    """Write n scenes as `<split>/*.png` and `annotations/captions_<split>.json`; returns the JSON's path."""
    scenes = SceneSet(seed=seed, split=split, n=n, world=world)
    folder = directory / split
    folder.mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for index, (pixels, caption) in enumerate(zip(scenes.pixels, scenes.captions, strict=True)):
        name = f"{index:012d}.png"
        Image.fromarray(pixels).save(folder / name)
        images.append({"id": index, "file_name": name, "height": world.image_size, "width": world.image_size})
        annotations.append({"id": index, "image_id": index, "caption": caption})
    path = directory / "annotations" / f"captions_{split}.json"
    path.parent.mkdir(exist_ok=True)
    info = {"description": f"vqdm {world.name} world, split {split}, seed {seed}", "version": "1"}
    path.write_text(json.dumps({"info": info, "images": images, "annotations": annotations}))
    return path
