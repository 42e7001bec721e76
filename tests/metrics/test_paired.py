"""PSNR, SSIM and LPIPS against torchmetrics, scipy and the lpips package."""

import numpy as np
import pytest
import torch
from random_networks import photographs, random_alexnet, textures
from scipy.ndimage import gaussian_filter
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from vqdm.metrics import paired
from vqdm.metrics.extractors import make_extractor
from vqdm.metrics.paired import feature_distance


def psnr(*pair):
    return paired.psnr(*(torch.from_numpy(pixels).permute(0, 3, 1, 2) for pixels in pair)).numpy()


def ssim(*pair):
    return paired.ssim(*(torch.from_numpy(pixels).permute(0, 3, 1, 2) for pixels in pair)).numpy()


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


def slow_ssim(image, original):
    """Wang et al. 2004, eq. 13, with scipy's Gaussian of 11 pixels; images are mirrored at their edges."""
    x, y = image / 255.0, original / 255.0

    def blurred(channel):
        return gaussian_filter(channel, 1.5, radius=5, mode="mirror")

    maps = []
    for c in range(3):
        first, second = x[..., c], y[..., c]
        mean_x, mean_y = blurred(first), blurred(second)
        var_x, var_y = blurred(first**2) - mean_x**2, blurred(second**2) - mean_y**2
        covariance = blurred(first * second) - mean_x * mean_y
        light = (2 * mean_x * mean_y + 0.01**2) / (mean_x**2 + mean_y**2 + 0.01**2)
        maps.append(light * (2 * covariance + 0.03**2) / (var_x + var_y + 0.03**2))
    return np.mean(maps)


def blurred_pair(count, size):
    originals = np.stack(textures(count, size))
    images = np.stack([gaussian_filter(o, (0.3 + i, 0.3 + i, 0)) for i, o in enumerate(originals)])
    return images, originals


@pytest.mark.parametrize("size", [(32, 32), (40, 61)])
def test_ssim_is_the_formula(size):
    images, originals = blurred_pair(3, size)
    expected = [slow_ssim(*pair) for pair in zip(images, originals, strict=True)]
    assert ssim(images, originals) == pytest.approx(expected, abs=1e-6)
    assert min(expected) < 0.9
    assert ssim(images[:1], originals[:1]) == pytest.approx(expected[:1], abs=1e-6)
    assert ssim(originals, originals) == pytest.approx([1, 1, 1])


def _around(level, spread, *, seed):
    grain = np.random.default_rng(seed).integers(-spread, spread + 1, (1, 48, 48, 3))
    return np.clip(level + grain, 0, 255).astype(np.uint8)


def _half_and_half(*, seed):
    """Dark on the left, a bright sky with a grain of one level on the right: far from the image's mean."""
    return np.concatenate([_around(5, 1, seed=seed), _around(250, 1, seed=seed + 9)], 2)


@pytest.mark.parametrize(
    "pair",
    [
        (_around(250, 0, seed=0), _around(247, 0, seed=0)),
        (_around(250, 0, seed=0), _around(250, 1, seed=1)),
        (_around(250, 1, seed=2), _around(250, 1, seed=3)),
        (_around(128, 2, seed=4), _around(130, 2, seed=5)),
        (_around(255, 0, seed=0), _around(0, 0, seed=0)),
        (_half_and_half(seed=6), _half_and_half(seed=7)),
        (_around(128, 127, seed=6), _around(128, 127, seed=7)),
    ],
)
def test_ssim_holds_1e_5_where_float32_of_its_formula_does_not(pair):
    """Flat and bright pairs, against torchmetrics in float64; in float32 it is wrong by up to 2e-3."""
    doubles = (torch.from_numpy(pixels).permute(0, 3, 1, 2).double() / 255 for pixels in pair)
    expected = float(structural_similarity_index_measure(*doubles, data_range=1.0))
    assert ssim(*pair) == pytest.approx([expected], abs=1e-5)


def test_many_pairs_are_looked_at_in_parts(monkeypatch):
    images, originals = blurred_pair(5, (32, 40))
    whole = make_extractor("paired", [], device="cpu").columns(images, originals)
    monkeypatch.setattr(paired, "AT_ONCE", 2 * 32 * 40)
    parts = make_extractor("paired", [], device="cpu").columns(images, originals)
    assert all(parts[name].tolist() == pytest.approx(whole[name].tolist(), abs=1e-7) for name in ("psnr", "ssim"))


def test_pairs_are_looked_at_side_by_side():
    images, originals = blurred_pair(3, (32, 40))
    found = make_extractor("paired", [], device="cpu").columns(images, originals)
    assert found["psnr"].tolist() == pytest.approx(psnr(images, originals).tolist())
    assert found["ssim"].tolist() == pytest.approx(ssim(images, originals).tolist())


def test_feature_distance_is_euclidean_row_by_row():
    first, second = torch.from_numpy(noise((6, 4))).double(), torch.from_numpy(noise((6, 4), seed=2)).double()
    expected = [np.sqrt(((a - b) ** 2).sum()) for a, b in zip(first.numpy(), second.numpy(), strict=True)]
    assert feature_distance(first, second).tolist() == pytest.approx(expected)


@pytest.fixture(scope="module")
def alexnet(tmp_path_factory):
    return random_alexnet(tmp_path_factory.mktemp("alexnet"))


@pytest.mark.parametrize("size", [(64, 64), (96, 131)])
def test_lpips_is_that_of_its_package(alexnet, size):
    """Which loads AlexNet's weights into torchvision's network, and takes its slices from there."""
    import lpips
    from lpips import pretrained_networks
    from torchvision.models import alexnet as network

    images, originals = blurred_pair(3, size)
    found = make_extractor("lpips", [alexnet], device="cpu").columns(images, originals)["lpips"]
    direct = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    whole = network(weights=None)
    whole.load_state_dict(torch.load(alexnet, weights_only=True))
    direct.net = pretrained_networks.alexnet(pretrained=False, requires_grad=False)
    for piece in ("slice1", "slice2", "slice3", "slice4", "slice5"):
        for place, layer in getattr(direct.net, piece).named_children():
            layer.load_state_dict(whole.features[int(place)].state_dict())
    for index, (image, original) in enumerate(zip(images, originals, strict=True)):
        pair = [lpips.im2tensor(pixels) for pixels in (image, original)]  # the package's own way to [-1, 1]
        assert float(found[index]) == pytest.approx(float(direct(*pair).detach()), rel=1e-3)
    assert found.max() > 10 * found.min() > 1e-4


def test_lpips_of_photographs_and_themselves_is_0(alexnet):
    pictures = photographs(2)
    if not pictures:
        pytest.skip("no photographs in ../shared/data/coco/mini")
    extractor = make_extractor("lpips", [alexnet], device="cpu")
    for picture in pictures:
        assert float(extractor.columns(picture[None], picture[None])["lpips"]) == 0
        assert float(extractor.columns(picture[None], (255 - picture)[None])["lpips"]) > 0.01
