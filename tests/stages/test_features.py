"""Features are computed once, batch after batch, of the images that are there now."""

import numpy as np
import pytest
import torch
from PIL import Image

from vqdm.runs.items import write_item
from vqdm.stages.features import environments, extract, load_columns
from vqdm.stages.layout import png_bytes

BATCH = 4


def pixels(seed, index, changed=False):
    return np.random.default_rng([seed, index, int(changed)]).integers(0, 256, (8, 8, 3), dtype=np.uint8)


def write_images(directory, count, *, seed=0, changed=()):
    directory.mkdir(exist_ok=True)
    for start in range(0, count, BATCH):
        files, prompts = {}, []
        for i in range(start, min(start + BATCH, count)):
            files[f"images/{i:06d}.png"] = png_bytes(Image.fromarray(pixels(seed, i, i in changed)))
            prompts.append([f"p{i}", f"caption {i}"])
        write_item(directory, f"{start:06d}", files, {"prompts": prompts})
    return directory


class Means:
    """Mean of each image and length of its caption; counts how many images it has seen."""

    def __init__(self):
        self.seen = 0

    def columns(self, images, others):
        self.seen += len(images)
        if isinstance(others, list):
            lengths = torch.tensor([float(len(caption)) for caption in others])
            return {"mean": torch.tensor([float(image.mean()) for image in images]), "length": lengths}
        return {"gap": torch.from_numpy(np.abs(images.astype(float) - others).mean((1, 2, 3)))}


def look(directory, images, count, originals=None):
    directory.mkdir(exist_ok=True)
    extractor = Means()
    extract(
        directory, images, originals, count=count, batch_size=BATCH, make_extractor=lambda: extractor,
        environment={"device": "cpu"},
    )  # fmt: skip
    return extractor.seen


def expected(count, *, seed=0, changed=()):
    return [pixels(seed, i, i in changed).mean() for i in range(count)]


def test_columns_have_a_row_for_every_image(tmp_path):
    images = write_images(tmp_path / "images", 10)
    assert look(tmp_path / "features", images, 10) == 10
    columns = load_columns(tmp_path / "features", 10, BATCH)
    assert columns["mean"].tolist() == pytest.approx(expected(10), rel=1e-6)
    assert columns["length"].tolist() == [9.0] * 10
    assert load_columns(tmp_path / "features", 7, BATCH)["mean"].tolist() == columns["mean"][:7].tolist()
    assert environments(tmp_path / "features", 10, BATCH) == [{"device": "cpu"}]


def test_only_what_is_new_or_changed_is_looked_at(tmp_path):
    images = write_images(tmp_path / "images", 8)
    assert look(tmp_path / "features", images, 8) == 8
    assert look(tmp_path / "features", images, 8) == 0
    assert look(tmp_path / "features", images, 6) == 0
    write_images(tmp_path / "images", 10)
    assert look(tmp_path / "features", images, 10) == 2
    write_images(tmp_path / "images", 10, changed={5})
    assert look(tmp_path / "features", images, 10) == 4, "the batch with the changed image"
    columns = load_columns(tmp_path / "features", 10, BATCH)
    assert columns["mean"].tolist() == pytest.approx(expected(10, changed={5}), rel=1e-6)


def test_a_damaged_file_of_features_is_made_again(tmp_path):
    images = write_images(tmp_path / "images", 8)
    look(tmp_path / "features", images, 8)
    (tmp_path / "features" / "features" / "000004.safetensors").write_bytes(b"torn")
    assert look(tmp_path / "features", images, 8) == 4
    assert load_columns(tmp_path / "features", 8, BATCH)["mean"].tolist() == pytest.approx(expected(8), rel=1e-6)


def test_pairs_hang_on_both_sets(tmp_path):
    images, originals = write_images(tmp_path / "images", 6), write_images(tmp_path / "originals", 6, seed=1)
    assert look(tmp_path / "features", images, 6, originals) == 6
    gaps = load_columns(tmp_path / "features", 6, BATCH)["gap"].tolist()
    assert gaps[0] == pytest.approx(np.abs(pixels(0, 0).astype(float) - pixels(1, 0)).mean())
    write_images(tmp_path / "originals", 6, seed=1, changed={5})
    assert look(tmp_path / "features", images, 6, originals) == 2
