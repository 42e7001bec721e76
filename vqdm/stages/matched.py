"""Train a compressed few-step student by distribution matching with its many-step teacher; checkpoints are items."""

import dataclasses
import logging
from pathlib import Path

import torch
from torch import nn

from vqdm.config.few_step import FewStepConfig
from vqdm.config.options import Config
from vqdm.distillation.end_to_end import optimizer_of
from vqdm.distillation.moving_codes import let_drift, stop_drifting
from vqdm.distillation.parameters import trained_parameters
from vqdm.models.loader import denoiser_of
from vqdm.stages.few_step import train_on_pairs
from vqdm.stages.finished import finished_denoiser

log = logging.getLogger("vqdm")
_SHARED = (
    "steps", "batch_size", "learning_rate", "warmup", "decay_from", "precision", "seed", "check_every", "critic_first",
)  # fmt: skip


def match(
    directory: Path, pipeline, teacher: nn.Module, pairs: Path, calibration: Path, *, config: Config, device: str
) -> dict:
    """Fill the stage's directory: `denoiser/`, `history.json`. Returns bits, bytes, and distances of the validation.

    pipeline: its denoiser is the student, in fp32, of which only what `finetune.train` names trains. teacher: fp32.
    pairs: that stage's directory.
    """
    student, own = denoiser_of(pipeline), config.finetune
    drifting = let_drift(student) if own.tune_codes else {}

    def settle(step: int) -> None:
        if step % own.code_every == 0:
            for weight in drifting.values():
                weight.settle()

    made, history = train_on_pairs(
        directory,
        student,
        teacher,
        pairs,
        scheduler=pipeline.scheduler,
        config=matching_config(config),
        optimizer=optimizer_of(trained_parameters(student, own.train, code_rate=own.code_rate), own),
        after_step=settle,
    )
    stop_drifting(made)
    first, last = history.validations[0]["distance"], history.validations[-1]["distance"]
    log.info("finetuned by distribution matching: distance to the teacher's images %.5f, from %.5f", last, first)
    found = finished_denoiser(directory, made, calibration, dtype=getattr(torch, config.model.dtype), device=device)
    return found | {"distance": last, "distance_before": first}


def matching_config(config: Config) -> FewStepConfig:
    """The few-step trainer's options with the rates and budgets of `finetune`; the last average is kept."""
    shared = {name: getattr(config.finetune, name) for name in _SHARED}
    return dataclasses.replace(config.few_step, kind="dmd", keep="last", **shared)
