"""Pairs of noise and the teacher's image of it, with their captions, read row by row from files of trajectories.

A file is one batch's first call of the denoiser with the final latents in the place of its output.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from vqdm.calibration.recording import LATENTS, OUTPUT, Call, play
from vqdm.distillation.trajectories import Batch, Trajectories, pack


def pack_pairs(call: Call, latents: Tensor) -> bytes:
    """A batch as a file. call: the first of its sampling, under guidance with two rows a caption; latents: its last."""
    rows_each = len(call[OUTPUT]) // len(latents)
    repeated = latents.to(device="cpu", dtype=torch.float32).repeat(rows_each, 1, 1, 1)
    return pack([call | {OUTPUT: repeated}], captions=len(latents))


@dataclass(frozen=True)
class Pairs:
    """Pairs on a device, in fp32, and how denoisers are asked about them.

    empty: the arguments without caption; None: the teacher is not guided. precision: of the denoisers' activations.
    """

    noise: Tensor  # [pairs, channels, h, w]
    clean: Tensor  # [pairs, channels, h, w]
    captions: dict  # arguments of the denoiser other than latents and timestep
    empty: dict | None
    precision: str = "float32"

    def ask(self, denoiser: nn.Module, latents: Tensor, timesteps: Tensor) -> Tensor:
        """The noise that a denoiser predicts for noised latents with these captions; timesteps [pairs]."""
        return self._ask(denoiser, self.captions, latents, timesteps)

    def ask_guided(self, denoiser: nn.Module, latents: Tensor, timesteps: Tensor, *, guidance: float) -> Tensor:
        """u + g (c − u), predictions with the caption (c) and without (u)."""
        noise = self._ask(denoiser, self.captions, latents, timesteps)
        if self.empty is None:
            return noise
        empty = self._ask(denoiser, self.empty, latents, timesteps)
        return empty + guidance * (noise - empty)

    def _ask(self, denoiser: nn.Module, arguments: dict, latents: Tensor, timesteps: Tensor) -> Tensor:
        """One call under autocast of its own: weights cast without gradient would stay so in the same block."""
        name, lower = _name_of_latents(arguments), self.precision == "bfloat16"
        with torch.autocast(latents.device.type, torch.bfloat16, enabled=lower):
            return play(denoiser, arguments | {name: latents, "timestep": timesteps}).float()


def read_pairs(
    files: Trajectories, indices: Sequence[int], *, device: str | torch.device, precision: str = "float32"
) -> Pairs:
    batch = files.batch(indices, device=device)
    first, last = 0, batch.rows_each - 1  # diffusers puts the empty caption first
    name = _name_of_latents(batch.arguments)
    empty = None if batch.rows_each == 1 else _rows(batch.arguments, batch, first)
    captions = _rows(batch.arguments, batch, last)
    return Pairs(captions[name], batch.target[last :: batch.rows_each], captions, empty, precision)


def _name_of_latents(arguments: dict) -> str:
    return next(name for name in LATENTS if name in arguments)


def _rows(value, batch: Batch, which: int):
    """Every sample's row of that number, of all tensors that have a row for each."""
    if isinstance(value, dict):
        return {name: _rows(inner, batch, which) for name, inner in value.items()}
    by_row = isinstance(value, Tensor) and value.ndim > 0 and len(value) == len(batch.target)
    return value[which :: batch.rows_each] if by_row else value


def student_scheduler(scheduler) -> DDIMScheduler:
    """DDIM on the model's own noise schedule, from the noisiest timestep down to the clean image itself."""
    return DDIMScheduler.from_config(
        scheduler.config, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=True
    )


@torch.no_grad()
def sampled(student: nn.Module, pairs: Pairs, scheduler: DDIMScheduler, *, steps: int) -> Tensor:
    """The student's latents of the pairs' noise, by DDIM in so many steps and without guidance."""
    scheduler.set_timesteps(steps)
    latents = pairs.noise
    for timestep in scheduler.timesteps:
        times = timestep.to(latents.device).expand(len(latents))
        latents = scheduler.step(pairs.ask(student, latents, times), timestep, latents).prev_sample
    return latents
