"""Room on disk that the stages take when they are done, and what a run fetches before it begins.

Left out: what lies on disk only while a stage is at work (checkpoints, a block's rows), and features and scores.
"""

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from vqdm.config.options import Config
from vqdm.errors import UserError
from vqdm.metrics.families import FAMILIES
from vqdm.metrics.sources import find
from vqdm.models.location import model_directory
from vqdm.stages.plan.forward import denoiser_inputs
from vqdm.stages.plan.stage import StageCost

WITH_DENOISER = ("quantize", "tune_blocks", "finetune")
WITH_IMAGES = ("teacher_images", "images")


def with_disk(
    costs: list[StageCost], config: Config, denoiser: nn.Module, *, rows: int, images: int, numbers: int, file: int
) -> list[StageCost]:
    """The same costs, each with the most bytes that the stage's directory takes.

    rows: of the denoiser's batch that calibration records in all; images: to score, each of so many `numbers`, as
    bytes, since a PNG is seldom larger; file: bytes of the denoiser's file.
    """
    sizes = dict.fromkeys(WITH_DENOISER, file) | dict.fromkeys(WITH_IMAGES, images * numbers)
    sizes["calibrate"] = rows * _call_bytes(denoiser, config)
    return [dataclasses.replace(cost, disk=cost.detail.get("disk_bytes", sizes.get(cost.name))) for cost in costs]


def _call_bytes(denoiser: nn.Module, config: Config) -> int:
    """Bytes of one row of a recorded call: all arguments, and an output as large as the first of them."""
    inputs = denoiser_inputs(denoiser, batch=1, size=config.model.sampler.size)
    if inputs is None:
        return 0
    tensors = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, torch.Tensor)]
    return sum(tensor.nbytes for tensor in tensors) + next(iter(inputs.values())).nbytes


def disk_bytes(costs: Iterable[StageCost]) -> int:
    return sum(cost.disk or 0 for cost in costs)


def downloads(config: Config, weights: int) -> dict[str, int]:
    """{what: bytes} of the model and the metrics' networks that are not here. weights: bytes of the whole pipeline."""
    found = {}
    if config.model.hub_id is not None:
        try:
            model_directory(config.model, allow_network=False)
        except UserError:
            found[config.model.hub_id] = weights
    if config.task == "experiment":
        needed = [weights for family in config.evaluate.metrics for weights in FAMILIES[family].weights]
        absent = [weights for weights in needed if find(weights, Path(config.evaluate.weights)) is None]
        found |= {weights.name: weights.megabytes * 10**6 for weights in absent}
    return found


def missing_lists(config: Config) -> list[str]:
    """Files of captions that are asked for and not here."""
    asked = [config.evaluate.prompts.path] if config.task == "experiment" else []
    if config.quantize.kind != "none":
        asked.append(config.calibration.path)
    return [path for path in dict.fromkeys(asked) if path is not None and not Path(path).is_file()]
