"""Score a set of images; every number with its standard error, and one protocol for all of them."""

import importlib.metadata
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from vqdm.config import EvaluateConfig
from vqdm.errors import UserError
from vqdm.metrics import tiny_world
from vqdm.metrics.paired import SMALLEST_ERROR, psnr
from vqdm.metrics.tiny_world import mean_and_error
from vqdm.prompts import PromptList
from vqdm.stages.generate import load_images
from vqdm.stages.layout import IMAGES_FILE, batches
from vqdm.store import atomic_write, write_json

BATCH = 128  # images in memory at a time


def evaluate(
    directory: Path, images: Path, originals: Path | None, prompts: PromptList, *,
    config: EvaluateConfig, evaluators_directory: Path | None,
) -> None:  # fmt: skip
    """Write `metrics.json`: {metrics: {name: {value, se}}, protocol: {...}} of the images of `prompts`.

    And `images.csv`, every image's own scores, to compare two runs on the same captions and noise pair by pair.

    originals: the full-precision images of the same captions and noise, or None for those themselves.
    """
    evaluators = None if evaluators_directory is None else tiny_world.Evaluators.load(evaluators_directory)
    columns: dict[str, list] = {}
    for _, rows in tqdm(batches(len(prompts), BATCH), desc=f"evaluate {directory.name}", unit="batch"):
        captions = [p.text for p in prompts.prompts[rows.start : rows.stop]]
        for name, values in _score_batch(images, originals, rows, captions=captions, evaluators=evaluators).items():
            columns.setdefault(name, []).append(values)
    joined = {name: torch.cat(parts) for name, parts in columns.items()}
    images_scores = _image_scores(joined, prompts, evaluators)
    atomic_write(directory / IMAGES_FILE, _csv(images_scores, prompts))
    scores = {name: mean_and_error(values) for name, values in images_scores.items()}
    if evaluators is not None:
        settings = {"resamples": config.bootstrap, "seed": 0}
        scores |= tiny_world.set_scores(evaluators, joined, prompts.texts, **settings)
    content = {"metrics": scores, "protocol": _protocol(prompts, config, evaluators)}
    write_json(directory / "metrics.json", content)


def _score_batch(images: Path, originals: Path | None, rows: range, *, captions, evaluators) -> dict[str, torch.Tensor]:
    own = load_images(images, rows)
    columns = {} if evaluators is None else tiny_world.features_of(evaluators, own, captions)
    if originals is not None:
        theirs = load_images(originals, rows)
        if theirs.shape != own.shape:
            raise UserError(f"{images} holds images of {own.shape[1:3]} pixels, {originals} of {theirs.shape[1:3]}")
        columns["psnr"] = torch.from_numpy(psnr(own, theirs))
        if evaluators is not None:
            columns["original_features"] = evaluators.features(theirs)
    return columns


def _image_scores(columns: dict, prompts: PromptList, evaluators) -> dict[str, np.ndarray]:
    """Metrics that every image has for itself: [n] each."""
    scores = {"psnr_to_fp": columns["psnr"].numpy()} if "psnr" in columns else {}
    return scores if evaluators is None else scores | tiny_world.image_scores(evaluators, columns, prompts.texts)


def _csv(scores: dict[str, np.ndarray], prompts: PromptList) -> bytes:
    import pandas as pd

    frame = pd.DataFrame({"prompt": [prompt.id for prompt in prompts.prompts], **scores})
    return frame.to_csv(index=False, float_format="%.7g").encode()


def _protocol(prompts: PromptList, config: EvaluateConfig, evaluators) -> dict:
    """What the numbers are; the sha256 of evaluators and images are upstream fingerprints in config.json."""
    protocol = {
        "n": len(prompts.prompts),
        "prompts": prompts.origin,
        "prompts_sha256": prompts.sha256,
        "image_seed": config.seed,
        "psnr_to_fp": f"dB, mean over images, uint8 RGB, squared error at least {SMALLEST_ERROR:.3g}",
        "standard_errors": f"over images; FID and KID: bootstrap of {config.bootstrap} resamples",
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "torchmetrics", "open_clip_torch")},
    }
    if evaluators is not None:
        protocol["fid"] = (
            f"64 standardised features of the tiny world's attribute network, {len(evaluators.reference)} renders; "
            "not comparable with Inception FIDs"
        )
        protocol["clip_score"] = "raw cosine of the tiny world's open_clip model"
    return protocol
