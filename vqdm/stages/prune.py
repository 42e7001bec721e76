"""Pruning: every operator scored by what the model does without it, and the model without the least of them.

Scores are items, one per operator, so that hours of them go on after a stop.
"""

import functools
import json
import re
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from vqdm.acceleration.operators import choose, operators, remove, without
from vqdm.calibration.calls import recorded_calls
from vqdm.calibration.recording import OUTPUT, Call, evenly_spread, play_back
from vqdm.config.acceleration import PruneConfig
from vqdm.config.options import CalibrationConfig, ModelConfig
from vqdm.models.loader import denoiser_of, sample
from vqdm.prompts import PromptList
from vqdm.runs.files import write_json
from vqdm.runs.items import batches, make_missing, read_item, write_item
from vqdm.seeds import torch_generator
from vqdm.stages.finished import finished_denoiser
from vqdm.stages.layout import label_of
from vqdm.weights.layers import replace_layer

SCORES_FILE, REMOVED_FILE = "scores.json", "removed.json"
CALLS = 8  # evenly spread recorded calls that score=prediction looks at


def score_operators(
    directory: Path,
    pipeline,
    calibration: Path,
    *,
    config: PruneConfig,
    model: ModelConfig,
    calibration_config: CalibrationConfig,
) -> dict:
    """Fill the stage's directory with `scores.json`, {operator: score}, one for all shares. Returns their number.

    pipeline: full precision; it is as it was afterwards. calibration: that stage's directory.
    """
    unet = denoiser_of(pipeline)
    score = {"latents": _by_latents, "prediction": _by_prediction}[config.score]
    score_of = score(directory, pipeline, calibration, config, model, calibration_config)

    def scored(name: str) -> tuple[dict[str, bytes], dict]:
        original = unet.get_submodule(name)
        replace_layer(unet, name, without(original).eval())
        score = score_of()
        replace_layer(unet, name, original)
        return {}, {"score": score}

    makers = {name: functools.partial(scored, name) for name in operators(unet)}
    make_missing(directory, makers, title=f"operators {label_of(directory)}", unit="operator")
    scores = {name: read_item(directory, name)["score"] for name in makers}
    write_json(directory / SCORES_FILE, scores)
    return {"operators": len(scores)}


def prune(directory: Path, pipeline, calibration: Path, scored: Path, *, config: PruneConfig, device: str) -> dict:
    """Fill the stage's directory: `removed.json`, `denoiser/`. Returns what is gone, bits, bytes and output error.

    pipeline: full precision; operators are taken out of its denoiser in place. scored: the scores' directory.
    """
    unet = denoiser_of(pipeline)
    weights, scores = operators(unet), json.loads((scored / SCORES_FILE).read_text())
    scores = {name: score for name, score in scores.items() if not (config.keep and re.search(config.keep, name))}
    total = sum(parameter.numel() for parameter in unet.parameters())
    removed = choose(scores, weights, least=config.share * total)
    found = {"removed": removed, "weights": sum(weights[name] for name in removed), "of": total}
    write_json(directory / REMOVED_FILE, found)
    remove(unet, removed)
    made = finished_denoiser(directory, unet, calibration, dtype=unet.dtype, device=device)
    return {"operators_removed": len(removed), "weights_removed": found["weights"] / total} | made


def removed_in(directory: Path) -> list[str]:
    """Names of the operators that a finished stage took out."""
    return json.loads((directory / REMOVED_FILE).read_text())["removed"]


def moments_apart(latents: Tensor, others: Tensor) -> float:
    """LD-Pruner's score, ‖mean z − mean z′‖ + ‖std z − std z′‖, moments over the images of [images, …]."""
    one, other = latents.double(), others.double()
    return float((one.mean(0) - other.mean(0)).norm() + (one.std(0) - other.std(0)).norm())


def _by_latents(
    directory: Path, pipeline, calibration: Path, config: PruneConfig, model: ModelConfig, how: CalibrationConfig
) -> Callable[[], float]:
    """Scores from the final latents of the calibration's first prompts, the same noise with and without."""
    prompts = PromptList.read_jsonl(calibration / "prompts.jsonl").prompts[: config.prompts]

    def latents() -> Tensor:
        made = []
        for _, rows in batches(len(prompts), how.batch_size):
            batch = prompts[rows.start : rows.stop]
            draws = [torch_generator(how.noise_seed, "calibration", p.id) for p in batch]
            texts = [p.text for p in batch]
            made.append(sample(pipeline, texts, sampler=model.sampler, generators=draws, output="latent").cpu())
        return torch.cat(made)

    if read_item(directory, "original") is None:
        write_item(directory, "original", {"original.safetensors": to_bytes({"latents": latents()})}, {})
    original = load_file(directory / "original.safetensors")["latents"]
    return lambda: moments_apart(original, latents())


def _by_prediction(
    _directory: Path, pipeline, calibration: Path, _config, model: ModelConfig, _how
) -> Callable[[], float]:
    """Scores from the guided prediction's relative squared error on a few recorded calls."""
    every = list(recorded_calls(calibration))
    calls = [every[i] for i in sorted(evenly_spread(len(every), CALLS))]
    unet = denoiser_of(pipeline)

    def score() -> float:
        sums = [_guided_error(unet, call, guidance=model.sampler.guidance) for call in calls]
        return sum(wrong for wrong, _ in sums) / sum(power for _, power in sums)

    return score


def _guided_error(unet: nn.Module, call: Call, *, guidance: float) -> tuple[float, float]:
    """Squared error of u + g (c − u) and its original's square; u and c are halves of the batch, if guided at all."""
    found, target = play_back(unet, call, device=str(unet.device)).double(), call[OUTPUT].double()
    if guidance > 1:
        (u, c), (v, d) = found.chunk(2), target.chunk(2)
        found, target = u + guidance * (c - u), v + guidance * (d - v)
    return float((found - target).square().sum()), float(target.square().sum())
