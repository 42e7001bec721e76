"""The tiny world's evaluators as a family of metrics: its attribute network, its open_clip model, its reference."""

from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from vqdm.metrics.attributes import KINDS, AttributeNet, Seen, fidelity, labels, seen_by
from vqdm.metrics.distribution import FrechetDistance, Gaussian, cmmd, kid
from vqdm.metrics.paired import feature_distance
from vqdm.metrics.resampling import SetStatistic, of_rows, of_weights, ratio_and_error
from vqdm.metrics.tiny_clip import clip_tokens, load_clip
from vqdm.tiny.captions import requested


class TinyWorld:
    """What both networks see of images; they run on the CPU."""

    def __init__(self, directory: Path):
        self.net = AttributeNet()
        self.net.load_state_dict({k: v.float() for k, v in load_file(directory / "attribute_net.safetensors").items()})
        self.net.eval().requires_grad_(False)
        self.clip, self.tokenizer = load_clip(directory)

    @torch.no_grad()
    def columns(self, images: list[np.ndarray], captions: list[str] | None = None) -> dict[str, torch.Tensor]:
        """uint8 [32, 32, 3] each -> {"features": [n, 64], "labels": [n, attributes], "image": unit vectors [n, 64],
        "cosine": [n], if there are captions}.
        """
        pixels = to_tensor(np.stack(images))
        features = self.net(pixels)
        seen = self.clip.encode_image(pixels, normalize=True)
        found = {"features": features, "labels": labels(self.net, features), "image": seen}
        if captions is not None:
            read = self.clip.encode_text(clip_tokens(self.tokenizer, captions), normalize=True)
            found["cosine"] = (seen * read).sum(-1)
        return found


def load_reference(directory: Path) -> dict[str, torch.Tensor]:
    """Features and CLIP vectors of real renders: float32 [n, 64] each."""
    return {name: tensor.float() for name, tensor in load_file(directory / "reference.safetensors").items()}


def to_tensor(images: np.ndarray) -> torch.Tensor:
    """uint8 [n, h, w, 3] -> float [n, 3, h, w] in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def standardised(features: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Features in units of their spread over the reference: what distances, FID and KID are taken of."""
    std, mean = torch.std_mean(reference, dim=0)
    return (features - mean) / std.clamp(min=1e-6)


def image_scores(own: dict, originals: dict | None, *, captions: list[str], reference: dict) -> dict[str, np.ndarray]:
    """Every image's own share of each metric that is a mean over images (fidelity: share of its own attributes)."""
    seen = seen_by(own["labels"])
    found, asked = (counts.sum(1) for counts in tally(captions, seen))
    scores = {
        "clip_score": own["cosine"].numpy(),
        "fidelity": found / np.maximum(asked, 1),
        "all_right": (found == asked).astype(np.float64),
    }
    if originals is not None:
        pair = (standardised(columns["features"], reference["features"]) for columns in (own, originals))
        scores["distance_to_fp"] = feature_distance(*pair).numpy()
        both = zip(seen, seen_by(originals["labels"]), strict=True)
        scores["agreement_with_fp"] = np.array([_agreement(one, other) for one, other in both])
    return scores


def set_statistics(own: dict, originals: dict | None, *, reference: dict) -> dict[str, SetStatistic]:
    """FID, KID and CMMD to the reference, and FID to the full-precision images, of one set of images."""
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


def tally(captions: list[str], seen: list[Seen]) -> tuple[np.ndarray, np.ndarray]:
    """Attributes found and asked for in every image, by kind: two [n, kinds]."""
    tallies = [fidelity(requested(caption), one) for caption, one in zip(captions, seen, strict=True)]
    found, asked = ([[counts[kind][i] for kind in KINDS] for counts in tallies] for i in (0, 1))
    return np.array(found, np.float64), np.array(asked, np.float64)


def fidelity_scores(captions: list[str], seen: list[Seen], *, copies: int = 1) -> dict[str, dict[str, float]]:
    """Share of the captions' attributes found, in all and by kind."""
    found, asked = tally(captions, seen)
    scores = {"fidelity": ratio_and_error(found.sum(1), asked.sum(1), copies)}
    by_kind = ((kind, ratio_and_error(found[:, i], asked[:, i], copies)) for i, kind in enumerate(KINDS))
    return scores | {f"fidelity_{kind}": share for kind, share in by_kind}


def _agreement(one: Seen, other: Seen) -> float:
    """Share of equal attributes of two images; things are compared slot by slot."""
    pairs = [(one.layout, other.layout), (one.background, other.background), (one.pattern, other.pattern)]
    for slot in range(max(len(one.things), len(other.things))):
        first, second = (s.things[slot] if slot < len(s.things) else (None,) * 3 for s in (one, other))
        pairs += zip(first, second, strict=True)
    return float(np.mean([a == b for a, b in pairs]))
