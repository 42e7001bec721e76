"""Scores of the families of published networks, from made-up columns, against formulas in numpy."""

import numpy as np
import pytest
import scipy.special
import torch
from test_distribution import fid, slow_cmmd, slow_kid

from vqdm.metrics.families import FAMILIES
from vqdm.metrics.resampling import Resamples
from vqdm.metrics.scores import SMALLEST_FID, inception_score, kid_of_subsets, score


def normal(*shape, seed, shift=0.0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape) + shift).float()


def unit(*shape, seed):
    return torch.nn.functional.normalize(normal(*shape, seed=seed, shift=0.5), dim=1)


def scored(family, own, originals=None, *, reference=None, n=None, copies=1):
    n = n or len(next(iter(own.values())))
    resamples = Resamples(n // copies, copies, count=4)
    return score(family, own, originals, captions=[""] * n, reference=reference, resamples=resamples)


def reference_of(rows):
    rows = rows.double()
    return {"mean": rows.mean(0), "covariance": torch.from_numpy(np.cov(rows.numpy().T)), "features": rows.float()}


@pytest.mark.parametrize("family", ["fid_paper", "fid_standard"])
def test_fid_to_the_references_statistics(family):
    real, own = normal(80, 8, seed=0), {"features": normal(50, 8, seed=1, shift=0.2), "logits": normal(50, 20, seed=2)}
    found = scored(family, own, reference=reference_of(real)).sets[family]
    assert found["value"] == pytest.approx(fid(real, own["features"]), rel=1e-6)
    values = [fid(real, own["features"][rows]) for rows in Resamples(50, count=4).rows()]
    assert found["se"] == pytest.approx(np.std(values, ddof=1), rel=1e-6)
    assert found["bias"] == pytest.approx(np.mean(values) - found["value"], rel=1e-6)
    assert f"{SMALLEST_FID:,}" in found["note"]


def test_fid_of_enough_images_has_no_note():
    real = normal(40, 2, seed=0)
    own = {"features": normal(SMALLEST_FID, 2, seed=1), "logits": normal(SMALLEST_FID, 4, seed=2)}
    assert "note" not in scored("fid_paper", own, reference=reference_of(real)).sets["fid_paper"]
    short = {name: column[:-1] for name, column in own.items()}
    assert "note" in scored("fid_paper", short, reference=reference_of(real)).sets["fid_paper"]


def test_fid_to_the_full_precision_images():
    own, originals = {"features": normal(30, 6, seed=0)}, {"features": normal(30, 6, seed=1, shift=0.3)}
    found = scored("fid_paper", own, originals).sets
    assert set(found) == {"fid_paper_to_fp"}
    assert found["fid_paper_to_fp"]["value"] == pytest.approx(fid(originals["features"], own["features"]), rel=1e-6)


def test_kid_of_one_subset_that_is_all_is_the_formula():
    """100 subsets of all rows are one and the same."""
    real, fake = normal(24, 8, seed=0), normal(24, 8, seed=1, shift=0.3)
    found = kid_of_subsets(real, fake)
    assert found["value"] == pytest.approx(slow_kid(real, fake), rel=1e-6)
    assert found["se"] == pytest.approx(0, abs=1e-9) and "100 subsets of 24" in found["note"]


def test_inception_score_is_the_formula():
    """exp of the mean KL divergence to the mean, in 10 parts of shuffled rows; of equal rows it is 1."""
    logits = normal(60, 12, seed=0) * 2
    rows = logits.double().numpy()[np.random.RandomState(2020).permutation(60)]
    scores = []
    for part in np.split(scipy.special.softmax(rows, axis=1), 10):
        scores.append(np.exp(np.mean(scipy.special.rel_entr(part, part.mean(0)).sum(1))))
    found = inception_score(logits)
    assert found["value"] == pytest.approx(np.mean(scores), rel=1e-6)
    assert found["se"] == pytest.approx(np.std(scores), rel=1e-6)
    assert inception_score(logits[:1].expand(30, -1))["value"] == pytest.approx(1, rel=1e-6)
    assert "3 parts" in inception_score(logits[:3])["note"]


def test_standard_family_without_a_reference_has_the_inception_score_alone():
    own = {"features": normal(30, 8, seed=1), "logits": normal(30, 20, seed=2)}
    assert set(scored("fid_standard", own).sets) == {"inception_score"}
    without_rows = {k: v for k, v in reference_of(normal(40, 8, seed=0)).items() if k != "features"}
    assert set(scored("fid_standard", own, reference=without_rows).sets) == {"inception_score", "fid_standard"}


def test_cmmd_is_the_formula():
    real, own = unit(20, 8, seed=0), {"image": unit(15, 8, seed=1)}
    found = scored("cmmd", own, reference={"features": real}).sets["cmmd_l14_336"]
    assert found["value"] == pytest.approx(slow_cmmd(real, own["image"]), rel=1e-6)
    values = [slow_cmmd(real, own["image"][rows]) for rows in Resamples(15, count=4).rows()]
    assert found["se"] == pytest.approx(np.std(values, ddof=1), rel=1e-6)
    assert scored("cmmd", own).sets == {}


def test_scores_of_single_images():
    cosine = torch.tensor([0.3, -0.1, 0.2])
    image, original = unit(3, 8, seed=0), unit(3, 8, seed=1)
    h14 = scored("clip_h14", {"cosine": cosine, "image": image}, {"cosine": cosine, "image": original}).images
    assert h14["clip_h14"].tolist() == pytest.approx([0.3, -0.1, 0.2])
    expected = [float(np.dot(a, b)) for a, b in zip(image.numpy(), original.numpy(), strict=True)]
    assert h14["clip_h14_similarity_to_fp"].tolist() == pytest.approx(expected, rel=1e-5)
    assert set(scored("clip_h14", {"cosine": cosine, "image": image}).images) == {"clip_h14"}
    assert scored("clip_l14", {"cosine": cosine}).images["clip_l14"].tolist() == pytest.approx([30, 0, 20])
    pick = scored("pickscore", {"cosine": cosine, "scaled": 100 * cosine}).images
    assert pick["pickscore_scaled"].tolist() == pytest.approx([30, -10, 20])
    assert scored("hpsv2", {"cosine": cosine}).images["hpsv2"].tolist() == pytest.approx([0.3, -0.1, 0.2])
    pairs = scored("paired", {"psnr": cosine, "ssim": cosine}).images
    assert set(pairs) == {"psnr_to_fp", "ssim_to_fp"}
    assert set(scored("lpips", {"lpips": cosine}).images) == {"lpips_to_fp"}


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "tiny"])
def test_a_family_yields_the_metrics_that_it_names(family):
    n = 12
    own = {
        "features": normal(n, 6, seed=0), "logits": normal(n, 6, seed=1), "image": unit(n, 6, seed=2),
        "cosine": normal(n, seed=3), "scaled": normal(n, seed=4),
    }  # fmt: skip
    if FAMILIES[family].pairs:
        own = {name.removesuffix("_to_fp"): normal(n, seed=5) for name in FAMILIES[family].metrics}
    if family == "recovery":
        own = dict.fromkeys(("gap_colour", "gap_shape", "right_colour", "right_shape", "error"), normal(n, seed=5))
    elif FAMILIES[family].of_model:
        own = dict.fromkeys(FAMILIES[family].metrics, normal(n, seed=5))
    found = scored(family, own, own, reference=reference_of(normal(20, 6, seed=6)))
    assert sorted([*found.images, *found.sets]) == sorted(FAMILIES[family].metrics)


@pytest.mark.parametrize("size", [8, 300])
@pytest.mark.parametrize("copies", [1, 2])
def test_one_prompt_has_no_errors_and_one_image_no_fid(copies, size):
    own, originals = ({"features": normal(copies, size, seed=seed)} for seed in (1, 2))
    real = reference_of(normal(2 * size, size, seed=0))
    found = scored("fid_paper", own, originals, reference=real, copies=copies).sets
    assert all(np.isnan(entry["se"]) for entry in found.values()) and len(found) == 2
    assert {name: np.isnan(entry["value"]) for name, entry in found.items()} == dict.fromkeys(found, copies == 1)
    vectors = {"image": unit(copies, size, seed=3)}
    assert np.isnan(
        scored("cmmd", vectors, reference={"features": unit(9, size, seed=4)}, copies=copies).sets["cmmd_l14_336"]["se"]
    )
