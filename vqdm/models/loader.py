"""Load a diffusers pipeline, ready to sample: U-Nets and transformers through the same lines."""

import inspect
import json
from pathlib import Path

import torch
from torch import nn

from vqdm.config.options import ModelConfig, SamplerConfig
from vqdm.errors import UserError
from vqdm.models.location import DENOISERS, configs_directory, denoiser_directory, model_directory, single_file
from vqdm.models.rescale import rescale_
from vqdm.models.samplers import check_sampler, set_sampler
from vqdm.models.single_file import load_single_file


def denoiser_part(pipeline) -> str:
    """The name of the pipeline's part that denoises: unet or transformer. UserError if it has neither."""
    found = next((name for name in DENOISERS if getattr(pipeline, name, None) is not None), None)
    if found is None:
        raise UserError(f"{type(pipeline).__name__} has no {' or '.join(DENOISERS)}: give a diffusers pipeline")
    return found


def denoiser_of(pipeline) -> nn.Module:
    return getattr(pipeline, denoiser_part(pipeline))


def load_pipeline(config: ModelConfig, *, device: str):
    """A diffusers text-to-image pipeline in evaluation mode, with the model's sampler and rescaling applied."""
    directory = model_directory(config)
    check_sampler(directory, config.sampler)
    pipeline = _from_files(config, directory)
    _check_whole(pipeline, single_file(config) or directory)
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


def _check_whole(pipeline, place: Path) -> None:
    """Raise UserError for weights that no file held: diffusers leaves them on meta, and only warns."""
    for part, module in pipeline.components.items():
        state = module.state_dict() if isinstance(module, nn.Module) else {}
        if missing := [name for name, tensor in state.items() if tensor.is_meta]:
            raise UserError(
                f"{place} lacks the weight {missing[0]} of the {part} ({len(missing)} in all): get the model again"
            )


def denoiser_on_meta(config: ModelConfig) -> nn.Module:
    """The denoiser made from its config file alone: shapes in the model's dtype, but no values."""
    import diffusers

    directory = denoiser_directory(configs_directory(config))
    settings = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    kind = getattr(diffusers, settings["_class_name"], None)  # imported here, not on the meta device
    if kind is None:
        raise UserError(
            f"{directory}/config.json names {settings['_class_name']}, which diffusers {diffusers.__version__} lacks"
        )
    with torch.device("meta"):
        return nn.Module.to(kind.from_config(settings), dtype=getattr(torch, config.dtype))


@torch.no_grad()
def sample(
    pipeline, texts: list[str], *, sampler: SamplerConfig, generators: list[torch.Generator], output: str = "pil"
):
    """Sample images of the prompts; every image draws all its noise from its own CPU generator.

        PixArt gets captions as they are (diffusers would clean them where packages for that happen to be installed) and
    exactly the size that was asked for.
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
