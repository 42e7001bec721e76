"""The place of a model's files, and their identity. Imports no torch."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from vqdm.config.options import ModelConfig
from vqdm.errors import UserError
from vqdm.models.drawn import drawn_identity, make_drawn
from vqdm.models.foreign import json_object
from vqdm.models.parts import DENOISERS, check_parts, parts_of, weight_files
from vqdm.models.shipped import builtin_directory, named_configs
from vqdm.runs.files import canonical_json
from vqdm.runs.identity import files_identity

DECODED_TOGETHER, LATENT = 512, 8  # pixels of the largest images of which a batch is decoded at once; of a latent


def check_pipeline_directory(directory: Path) -> Path:
    """Check a diffusers directory: its model_index.json must name a denoiser whose config is there."""
    index = directory / "model_index.json"
    if not directory.is_dir():
        raise UserError(f"model.path={directory} is no directory; give a diffusers pipeline directory")
    if not index.is_file():
        raise UserError(
            f"{directory} has no model_index.json; give a directory written by a pipeline's save_pretrained"
        )
    denoiser_directory(directory, [part for part in DENOISERS if part in json_object(index)])
    return directory


def check_original(directory: Path) -> Path:
    """Check that a pipeline directory's denoiser is not quantized yet: quantizing starts from its weights."""
    file = denoiser_directory(check_pipeline_directory(directory)) / "config.json"
    if found := json_object(file).get("quantization_config"):
        method = found.get("quant_method", "another method") if isinstance(found, dict) else found
        raise UserError(f"{directory} is quantized already (by {method}): give the full-precision model as model.path")
    return directory


def denoiser_directory(directory: Path, parts: Sequence[str] = DENOISERS) -> Path:
    """The folder among a pipeline directory's `parts` that holds its U-Net or transformer."""
    for part in parts:
        if (directory / part / "config.json").is_file():
            return directory / part
    raise UserError(
        f"{directory} holds no denoiser (unet/config.json or transformer/config.json); download the model again"
    )


def single_file(config: ModelConfig) -> Path | None:
    """The checkpoint of a model that is one file, else None; `model_directory` is then that of its configs."""
    path = None if config.path is None else Path(config.path)
    return path if path is not None and (path.is_file() or path.suffix == ".safetensors") else None


def _file_configs(config: ModelConfig, file: Path) -> Path:
    from vqdm.models.single_file import check_single_file, default_configs

    if config.configs is None:
        return default_configs(file)
    configs = named_configs(config.configs)
    check_single_file(file, configs)
    return configs


def local_directory(config: ModelConfig) -> Path | None:
    """The checked directory of a shipped or local model, made now if it is to be drawn; None for a model of the hub."""
    if config.builtin is not None:
        return check_parts(check_original(builtin_directory(config.builtin)))
    if config.path is None:
        return None
    if config.random_seed is not None:
        made = make_drawn(named_configs(config.configs), Path(config.path), seed=config.random_seed)
        return check_parts(check_original(made))
    file = single_file(config)
    if file is not None:
        return check_original(_file_configs(config, file))
    return check_parts(check_original(Path(config.path)), variant=config.variant)


def configs_directory(config: ModelConfig) -> Path:
    """The directory of the model's configs; for one not downloaded or drawn yet, that which model.configs names."""
    if config.random_seed is not None:
        return named_configs(config.configs)
    if config.hub_id is None or config.configs is None:
        return model_directory(config, allow_network=False)
    try:
        return model_directory(config, allow_network=False)
    except UserError:
        return named_configs(config.configs)


def decodes_sliced(config: ModelConfig) -> bool:
    """True if a batch's images are decoded one after the other: those of 1024² take 4 GiB each on the way, in fp32."""
    size = config.sampler.size
    if size is None:
        latents = json_object(denoiser_directory(configs_directory(config)) / "config.json").get("sample_size")
        sides = [side for side in (latents if isinstance(latents, list) else [latents]) if isinstance(side, int)]
        size = LATENT * max(sides, default=128)
    return size > DECODED_TOGETHER


