"""A quantized denoiser as one safetensors file, and back.

The file holds the denoiser's whole state dict: packed codes as uint8, everything else in 16 bit. Its metadata name
the scheme of every quantized layer, so that file and model config suffice to load it.
"""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import nn

from vqdm.errors import UserError
from vqdm.layers import swap_empty
from vqdm.models.specs import layer_specs
from vqdm.weights.base import QuantizedWeight, Scheme
from vqdm.weights.registry import scheme_from_dict

MODEL_FILE = "denoiser.safetensors"
METADATA = "vqdm"
FORMAT_VERSION = 1


def quantized_weights(denoiser: nn.Module) -> dict[str, QuantizedWeight]:
    """Layer name -> its quantized weight, in module order."""
    found = {name: module for name, module in denoiser.named_modules() if isinstance(module, QuantizedWeight)}
    return {name.rpartition(".")[0]: weight for name, weight in found.items()}


def _stored(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.half() if tensor.is_floating_point() else tensor).detach().cpu().contiguous()


def denoiser_bytes(denoiser: nn.Module) -> bytes:
    """The file's content, for a full-precision or quantized denoiser."""
    schemes = {name: weight.scheme.to_dict() for name, weight in quantized_weights(denoiser).items()}
    about = json.dumps({"version": FORMAT_VERSION, "schemes": schemes}, separators=(",", ":"))
    # one metadata key: safetensors writes several in random order, and the same model must give the same bytes
    return to_bytes({name: _stored(tensor) for name, tensor in denoiser.state_dict().items()}, {METADATA: about})


def _schemes(path: Path, metadata: dict[str, str]) -> dict[str, Scheme]:
    """Layer name -> scheme, from the file's metadata; UserError for anything else."""
    try:
        about = json.loads(metadata.get(METADATA, "{}"))
        version, schemes = about["version"], dict(about["schemes"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} does not say what it holds ({error!r}); it is no vqdm file, or damaged") from error
    if version != FORMAT_VERSION:
        raise UserError(
            f"{path} has format version {version}, this vqdm reads version {FORMAT_VERSION}; quantize again"
        )
    return {name: scheme_from_dict(fields) for name, fields in schemes.items()}


def load_quantized_(denoiser: nn.Module, path: Path, *, decode: str = "cached") -> None:
    """Replace the quantized layers of a full-precision denoiser and load every tensor of the file, strictly."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}); delete it and run the same command again") from error
    schemes = _schemes(path, metadata)
    parameter = next(denoiser.parameters())
    specs = {spec.name: spec for spec in layer_specs(denoiser, pattern=".", min_size=1)}
    strange = next((name for name in schemes if name not in specs), None)
    if strange is not None:
        raise UserError(f"{path} has a quantized layer {strange}, which this model lacks; it belongs to another model")
    swap_empty(denoiser, [(specs[name], scheme) for name, scheme in schemes.items()], decode=decode)
    missing, extra = denoiser.load_state_dict(tensors, strict=False)
    for kind, names in (("lacks the tensor", missing), ("has the unknown tensor", extra)):
        if names:
            raise UserError(f"{path} {kind} {names[0]} ({len(names)} in all); it belongs to another model")
    nn.Module.to(denoiser, device=parameter.device, dtype=parameter.dtype)  # diffusers' own warns of nothing
    denoiser.eval().requires_grad_(False)
