"""Scores from the features of a set of images, each with its standard error and its own protocol."""

import importlib.metadata
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from vqdm.config.options import EvaluateConfig, SamplerConfig
from vqdm.metrics.families import FAMILIES
from vqdm.metrics.reference import Reference
from vqdm.metrics.resampling import Resamples, mean_and_error
from vqdm.metrics.scores import score
from vqdm.prompts import ImageList, PromptList
from vqdm.runs import progress
from vqdm.runs.files import atomic_write, write_json
from vqdm.runs.texts import in_csv
from vqdm.stages.features import environments, load_columns
from vqdm.stages.layout import IMAGES_FILE, MADE_BY, SCORES_FILE

SEED = 0  # seed of the bootstrap, so that all methods are resampled alike


@dataclass(frozen=True)
class Columns:
    """Places of a family's features, for the images and for the full-precision ones, and the sha256 of its weights."""

    own: Path
    originals: Path | None
    weights: tuple[str, ...]


def evaluate(
    directory: Path,
    families: dict[str, Columns],
    not_run: dict[str, str],
    prompts: PromptList,
    *,
    config: EvaluateConfig,
    reference: Reference | None,
    tiny_reference: dict | None,
    sampler: SamplerConfig,
    images: list[dict],
    images_sha256: str,
    originals: SamplerConfig | None = None,
) -> None:
    """Write `metrics.json`: {protocol, metrics: {name: {value, se, protocol, …}}, not_run: {name: why}, images_sha256}.

    It also writes `images.csv`, the scores of every image, for paired comparisons of runs on the same captions and
    noise.

    tiny_reference: the tiny world's, if family tiny is to be scored. images: the environments (device, dtype,
    libraries) in which the images were made. images_sha256: of all images that were looked at. originals: how the
    teacher of a few-step student sampled the images to compare with; None: they are the model's own.
    """
    listed = ImageList(prompts.prompts, config.images_per_prompt)
    resamples = Resamples(len(prompts), listed.copies, count=config.bootstrap, seed=SEED)
    captions = [prompt.text for prompt, _ in listed]
    per_image: dict[str, np.ndarray] = {}
    metrics: dict[str, dict] = {}
    for family, place in families.items():
        own, theirs = (_columns(folder, len(captions), config) for folder in (place.own, place.originals))
        known = tiny_reference if family == "tiny" else _reference(reference, family)
        with progress.step(f"scores of family {family}"):  # FIDs take minutes
            found = score(family, own, theirs, captions=captions, reference=known, resamples=resamples)
        per_image |= found.images
        means = {
            name: mean_and_error(values, listed.copies)
            for name, values in found.images.items()
            if name not in found.sets
        }
        where = environments(place.own, len(captions), config.batch_size)
        for name, entry in (means | found.sets).items():
            metrics[name] = entry | {"protocol": _protocol(family, name, place, reference, where=where)}
    atomic_write(directory / IMAGES_FILE, _csv(per_image, listed))
    common = _common_protocol(prompts, config, sampler, images)
    common |= {} if originals is None else {"originals": {"of": "teacher", "sampler": _given(originals)}}
    scores = {"protocol": common, "metrics": _finite(metrics), "not_run": not_run, "images_sha256": images_sha256}
    write_json(directory / SCORES_FILE, scores)


def _columns(folder: Path | None, count: int, config: EvaluateConfig) -> dict[str, torch.Tensor] | None:
    return None if folder is None else load_columns(folder, count, config.batch_size)


def _reference(reference: Reference | None, family: str) -> dict | None:
    return reference.load(family) if reference is not None and reference.serves(family) else None


def _finite(metrics: dict[str, dict]) -> dict[str, dict]:
    """Replace NaN, which JSON lacks, by null."""
    return {
        name: {key: None if isinstance(v, float) and not np.isfinite(v) else v for key, v in entry.items()}
        for name, entry in metrics.items()
    }


def _csv(scores: dict[str, np.ndarray], listed: ImageList) -> bytes:
    import pandas as pd

    places = {"prompt": [prompt.id for prompt, _ in listed], "copy": [copy for _, copy in listed]}
    frame = pd.DataFrame(places | scores)
    return frame.map(in_csv).to_csv(index=False, float_format="%.7g").encode()


def _given(sampler: SamplerConfig) -> dict:
    return {name: value for name, value in asdict(sampler).items() if value is not None}


def _common_protocol(prompts: PromptList, config: EvaluateConfig, sampler: SamplerConfig, images: list[dict]) -> dict:
    """Protocol shared by all metrics of a set of images."""
    return {
        "n": len(prompts),
        "images_per_prompt": config.images_per_prompt,
        "prompts": prompts.origin,
        "prompts_sha256": prompts.sha256,
        "image_seed": config.seed,
        "sampler": _given(sampler),
        **({} if config.original_steps is None else {"original_steps": config.original_steps}),
        **{key: _joined(images, key) for key in ("dtype", "device")},
        **({"float32": _joined(images, "float32", "")} if any("float32" in one for one in images) else {}),
        "standard_errors": f"over prompts: means in closed form, all else by {config.bootstrap} bootstrap resamples",
        "versions": {name: _joined(images, name, importlib.metadata.version(name)) for name in MADE_BY},
    }


def _protocol(family: str, metric: str, place: Columns, reference: Reference | None, *, where: list[dict]) -> dict:
    """Protocol of one metric."""
    kind = FAMILIES[family]
    protocol = {**kind.protocol, **kind.details(metric), "library": _joined(where, "library", kind.installed())}
    if place.weights:
        protocol["weights_sha256"] = list(place.weights)
    if metric in kind.against_reference and reference is not None:
        protocol |= reference.protocol(family)
    return protocol | {"computed_in": kind.computed_in, "device": _joined(where, "device")}


def _joined(environments: list[dict], key: str, otherwise: str | None = None) -> str:
    """The value that all batches have, or all different values. otherwise: the value of batches without one."""
    return ", ".join(dict.fromkeys(one.get(key, otherwise) for one in environments))
