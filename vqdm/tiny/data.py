"""Scenes in memory for training, and on disk in official COCO annotation format."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from vqdm.tiny.captions import caption_of
from vqdm.tiny.scenes import IMAGE_SIZE, WORLD_SEED, draw_scenes, render


class SceneSet:
    """n scenes of a split from `start` on: their renders as uint8, and one caption each."""

    def __init__(self, *, seed: int, split: str, n: int, start: int = 0):
        self.scenes = draw_scenes(seed, split, range(start, start + n))
        self.pixels = np.concatenate([render(self.scenes[i : i + 1024]) for i in range(0, n, 1024)])
        self.captions = [caption_of(s, seed=seed, split=split, index=start + i) for i, s in enumerate(self.scenes)]

    def __len__(self) -> int:
        return len(self.scenes)

    def pick(self, count: int, generator: torch.Generator) -> torch.Tensor:
        return torch.randint(len(self), (count,), generator=generator)

    def images(self, indices: torch.Tensor) -> torch.Tensor:
        """Chosen renders as float [n, 3, 32, 32] in [-1, 1]."""
        return torch.from_numpy(self.pixels[indices.numpy()]).permute(0, 3, 1, 2).float() / 127.5 - 1


def scene_pixels(prompt_id: str) -> np.ndarray:
    """The render of the scene behind a prompt id `<split>-<index>` of the tiny world: uint8 [32, 32, 3]."""
    split, _, index = prompt_id.rpartition("-")
    return render(draw_scenes(WORLD_SEED, split, [int(index)]))[0]


def write_coco(directory: Path, *, seed: int, split: str, n: int) -> Path:
    """Write n scenes as `<split>/*.png` and `annotations/captions_<split>.json`; returns the JSON's path."""
    scenes = SceneSet(seed=seed, split=split, n=n)
    folder = directory / split
    folder.mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for index, (pixels, caption) in enumerate(zip(scenes.pixels, scenes.captions, strict=True)):
        name = f"{index:012d}.png"
        Image.fromarray(pixels).save(folder / name)
        images.append({"id": index, "file_name": name, "height": IMAGE_SIZE, "width": IMAGE_SIZE})
        annotations.append({"id": index, "image_id": index, "caption": caption})
    path = directory / "annotations" / f"captions_{split}.json"
    path.parent.mkdir(exist_ok=True)
    info = {"description": f"vqdm tiny world, split {split}, seed {seed}", "version": "1"}
    path.write_text(json.dumps({"info": info, "images": images, "annotations": annotations}))
    return path
