"""Hessians of one group of layers after another, from the teacher's recorded calls or the student's own sampling."""

import contextlib
import itertools
import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from vqdm.calibration.blocks import execution_order
from vqdm.calibration.calls import call_count, recorded_calls, recorded_positions, sample_batches
from vqdm.calibration.hessian import HessianRecorder, shrunk
from vqdm.calibration.recording import play_back
from vqdm.config.options import CalibrationConfig, QuantizeConfig, SamplerConfig
from vqdm.models.loader import denoiser_of
from vqdm.models.specs import LayerSpec, in_groups
from vqdm.prompts import PromptList
from vqdm.runs import progress
from vqdm.runs.device import one_thread_each

ONE_TOKEN = re.compile(r"norm\w*\.linear$")  # adaptive norms of transformers read one token per image
TEACHER_BYTES = 4 << 30  # limit for the Hessians that one pass of the teacher collects; one layer always passes


def execution_groups(denoiser: nn.Module, specs: list[LayerSpec], calibration: Path) -> list[list[LayerSpec]]:
    """The paper's groups in the order in which the denoiser runs them, which is not module order."""
    by_name = {spec.name: spec for spec in specs}
    order = execution_order(denoiser, next(recorded_calls(calibration)), by_name)
    return in_groups(by_name[name] for name in order)


def teacher_groups(groups: list[list[LayerSpec]]) -> list[list[LayerSpec]]:
    """Join groups into as few as memory allows, since the teacher does not change while layers are quantized."""
    return in_passes([spec for group in groups for spec in group], TEACHER_BYTES)


def in_passes(specs: list[LayerSpec], room: int) -> list[list[LayerSpec]]:
    """The layers in order, divided so that the Hessians of each part take `room` bytes at most, or are of one layer."""
    found: list[list[LayerSpec]] = [[]]
    held = 0
    for spec in specs:
        size = 4 * spec.shape[1] ** 2
        if held + size > room and found[-1]:
            found.append([])
            held = 0
        found[-1].append(spec)
        held += size
    return found


Drive = Callable[[HessianRecorder], None]


def collect(
    denoiser: nn.Module,
    group: list[LayerSpec],
    drive: Drive,
    *,
    config: QuantizeConfig,
    wanted: list[LayerSpec] | None = None,
) -> dict[str, torch.Tensor]:
    """The Hessians of a group's layers by name, the same with any number of threads.

    wanted: those of the group whose Hessians are summed, the same as if all were; None: all. Hessians from few tokens
    are shrunk.
    """
    names = [spec.name for spec in (group if wanted is None else wanted)]
    options = {"tokens_per_call": config.tokens_per_call, "seed": config.seed, "wanted": names}
    with one_thread_each(), HessianRecorder(denoiser, group, **options) as recorder:
        drive(recorder)
    found = recorder.hessians()
    return {name: shrunk(h, recorder.tokens[name]) if ONE_TOKEN.search(name) else h for name, h in found.items()}


def drive_teacher(denoiser: nn.Module, calibration: Path, *, device: str) -> Drive:
    """A function that plays all recorded calls back to the full-precision denoiser."""

    def drive(recorder: HessianRecorder) -> None:
        calls = recorded_calls(calibration)
        for call in progress.over(calls, "Hessians", unit="call", total=call_count(calibration)):
            play_back(denoiser, call, device=device)

    return drive


def drive_student(pipeline, calibration: Path, *, config: CalibrationConfig, sampler: SamplerConfig) -> Drive:
    """A function that samples the calibration prompts with the partly quantized denoiser, read at recorded steps."""

    prompts = PromptList.read_jsonl(calibration / "prompts.jsonl")

    def drive(recorder: HessianRecorder) -> None:
        batches = sample_batches(pipeline, prompts, config=config, sampler=sampler)
        for name, _, run in progress.over(batches, "Hessians of the student", unit="batch", apart=False):
            with _only_at(denoiser_of(pipeline), recorder, recorded_positions(config, sampler.steps, name)):
                run()

    return drive


@contextlib.contextmanager
def _only_at(denoiser: nn.Module, recorder: HessianRecorder, positions: set[int]):
    """Enable the recorder only while the denoiser is at one of these positions of its sampling loop."""
    position = itertools.count()

    def choose(*_) -> None:
        recorder.enabled = next(position) in positions

    hook = denoiser.register_forward_pre_hook(choose)
    try:
        yield
    finally:
        hook.remove()
        recorder.enabled = True
