"""Scores of the tiny world: caption fidelity, agreement with the full-precision image, FID, KID and CMMD."""

import numpy as np
import pytest
import torch

from vqdm.metrics.distribution import FrechetDistance, Gaussian, cmmd, kid
from vqdm.metrics.extractors import make_extractor
from vqdm.metrics.resampling import Resamples
from vqdm.metrics.scores import score
from vqdm.metrics.tiny_world import _agreement, fidelity_scores, standardised
from vqdm.models.shipped import evaluators_directory
from vqdm.tiny.attributes import KINDS, Seen, as_seen, fidelity, look
from vqdm.tiny.captions import caption_of, requested
from vqdm.tiny.evaluator import load_reference, to_tensor
from vqdm.tiny.scenes import draw_scene, render

N = 40


def fid(real, fake):
    return FrechetDistance(Gaussian.of(real))(fake)


@pytest.fixture(scope="module")
def world():
    """(pixels, captions, scenes) of real renders."""
    scenes = [draw_scene(0, "test", i) for i in range(N)]
    captions = [caption_of(s, seed=0, split="test", index=i) for i, s in enumerate(scenes)]
    return render(scenes), captions, scenes


@pytest.fixture(scope="module")
def extractor():
    return make_extractor("tiny", [evaluators_directory(None)], device="cpu")


@pytest.fixture(scope="module")
def columns(world, extractor):
    pixels, captions, _ = world
    return extractor.columns(list(pixels), captions), extractor.columns(list(255 - pixels), captions)


@pytest.fixture(scope="module")
def reference():
    return load_reference(evaluators_directory(None))


