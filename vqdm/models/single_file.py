"""SDXL-type pipelines from one `.safetensors` file with the original key names, without the hub.

Configs, scheduler and tokenizers, which such a file does not hold, come from a directory of configs, shipped for SDXL
and SDXL-Turbo. The file's header is compared with it before anything is read, since diffusers only warns about gaps.
"""

import functools
import gzip
import json
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from vqdm.errors import UserError
from vqdm.models.foreign import first_line, json_object, loading, safetensors_header
from vqdm.models.original_keys import COMPONENTS, to_original
from vqdm.models.shipped import CONFIGS, shipped_configs
from vqdm.models.training import differs, few_step_kind, say_assumption

UNET = COMPONENTS["unet"][0]
POSITIONS = (
    "conditioner.embedders.0.transformer.text_model.embeddings.position_embedding.weight",
    "conditioner.embedders.1.model.positional_embedding",
)
FLOATS = {"F16", "BF16", "F32", "F64"}
TOKENIZERS = ("tokenizer", "tokenizer_2")
CONFIG_FILES = (
    "model_index.json",
    "scheduler/scheduler_config.json",
    *(f"{component}/config.json" for component in COMPONENTS),
    *(f"{tokenizer}/tokenizer_config.json" for tokenizer in TOKENIZERS),
)
MERGES = CONFIGS / "clip_merges.txt.gz"  # of openai/CLIP (MIT), bpe_simple_vocab_16e6: the merges that CLIP uses
# part of a key, and the kind of file that has such keys; the first that fits names the file
KINDS = (
    ("lora_", "a LoRA"),
    ("joint_blocks.", "Stable Diffusion 3"),
    ("double_blocks.", "Flux"),
    ("cond_stage_model.transformer.", "Stable Diffusion 1"),
    ("cond_stage_model.model.", "Stable Diffusion 2"),
    ("conditioner.embedders.0.model.", "the SDXL refiner"),
    ("down_blocks.", "a model in diffusers' own names"),
)
PARTS = {"unet": "U-Net", "vae": "VAE", "text_encoder": "first text encoder", "text_encoder_2": "second text encoder"}


def load_single_file(path: Path, *, configs: Path, dtype: torch.dtype, **given: nn.Module):
    """Load the pipeline class named by `configs`/model_index.json from one file, in evaluation mode, on the CPU.

    given: parts that are not read.
    """
    import diffusers

    check_single_file(path, configs)
    name = json_object(configs / "model_index.json").get("_class_name")
    kind = getattr(diffusers, str(name), None)
    if not hasattr(kind, "from_single_file"):
        raise UserError(f"{configs}/model_index.json names {name}, which diffusers cannot load from a single file")
    own = {name: clip_tokenizer(configs / name) for name in TOKENIZERS if not _has_vocabulary(configs / name)}
    with loading(path, f"an SDXL-type checkpoint with the configs of {configs}"):
        return kind.from_single_file(str(path), config=str(configs), dtype=dtype, local_files_only=True, **own, **given)


def check_single_file(path: Path, configs: Path) -> None:
    """Check by its header that a file is whole and holds every weight of an SDXL-type pipeline with these configs."""
    shapes = _shapes(path)
    _check_denoiser(path, shapes)
    absent = [name for name in CONFIG_FILES if not (configs / name).is_file()]
    if absent:
        raise UserError(f"{configs} has no {', '.join(absent)}; give model.configs=DIR with an SDXL-type pipeline's")
    scheduler = json_object(configs / "scheduler" / "scheduler_config.json")
    if (other := differs(scheduler, shapes, _metadata(path))) is not None:
        raise UserError(
            f"{path} was trained with {other}, and the scheduler of {configs} is for another training: give "
            "model.configs=DIR with the file's own scheduler"
        )
    expected = _expected_shapes(configs)
    width, width_2 = (expected[key][-1] for key in POSITIONS)
    if width == width_2:
        raise UserError(
            f"{configs}: both text encoders are {width} wide, and diffusers tells them apart by their widths"
        )
    if fault := _fault(shapes, expected):
        raise UserError(f"{path} does not fit the configs of {configs}: {fault}; give the file's own model.configs")


def default_configs(path: Path) -> Path:
    """The shipped configs that fit the file. What it does not say of its training is assumed, and said.

    SDXL-Turbo has SDXL's keys and shapes: it is told by the metadata or the name, or not at all.
    """
    shapes, metadata = _shapes(path), _metadata(path)
    _check_denoiser(path, shapes)
    if (other := differs({}, shapes, metadata)) is not None:
        raise UserError(f"{path} was trained with {other}; give model.configs=DIR with its scheduler")
    shipped = [shipped_configs(index.parent.name) for index in sorted(CONFIGS.glob("*/model_index.json"))]
    faults = [_fault(shapes, _expected_shapes(configs)) for configs in shipped]
    fitting = {configs.name: configs for configs, fault in zip(shipped, faults, strict=True) if fault is None}
    if fitting:
        chosen, reason = few_step_kind(path, metadata) if "sdxl_turbo" in fitting else (next(iter(fitting)), None)
        say_assumption(path, chosen, reason)
        return fitting[chosen]
    names = ", ".join(configs.name for configs in shipped)
    raise UserError(
        f"{path} fits none of the shipped configs ({names}): by {shipped[0].name}, {faults[0]}; "
        "give model.configs=DIR with its own"
    )


