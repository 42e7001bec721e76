"""Quantized denoisers and their pipelines in directories, through diffusers' own loading and saving."""

import contextlib
import json
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn

from vqdm.acceleration.operators import removed_operators
from vqdm.errors import UserError
from vqdm.hub.card import CARD_FILE, PICTURE_FILE
from vqdm.hub.config import METHOD, VQDMConfig
from vqdm.hub.quantizer import attach
from vqdm.models.foreign import json_object, loading, safetensors_header, without_bars
from vqdm.models.loader import denoiser_of, denoiser_part
from vqdm.models.location import DENOISERS
from vqdm.models.parts import weight_files
from vqdm.runs.files import full_disk_is_mendable, replace_directory, write_json
from vqdm.runs.locks import LOCK, locked
from vqdm.weights.layers import check_decode, quantized_layers

INDEX = "model_index.json"  # the file that makes a directory a pipeline


@contextlib.contextmanager
def quiet_diffusers():
    """Silence libraries' progress bars inside; a full disk raises OSError rather than an error of safetensors' own."""
    try:
        with without_bars():
            yield
    except SafetensorError as error:
        if (code := re.search(r"\(os error (\d+)\)", str(error))) is None:
            raise
        raise OSError(int(code[1]), str(error)) from error


def save_denoiser(denoiser: nn.Module, directory: Path, *, metrics: Mapping[str, float]) -> int:
    """Write a denoiser with quantized layers as diffusers does; returns the bytes of its safetensors files."""
    attach(denoiser, metrics=dict(metrics))
    with quiet_diffusers():
        denoiser.save_pretrained(directory)
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


def load_denoiser(directory: Path, *, dtype: torch.dtype, decode: str = "per_call") -> nn.Module:
    """A saved denoiser on the CPU, ready to sample. UserError, naming the directory, if it is not what it says."""
    kind = check_saved(directory)
    with naming(directory), loading(directory, "a quantized denoiser"), quiet_diffusers():
        denoiser = kind.from_pretrained(directory, dtype=dtype, local_files_only=True)
    if not quantized_layers(denoiser) and not removed_operators(denoiser):
        raise UserError(f"{directory} is not a quantized denoiser: its files hold plain weights")
    set_decode(denoiser, decode)
    return denoiser.requires_grad_(False)


def check_saved(directory: Path) -> type:
    """The class of a saved denoiser; what its files say of themselves is checked before diffusers builds from it.

    UserError, naming the directory, for a config of another form or of other options than it was quantized with, and
    for shards or files that are not whole.
    """
    import diffusers

    config = json_object(directory / "config.json")
    kind = getattr(diffusers, str(config.get("_class_name")), None)
    if not isinstance(kind, type) or not issubclass(kind, diffusers.ModelMixin):
        raise UserError(f"{directory}/config.json names no model of diffusers ({str(config.get('_class_name'))[:80]})")
    said = config.get("quantization_config")
    if not isinstance(said, dict) or said.get("quant_method") != METHOD or "groups" not in said:
        raise UserError(f"{directory} is not a quantized denoiser: its config.json has no quantization_config of vqdm")
    with naming(directory / "config.json"):
        options = VQDMConfig.from_dict(said).options
    for name, value in options.items():
        if name not in config or config[name] != value:
            raise UserError(
                f"{directory}/config.json says {name}={str(config.get(name))[:80]}, and that the model was quantized "
                f"with {str(value)[:80]}: it is damaged or of another model"
            )
    for file in weight_files(directory, variant=None):
        safetensors_header(file)
    return kind


@contextlib.contextmanager
def naming(place: Path):
    """Put the place before the message of a UserError that does not name it."""
    try:
        yield
    except UserError as error:
        if str(place) in str(error):
            raise
        raise UserError(f"{place}: {error}") from error


def set_decode(denoiser: nn.Module, decode: str) -> None:
    """Set how all quantized layers decode: `per_call` or `cached`. UserError for anything else."""
    check_decode(decode)
    for layer in quantized_layers(denoiser).values():
        layer.decode = decode


def check_place(directory: Path) -> None:
    """Raise UserError unless the place is writable and holds nothing, or nothing but a pipeline of vqdm's."""
    strange = sorted(directory.iterdir()) if directory.is_dir() else [directory] if directory.exists() else []
    if strange and _is_ours(directory):
        strange = [path for path in strange if path.name not in _names_in(directory)]
    if strange:
        raise UserError(
            f"output={directory} holds {strange[0].name}, which is of no pipeline written by vqdm: give another place"
        )
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryDirectory(prefix=f".{directory.name}.", dir=directory.parent).cleanup()
    except OSError as error:
        raise UserError(f"output={directory} cannot be written ({error.strerror}): give another place") from error


def _is_ours(directory: Path) -> bool:
    configs = [directory / part / "config.json" for part in DENOISERS]
    return any(file.is_file() and b'"quant_method": "vqdm"' in file.read_bytes() for file in configs)


def _names_in(directory: Path) -> set[str]:
    """Names of the parts in a pipeline's directory, by its own list; empty without one that can be read."""
    try:
        return {INDEX, CARD_FILE, PICTURE_FILE, LOCK, *json_object(directory / INDEX)}
    except UserError:
        return set()


def save_pipeline(pipeline, directory: Path, *, base: str | None) -> None:
    """Write a pipeline with a quantized denoiser as a directory for from_pretrained, with a card: whole or not at all.

    base: origin of the full-precision model, a hub id or a directory. All other parts keep their dtype.
    """
    directory = directory.resolve()  # files go where a link points to
    check_place(directory)
    denoiser_of(pipeline).register_to_config(_name_or_path=base)
    written = directory.with_name(f".{directory.name}.tmp")
    with locked(written):
        try:
            _remove_all_in(written)  # left by a killed process
            with full_disk_is_mendable(directory), quiet_diffusers():
                pipeline.save_pretrained(written)
            shutil.copy(written / denoiser_part(pipeline) / CARD_FILE, written / CARD_FILE)
            replace_directory(written, directory)
        except BaseException:
            shutil.rmtree(written, ignore_errors=True)
            raise
        (directory / LOCK).unlink()


def _remove_all_in(directory: Path) -> None:
    """Remove everything in a directory but the lock that is held."""
    for path in directory.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()


def forget_origins(configs: Iterable[Path]) -> None:
    """Take out of JSON files where diffusers notes that a part came from, a local path."""
    for path in configs:
        write_json(path, {key: value for key, value in json.loads(path.read_text()).items() if key != "_name_or_path"})


def replace_denoiser(pipeline, denoiser: nn.Module) -> None:
    pipeline.register_modules(**{denoiser_part(pipeline): denoiser})
