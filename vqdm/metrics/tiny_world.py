"""All metrics of a set of tiny-world images, from features that are computed once and streamed."""

import dataclasses
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from vqdm.metrics.attributes import KINDS, AttributeNet, Seen, fidelity, look
from vqdm.metrics.distribution import bootstrap_error, fid, kid
from vqdm.metrics.paired import feature_distance
from vqdm.metrics.tiny_clip import cosines, load_clip
from vqdm.tiny.captions import requested


@dataclasses.dataclass(frozen=True)
class Evaluators:
    net: AttributeNet
    clip: torch.nn.Module
    tokenizer: object
    reference: torch.Tensor  # features of real renders [n, 64]

    @torch.no_grad()
    def features(self, images: np.ndarray) -> torch.Tensor:
        """The attribute network's, of uint8 [n, 32, 32, 3]: float [n, 64]."""
        return self.net(to_tensor(images))

    def standardised(self, features: torch.Tensor) -> torch.Tensor:
        """Features in units of their spread over the reference: what distances, FID and KID are taken of."""
        std, mean = torch.std_mean(self.reference, dim=0)
        return (features - mean) / std.clamp(min=1e-6)

    @classmethod
    def load(cls, directory: Path) -> "Evaluators":
        net = AttributeNet()
        net.load_state_dict({k: v.float() for k, v in load_file(directory / "attribute_net.safetensors").items()})
        clip, tokenizer = load_clip(directory)
        reference = load_file(directory / "reference.safetensors")["features"].float()
        return cls(net.eval().requires_grad_(False), clip, tokenizer, reference)


def to_tensor(images: np.ndarray) -> torch.Tensor:
    """uint8 [n, h, w, 3] -> float [n, 3, h, w] in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def features_of(evaluators: Evaluators, images: np.ndarray, captions: list[str]) -> dict[str, torch.Tensor]:
    return {
        "features": evaluators.features(images),
        "cosines": cosines(evaluators.clip, evaluators.tokenizer, to_tensor(images), captions),
    }


def mean_and_error(values: np.ndarray) -> dict[str, float]:
    """Mean over images and its standard error."""
    values = np.asarray(values, np.float64)
    error = float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")
    return {"value": float(values.mean()), "se": error}


def fidelity_scores(captions: list[str], seen: list[Seen]) -> dict[str, dict[str, float]]:
    """Share of the captions' attributes found, the share of images with all of them right, and shares by kind.

    The standard error of a share of attributes is that of a ratio of sums over images (delta method).
    """
    tallies = [fidelity(requested(caption), one) for caption, one in zip(captions, seen, strict=True)]
    found = np.array([[tally[kind][0] for kind in KINDS] for tally in tallies], np.float64)
    asked = np.array([[tally[kind][1] for kind in KINDS] for tally in tallies], np.float64)
    scores = {"fidelity": _ratio(found.sum(1), asked.sum(1))}
    scores["all_right"] = mean_and_error(found.sum(1) == asked.sum(1))
    scores |= {f"fidelity_{kind}": _ratio(found[:, i], asked[:, i]) for i, kind in enumerate(KINDS)}
    return scores


def _ratio(found: np.ndarray, asked: np.ndarray) -> dict[str, float]:
    if asked.sum() == 0:
        return {"value": float("nan"), "se": float("nan")}
    share = found.sum() / asked.sum()
    residual = found - share * asked
    return {"value": float(share), "se": float(residual.std(ddof=1) / asked.mean() / np.sqrt(len(found)))}


def unpaired_scores(evaluators: Evaluators, columns: dict, captions: list[str], *, resamples: int, seed: int) -> dict:
    """FID, KID, CLIP score and fidelity of one set of images."""
    real, fake = (evaluators.standardised(f) for f in (evaluators.reference, columns["features"]))
    scores = {}
    for name, statistic in (("fid", fid), ("kid", kid)):
        error = bootstrap_error(lambda rows, s=statistic: s(real, rows), fake, resamples=resamples, seed=seed)
        scores[name] = {"value": statistic(real, fake), "se": error}
    scores["clip_score"] = mean_and_error(columns["cosines"].numpy())
    return scores | fidelity_scores(captions, look(evaluators.net, columns["features"]))


def _agreement(one: Seen, other: Seen) -> float:
    """Share of equal attributes of two images; things are compared slot by slot."""
    pairs = [(one.layout, other.layout), (one.background, other.background), (one.pattern, other.pattern)]
    for slot in range(max(len(one.things), len(other.things))):
        first, second = (s.things[slot] if slot < len(s.things) else (None,) * 3 for s in (one, other))
        pairs += zip(first, second, strict=True)
    return float(np.mean([a == b for a, b in pairs]))


def paired_scores(evaluators: Evaluators, columns: dict, originals: dict, *, resamples: int, seed: int) -> dict:
    """Distance of features, FID and attribute agreement, against the full-precision images of the same noise."""
    raw = (columns["features"], originals["features"])
    fake, real = map(evaluators.standardised, raw)
    pairs = zip(*(look(evaluators.net, features) for features in raw), strict=True)
    error = bootstrap_error(lambda rows: fid(real, rows), fake, resamples=resamples, seed=seed)
    return {
        "distance_to_fp": mean_and_error(feature_distance(fake, real).numpy()),
        "fid_to_fp": {"value": fid(real, fake), "se": error},
        "agreement_with_fp": mean_and_error(np.array([_agreement(a, b) for a, b in pairs])),
    }
