"""Inception features against torch-fidelity's extractor as it loads and feeds itself, from one random weights file."""

import numpy as np
import pytest
import torch
from PIL import Image
from random_networks import photographs, random_inception, textures
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from vqdm.metrics.extractors import make_extractor
from vqdm.metrics.inception import crop_256


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return random_inception(tmp_path_factory.mktemp("inception"))


@pytest.fixture(scope="module")
def direct(weights):
    """image -> its features and logits, by torch-fidelity from the file itself."""
    net = FeatureExtractorInceptionV3("direct", ["2048", "logits_unbiased"], feature_extractor_weights_path=weights)
    return lambda image: net(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None])


def agree(found, expected):
    gap = np.linalg.norm(found.numpy() - expected.numpy(), axis=1) / np.linalg.norm(expected.numpy(), axis=1)
    assert gap.max() <= 1e-3


def spread_apart(features):
    """Not all alike: otherwise it would say nothing that they agree."""
    centred = features - features.mean(0)
    return float(centred.norm(dim=1).min() / features.norm(dim=1).max()) > 0.02


@pytest.mark.parametrize("sizes", [[(64, 64)] * 3, [(299, 299)] * 2, [(32, 32), (120, 77), (320, 480)]])
def test_standard_features_are_those_of_torch_fidelity(weights, direct, sizes):
    images = [textures(1, size, seed=i)[0] for i, size in enumerate(sizes)]
    found = make_extractor("fid_standard", [weights], device="cpu").columns(images)
    expected = [torch.cat(column) for column in zip(*map(direct, images), strict=True)]
    assert found["features"].shape == (len(images), 2048) and found["logits"].shape == (len(images), 1008)
    for name, column in zip(("features", "logits"), expected, strict=True):
        agree(found[name], column)
    assert spread_apart(found["features"])


def by_hand(image: np.ndarray) -> np.ndarray:
    """Short side 256 by Pillow's LANCZOS, the long one rounded down, and the middle 256 × 256."""
    height, width = image.shape[:2]
    short = min(height, width)
    size = [256 if side == short else int(256 * side / short) for side in (width, height)]
    resized = Image.fromarray(image).resize(size, Image.Resampling.LANCZOS)
    left, top = (round((side - 256) / 2) for side in size)
    return np.asarray(resized.crop((left, top, left + 256, top + 256)))


@pytest.mark.parametrize("size", [(1024, 1024), (512, 512), (427, 640), (640, 427), (256, 256), (200, 300), (333, 334)])
def test_the_papers_resize_is_pillows_to_the_pixel(size):
    image = textures(1, size, seed=2)[0]
    assert np.array_equal(crop_256(image), by_hand(image))


def test_paper_features_are_those_of_the_resized_images(weights, direct):
    images = [textures(1, size, seed=i)[0] for i, size in enumerate([(512, 512), (300, 470)])]
    found = make_extractor("fid_paper", [weights], device="cpu").columns(images)["features"]
    agree(found, torch.cat([direct(by_hand(image))[0] for image in images]))


def test_photographs(weights, direct):
    pictures = photographs(3)
    if not pictures:
        pytest.skip("no photographs in ../shared/data/coco/mini")
    standard = make_extractor("fid_standard", [weights], device="cpu").columns(pictures)["features"]
    agree(standard, torch.cat([direct(picture)[0] for picture in pictures]))
    paper = make_extractor("fid_paper", [weights], device="cpu").columns(pictures)["features"]
    agree(paper, torch.cat([direct(by_hand(picture))[0] for picture in pictures]))
    assert spread_apart(standard) and not torch.allclose(paper, standard, rtol=1e-3)


def test_a_safetensors_file_serves_as_well(weights):
    image = textures(1, (64, 64))
    files = [weights, weights.with_suffix(".safetensors")]
    first, second = (make_extractor("fid_standard", [file], device="cpu").columns(image) for file in files)
    assert torch.equal(first["features"], second["features"])
