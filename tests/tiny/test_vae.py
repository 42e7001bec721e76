"""What the VAE of a world is trained on."""

import dataclasses

import numpy as np
import torch

from vqdm.stages.tiny_train.vae import CROP, crops_of_things
from vqdm.tiny.data import SceneSet
from vqdm.tiny.small import SMALL

PLACES = ((0, 0), (63, 20), (31, 31), (63, 63))


def test_crops_are_parts_of_their_scenes_with_a_thing_in_them():
    scenes = SceneSet(seed=3, split="train", n=1, world=SMALL)
    (scene,) = scenes.scenes
    things = [dataclasses.replace(scene.things[0], x=x, y=y) for x, y in PLACES]
    scenes.scenes = [dataclasses.replace(scene, things=(thing,)) for thing in things]
    pixels = np.zeros((len(PLACES), 64, 64, 3), np.uint8)  # whose colour is their place
    pixels[..., 0], pixels[..., 1] = np.meshgrid(np.arange(64), np.arange(64))
    scenes.pixels = pixels
    rows = scenes.pick(40, torch.Generator().manual_seed(0)).tolist()
    crops = crops_of_things(scenes, 40, torch.Generator().manual_seed(0))
    corners = set()
    for row, (across, down, _) in zip(rows, (127.5 * (crops + 1)).round().int(), strict=True):
        left, top = int(across[0, 0]), int(down[0, 0])
        assert torch.equal(across, torch.arange(left, left + CROP).expand(CROP, CROP).int())
        assert torch.equal(down, torch.arange(top, top + CROP)[:, None].expand(CROP, CROP).int())
        assert left <= things[row].x <= left + CROP and top <= things[row].y <= top + CROP
        corners.add((left, top))
    assert len(corners) > 8
