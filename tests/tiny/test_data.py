import json

import numpy as np
import pytest
import torch
from PIL import Image

from vqdm.prompts import load_prompts
from vqdm.tiny.captions import caption_of
from vqdm.tiny.data import SceneSet, write_coco
from vqdm.tiny.scenes import draw_scene, render

N = 12


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    folder = tmp_path_factory.mktemp("coco")
    return folder, write_coco(folder, seed=5, split="test", n=N)


def test_file_is_read_as_a_list_of_prompts_with_the_same_captions(coco):
    _, path = coco
    prompts = load_prompts(source="file", path=str(path))
    scenes = [draw_scene(5, "test", i) for i in range(N)]
    assert prompts.texts == [caption_of(s, seed=5, split="test", index=i) for i, s in enumerate(scenes)]
    assert [prompt.id for prompt in prompts.prompts] == [str(i) for i in range(N)]


def test_seed_0_gives_the_prompts_of_source_tiny(tmp_path):
    path = write_coco(tmp_path, seed=0, split="validation", n=4)
    shipped = load_prompts(source="tiny", split="validation", n=4)
    assert load_prompts(source="file", path=str(path)).texts == shipped.texts


def test_annotations_have_the_official_fields(coco):
    folder, path = coco
    assert path == folder / "annotations" / "captions_test.json"
    document = json.loads(path.read_text())
    assert document.keys() == {"info", "images", "annotations"}
    for image, annotation in zip(document["images"], document["annotations"], strict=True):
        assert image.keys() == {"id", "file_name", "height", "width"}
        assert annotation.keys() == {"id", "image_id", "caption"}
        assert annotation["image_id"] == image["id"]
        with Image.open(folder / "test" / image["file_name"]) as picture:
            assert picture.size == (image["width"], image["height"])


def test_pictures_are_the_renders(coco):
    folder, _ = coco
    files = sorted((folder / "test").iterdir())
    assert [file.name for file in files] == [f"{i:012d}.png" for i in range(N)]
    pixels = np.stack([np.asarray(Image.open(file)) for file in files])
    assert np.array_equal(pixels, render([draw_scene(5, "test", i) for i in range(N)]))


def test_a_set_from_the_middle_is_a_part_of_the_whole():
    whole = SceneSet(seed=2, split="train", n=9)
    part = SceneSet(seed=2, split="train", n=4, start=5)
    assert len(part) == 4
    assert part.scenes == whole.scenes[5:]
    assert part.captions == whole.captions[5:]
    assert np.array_equal(part.pixels, whole.pixels[5:])


def test_images_are_the_pixels_between_minus_1_and_1():
    scenes = SceneSet(seed=2, split="train", n=6)
    images = scenes.images(torch.tensor([4, 0, 4]))
    assert images.shape == (3, 3, 32, 32)
    assert images.dtype == torch.float32
    back = ((images.double() + 1) * 127.5).round().permute(0, 2, 3, 1).numpy()
    assert np.array_equal(back, scenes.pixels[[4, 0, 4]])
    picked = scenes.pick(500, torch.Generator().manual_seed(0))
    assert set(picked.tolist()) == set(range(6))
    assert torch.equal(picked, scenes.pick(500, torch.Generator().manual_seed(0)))
