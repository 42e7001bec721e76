"""Distil the quantized denoiser from its teacher, end to end; every checkpoint is an item."""

import functools
import logging
from pathlib import Path

import torch
from torch import nn

from vqdm.config.options import FinetuneConfig, ModelConfig
from vqdm.distillation.checkpoints import State
from vqdm.distillation.end_to_end import Distillation
from vqdm.distillation.parameters import trained_parameters
from vqdm.distillation.trajectories import Trajectories
from vqdm.models.loader import denoiser_of, sample
from vqdm.prompts import PromptList
from vqdm.runs import processes
from vqdm.runs.files import atomic_write, write_json
from vqdm.seeds import torch_generator
from vqdm.stages.finished import finished_denoiser
from vqdm.stages.layout import png_bytes
from vqdm.stages.own_trajectories import OwnTrajectories, computing_in
from vqdm.stages.trajectories import TRAIN, VALIDATION, split_prompts, trajectories_in

log = logging.getLogger("vqdm")
SHOWN = 4  # number of the validation's captions that are sampled at every validation


def finetune(
    directory: Path,
    pipeline,
    teacher: nn.Module | None,
    trajectories: Path,
    prompts: PromptList,
    calibration: Path,
    *,
    config: FinetuneConfig,
    model: ModelConfig,
    device: str,
    tracker,
) -> dict:
    """Fill the stage's directory: `denoiser/`, `history.json`, images. Returns bits, bytes, and losses.

    pipeline: its denoiser is the student, in fp32, trained in place. teacher: its denoiser, where predictions were not
    recorded (`teacher_runs_along`). prompts: of the trajectories.
    """
    dtype, sampler = getattr(torch, model.dtype), model.sampler
    student = denoiser_of(pipeline)
    running = functools.partial(computing_in, dtype, student)
    if teacher is not None:
        shared = share_frozen(student, teacher, config=config)
        log.debug("finetune: student and teacher share %.0f MiB", shared / 2**20)
    train, validation = split_prompts(prompts, config.trajectories.validation)
    if config.trajectories.along == "student":
        samples = OwnTrajectories(
            directory, pipeline, teacher, train, config=config, sampler=sampler, device=device, running=running
        ).at
    else:
        recorded = trajectories_in(trajectories, TRAIN)

        def samples(_step: int) -> Trajectories:
            return recorded

    shown = validation.prompts[:SHOWN]

    def show(step: int) -> None:
        paths = [directory / "images" / f"{step:06d}-{i}.png" for i in range(len(shown))]
        for path, prompt in zip(paths, shown, strict=True):  # one at a time, since decoding needs the most memory
            draw = torch_generator(config.seed, "finetune/shown", prompt.id)
            with running():
                (image,) = sample(pipeline, [prompt.text], sampler=sampler, generators=[draw])
            atomic_write(path, png_bytes(image))
        tracker.images("finetune/images", paths, [prompt.text for prompt in shown])

    state = Distillation(
        student,
        samples,
        trajectories_in(trajectories, VALIDATION),
        config,
        sampler.guidance,
        pipeline.scheduler,
        teacher=teacher if config.feature_weight else None,
        show=show,
        report=lambda values: tracker.log({f"finetune/{name}": value for name, value in values.items()}),
    ).run(directory)
    if not processes.is_main():
        return {}
    return _finish(directory, student, calibration, state, dtype=dtype, device=device)


def teacher_runs_along(config: FinetuneConfig) -> bool:
    """True if training needs more of the teacher than its recorded predictions."""
    return config.trajectories.along == "student" or config.feature_weight > 0


def _finish(directory: Path, student: nn.Module, calibration: Path, state: State, *, dtype, device: str) -> dict:
    write_json(directory / "history.json", {"losses": state.losses, "validations": state.validations})
    found = finished_denoiser(directory, student, calibration, dtype=dtype, device=device)
    first, best = state.validations[0], state.best
    log.info(
        "finetuned in %d steps: validation loss %.5f, from %.5f; best at step %d",
        state.step,
        best["loss"],
        first["loss"],
        best["step"],
    )
    return found | {"best_step": best["step"], "validation_loss": best["loss"], "validation_loss_before": first["loss"]}


def share_frozen(student: nn.Module, teacher: nn.Module, *, config: FinetuneConfig) -> int:
    """Replace the student's frozen tensors by the teacher's where they are equal; returns the bytes saved."""
    trains = {id(part.parameter) for part in trained_parameters(student, config.train)}
    theirs, shared = dict(teacher.named_parameters()), 0
    for name, parameter in student.named_parameters():
        other = theirs.get(name)
        if id(parameter) in trains or other is None or other.shape != parameter.shape:
            continue
        if other.dtype != parameter.dtype and config.precision == "float32":  # only autocast computes across dtypes
            continue
        if torch.equal(other.to(parameter.dtype), parameter):
            parameter.data = other.data
            shared += other.numel() * other.element_size()
    return shared
