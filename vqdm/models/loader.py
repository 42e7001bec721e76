"""Load a diffusers pipeline, ready to sample: U-Nets and transformers through the same lines."""

import inspect
import json
from pathlib import Path

import torch
from torch import nn

from vqdm.config import ModelConfig, SamplerConfig
from vqdm.errors import UserError
from vqdm.models.location import DENOISERS, configs_directory, denoiser_directory, model_directory, single_file
from vqdm.models.rescale import rescale_
from vqdm.models.single_file import load_single_file

SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_ancestral": "EulerAncestralDiscreteScheduler",
    "dpm_solver": "DPMSolverMultistepScheduler",
}
NATIVE = "native"  # the model's own scheduler


def denoiser_part(pipeline) -> str:
    """The name of the pipeline's part that denoises: unet or transformer."""
    return next(name for name in DENOISERS if getattr(pipeline, name, None) is not None)


def denoiser_of(pipeline) -> nn.Module:
    return getattr(pipeline, denoiser_part(pipeline))


def load_pipeline(config: ModelConfig, *, device: str):
    """A diffusers text-to-image pipeline in evaluation mode, with the model's sampler and rescaling applied."""
    directory = model_directory(config)
    check_sampler(directory, config.sampler)
    pipeline = _from_files(config, directory)
    pipeline.set_progress_bar_config(disable=True)
    set_sampler(pipeline, config.sampler)
    denoiser = denoiser_of(pipeline)
    denoiser.eval().requires_grad_(False)
    if config.rescale.sigma and not rescale_(denoiser, sigma=config.rescale.sigma, seed=config.rescale.seed):
        raise UserError(
            f"model.rescale.sigma={config.rescale.sigma:g}: {type(denoiser).__name__} has nothing to rescale, "
            "only U-Nets have; set it to 0"
        )
    return pipeline.to(device)


def _from_files(config: ModelConfig, directory: Path):
    """A pipeline directory, or a single file with the configs of `directory`."""
    from diffusers import DiffusionPipeline

    dtype = getattr(torch, config.dtype)
    if (file := single_file(config)) is not None:
        return load_single_file(file, configs=directory, dtype=dtype)
    try:
        return DiffusionPipeline.from_pretrained(
            directory, dtype=dtype, variant=config.variant, use_safetensors=True, local_files_only=True
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"{directory} cannot be loaded as a diffusers pipeline: {str(error).splitlines()[0]}"
        ) from error


def denoiser_on_meta(config: ModelConfig) -> nn.Module:
    """The denoiser with shapes and no values, from its config file alone."""
    import diffusers

    directory = denoiser_directory(configs_directory(config))
    settings = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    kind = getattr(diffusers, settings["_class_name"])  # diffusers imports it now: not on the meta device
    with torch.device("meta"):
        return kind.from_config(settings)


def check_sampler(directory: Path, sampler: SamplerConfig) -> None:
    """Refuse samplers of diffusion for a flow-matching model, known from the pipeline's scheduler file."""
    file = directory / "scheduler" / "scheduler_config.json"
    try:
        settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError as error:
        raise UserError(f"{file} is not JSON ({error}); download the model again") from error
    is_flow = settings.get("use_flow_sigmas") or settings.get("prediction_type") == "flow_prediction"
    is_flow = is_flow or settings.get("_class_name", "").startswith("FlowMatch")
    if is_flow and sampler.scheduler != NATIVE:
        raise UserError(
            f"model.sampler.scheduler={sampler.scheduler} does not fit {directory}, which is a flow-matching model: "
            f"give model.sampler.scheduler={NATIVE}"
        )


def set_sampler(pipeline, sampler: SamplerConfig) -> None:
    """Replace the scheduler, keeping the model's own noise schedule; native keeps the scheduler, too."""
    import diffusers

    own = pipeline.scheduler
    kind = type(own) if sampler.scheduler == NATIVE else getattr(diffusers, SCHEDULERS[sampler.scheduler])
    extra = {} if sampler.timestep_spacing is None else {"timestep_spacing": sampler.timestep_spacing}
    if not extra.keys() <= inspect.signature(kind.__init__).parameters.keys():
        raise UserError(
            f"model.sampler.timestep_spacing={sampler.timestep_spacing}: {kind.__name__} has no such setting; "
            "set it to null"
        )
    pipeline.scheduler = kind.from_config(own.config, **extra)


@torch.no_grad()
def sample(
    pipeline, texts: list[str], *, sampler: SamplerConfig, generators: list[torch.Generator], output: str = "pil"
):
    """Images of the prompts; every image draws all its noise from its own CPU generator.

    PixArt gets captions as they are, not cleaned where packages for that happen to be installed, and the very size.
    """
    arguments = {
        "prompt": texts,
        "num_inference_steps": sampler.steps,
        "guidance_scale": sampler.guidance,
        "height": sampler.size,
        "width": sampler.size,
        "generator": generators,
        "output_type": output,
        "clean_caption": False,
        "use_resolution_binning": False,
    }
    known = inspect.signature(pipeline.__call__).parameters
    return pipeline(**{name: value for name, value in arguments.items() if name in known}).images