def scored(own, originals, captions, reference, *, copies=1):
    resamples = Resamples(len(captions) // copies, copies, count=5)
    return score("tiny", own, originals, captions=captions, reference=reference, resamples=resamples)


def test_columns_are_what_the_networks_see_one_by_one(world, extractor, columns):
    pixels, captions, _ = world
    own, _ = columns
    for index in (0, 7):
        alone = extractor.columns([pixels[index]], captions[index : index + 1])
        for name, column in alone.items():
            assert torch.allclose(column[0].double(), own[name][index].double(), atol=1e-4)
    with torch.no_grad():
        seen = extractor.clip.encode_image(to_tensor(pixels))
    assert torch.allclose(own["image"], seen / seen.norm(dim=1, keepdim=True), atol=1e-5)
    assert own["labels"].dtype == torch.int64 and "cosine" not in extractor.columns(list(pixels[:2]))


def test_fidelity_scores_of_the_truth_and_of_one_mistake(world):
    _, captions, scenes = world
    truth = [as_seen(scene) for scene in scenes]
    scores = fidelity_scores(captions, truth)
    assert scores.keys() == {"fidelity", *(f"fidelity_{kind}" for kind in KINDS)}
    assert {found["value"] for found in scores.values()} == {1.0}
    shape, colour, size = truth[0].things[0]
    wrong = (shape, "red" if colour != "red" else "blue", size)
    mistaken = Seen(truth[0].layout, (wrong, *truth[0].things[1:]), truth[0].background, truth[0].pattern)
    worse = fidelity_scores(captions, [mistaken, *truth[1:]])
    things = sum(len(scene.things) for scene in scenes)
    assert worse["fidelity_colour"]["value"] == pytest.approx(1 - 1 / things)
    assert worse["fidelity_shape"]["value"] == 1.0
    assert 1 - 1 / (3 * things) < worse["fidelity"]["value"] < 1


def test_agreement_counts_equal_attributes_slot_by_slot():
    red, blue = ("circle", "red", "small"), ("square", "blue", "large")
    two = Seen("left", (red, blue), "gray", "plain")
    assert _agreement(two, two) == 1
    assert _agreement(two, Seen("left", (blue, red), "gray", "plain")) == pytest.approx(3 / 9)
    assert _agreement(two, Seen("left", (red, ("ring", "blue", "large")), "pink", "plain")) == pytest.approx(7 / 9)
    one = Seen("single", (red,), "gray", "plain")
    assert _agreement(two, one) == _agreement(one, two) == pytest.approx(5 / 9)


def test_every_images_own_scores(world, columns, reference, extractor):
    """Fidelity attribute by attribute; distances in units of the reference's spread."""
    _, captions, _ = world
    own, negatives = columns
    images = scored(negatives, own, captions, reference).images
    spread = reference["features"].numpy().std(axis=0, ddof=1)
    distances = np.linalg.norm((negatives["features"] - own["features"]).numpy() / spread, axis=1)
    assert images["distance_to_fp"] == pytest.approx(distances, rel=1e-5)
    assert np.array_equal(images["clip_score"], negatives["cosine"].numpy())
    seen = look(extractor.net, negatives["features"])
    for index, caption in enumerate(captions):
        tally = fidelity(requested(caption), seen[index]).values()
        found, asked = sum(f for f, _ in tally), sum(a for _, a in tally)
        assert images["fidelity"][index] == pytest.approx(found / asked)
        assert images["all_right"][index] == float(found == asked)


def test_against_themselves(world, columns, reference):
    _, captions, _ = world
    own, negatives = columns
    same, away = scored(own, own, captions, reference), scored(negatives, own, captions, reference)
    assert np.all(same.images["distance_to_fp"] == 0) and np.all(same.images["agreement_with_fp"] == 1)
    assert same.sets["fid_to_fp"]["value"] == pytest.approx(0, abs=1e-4)
    assert away.sets["fid_to_fp"]["value"] > 1 and away.sets["cmmd"]["value"] > same.sets["cmmd"]["value"]
    alone = scored(own, None, captions, reference)
    assert not [name for name in (*alone.images, *alone.sets) if name.endswith("_fp")]


def test_scores_of_the_set_are_those_of_standardised_features(world, columns, reference):
    _, captions, _ = world
    own, negatives = columns
    sets = scored(negatives, own, captions, reference).sets
    mean, spread = reference["features"].mean(0), reference["features"].std(0)
    real, fake, original = (
        (f - mean) / spread for f in (reference["features"], negatives["features"], own["features"])
    )
    assert sets["fid"]["value"] == pytest.approx(fid(real, fake), rel=1e-6)
    assert sets["kid"]["value"] == pytest.approx(float(kid(real, fake)), rel=1e-6)
    assert sets["fid_to_fp"]["value"] == pytest.approx(fid(original, fake), rel=1e-6)
    assert sets["cmmd"]["value"] == pytest.approx(float(cmmd(reference["image"], negatives["image"])), rel=1e-6)
    assert "n too small for FID: 40 images" in sets["fid"]["note"] and "note" not in sets["fidelity"]


def test_a_feature_that_renders_hardly_stir_does_not_outweigh_the_others():
    """A deviation of five in a feature whose spread is 1e-4 moves one image by about five units, not by 50,000."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(200, 6, generator=generator) * torch.tensor([8.0, 9, 10, 11, 12, 1e-4])
    stirred = features.clone()
    stirred[3, 5] = 5.0
    plain = (features - features.mean(0)) / features.std(0)
    assert torch.allclose(standardised(features, features)[:, :5], plain[:, :5], atol=1e-5)
    moved = (standardised(stirred, features) - standardised(features, features)).abs()
    assert 4 < moved.max() < 6 and moved.max() == moved[3, 5], "a tenth of the median spread, about 1"


@pytest.mark.parametrize("name", ["tiny", "small"])
def test_spreads_of_the_shipped_features(name):
    """All of tiny's count as they are; nine of small's 96 are as good as dead."""
    features = load_reference(evaluators_directory(name))["features"]
    spread = features.std(0)
    assert int((spread < 0.1 * spread.median()).sum()) == {"tiny": 0, "small": 9}[name]


def test_copies_of_a_prompt_are_drawn_together(world, columns, reference):
    """20 prompts of two images each: FIDs of the draws by hand."""
    _, captions, _ = world
    own, _ = columns
    captions = [caption for caption in captions[:20] for _ in range(2)]
    found = scored(own, None, captions, reference, copies=2).sets["fid"]
    mean, spread = reference["features"].mean(0), reference["features"].std(0)
    real, fake = ((f - mean) / spread for f in (reference["features"], own["features"]))
    drawn = Resamples(20, 2, count=5).draws()
    values = [fid(real, torch.cat([fake[[2 * p, 2 * p + 1]] for p in prompts.tolist()])) for prompts in drawn]
    assert found["se"] == pytest.approx(np.std(values, ddof=1), rel=1e-6)
    assert found["bias"] == pytest.approx(np.mean(values) - fid(real, fake), rel=1e-6)


def test_tensors_keep_pixels_in_place():
    images = np.random.default_rng(0).integers(0, 256, (2, 4, 5, 3), dtype=np.uint8)
    tensor = to_tensor(images)
    assert tensor.shape == (2, 3, 4, 5)
    assert float(tensor[1, 2, 3, 4]) == pytest.approx(images[1, 3, 4, 2] / 127.5 - 1)
    assert to_tensor(np.array([[[[0, 255, 0]]]], np.uint8)).flatten().tolist() == [-1, 1, -1]
