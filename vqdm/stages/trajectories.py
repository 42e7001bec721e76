"""Trajectories: the denoiser's calls and outputs at every step of sampling distillation's own captions.

Files are `train/<batch>-<steps>.safetensors` and `validation/…`, each an item; they are read sample by sample.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import nn

from vqdm.calibration.calls import sample_batches
from vqdm.calibration.recording import LATENTS, OUTPUT, Call, Recorder, evenly_spread, play_back
from vqdm.config.options import SamplerConfig, TrajectoriesConfig
from vqdm.distillation.trajectories import Trajectories, pack
from vqdm.errors import UserError
from vqdm.models.loader import denoiser_of
from vqdm.models.placement import visits
from vqdm.prompts import Prompt, PromptList
from vqdm.runs.items import make_missing
from vqdm.seeds import torch_generator
from vqdm.stages.caption_images import caption_image

TRAIN, VALIDATION = "train", "validation"
WHAT_FOR = {TRAIN: "learn from", VALIDATION: "validate on"}


def split_prompts(prompts: PromptList, validation: int) -> tuple[PromptList, PromptList]:
    """Split prompts into those to train on and the last ones, which judge."""
    first, last = prompts.prompts[: len(prompts) - validation], prompts.prompts[len(prompts) - validation :]
    return PromptList(first, prompts.origin), PromptList(last, prompts.origin)


def record_trajectories(
    directory: Path, pipeline, prompts: PromptList, *, config: TrajectoriesConfig, sampler: SamplerConfig
) -> dict:
    """Fill the stage's directory; existing batches are kept. Returns the number of samples in each part.

    pipeline: full precision. With along=student only the validation's are made here, as the student makes its own.
    """
    train, validation = split_prompts(prompts, config.validation)
    if config.along == "teacher":
        _record(directory, TRAIN, pipeline, train, config=config, sampler=sampler)
    elif config.along == "data":
        _record(directory, TRAIN, pipeline, train, config=config, sampler=sampler, noised=True)
    _record(directory, VALIDATION, pipeline, validation, config=config, sampler=sampler)
    return {part: len(trajectories_in(directory, part)) for part in (TRAIN, VALIDATION)}


def trajectories_in(directory: Path, part: str) -> Trajectories:
    return Trajectories((directory / part).glob("*.safetensors"))


def _record(directory: Path, part: str, pipeline, prompts: PromptList, *, config, sampler, noised=False) -> None:
    def record(name: str, captions: list[Prompt], sampled: Callable[[], list[Call]]) -> tuple[dict[str, bytes], dict]:
        calls = sampled()
        if noised:
            calls = noised_calls(pipeline, calls, captions, config=config)
        content = pack(calls, captions=len(captions))
        return {f"{part}/{name}.safetensors": content}, {"prompts": [p.id for p in captions], "calls": len(calls)}

    batches = recorded_batches(pipeline, prompts, config=config, sampler=sampler)
    makers = {f"{part}-{batch[0]}": functools.partial(record, *batch) for batch in batches}
    make_missing(directory, makers, title=f"trajectories to {WHAT_FOR[part]}")


def recorded_batches(
    pipeline, prompts: PromptList, *, config: TrajectoriesConfig, sampler: SamplerConfig
) -> Iterator[tuple[str, list[Prompt], Callable[[], list[Call]]]]:
    """Yield every batch at every number of steps: name, captions, and a function that gives the recorded calls."""
    for steps in config.sampler_steps or [sampler.steps]:
        own = dataclasses.replace(sampler, steps=steps)
        positions = evenly_spread(steps, config.recorded_steps or steps)
        for name, captions, run in sample_batches(pipeline, prompts, config=config, sampler=own):

            def sampled(run=run, positions=positions) -> list[Call]:
                with Recorder(denoiser_of(pipeline), steps=positions) as recorder:
                    run()
                return recorder.calls

            yield f"{name}-{steps:03d}", captions, sampled


def relabelled(calls: list[Call], teacher: nn.Module, *, device: str | torch.device) -> list[Call]:
    """The calls with the teacher's outputs for them."""
    return [call | {OUTPUT: play_back(teacher, call, device=device)} for call in calls]


@torch.no_grad()
def noised_calls(pipeline, calls: list[Call], captions: list[Prompt], *, config: TrajectoriesConfig) -> list[Call]:
    """The calls with noised latents of the captions' images in place of the sampled ones, at the same timesteps.

    x_t = √ᾱ_t x + √(1 − ᾱ_t) ε (Ho et al. 2020, eq. 4), as every scheduler here feeds the denoiser.
    UserError for flow matching.
    """
    scheduler = pipeline.scheduler
    if not hasattr(scheduler, "alphas_cumprod"):
        raise UserError(
            f"finetune.trajectories.along=data needs a noise schedule, and {type(scheduler).__name__} has none: "
            "use along=teacher"
        )
    name = next(name for name in LATENTS if name in calls[0])
    clean, made = _latents(pipeline, captions, config, size=calls[0][name].shape[-1] * pipeline.vae_scale_factor), []
    for call in calls:
        timestep = call["timestep"].flatten()[0]
        level = scheduler.alphas_cumprod[timestep.long()]
        draws = [torch_generator(config.noise_seed, f"noised/{float(timestep):g}", p.id) for p in captions]
        noise = torch.stack([torch.randn(clean.shape[1:], generator=draw, device="cpu") for draw in draws])
        noisy = level.sqrt() * clean + (1 - level).sqrt() * noise
        rows = call[name]
        made.append(call | {name: noisy.repeat(len(rows) // len(noisy), 1, 1, 1).to(rows.dtype)})
    return relabelled(made, denoiser_of(pipeline), device=denoiser_of(pipeline).device)


def _latents(pipeline, captions: list[Prompt], config: TrajectoriesConfig, *, size: int) -> torch.Tensor:
    """Latents of the captions' images, `size` pixels wide: fp32 [captions, channels, h, w]."""
    vae, dtype = pipeline.vae, pipeline.vae.dtype
    vae.to(torch.float32)  # SDXL's overflows in fp16
    latents, device = [], denoiser_of(pipeline).device
    with visits(pipeline):
        for prompt in captions:  # one at a time: encoding an image of 1024 pixels takes gigabytes
            image = torch.from_numpy(_pixels(prompt, config, size)).permute(2, 0, 1)[None].float() / 127.5 - 1
            latents.append(vae.encode(image.to(device)).latent_dist.mode().cpu())
    vae.to(dtype)
    return torch.cat(latents) * vae.config.scaling_factor


def _pixels(prompt: Prompt, config: TrajectoriesConfig, size: int) -> np.ndarray:
    """The caption's scene of the tiny world, or its file cut to a central square: uint8 [size, size, 3]."""
    if config.images is None:
        from vqdm.tiny.data import scene_pixels
        from vqdm.tiny.worlds import WORLDS

        return scene_pixels(prompt.id, world=WORLDS[config.source])
    path = caption_image(config.images, prompt)
    try:
        image = Image.open(path).convert("RGB")
    except OSError as error:
        raise UserError(
            f"{path} is no image that can be read ({error}): replace it; the same command goes on"
        ) from error
    return np.asarray(ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS))
