"""From columns of features to scores: a number for every image, and numbers for the whole set. No network runs here."""

from dataclasses import dataclass

import numpy as np
import torch

from vqdm.metrics import tiny_world
from vqdm.metrics.distribution import FrechetDistance, Gaussian, cmmd
from vqdm.metrics.resampling import Resamples, with_error
from vqdm.metrics.tiny_world import frechet_score

SMALLEST_FID = 2048  # images; with fewer, Inception's covariance has not full rank
SUBSETS, SUBSET_SIZE, SPLITS = 100, 1000, 10  # of KID and of the Inception score, as is the convention


@dataclass(frozen=True)
class Scores:
    """images: {metric: [n]}, their means are metrics. sets: {metric: {value, se, …}}, of all images at once."""

    images: dict[str, np.ndarray]
    sets: dict[str, dict]


def score(
    family: str, own: dict, originals: dict | None, *, captions: list[str], reference: dict | None, resamples: Resamples
) -> Scores:
    """The scores of one family.

    own, originals: columns {name: [n, …]} of the images and, where there are such, of the full-precision ones.
    reference: {"mean", "covariance", "features"}, what there is of it; of family tiny, its own reference.
    """
    if family == "tiny":
        images = tiny_world.image_scores(own, originals, captions=captions, reference=reference)
        sets = tiny_world.set_scores(own, originals, captions=captions, reference=reference, resamples=resamples)
        return _noted(Scores(images, sets), resamples)
    found = _SCORES[family](own, originals, reference=reference, resamples=resamples)
    return _noted(found, resamples)


def _noted(scores: Scores, resamples: Resamples) -> Scores:
    """Says where there are too few images for an FID."""
    images = resamples.prompts * resamples.copies
    for name, found in scores.sets.items():
        if name.startswith("fid") and not name.startswith("fidelity") and images < SMALLEST_FID:
            found["note"] = f"n too small for FID: {images} images, and it takes {SMALLEST_FID:,} at least"
    return scores


def _paired(own: dict, originals, *, reference, resamples) -> Scores:
    return Scores({f"{name}_to_fp": column.numpy() for name, column in own.items()}, {})


def _fid_paper(own: dict, originals, *, reference, resamples) -> Scores:
    sets = {}
    if reference is not None:
        sets["fid_paper"] = _fid(reference, own, resamples)
    if originals is not None:
        distance = FrechetDistance(Gaussian.of(originals["features"]))
        sets["fid_paper_to_fp"] = frechet_score(distance, own["features"], resamples)
    return Scores({}, sets)


def _fid(reference: dict, own: dict, resamples: Resamples) -> dict:
    distance = FrechetDistance(Gaussian(reference["mean"].double(), reference["covariance"].double()))
    return frechet_score(distance, own["features"], resamples)


def _fid_standard(own: dict, originals, *, reference, resamples) -> Scores:
    sets = {"inception_score": inception_score(own["logits"])}
    if reference is not None:
        sets["fid_standard"] = _fid(reference, own, resamples)
    if reference is not None and "features" in reference:
        sets["kid_standard"] = kid_of_subsets(reference["features"], own["features"])
    return Scores({}, sets)


def kid_of_subsets(real: torch.Tensor, fake: torch.Tensor) -> dict:
    """Mean and standard deviation over 100 subsets of 1,000 (or of all, if there are fewer), by torch-fidelity."""
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

    size = min(SUBSET_SIZE, len(real), len(fake))
    found = kid_features_to_metric(real, fake, kid_subsets=SUBSETS, kid_subset_size=size, verbose=False)
    note = f"± is the standard deviation over {SUBSETS} subsets of {size}"
    return {"value": found[KEY_METRIC_KID_MEAN], "se": found[KEY_METRIC_KID_STD], "note": note}


def inception_score(logits: torch.Tensor) -> dict:
    """Mean and standard deviation over 10 parts (Salimans et al. 2016), by torch-fidelity."""
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric

    found = isc_features_to_metric(logits, splits=min(SPLITS, len(logits)))
    note = f"± is the standard deviation over {SPLITS} parts"
    return {"value": found[KEY_METRIC_ISC_MEAN], "se": found[KEY_METRIC_ISC_STD], "note": note}


def _cmmd(own: dict, originals, *, reference, resamples) -> Scores:
    if reference is None or "features" not in reference:
        return Scores({}, {})
    pair = (reference["features"], own["image"])
    return Scores({}, {"cmmd_l14_336": with_error(cmmd(*pair), cmmd(*pair, resamples.weights()))})


def _clip_h14(own: dict, originals, *, reference, resamples) -> Scores:
    images = {"clip_h14": own["cosine"].numpy()}
    if originals is not None:
        images["clip_h14_similarity_to_fp"] = (own["image"] * originals["image"]).sum(-1).numpy()
    return Scores(images, {})


def _clip_l14(own: dict, originals, *, reference, resamples) -> Scores:
    return Scores({"clip_l14": 100 * own["cosine"].clamp(min=0).numpy()}, {})


def _pickscore(own: dict, originals, *, reference, resamples) -> Scores:
    return Scores({"pickscore": own["cosine"].numpy(), "pickscore_scaled": own["scaled"].numpy()}, {})


def _hpsv2(own: dict, originals, *, reference, resamples) -> Scores:
    return Scores({"hpsv2": own["cosine"].numpy()}, {})


_SCORES = {
    "paired": _paired,
    "lpips": _paired,
    "fid_paper": _fid_paper,
    "fid_standard": _fid_standard,
    "cmmd": _cmmd,
    "clip_h14": _clip_h14,
    "clip_l14": _clip_l14,
    "pickscore": _pickscore,
    "hpsv2": _hpsv2,
}
