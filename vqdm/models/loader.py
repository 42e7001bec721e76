"""Load a diffusers pipeline, ready to sample: the tiny model and SDXL through the same lines."""

import json
import warnings

import torch
from torch import nn

from vqdm.config import ModelConfig, SamplerConfig
from vqdm.errors import UserError
from vqdm.models.location import DENOISERS, denoiser_directory, model_directory
from vqdm.models.rescale import rescale_

SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_ancestral": "EulerAncestralDiscreteScheduler",
    "dpm_solver": "DPMSolverMultistepScheduler",
}


def denoiser_of(pipeline) -> nn.Module:
    """The U-Net or transformer."""
    return next(getattr(pipeline, name) for name in DENOISERS if getattr(pipeline, name, None) is not None)


def load_pipeline(config: ModelConfig, *, device: str):
    """A diffusers text-to-image pipeline in evaluation mode, with the model's sampler and rescaling applied."""
    from diffusers import DiffusionPipeline

    directory = model_directory(config)
    # the name that older versions of diffusers know, too
    warnings.filterwarnings("ignore", message=".*`torch_dtype` is deprecated", category=FutureWarning)
    try:
        pipeline = DiffusionPipeline.from_pretrained(
            directory,
            torch_dtype=getattr(torch, config.dtype),
            variant=config.variant,
            use_safetensors=True,
            local_files_only=True,
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"{directory} cannot be loaded as a diffusers pipeline: {str(error).splitlines()[0]}"
        ) from error
    pipeline.set_progress_bar_config(disable=True)
    set_sampler(pipeline, config.sampler)
    denoiser = denoiser_of(pipeline)
    denoiser.eval().requires_grad_(False)
    if config.rescale.sigma:
        rescale_(denoiser, sigma=config.rescale.sigma, seed=config.rescale.seed)
    return pipeline.to(device)


def denoiser_on_meta(config: ModelConfig) -> nn.Module:
    """The denoiser with shapes and no values, from its config file alone."""
    import diffusers

    directory = denoiser_directory(model_directory(config))
    settings = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    with torch.device("meta"):
        return getattr(diffusers, settings["_class_name"]).from_config(settings)


def set_sampler(pipeline, sampler: SamplerConfig) -> None:
    """Replace the scheduler, keeping the model's own noise schedule."""
    import diffusers

    extra = {} if sampler.timestep_spacing is None else {"timestep_spacing": sampler.timestep_spacing}
    kind = getattr(diffusers, SCHEDULERS[sampler.scheduler])
    pipeline.scheduler = kind.from_config(pipeline.scheduler.config, **extra)


@torch.no_grad()
def sample(
    pipeline, texts: list[str], *, sampler: SamplerConfig, generators: list[torch.Generator], output: str = "pil"
):
    """Images of the prompts; every image draws all its noise from its own CPU generator."""
    return pipeline(
        prompt=texts,
        num_inference_steps=sampler.steps,
        guidance_scale=sampler.guidance,
        height=sampler.size,
        width=sampler.size,
        generator=generators,
        output_type=output,
    ).images
