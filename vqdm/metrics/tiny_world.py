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


def tally(captions: list[str], seen: list[Seen]) -> tuple[np.ndarray, np.ndarray]:
    """Attributes found and asked for in every image, by kind: two [n, kinds]."""
    tallies = [fidelity(requested(caption), one) for caption, one in zip(captions, seen, strict=True)]
    found, asked = ([[counts[kind][i] for kind in KINDS] for counts in tallies] for i in (0, 1))
    return np.array(found, np.float64), np.array(asked, np.float64)


def fidelity_scores(captions: list[str], seen: list[Seen]) -> dict[str, dict[str, float]]:
    """Share of the captions' attributes found, the share of images with all of them right, and shares by kind.

    The standard error of a share of attributes is that of a ratio of sums over images (delta method).
    """
    found, asked = tally(captions, seen)
    scores = {"fidelity": _ratio(found.sum(1), asked.sum(1))}
    scores["all_right"] = mean_and_error(found.sum(1) == asked.sum(1))
    scores |= {f"fidelity_{kind}": _ratio(found[:, i], asked[:, i]) for i, kind in enumerate(KINDS)}
    return scores


def image_scores(evaluators: Evaluators, columns: dict, captions: list[str]) -> dict[str, np.ndarray]:
    """Every image's own share of each metric that is a mean over images (fidelity: share of its own attributes)."""
    seen = look(evaluators.net, columns["features"])
    found, asked = (counts.sum(1) for counts in tally(captions, seen))
    scores = {
        "clip_score": columns["cosines"].numpy(),
        "fidelity": found / np.maximum(asked, 1),
        "all_right": (found == asked).astype(np.float64),
    }
    if "original_features" in columns:
        own, originals = (evaluators.standardised(columns[name]) for name in ("features", "original_features"))
        pairs = zip(seen, look(evaluators.net, columns["original_features"]), strict=True)
        scores["distance_to_fp"] = feature_distance(own, originals).numpy()
        scores["agreement_with_fp"] = np.array([_agreement(a, b) for a, b in pairs])
    return scores


def _ratio(found: np.ndarray, asked: np.ndarray) -> dict[str, float]:
    if asked.sum() == 0:
        return {"value": float("nan"), "se": float("nan")}
    share = found.sum() / asked.sum()
    residual = found - share * asked
    return {"value": float(share), "se": float(residual.std(ddof=1) / asked.mean() / np.sqrt(len(found)))}


def set_scores(evaluators: Evaluators, columns: dict, captions: list[str], *, resamples: int, seed: int) -> dict:
    """FID, KID and fidelity of one set of images, FID against the full-precision ones if they are there."""
    real, fake = (evaluators.standardised(f) for f in (evaluators.reference, columns["features"]))
    scores = {}
    for name, statistic in (("fid", fid), ("kid", kid)):
        error = bootstrap_error(lambda rows, s=statistic: s(real, rows), fake, resamples=resamples, seed=seed)
        scores[name] = {"value": statistic(real, fake), "se": error}
    if "original_features" in columns:
        original = evaluators.standardised(columns["original_features"])
        error = bootstrap_error(lambda rows: fid(original, rows), fake, resamples=resamples, seed=seed)
        scores["fid_to_fp"] = {"value": fid(original, fake), "se": error}
    return scores | fidelity_scores(captions, look(evaluators.net, columns["features"]))


def _agreement(one: Seen, other: Seen) -> float:
    """Share of equal attributes of two images; things are compared slot by slot."""
    pairs = [(one.layout, other.layout), (one.background, other.background), (one.pattern, other.pattern)]
    for slot in range(max(len(one.things), len(other.things))):
        first, second = (s.things[slot] if slot < len(s.things) else (None,) * 3 for s in (one, other))
        pairs += zip(first, second, strict=True)
    return float(np.mean([a == b for a, b in pairs]))