def model_directory(config: ModelConfig, *, allow_network: bool = True) -> Path:
    """The directory of the model's files, downloaded if need be."""
    return local_directory(config) or check_original(download(config, allow_network=allow_network))


def model_identity(config: ModelConfig, *, cache: Path) -> str:
    """Identity of a model: sha256 of its files, or its hub id at the pinned revision, or what it is drawn from."""
    if config.random_seed is not None:
        return drawn_identity(named_configs(config.configs), config.random_seed)
    directory, file = local_directory(config), single_file(config)
    if directory is None:
        return f"{config.hub_id}@{config.revision}"
    if file is None:
        return files_identity(directory, cache)
    parts = [files_identity(file, cache), files_identity(directory, cache)]
    return hashlib.sha256(canonical_json(parts)).hexdigest()


def download(config: ModelConfig, *, allow_network: bool = True) -> Path:
    """The local snapshot of a hub model, from the hub's cache or downloaded; one clear line where neither works.

    Whether a snapshot is whole is told by its own model_index.json: the cache may hold configs alone, and what others
    downloaded lacks what they had no use for.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    about = {"repo_id": config.hub_id, "revision": config.revision}

    def whole(folder: str) -> Path:
        return check_parts(check_pipeline_directory(Path(folder)), variant=config.variant)

    half = ""
    try:
        return whole(snapshot_download(**about, allow_patterns="model_index.json", local_files_only=True))
    except LocalEntryNotFoundError as error:
        if not allow_network:
            raise _not_here(config, "is not in the hub's cache") from error
    except UserError as error:
        half = f"; the hub's cache has it in part: {error}"
        if not allow_network:
            raise _not_here(config, f"is not whole in the hub's cache ({error})") from error
    except HFValidationError as error:
        raise UserError(f"model.hub_id={config.hub_id!r} is no hub id; give owner/name") from error
    try:
        # ask once first: a download without network would be retried for half a minute, with many lines of output
        HfApi().model_info(config.hub_id, revision=config.revision, timeout=10)
        index = Path(snapshot_download(**about, allow_patterns="model_index.json"))
        return whole(snapshot_download(**about, allow_patterns=_wanted(index, config.variant)))
    except UserError:
        raise
    except Exception as error:  # from requests, httpx or httpx2, depending on the version of huggingface_hub
        raise _not_here(config, f"cannot be downloaded ({type(error).__name__}{half})") from error


def _wanted(directory: Path, variant: str | None) -> list[str]:
    """Patterns of a repository's files: those of the parts that its model_index.json names, as some have more.

    Some repositories hold the whole model once more as one file, for other runtimes, or with another VAE.
    """
    weights = "*.safetensors" if variant is None else f"*.{variant}*.safetensors"
    return [
        "model_index.json",
        *(f"{p}/{n}" for p in parts_of(directory) for n in ("*.json", "*.txt", "*.model", weights)),
    ]


def _not_here(config: ModelConfig, why: str) -> UserError:
    folder = f"models/{config.name}"
    return UserError(
        f"{config.hub_id} {why}; where there is network, run `hf download {config.hub_id} "
        f"--revision {config.revision} --local-dir {folder}`, copy that folder here, and add "
        f"`model.hub_id=null model.path={folder}` to this command"
    )


def full_precision_bytes(config: ModelConfig) -> int:
    """Bytes on disk of the denoiser's own safetensors files, in the configured variant."""
    if (file := single_file(config)) is not None:
        from vqdm.models.single_file import denoiser_bytes

        return denoiser_bytes(file)
    directory = denoiser_directory(model_directory(config, allow_network=False))
    return sum(path.stat().st_size for path in weight_files(directory, variant=config.variant))


def part_bytes(config: ModelConfig) -> dict[str, int]:
    """Bytes on disk of the other parts' safetensors files, by part; empty for a single file, whose parts lie in one."""
    if single_file(config) is not None:
        return {}
    directory = model_directory(config, allow_network=False)
    places = [directory / name for name in parts_of(directory) if name not in DENOISERS]
    weighty = [place for place in places if any(place.glob("*.safetensors"))]
    return {p.name: sum(file.stat().st_size for file in weight_files(p, variant=config.variant)) for p in weighty}
