"""The tiny world's evaluators as a family of metrics: its attribute network, its open_clip model, its reference."""

from functools import partial

import numpy as np
import torch

from vqdm.metrics.distribution import FrechetDistance, Gaussian, cmmd, kid
from vqdm.metrics.paired import feature_distance
from vqdm.metrics.resampling import SetStatistic, of_rows, of_weights, ratio_and_error
from vqdm.tiny.attributes import Seen, fidelity, kinds_of, seen_by
from vqdm.tiny.captions import requested
from vqdm.tiny.scenes import TINY
from vqdm.tiny.world import World
from vqdm.tiny.worlds import world_of


def standardised(features: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Features in units of their spread over the reference, as used for distances, FID and KID.

    [n, features]. A spread counts as a tenth of the median one at least: small's network has nine features that renders
    hardly stir, and in units of 1e-4 one image that stirs them would outweigh all others.
    """
    std, mean = torch.std_mean(reference, dim=0)
    return (features - mean) / std.clamp(min=0.1 * float(std.median()))


def image_scores(own: dict, originals: dict | None, *, captions: list[str], reference: dict) -> dict[str, np.ndarray]:
    """Scores of every image, for metrics that are means over images (fidelity: share of the image's own attributes)."""
    world = world_of(own["labels"].shape[1])
    seen = seen_by(own["labels"], world=world)
    found, asked = (counts.sum(1) for counts in tally(captions, seen, world=world))
    scores = {
        "clip_score": own["cosine"].numpy(),
        "fidelity": found / np.maximum(asked, 1),
        "all_right": (found == asked).astype(np.float64),
    }
    if originals is not None:
        pair = (standardised(columns["features"], reference["features"]) for columns in (own, originals))
        scores["distance_to_fp"] = feature_distance(*pair).numpy()
        both = zip(seen, seen_by(originals["labels"], world=world), strict=True)
        scores["agreement_with_fp"] = np.array([_agreement(one, other) for one, other in both])
    return scores


def set_statistics(own: dict, originals: dict | None, *, reference: dict) -> dict[str, SetStatistic]:
    """FID, KID and CMMD to the reference, and FID to the full-precision images, for one set of images."""
    real = standardised(reference["features"], reference["features"])
    fake = standardised(own["features"], reference["features"])
    statistics = {
        "fid": of_rows(FrechetDistance(Gaussian.of(real)), fake),
        "kid": of_weights(partial(kid, real, fake)),
    }
    if "image" in reference:
        statistics["cmmd"] = of_weights(partial(cmmd, reference["image"], own["image"]))
    if originals is not None:
        original = Gaussian.of(standardised(originals["features"], reference["features"]))
        statistics["fid_to_fp"] = of_rows(FrechetDistance(original), fake)
    return statistics


def tally(captions: list[str], seen: list[Seen], *, world: World) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of attributes found and asked for in every image, by kind: two arrays [n, kinds]."""
    pairs = zip(captions, seen, strict=True)
    tallies = [fidelity(requested(caption, world=world), one, world=world) for caption, one in pairs]
    found, asked = ([[counts[kind][i] for kind in kinds_of(world)] for counts in tallies] for i in (0, 1))
    return np.array(found, np.float64), np.array(asked, np.float64)


def fidelity_scores(
    captions: list[str], seen: list[Seen], *, world: World = TINY, copies: int = 1
) -> dict[str, dict[str, float]]:
    """Share of the captions' attributes that were found, in all and by kind."""
    found, asked = tally(captions, seen, world=world)
    scores = {"fidelity": ratio_and_error(found.sum(1), asked.sum(1), copies)}
    by_kind = ((kind, ratio_and_error(found[:, i], asked[:, i], copies)) for i, kind in enumerate(kinds_of(world)))
    return scores | {f"fidelity_{kind}": share for kind, share in by_kind}


def _agreement(one: Seen, other: Seen) -> float:
    """Share of attributes that agree between two images; things are compared slot by slot."""
    pairs = [(one.layout, other.layout), (one.background, other.background), (one.pattern, other.pattern)]
    for slot in range(max(len(one.things), len(other.things))):
        nothing = (None,) * len(one.things[0])
        first, second = (s.things[slot] if slot < len(s.things) else nothing for s in (one, other))
        pairs += zip(first, second, strict=True)
    return float(np.mean([a == b for a, b in pairs]))
