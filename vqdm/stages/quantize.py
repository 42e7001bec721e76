"""Quantize the denoiser layer by layer; one file per layer until all are there, then one file for the model."""

import logging
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load, load_file
from safetensors.torch import save as to_bytes
from torch import nn
from tqdm import tqdm

from vqdm.bits import BitCounts, count_bits, tensor_bytes
from vqdm.codecs import additive, rtn
from vqdm.config import QuantizeConfig
from vqdm.hub import MODEL_FILE, denoiser_bytes
from vqdm.layers import swap, swap_empty
from vqdm.models.recording import OUTPUT, Call, play_back
from vqdm.models.specs import LayerSpec, layer_specs, skipped_specs, weight_to_matrix
from vqdm.seeds import torch_generator
from vqdm.store import atomic_write, read_item, write_item, write_json
from vqdm.weights.additive import AdditiveScheme, SharedCodebooks
from vqdm.weights.base import QuantizedWeight, Scheme
from vqdm.weights.registry import empty_weight, scheme_from_dict
from vqdm.weights.scalar import ScalarScheme

log = logging.getLogger("vqdm")


def _matrix(denoiser: nn.Module, spec: LayerSpec) -> torch.Tensor:
    return weight_to_matrix(denoiser.get_submodule(spec.name).weight.detach().float())


def scheme_for(config: QuantizeConfig) -> Scheme:
    """The scheme that a configuration asks of every layer."""
    if config.kind == "rtn":
        return ScalarScheme(codec="rtn", bits=config.bits, group_size=config.group_size)
    return AdditiveScheme(
        num_codebooks=config.bits * config.group_size // config.codebook_bits,
        codebook_bits=config.codebook_bits,
        group_size=config.group_size,
        shared="codebooks" if config.codebooks == "model" else None,
    )


def planned_bits(denoiser: nn.Module, config: QuantizeConfig, *, pattern: str, min_size: int) -> BitCounts:
    """What the quantized denoiser will take, from its shapes alone: `denoiser` is on the meta device, and changed.

    UserError, with the layer's name, where the scheme does not fit a layer.
    """
    scheme = scheme_for(config)
    swap_empty(denoiser, [(spec, scheme) for spec in layer_specs(denoiser, pattern=pattern, min_size=min_size)])
    return count_bits(denoiser)


def _shared_codebooks(directory: Path, denoiser: nn.Module, specs: list[LayerSpec], *, config: QuantizeConfig):
    """One codebook set for the model: read back if a killed run has learned it already."""
    scheme, name = scheme_for(config), "shared_codebooks"
    if read_item(directory, name) is None:
        shared = additive.train_shared_codebooks(
            (_matrix(denoiser, spec) for spec in specs),
            num_codebooks=scheme.num_codebooks,
            codebook_bits=scheme.codebook_bits,
            group_size=scheme.group_size,
            generator=torch_generator(config.seed, "codebooks"),
        )
        write_item(directory, name, {f"{name}.safetensors": to_bytes(shared.state_dict())}, {})
    shared = SharedCodebooks(scheme)
    shared.load_state_dict(load_file(directory / f"{name}.safetensors"))
    return shared


def _encode(matrix: torch.Tensor, spec: LayerSpec, *, config: QuantizeConfig, shared) -> QuantizedWeight:
    if config.kind == "rtn":
        return rtn.encode(matrix, bits=config.bits, clip=config.clip, group_size=config.group_size, layer=spec.name)
    scheme = scheme_for(config)
    return additive.encode(
        matrix,
        num_codebooks=scheme.num_codebooks,
        codebook_bits=scheme.codebook_bits,
        group_size=scheme.group_size,
        beam_size=config.beam_size,
        shared=shared,
        generator=torch_generator(config.seed, "encode", spec.name),
        layer=spec.name,
    )


def _record(spec: LayerSpec, matrix: torch.Tensor, weight: QuantizedWeight, seconds: float) -> dict:
    """One line of the per-layer table; the error is relative to the weight's own power."""
    error = (weight().float() - matrix).square().sum() / matrix.square().sum().clamp(min=1e-30)
    return {
        "name": spec.name,
        "shape": list(spec.shape),
        "scheme": weight.scheme.to_dict(),
        "bits": 8 * tensor_bytes(weight.state_dict(keep_vars=True).values()) / matrix.numel(),
        "relative_weight_error": float(error),
        "seconds": round(seconds, 3),
    }


def _quantize_layer(directory: Path, denoiser: nn.Module, spec: LayerSpec, *, config: QuantizeConfig, shared) -> dict:
    """Encode one layer, or read it back; puts it into the denoiser either way."""
    record = read_item(directory, spec.name)
    file = f"layers/{spec.name}.safetensors"
    if record is None:
        began = time.monotonic()
        matrix = _matrix(denoiser, spec)
        weight = _encode(matrix, spec, config=config, shared=shared)
        record = _record(spec, matrix, weight, time.monotonic() - began)
        write_item(directory, spec.name, {file: to_bytes(weight.state_dict())}, record)
    else:
        weight = empty_weight(scheme_from_dict(record["scheme"]), spec.shape, shared)
        weight.load_state_dict(load((directory / file).read_bytes()))
    swap(denoiser, spec, weight)
    return record


def _output_error(denoiser: nn.Module, calls: Iterable[Call], device: str) -> float:
    """Relative squared error of the denoiser's own output on the recorded calls, as stored (16-bit floats)."""
    wrong = power = 0.0
    for call in calls:
        output = play_back(denoiser, call, device=device)
        wrong += float((output.double() - call[OUTPUT].double()).square().sum())
        power += float(call[OUTPUT].double().square().sum())
    return wrong / power


def quantize(
    directory: Path, denoiser: nn.Module, calls, *, config: QuantizeConfig, pattern: str, min_size: int, device: str
) -> dict:
    """Fill the stage's directory: `denoiser.safetensors`, `layers.json`. Returns bits, bytes and output error.

    calls: recorded calls of the full-precision denoiser; they measure the error, no codec of this stage learns on them.
    """
    specs = layer_specs(denoiser, pattern=pattern, min_size=min_size)
    skipped = skipped_specs(denoiser, pattern=pattern, min_size=min_size)
    dtype = next(denoiser.parameters()).dtype
    shared = None
    if config.kind == "additive" and config.codebooks == "model":
        shared = _shared_codebooks(directory, denoiser, specs, config=config)
    records = []
    with tqdm(specs, desc=f"quantize {directory.name}", unit="layer") as progress:
        for spec in progress:
            records.append(_quantize_layer(directory, denoiser, spec, config=config, shared=shared))
            progress.set_postfix(bits=f"{records[-1]['bits']:.3f}", error=f"{records[-1]['relative_weight_error']:.4f}")
    bits = count_bits(denoiser)
    content = denoiser_bytes(denoiser)
    atomic_write(directory / MODEL_FILE, content)
    left = [{"name": s.name, "shape": list(s.shape), "reason": reason} for s, reason in skipped]
    write_json(directory / "layers.json", {"quantized": records, "left_in_16_bit": left})
    nn.Module.to(denoiser, device=device, dtype=dtype)
    error = _output_error(denoiser, calls, device)
    log.info(
        "quantized %d layers, %d left in 16 bit: %.3f bits per weight, relative output error %.4f",
        len(records), len(left), bits.bits_per_weight, error,
    )  # fmt: skip
    return {**bits.to_dict(), "file_bytes": len(content), "relative_output_error": error}
