"""Denoisers that other libraries quantize, by diffusers' own loading and saving: rows beside ours, never our codecs.

All of it is theirs but two things: bits are counted by our rule from what they store, and a GGUF file is written with
`gguf`'s own rounding here, since diffusers only reads such files.
"""

import contextlib
import logging
import math
import os
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from vqdm.config.codecs import PeerConfig
from vqdm.errors import NotRunHere
from vqdm.models.foreign import json_object
from vqdm.runs.provenance import installed_version
from vqdm.seeds import seeded_initialisation

GGUF_FILE = "denoiser.gguf"
REFUSALS = (ImportError, RuntimeError, ValueError, NotImplementedError, AssertionError, TypeError)


def made_by(config: PeerConfig) -> str:
    """Names and versions of what quantizes, for a table's footnotes."""
    import diffusers

    return f"{config.name} by {config.package} {installed_version(config.package)}, diffusers {diffusers.__version__}"


@contextlib.contextmanager
def refusing(config: PeerConfig):
    """Turn the library's own refusal into NotRunHere, in its words."""
    version = installed_version(config.package)
    if version is None:
        raise NotRunHere(f"{config.name}: {config.package} is not installed: pip install 'vqdm[peers]'")
    os.environ.setdefault("SDNQ_USE_TORCH_COMPILE", "0")  # eager, as every other row
    shown = logging.root.manager.disable
    logging.disable(logging.WARNING)  # of libraries that look for kernels of theirs
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except REFUSALS as error:
        said = " ".join(str(error).split()) or type(error).__name__
        raise NotRunHere(f"{config.name}: {config.package} {version} says: {said[:300]}") from error
    finally:
        logging.disable(shown)


def quantize_by_peer(denoiser: nn.Module, directory: Path, *, full: Path, config: PeerConfig) -> None:
    """Write `directory`: the denoiser as the peer saves it, quantized from a copy at full precision in `full`.

    NotRunHere, in the library's own words, where it cannot do it.
    """
    dtype = next(denoiser.parameters()).dtype
    with (
        refusing(config),
        seeded_initialisation(config.seed, "peer"),
    ):
        if config.library == "gguf":
            _write_gguf(denoiser, directory, config.weights)
            return
        denoiser.save_pretrained(full)
        made = type(denoiser).from_pretrained(
            full, torch_dtype=dtype, quantization_config=OPTIONS[config.library](config)
        )
        made.save_pretrained(directory)


def load_by_peer(directory: Path, *, dtype: torch.dtype, config: PeerConfig) -> nn.Module:
    """The denoiser of `quantize_by_peer` on the CPU, which computes in `dtype`."""
    import diffusers

    kind = getattr(diffusers, json_object(directory / "config.json")["_class_name"])
    with refusing(config):
        if config.library == "gguf":
            return _read_gguf(directory, kind, dtype)
        return kind.from_pretrained(directory, torch_dtype=dtype, local_files_only=True).requires_grad_(False)


def _sdnq(config: PeerConfig):
    import diffusers

    switches = {f"use_{name}": getattr(config, name) for name in ("svd", "hadamard", "codebook")}
    return diffusers.SDNQConfig(weights_dtype=config.weights, quant_conv=True, **switches)  # convolutions too


def _bitsandbytes(config: PeerConfig):
    import diffusers

    if config.weights == "int8":
        return diffusers.BitsAndBytesConfig(load_in_8bit=True)
    return diffusers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=config.weights)


def _torchao(config: PeerConfig):
    import diffusers
    from torchao import quantization

    kinds = {"int4": quantization.Int4WeightOnlyConfig, "int8": quantization.Int8WeightOnlyConfig}
    return diffusers.TorchAoConfig(kinds[config.weights]())


def _quanto(config: PeerConfig):
    import diffusers

    return diffusers.QuantoConfig(weights_dtype=config.weights)


def _autoround(config: PeerConfig):
    import diffusers

    return diffusers.AutoRoundConfig(bits=int(config.weights.removeprefix("int")))


OPTIONS = {  # what tells diffusers how a library is to quantize; gguf is none of them, as its file is written here
    "sdnq": _sdnq,
    "bitsandbytes": _bitsandbytes,
    "torchao": _torchao,
    "quanto": _quanto,
    "autoround": _autoround,
}


def _write_gguf(denoiser: nn.Module, directory: Path, name: str) -> None:
    """A GGUF file: matrices whose rows are whole blocks in the type `name`, all else in 16 bit."""
    import gguf

    kind = gguf.GGMLQuantizationType[name]
    block = gguf.GGML_QUANT_SIZES[kind][0]
    matrices = {f"{name}.weight" for name, module in denoiser.named_modules() if isinstance(module, nn.Linear)}
    directory.mkdir(parents=True)
    writer = gguf.GGUFWriter(directory / GGUF_FILE, "denoiser")
    for key, tensor in denoiser.state_dict().items():
        values = tensor.detach().float().cpu().numpy()
        if key in matrices and tensor.shape[1] % block == 0:
            writer.add_tensor(key, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(key, values.astype("float16"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    denoiser.save_config(directory)


def _read_gguf(directory: Path, kind: type, dtype: torch.dtype) -> nn.Module:
    from diffusers import GGUFQuantizationConfig

    options = GGUFQuantizationConfig(compute_dtype=dtype)
    file, config = str(directory / GGUF_FILE), str(directory)
    return kind.from_single_file(file, config=config, quantization_config=options, torch_dtype=dtype)


def peer_bits(directory: Path, original: nn.Module) -> dict[str, float | int]:
    """Bits and bytes of a peer's denoiser by the rule of `weights.bits`: every tensor stored counts, floats in 16 bit.

    A tensor of the original's name and shape that holds floats is not quantized; all others together stand for the
    original's remaining weights. The file itself may be larger: several libraries keep floats in 32 bit.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in original.state_dict().items()}
    stored = _stored(directory)
    plain = {name for name, (shape, is_float, _) in stored.items() if is_float and shapes.get(name) == shape}
    weights = sum(math.prod(shape) for name, shape in shapes.items() if name not in plain)
    parameters = sum(math.prod(shape) for shape in shapes.values())
    size = sum(taken for _, _, taken in stored.values())
    coded = sum(taken for name, (_, _, taken) in stored.items() if name not in plain)
    return {
        "bits_per_weight": 8 * size / parameters,
        "bits_quantized": 8 * coded / weights if weights else 16.0,
        "bytes": size,
        "file_bytes": size,
    }


def _stored(directory: Path) -> dict[str, tuple[tuple[int, ...], bool, int]]:
    """{tensor: (shape, True if it holds floats of 16 bits or more, its bytes with such floats in 16 bit)}."""
    if (directory / GGUF_FILE).exists():
        import gguf

        floats = (gguf.GGMLQuantizationType.F16, gguf.GGMLQuantizationType.F32)
        return {
            tensor.name: _counted(tensor.shape.tolist()[::-1], tensor.tensor_type in floats, int(tensor.n_bytes))
            for tensor in gguf.GGUFReader(directory / GGUF_FILE).tensors
        }
    found = {}
    for file in sorted(directory.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            wide = tensor.is_floating_point() and tensor.element_size() > 1
            found[name] = _counted(tensor.shape, wide, tensor.nbytes)
    return found


def _counted(shape: Iterable[int], wide: bool, size: int) -> tuple[tuple[int, ...], bool, int]:
    return tuple(shape), wide, 2 * math.prod(shape) if wide else size
