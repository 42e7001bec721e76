"""Weights of metrics: found in a local folder or the hub's cache, or downloaded. Hashes are checked."""

import functools
import logging
from pathlib import Path

from vqdm.errors import UserError
from vqdm.metrics.families import Weights
from vqdm.runs.identity import file_identity, files_identity

log = logging.getLogger("vqdm")


def find(weights: Weights, folder: Path) -> Path | None:
    """The path of weights that are here already (a directory is found by its marker), else None."""
    local = folder / weights.name
    if (local / weights.marker if weights.marker else local).is_file():
        return local
    if weights.hub is None:
        return None
    from huggingface_hub import try_to_load_from_cache

    repository, _, file = weights.hub.partition(":")
    found = try_to_load_from_cache(repository, file or weights.marker)
    if not isinstance(found, str):
        return None
    return Path(found) if file else Path(found).parent


def missing(weights: Weights, folder: Path) -> str:
    """The words of a table for a metric that could not be run."""
    place = f"the hub's {weights.hub.replace(':', ', ')}" if weights.hub else weights.url
    return f"needs {weights.name} in {folder} (from {place})"


@functools.lru_cache(maxsize=32)
def fetch(weights: Weights, folder: Path) -> Path | None:
    """Download weights; None, with one line of explanation, if that is impossible: their metrics are then not run."""
    if (here := find(weights, folder)) is not None:
        return here
    log.info("fetching %s for metrics", weights.name)
    try:
        return _from_hub(weights.hub) if weights.hub else _from_url(weights, folder)
    except Exception as error:  # of requests, httpx or urllib, or a hash other than the published one
        why = next(iter(str(error).splitlines()), "")[:200]
        log.warning("%s cannot be fetched (%s: %s); its metrics are not run", weights.name, type(error).__name__, why)
        return None


def _from_hub(source: str) -> Path:
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download

    repository, _, file = source.partition(":")
    HfApi().model_info(repository, timeout=10)  # ask once first, as a download would be retried for long
    if file:
        return Path(hf_hub_download(repository, file))
    return Path(snapshot_download(repository, allow_patterns=["*.json", "*.txt", "*.safetensors"]))


def _from_url(weights: Weights, folder: Path) -> Path:
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from torch.hub import download_url_to_file

    if HF_HUB_OFFLINE:
        raise ConnectionError("HF_HUB_OFFLINE is set")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / weights.name
    download_url_to_file(weights.url, str(path), hash_prefix=weights.sha256 or None)
    return path


def load_tensors(path: Path) -> dict:
    """Tensors of a .safetensors file, or of a .pth one by torch's restricted reader, which runs no code."""
    import torch
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
        content = content.get("state_dict", content)
        if not all(isinstance(value, torch.Tensor) for value in content.values()):
            raise TypeError("not all of it is tensors")
    except Exception as error:  # many kinds, from either reader
        raise UserError(
            f"{path} holds more than tensors, or is damaged ({type(error).__name__}); fetch it again"
        ) from error
    return content


def check_whole(path: Path) -> None:
    """Raise UserError for a truncated .safetensors file, as its header tells, before images are made for it."""
    from safetensors import SafetensorError, safe_open

    if path.suffix != ".safetensors":
        return
    try:
        with safe_open(path, "np"):
            pass
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is damaged ({error}): fetch or make it again, or remove it") from error


def identity(weights: Weights, path: Path, *, cache: Path) -> str:
    """Checked sha256 of a file, or over the files of a directory. `cache` keeps hashes by size and time."""
    check_whole(path / weights.marker if weights.marker else path)
    if path.is_dir():
        return files_identity(path, cache)
    sha256 = file_identity(path, cache)
    if not sha256.startswith(weights.sha256):
        raise UserError(
            f"{path} has the sha256 {sha256[:16]}…, and the published {weights.name} begins with {weights.sha256}: "
            "fetch it again, or remove it to go without its metrics"
        )
    return sha256
