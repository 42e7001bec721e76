"""Quantized denoisers and their pipelines in directories, by diffusers' own loading and saving."""

import contextlib
import json
from pathlib import Path

import torch
from torch import nn

from vqdm.errors import UserError
from vqdm.hub.quantizer import attach
from vqdm.layers import quantized_layers
from vqdm.models.loader import denoiser_part

WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"


@contextlib.contextmanager
def quiet_diffusers():
    """Without diffusers' own progress bars inside."""
    from diffusers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def save_denoiser(denoiser: nn.Module, directory: Path) -> int:
    """Write a denoiser with quantized layers as diffusers does; returns the bytes of its safetensors files."""
    attach(denoiser)
    with quiet_diffusers():
        denoiser.save_pretrained(directory)
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


def load_denoiser(directory: Path, *, dtype: torch.dtype, decode: str = "per_call") -> nn.Module:
    """A saved denoiser on the CPU, ready to sample. UserError if it is not what it says."""
    import diffusers

    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    kind = getattr(diffusers, str(config.get("_class_name")), None)
    if kind is None:
        raise UserError(f"{directory}/config.json names no model of diffusers ({config.get('_class_name')})")
    with quiet_diffusers():
        denoiser = kind.from_pretrained(directory, torch_dtype=dtype, local_files_only=True)
    set_decode(denoiser, decode)
    return denoiser.requires_grad_(False)


def set_decode(denoiser: nn.Module, decode: str) -> None:
    """`per_call` or `cached`, of all quantized layers."""
    for layer in quantized_layers(denoiser).values():
        layer.decode = decode


def replace_denoiser(pipeline, denoiser: nn.Module) -> None:
    pipeline.register_modules(**{denoiser_part(pipeline): denoiser})