def denoiser_bytes(path: Path) -> int:
    """Bytes of the denoiser's tensors, as they lie in the file."""
    _opened(path)
    offsets = [entry["data_offsets"] for key, entry in safetensors_header(path).items() if key.startswith(UNET)]
    return sum(end - start for start, end in offsets)


def clip_tokenizer(directory: Path):
    """CLIP's tokenizer with the special tokens of `directory`/tokenizer_config.json.

    Vocabulary and merges come from the start of OpenAI's BPE file; ids are those of openai/clip-vit-large-patch14.
    """
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    merges = gzip.decompress(MERGES.read_bytes()).decode().removesuffix("\n").split("\n")[1:]
    letters = sorted(ByteLevel.alphabet())
    words = ["".join(merge.split()) for merge in merges]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *words, "<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(directory / "tokenizer_config.json", folder)
        Path(folder, "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
        Path(folder, "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True)


def component_on_meta(directory: Path) -> nn.Module:
    """A pipeline's component with shapes and no values, from the config.json in `directory`."""
    import diffusers
    import transformers

    settings = json_object(directory / "config.json")
    # the classes are looked up first: both libraries import them only now, and that not on the meta device
    ours = getattr(diffusers, str(settings.get("_class_name")), None)
    theirs = getattr(transformers, str((settings.get("architectures") or [None])[0]), None)
    with torch.device("meta"):
        if ours is not None:
            return ours.from_config(settings)
        if theirs is not None:
            return theirs(theirs.config_class.from_dict(settings))
    raise UserError(
        f"{directory}/config.json names no model of diffusers or transformers; copy the model's configs again"
    )


@functools.cache
def _expected_shapes(configs: Path) -> dict[str, list[int]]:
    """{original key: shape} of every tensor that a file for these configs must hold."""
    shapes = {}
    for component in COMPONENTS:
        module = component_on_meta(configs / component)
        original = to_original(component, module.state_dict(), module.config)
        shapes |= {key: list(weight.shape) for key, weight in original.items()}
    return shapes


def _opened(path: Path):
    if not path.is_file():
        raise UserError(f"no file {path}; give model.path=FILE.safetensors or a diffusers pipeline directory")
    if path.suffix != ".safetensors":
        raise UserError(f"{path} is no .safetensors file; only safetensors is read: pickles can run code")
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise UserError(
            f"{path} is no whole safetensors file ({first_line(error)}); download or convert it again"
        ) from error


def _shapes(path: Path) -> dict[str, list[int]]:
    """{key: shape} from the header. UserError for a quantized U-Net, whose scales would be passed over."""
    with _opened(path) as file:
        views = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
    other = {view.get_dtype() for key, view in views.items() if key.startswith(UNET)} - FLOATS
    if other:
        raise UserError(f"{path} holds a U-Net of {', '.join(sorted(other))}; give a file with 16- or 32-bit floats")
    for key, view in views.items():
        if (
            key.endswith((".weight", ".bias"))
            and view.get_dtype() not in FLOATS
            and not view.get_dtype().startswith("F8")
        ):
            raise UserError(f"{path}: the weight {key} is of {view.get_dtype()}: give a file with floats")
    return {key: view.get_shape() for key, view in views.items()}


def _metadata(path: Path) -> dict[str, str]:
    """What the file's writer says of it."""
    with _opened(path) as file:
        return dict(file.metadata() or {})


def _check_denoiser(path: Path, keys: Iterable[str]) -> None:
    """Check by the keys that a file holds an SDXL-type U-Net and its text encoders."""
    found = next((name for part, name in KINDS if any(part in key for key in keys)), None)
    has_unet = any(key.startswith(f"{UNET}input_blocks.") for key in keys)
    if found is not None or not has_unet:
        names = found or f"keys such as {', '.join(sorted(keys)[:2]) or 'none'}"
        raise UserError(f"{path} is no SDXL-type checkpoint: it holds {names}; give one with {UNET}… and conditioner.…")
    absent = [PARTS[part] for part, (prefix, *_) in COMPONENTS.items() if not any(k.startswith(prefix) for k in keys)]
    if absent:
        raise UserError(
            f"{path} has no weights of the {' and the '.join(absent)}: give a file that holds them too, or join them "
            "in Python (StableDiffusionXLPipeline.from_single_file(file, vae=…), save_pretrained) and give that folder "
            "as model.path"
        )


def _fault(shapes: dict[str, list[int]], expected: dict[str, list[int]]) -> str | None:
    """A description of what a file lacks of `expected`, or None. Surplus keys (position_ids, EMA copies) do no harm."""
    missing = [key for key in expected if key not in shapes]
    if missing:
        return f"{len(missing)} of {len(expected)} weights are missing, first {' and '.join(missing[:2])}"
    other = [key for key in expected if _trimmed(shapes[key]) != _trimmed(expected[key])]
    if other:
        return f"{other[0]} is {shapes[other[0]]} instead of {expected[other[0]]} ({len(other)} shapes differ)"
    return None


def _trimmed(shape: list[int]) -> list[int]:
    """A shape without the trailing ones of a 1 × 1 convolution: some files keep the VAE's attention as matrices."""
    return [*shape[:2], *(n for n in shape[2:] if n != 1)]


def _has_vocabulary(directory: Path) -> bool:
    return any((directory / name).is_file() for name in ("tokenizer.json", "vocab.json"))
