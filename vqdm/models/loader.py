"""Load a diffusers pipeline, ready to sample: U-Nets and transformers through the same lines."""

import inspect
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from vqdm.config.options import ModelConfig, SamplerConfig
from vqdm.errors import UserError
from vqdm.models.finite import check_finite, check_images
from vqdm.models.foreign import json_object, loading, without_bars
from vqdm.models.location import (
    DENOISERS,
    configs_directory,
    decodes_sliced,
    denoiser_directory,
    model_directory,
    single_file,
)
from vqdm.models.placement import put_on, visits
from vqdm.models.rescale import rescale_
from vqdm.models.samplers import check_sampler, set_sampler
from vqdm.models.single_file import load_single_file
from vqdm.runs import progress


def denoiser_part(pipeline) -> str:
    """The name of the pipeline's part that denoises: unet or transformer. UserError if it has neither."""
    found = next((name for name in DENOISERS if getattr(pipeline, name, None) is not None), None)
    if found is None:
        raise UserError(f"{type(pipeline).__name__} has no {' or '.join(DENOISERS)}: give a diffusers pipeline")
    return found


def denoiser_of(pipeline) -> nn.Module:
    return getattr(pipeline, denoiser_part(pipeline))


def load_pipeline(config: ModelConfig, *, device: str, denoiser: nn.Module | None = None, **parts: nn.Module):
    """A diffusers text-to-image pipeline in evaluation mode, with the model's sampler and rescaling applied.

    denoiser, parts: take the places of the model's own, which are then not read; that denoiser is not rescaled.
    """
    directory = model_directory(config)
    check_sampler(directory, config.sampler)
    given = {} if denoiser is None else {denoiser_directory(directory).name: denoiser}
    with progress.step(f"loading {config.name}"):
        pipeline = _from_files(config, directory, **given, **parts)
    place = single_file(config) or directory
    _check_whole(pipeline, place)
    check_finite(pipeline, place, checked={*given, *parts})
    pipeline.set_progress_bar_config(disable=True)
    set_sampler(pipeline, config.sampler)
    denoiser_of(pipeline).eval().requires_grad_(False)
    if decodes_sliced(config):
        pipeline.vae.enable_slicing()
    if config.rescale.sigma and not given:
        _rescale(pipeline, config)
    return put_on(pipeline, device)


def _rescale(pipeline, config: ModelConfig) -> None:
    denoiser, sigma = denoiser_of(pipeline), config.rescale.sigma
    if not rescale_(denoiser, sigma=sigma, seed=config.rescale.seed):
        raise UserError(
            f"model.rescale.sigma={sigma:g}: {type(denoiser).__name__} has nothing to rescale, only U-Nets have; set "
            "it to 0"
        )
    check_finite(pipeline, f"model.rescale.sigma={sigma:g} in {config.dtype}")


def _from_files(config: ModelConfig, directory: Path, **given: nn.Module):
    """A pipeline directory, or a single file with the configs of `directory`; parts that are `given` are not read."""
    from diffusers import DiffusionPipeline

    dtype = getattr(torch, config.dtype)
    if (file := single_file(config)) is not None:
        with without_bars():
            return load_single_file(file, configs=directory, dtype=dtype, **given)
    with loading(directory), without_bars():
        pipeline = DiffusionPipeline.from_pretrained(
            directory, dtype=dtype, variant=config.variant, use_safetensors=True, local_files_only=True, **given
        )
    call_parameters(pipeline)
    return pipeline


def call_parameters(pipeline) -> Mapping[str, inspect.Parameter]:
    """The parameters of a pipeline's call. UserError unless captions and noise are all that it samples from."""
    found = inspect.signature(pipeline.__call__).parameters
    if "image" in found or not {"prompt", "num_inference_steps", "guidance_scale"} <= set(found):
        raise UserError(
            f"{type(pipeline).__name__} does not make images from text alone: give the text-to-image pipeline of its "
            "parts, such as StableDiffusionXLPipeline.from_pipe(pipeline)"
        )
    return found


def execution_device(pipeline) -> torch.device:
    """The device that a pipeline in memory computes on: its weights', or that to which model offloading moves them."""
    return pipeline._execution_device


def check_on_device(pipeline) -> None:
    """UserError for a pipeline in memory whose layers' weights come and go, as by sequential or group offloading."""
    if any(_is_in_a_group(module) for module in denoiser_of(pipeline).modules()):
        raise UserError(
            "group offloading holds the denoiser's layers, which are to be replaced: load the pipeline without it "
            "(enable_group_offload), compress it, then offload"
        )
    for part, module in pipeline.components.items():
        state = module.state_dict() if isinstance(module, nn.Module) else {}
        if away := next((name for name, tensor in state.items() if tensor.is_meta), None):
            raise UserError(
                f"the weight {away} of the pipeline's {part} is on the meta device: load the pipeline without "
                "offloading (enable_sequential_cpu_offload, device_map), compress it, then offload"
            )


def _is_in_a_group(module: nn.Module) -> bool:
    hooks = getattr(module, "_diffusers_hook", None)
    return hooks is not None and hooks.get_hook("group_offloading") is not None


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
    settings = json_object(directory / "config.json")
    name = str(settings.get("_class_name"))
    kind = getattr(diffusers, name, None)  # diffusers imports it now: not on the meta device
    if not isinstance(kind, type) or not issubclass(kind, diffusers.ModelMixin):
        raise UserError(f"{directory}/config.json names {name}, which diffusers {diffusers.__version__} lacks")
    with loading(directory / "config.json", f"a {name}"), torch.device("meta"):
        return nn.Module.to(kind.from_config(settings), dtype=getattr(torch, config.dtype))


@torch.no_grad()
def sample(
    pipeline, texts: list[str], *, sampler: SamplerConfig, generators: list[torch.Generator], output: str = "pil"
):
    """Sample images of the prompts; every image draws all its noise from its own CPU generator.

    Arrays become pictures here, as diffusers does it, so that NaN is found before it is cast to black: UserError.
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
        "output_type": "np" if output == "pil" else output,
        "clean_caption": False,
        "use_resolution_binning": False,
    }
    known = inspect.signature(pipeline.__call__).parameters
    with visits(pipeline):
        made = pipeline(**{name: value for name, value in arguments.items() if name in known}).images
    check_images([torch.as_tensor(image) for image in made], texts)
    return pipeline.image_processor.numpy_to_pil(made) if output == "pil" else made
