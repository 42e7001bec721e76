import numpy as np
import pytest
import scipy.stats
import torch
from torchmetrics.functional.image import peak_signal_noise_ratio

from vqdm.metrics.attributes import KINDS, AttributeNet, Seen, as_seen
from vqdm.metrics.paired import feature_distance, psnr
from vqdm.metrics.tiny_world import (
    Evaluators,
    _agreement,
    _ratio,
    fidelity_scores,
    image_scores,
    mean_and_error,
    set_scores,
    to_tensor,
)
from vqdm.tiny.captions import caption_of
from vqdm.tiny.scenes import draw_scene, render


def noise(shape, *, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("difference", [1, 3, 51, 255])
def test_psnr_of_a_constant_difference(difference):
    """Also where uint8 would wrap around."""
    dark = np.zeros((2, 4, 5, 3), np.uint8)
    light = np.full((2, 4, 5, 3), difference, np.uint8)
    expected = [20 * np.log10(255 / difference)] * 2
    assert psnr(dark, light) == pytest.approx(expected)
    assert psnr(light, dark) == pytest.approx(expected)


def test_psnr_is_that_of_torchmetrics_image_by_image():
    images, originals = noise((5, 8, 8, 3)), noise((5, 8, 8, 3), seed=1)
    images[3] = np.clip(originals[3].astype(int) + 2, 0, 255)
    pairs = zip(torch.from_numpy(images), torch.from_numpy(originals), strict=True)
    expected = [float(peak_signal_noise_ratio(a.double(), b.double(), data_range=255.0)) for a, b in pairs]
    assert psnr(images, originals) == pytest.approx(expected, rel=1e-6)


def test_identical_images_get_the_cap_and_no_others_get_more():
    """The cap: an error spread evenly over half a level to each side, (1/255)²/12."""
    images = noise((2, 8, 8, 3))
    cap = 20 * np.log10(255) + 10 * np.log10(12)
    assert psnr(images, images) == pytest.approx([cap, cap])
    nearly = images.copy()
    nearly[0, 0, 0, 0] ^= 1
    assert psnr(nearly, images)[0] <= cap
    assert round(cap, 1) == 58.9


def test_feature_distance_is_euclidean_row_by_row():
    first, second = torch.from_numpy(noise((6, 4))).double(), torch.from_numpy(noise((6, 4), seed=2)).double()
    expected = [np.sqrt(((a - b) ** 2).sum()) for a, b in zip(first.numpy(), second.numpy(), strict=True)]
    assert feature_distance(first, second).tolist() == pytest.approx(expected)


def resampled(statistic, n, *, times=4000):
    rng = np.random.default_rng(0)
    return np.std([statistic(rng.integers(0, n, n)) for _ in range(times)])


def test_ratio_has_the_error_of_a_bootstrap():
    rng = np.random.default_rng(1)
    asked = rng.integers(2, 9, 300).astype(float)
    found = rng.binomial(asked.astype(int), rng.beta(4, 2, 300)).astype(float)  # right or wrong together, in an image
    score = _ratio(found, asked)
    assert score["value"] == found.sum() / asked.sum()
    assert score["se"] == pytest.approx(resampled(lambda i: found[i].sum() / asked[i].sum(), 300), rel=0.06)


def test_ratio_where_many_images_ask_for_nothing():
    rng = np.random.default_rng(2)
    asked = rng.integers(0, 2, 400).astype(float)
    found = asked * (rng.random(400) < 0.7)
    score = _ratio(found, asked)
    assert score["se"] == pytest.approx(resampled(lambda i: found[i].sum() / asked[i].sum(), 400), rel=0.06)
    share, n = found.sum() / asked.sum(), asked.sum()
    assert score["se"] == pytest.approx(np.sqrt(share * (1 - share) / n), rel=0.02)  # binomial


def test_ratio_of_nothing_is_no_number():
    assert all(np.isnan(value) for value in _ratio(np.zeros(5), np.zeros(5)).values())


def test_mean_has_the_error_of_scipy_and_of_a_bootstrap():
    values = np.random.default_rng(3).gamma(2.0, size=250)
    score = mean_and_error(values)
    assert score["value"] == pytest.approx(values.mean())
    assert score["se"] == pytest.approx(scipy.stats.sem(values))
    assert score["se"] == pytest.approx(resampled(lambda i: values[i].mean(), 250), rel=0.06)
    assert mean_and_error(np.float32([0.1, 0.3]))["value"] == pytest.approx(0.2)
    assert np.isnan(mean_and_error([4.0])["se"])


def test_fidelity_scores_of_the_truth_and_of_one_mistake():
    scenes = [draw_scene(0, "test", i) for i in range(50)]
    captions = [caption_of(s, seed=0, split="test", index=i) for i, s in enumerate(scenes)]
    truth = [as_seen(scene) for scene in scenes]
    scores = fidelity_scores(captions, truth)
    assert scores.keys() == {"fidelity", "all_right", *(f"fidelity_{kind}" for kind in KINDS)}
    assert {score["value"] for score in scores.values()} == {1.0}
    shape, colour, size = truth[0].things[0]
    wrong = (shape, "red" if colour != "red" else "blue", size)
    mistaken = Seen(truth[0].layout, (wrong, *truth[0].things[1:]), truth[0].background, truth[0].pattern)
    worse = fidelity_scores(captions, [mistaken, *truth[1:]])
    things = sum(len(scene.things) for scene in scenes)
    assert worse["fidelity_colour"]["value"] == pytest.approx(1 - 1 / things)
    assert worse["all_right"]["value"] == pytest.approx(0.98)
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


def test_paired_scores_of_the_same_images_and_of_others():
    net = AttributeNet().eval().requires_grad_(False)
    reference = net(to_tensor(render([draw_scene(0, "reference", i) for i in range(40)])))
    evaluators = Evaluators(net, torch.nn.Identity(), None, reference)
    images = render([draw_scene(0, "test", i) for i in range(40)])
    scenes = [draw_scene(0, "test", i) for i in range(40)]
    captions = [caption_of(s, seed=0, split="test", index=i) for i, s in enumerate(scenes)]
    original, cosines = net(to_tensor(images)), torch.linspace(-1, 1, 40)
    columns = {"features": original, "original_features": original, "cosines": cosines}
    same = image_scores(evaluators, columns, captions)
    assert np.all(same["distance_to_fp"] == 0) and np.all(same["agreement_with_fp"] == 1)
    assert np.array_equal(same["clip_score"], cosines.numpy())
    same_set = set_scores(evaluators, columns, captions, resamples=3, seed=0)
    assert same_set["fid_to_fp"]["value"] == pytest.approx(0, abs=1e-4)
    others = columns | {"features": net(to_tensor(255 - images))}
    spread = reference.numpy().std(axis=0, ddof=1)  # distances are in units of the reference's spread
    distances = np.linalg.norm((others["features"] - original).numpy() / spread, axis=1)
    assert image_scores(evaluators, others, captions)["distance_to_fp"] == pytest.approx(distances, rel=1e-5)
    away = set_scores(evaluators, others, captions, resamples=3, seed=0)
    assert away["fid_to_fp"]["value"] > 10 * abs(same_set["fid_to_fp"]["value"])
    assert "fid_to_fp" not in set_scores(
        evaluators, {"features": original, "cosines": cosines}, captions, resamples=3, seed=0
    )
    asked = image_scores(evaluators, columns, captions)
    assert set(np.unique(asked["all_right"])) <= {0.0, 1.0}
    assert np.array_equal(asked["fidelity"] == 1, asked["all_right"] == 1)


def test_tensors_keep_pixels_in_place():
    images = noise((2, 4, 5, 3))
    tensor = to_tensor(images)
    assert tensor.shape == (2, 3, 4, 5)
    assert float(tensor[1, 2, 3, 4]) == pytest.approx(images[1, 3, 4, 2] / 127.5 - 1)
    assert to_tensor(np.array([[[[0, 255, 0]]]], np.uint8)).flatten().tolist() == [-1, 1, -1]
