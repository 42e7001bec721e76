"""Scores from columns of features: a number for every image, and numbers for the whole set. No network runs here."""

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from vqdm.metrics import tiny_world
from vqdm.metrics.distribution import FrechetDistance, Gaussian, cmmd
from vqdm.metrics.families import FAMILIES
from vqdm.metrics.probes.recovery import KINDS
from vqdm.metrics.resampling import Resamples, SetStatistic, of_rows, of_weights, with_error
from vqdm.tiny.attributes import seen_by
from vqdm.tiny.worlds import world_of

SMALLEST_FID = 2048  # images; with fewer, Inception's covariance does not have full rank
SUBSETS, SUBSET_SIZE, SPLITS = 100, 1000, 10  # for KID and the Inception score, by convention


@dataclass(frozen=True)
class Scores:
    """Scores of one family. images: {metric: [n]}, to be averaged. sets: {metric: {value, se, …}} of all images."""

    images: dict[str, np.ndarray]
    sets: dict[str, dict]


def score(
    family: str, own: dict, originals: dict | None, *, captions: list[str], reference: dict | None, resamples: Resamples
) -> Scores:
    """The scores of one family.

    own, originals: columns {name: [n, …]} of the images and, if there are any, of the full-precision ones.
    reference: what there is of {"mean", "covariance", "features"}; for family tiny, its own reference.
    """
    images = _image_scores(family, own, originals, captions=captions, reference=reference)
    statistics = set_statistics(family, own, originals, reference=reference)
    sets = {name: with_error(*statistic(resamples)) for name, statistic in statistics.items()}
    if resamples.prompts == 1:  # all draws are the same, which says nothing about the error
        sets = {name: found | {"se": float("nan")} for name, found in sets.items()}
    if family == "tiny":
        world = world_of(own["labels"].shape[1])
        seen = seen_by(own["labels"], world=world)
        sets |= tiny_world.fidelity_scores(captions, seen, world=world, copies=resamples.copies)
    if family == "fid_standard":
        sets["inception_score"] = inception_score(own["logits"])
        if reference is not None and "features" in reference:
            sets["kid_standard"] = kid_of_subsets(reference["features"], own["features"])
    return _noted(Scores(images, sets), resamples)


def set_statistics(
    family: str, own: dict, originals: dict | None, *, reference: dict | None
) -> dict[str, SetStatistic]:
    """Scores of the whole set whose errors come from a bootstrap; arguments as in `score`."""
    if family == "tiny":
        return tiny_world.set_statistics(own, originals, reference=reference)
    found = {}
    if family in ("fid_paper", "fid_standard") and reference is not None:
        real = Gaussian(reference["mean"].double(), reference["covariance"].double())
        found[family] = of_rows(FrechetDistance(real), own["features"])
    if family == "fid_paper" and originals is not None:
        original = FrechetDistance(Gaussian.of(originals["features"]))
        found["fid_paper_to_fp"] = of_rows(original, own["features"])
    if family == "cmmd" and reference is not None and "features" in reference:
        found["cmmd_l14_336"] = of_weights(partial(cmmd, reference["features"], own["image"]))
    return found


def _noted(scores: Scores, resamples: Resamples) -> Scores:
    """Add a note where there are too few images for an FID."""
    images = len(resamples.images)
    for name, found in scores.sets.items():
        if name.startswith("fid") and not name.startswith("fidelity") and images < SMALLEST_FID:
            found["note"] = f"n too small for FID: {images} images, and it takes {SMALLEST_FID:,} at least"
    return scores


def kid_of_subsets(real: torch.Tensor, fake: torch.Tensor) -> dict:
    """KID as mean and standard deviation over 100 subsets of 1,000 (or all, if fewer), by torch-fidelity."""
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

    size = min(SUBSET_SIZE, len(real), len(fake))
    pair = real.double(), fake.double()  # double, as it is a small difference of large sums
    found = kid_features_to_metric(*pair, kid_subsets=SUBSETS, kid_subset_size=size, verbose=False)
    note = f"± is the standard deviation over {SUBSETS} subsets of {size}"
    return {"value": found[KEY_METRIC_KID_MEAN], "se": found[KEY_METRIC_KID_STD], "note": note}


def inception_score(logits: torch.Tensor) -> dict:
    """Inception score as mean and standard deviation over 10 parts (Salimans et al. 2016), by torch-fidelity."""
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric

    parts = min(SPLITS, len(logits))
    found = isc_features_to_metric(logits, splits=parts)
    note = f"± is the standard deviation over {parts} parts"
    return {"value": found[KEY_METRIC_ISC_MEAN], "se": found[KEY_METRIC_ISC_STD], "note": note}


def _image_scores(
    family: str, own: dict, originals: dict | None, *, captions: list[str], reference: dict | None
) -> dict[str, np.ndarray]:
    if family == "tiny":
        return tiny_world.image_scores(own, originals, captions=captions, reference=reference)
    if family == "recovery":
        gaps = {f"recovery_{name}": column.numpy() for name, column in own.items() if not name.startswith("right_")}
        shares = {f"recovery_{kind}": own[f"right_{kind}"].numpy() for kind in KINDS}
        return gaps | shares
    if FAMILIES[family].of_model:
        return {name: column.numpy() for name, column in own.items()}
    if family in ("paired", "lpips"):
        return {f"{name}_to_fp": column.numpy() for name, column in own.items()}
    cosine = own["cosine"].numpy() if "cosine" in own else None
    if family == "clip_h14":
        if originals is None:
            return {family: cosine}
        return {family: cosine, "clip_h14_similarity_to_fp": (own["image"] * originals["image"]).sum(-1).numpy()}
    if family == "clip_l14":
        return {family: 100 * np.maximum(cosine, 0)}
    if family == "pickscore":
        return {family: cosine, "pickscore_scaled": own["scaled"].numpy()}
    return {family: cosine} if family == "hpsv2" else {}
