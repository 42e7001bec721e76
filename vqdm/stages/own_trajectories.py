"""Trajectories from the student's own sampling during finetuning, with the teacher's predictions on them."""

import contextlib
import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from vqdm.config.options import FinetuneConfig, SamplerConfig, TrajectoriesConfig
from vqdm.distillation.trajectories import Trajectories, pack
from vqdm.prompts import PromptList
from vqdm.runs import processes
from vqdm.runs.items import item_names, read_item, remove_item, write_item
from vqdm.stages.trajectories import recorded_batches, relabelled, trajectories_in


def sampled_steps(config: TrajectoriesConfig, sampler: SamplerConfig) -> tuple[list[int], int]:
    """Numbers of steps with which a caption is sampled, and how many steps in all are kept."""
    steps = config.sampler_steps or [sampler.steps]
    return steps, sum(min(config.recorded_steps or count, count) for count in steps)


def captions_of_a_round(config: FinetuneConfig, sampler: SamplerConfig, *, train: int) -> int:
    """Number of captions that fill the steps between two recordings, in whole batches, at most `train`."""
    own = config.trajectories
    wanted = -(-config.refresh * config.batch_size // sampled_steps(own, sampler)[1])
    return min(train, -(-wanted // own.batch_size) * own.batch_size)


@contextlib.contextmanager
def computing_in(dtype: torch.dtype, denoiser: nn.Module) -> Iterator[None]:
    """Let an fp32 denoiser take and give another dtype inside, as the 16-bit pipeline around it does."""
    if dtype != torch.float32:
        denoiser.forward = torch.autocast(denoiser.device.type, dtype)(
            denoiser.forward
        )  # only inside, not in its caller
    try:
        yield
    finally:
        denoiser.__dict__.pop("forward", None)


class OwnTrajectories:
    """The student's own trajectories with the teacher's predictions, recorded anew every `refresh` steps.

    A round's trajectories stay on disk until there is a later checkpoint, so that an interrupted run finds them again.
    """

    def __init__(
        self, directory: Path, pipeline, teacher: nn.Module, prompts: PromptList, *, config, sampler, device, running
    ):
        self.directory, self.pipeline, self.teacher, self.prompts = directory, pipeline, teacher, prompts
        self.config, self.sampler, self.device, self.running = config, sampler, device, running
        self.round, self.samples = None, None

    def at(self, step: int) -> Trajectories:
        """The trajectories for a step, recorded if need be."""
        number = step // self.config.refresh
        if number != self.round:
            self._record(number)
            self.round, self.samples = number, trajectories_in(self.directory, _folder(number))
            if processes.is_main():
                self._remove_before((step - step % self.config.check_every) // self.config.refresh)
        return self.samples

    def _remove_before(self, number: int) -> None:
        """Remove the rounds before that of the last checkpoint, from which an interrupted run goes on."""
        for folder in self.directory.glob("round-*"):
            if folder.name < _folder(number):
                for item in item_names(self.directory, folder.name):
                    remove_item(self.directory, item, [])
                shutil.rmtree(folder)

    def _record(self, number: int) -> None:
        """Record a round, with its captions taken in turn."""
        config = self.config.trajectories
        count = captions_of_a_round(self.config, self.sampler, train=len(self.prompts))
        chosen = [self.prompts.prompts[(number * count + i) % len(self.prompts)] for i in range(count)]
        fresh = dataclasses.replace(config, noise_seed=config.noise_seed + 1 + number)
        rank, processes_count = processes.rank_and_count()
        batches = recorded_batches(self.pipeline, PromptList(tuple(chosen), ""), config=fresh, sampler=self.sampler)
        for index, (name, captions, sampled) in enumerate(batches):
            item = f"{_folder(number)}-{name}"
            if index % processes_count == rank and read_item(self.directory, item) is None:
                with self.running():
                    calls = sampled()
                calls = relabelled(calls, self.teacher, device=self.device)
                files = {f"{_folder(number)}/{name}.safetensors": pack(calls, captions=len(captions))}
                write_item(self.directory, item, files, {"captions": [p.id for p in captions]})
        processes.wait_for_all()


def _folder(number: int) -> str:
    return f"round-{number:04d}"
