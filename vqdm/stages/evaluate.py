"""Score a set of images; every number with its standard error, and one protocol for all of them."""

import importlib.metadata
from pathlib import Path

import torch
from tqdm import tqdm

from vqdm.config import EvaluateConfig
from vqdm.errors import UserError
from vqdm.metrics import tiny_world
from vqdm.metrics.paired import SMALLEST_ERROR, psnr
from vqdm.prompts import PromptList
from vqdm.stages.generate import load_images
from vqdm.stages.layout import batches
from vqdm.store import write_json

BATCH = 128  # images in memory at a time


def evaluate(
    directory: Path, images: Path, originals: Path | None, prompts: PromptList, *,
    config: EvaluateConfig, evaluators_directory: Path | None,
) -> None:  # fmt: skip
    """Write `metrics.json`: {metrics: {name: {value, se}}, protocol: {...}} of the images of `prompts`.

    originals: the full-precision images of the same captions and noise, or None for those themselves.
    """
    evaluators = None if evaluators_directory is None else tiny_world.Evaluators.load(evaluators_directory)
    columns: dict[str, list] = {}
    for _, rows in tqdm(batches(len(prompts), BATCH), desc=f"evaluate {directory.name}", unit="batch"):
        captions = [p.text for p in prompts.prompts[rows.start : rows.stop]]
        for name, values in _score_batch(images, originals, rows, captions=captions, evaluators=evaluators).items():
            columns.setdefault(name, []).append(values)
    joined = {name: torch.cat(parts) for name, parts in columns.items()}
    scores = _scores(joined, prompts, evaluators, config=config)
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


def _scores(columns: dict, prompts: PromptList, evaluators, *, config: EvaluateConfig) -> dict:
    scores: dict[str, dict] = {}
    settings = {"resamples": config.bootstrap, "seed": 0}
    if evaluators is not None:
        scores |= tiny_world.unpaired_scores(evaluators, columns, prompts.texts, **settings)
    if "psnr" in columns:
        scores["psnr_to_fp"] = tiny_world.mean_and_error(columns["psnr"].numpy())
    if evaluators is not None and "psnr" in columns:
        originals = {"features": columns["original_features"]}
        scores |= tiny_world.paired_scores(evaluators, columns, originals, **settings)
    return scores


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
