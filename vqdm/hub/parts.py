"""Text encoders and VAEs with quantized layers in directories, through transformers' and diffusers' own loading."""

from pathlib import Path

import torch
from torch import nn

from vqdm.errors import UserError
from vqdm.hub.pipelines import load_denoiser, naming, quiet_diffusers, save_denoiser
from vqdm.models.foreign import json_object, loading
from vqdm.weights.layers import quantized_layers


def text_encoders_of(pipeline) -> dict[str, nn.Module]:
    """The text encoders that can be quantized. UserError, naming the part, for a class that is not CLIP's."""
    found = {
        name: module
        for name, module in pipeline.components.items()
        if name.startswith("text_encoder") and isinstance(module, nn.Module)
    }
    for name, module in found.items():
        if not type(module).__name__.startswith("CLIPText"):
            raise UserError(
                f"parts.text_encoders: the pipeline's {name} is a {type(module).__name__}, and only CLIP's are "
                "quantized: leave it null"
            )
    return found


def save_part(module: nn.Module, directory: Path) -> int:
    """Write a part with quantized layers as its own library does; returns the bytes of its safetensors files."""
    if hasattr(type(module), "load_config"):  # diffusers' own, as VAEs are
        return save_denoiser(module, directory, metrics={})
    from vqdm.hub.transformers_table import attach_text_encoder

    attach_text_encoder(module)
    module.save_pretrained(directory)
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


def load_part(directory: Path, *, dtype: torch.dtype) -> nn.Module:
    """A saved part on the CPU. UserError, naming the directory, if it is not what it says."""
    config = json_object(directory / "config.json")
    if "_class_name" in config:
        return load_denoiser(directory, dtype=dtype)
    import transformers

    kind = getattr(transformers, str((config.get("architectures") or [None])[0]), None)
    if not isinstance(kind, type) or not issubclass(kind, transformers.PreTrainedModel):
        raise UserError(f"{directory}/config.json names no model of transformers")
    with naming(directory), loading(directory, "a quantized text encoder"), quiet_diffusers():
        found = kind.from_pretrained(directory, dtype=dtype, local_files_only=True)
    if not quantized_layers(found):
        raise UserError(f"{directory} is not a quantized text encoder: its files hold plain weights")
    return found.requires_grad_(False)
