"""Check a pipeline directory's parts against its model_index.json, by names, configs and headers, before any work.

Diffusers only warns of much of this, or fails with errors that name no file. Imports no torch, so that a plan checks
it too.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from vqdm.errors import UserError
from vqdm.models.foreign import json_object, safetensors_header
from vqdm.runs.files import files_below

INDEX = "model_index.json"
DENOISERS = ("unet", "transformer")
# words in the names of pipelines that take more than text, and the tasks they are for
OTHER_TASKS = {
    "Inpaint": "inpainting",
    "Img2Img": "image to image (a refiner is one)",
    "ControlNet": "control images",
    "Adapter": "control images",
    "Upscale": "upscaling",
    "InstructPix2Pix": "editing images",
    "Depth2Img": "images with depth",
    "ImageVariation": "variations of images",
}
VOCABULARIES = (
    "tokenizer.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer.model",
)
_WEIGHTS = re.compile(r"(?P<stem>[^.]+)(?:\.(?P<variant>[^.-]+))?(?:-\d+-of-\d+)?\.safetensors")
_known: dict[tuple[Path, str | None], tuple] = {}  # what was checked, and the state of its files then
_INTEGERS = re.compile(r"BOOL|[IU]\d+")


def parts_of(directory: Path) -> dict[str, tuple[str, str]]:
    """{part: (library, class)} of a pipeline directory, by its model_index.json."""
    found = {}
    for part, value in json_object(directory / INDEX).items():
        if part.startswith("_") or not isinstance(value, list) or value == [None, None]:
            continue
        if len(value) != 2 or not all(isinstance(word, str) for word in value):
            raise UserError(
                f"{directory / INDEX}: {part} is {str(value)[:80]}, no library and class; get the model again"
            )
        found[part] = (value[0], value[1])
    return found


def check_parts(directory: Path, *, variant: str | None = None) -> Path:
    """UserError, naming what is missing or damaged, unless every part in the index is there, whole and usable."""
    stats = ((path, path.stat()) for path in files_below(directory))
    state = tuple((path, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for path, stat in stats)
    if _known.get((directory, variant)) == state:  # a run asks a dozen times, and vocabularies take a while to read
        return directory
    _check_task(directory)
    _check_named(directory)
    for part, (library, kind) in parts_of(directory).items():
        folder = directory / part
        if not folder.is_dir():
            raise UserError(
                f"{directory} has no folder {part}, which its {INDEX} names: it is half a model; get the rest"
            )
        if kind.endswith("Scheduler"):
            json_object(_file(folder, "scheduler_config.json"))
        elif "Tokenizer" in kind:
            _check_vocabulary(folder)
        elif not kind.endswith(("Processor", "Extractor")) and library in ("diffusers", "transformers"):
            _check_model(folder, kind, variant=variant)
    _known[directory, variant] = state
    return directory


def _check_named(directory: Path) -> None:
    """UserError unless every text encoder has its tokenizer, and neither VAE nor scheduler is left empty."""
    parts = parts_of(directory)
    index = json_object(directory / INDEX)
    absent = [part.replace("text_encoder", "tokenizer") for part in parts if part.startswith("text_encoder")]
    absent += [part for part in ("vae", "scheduler") if part in index]
    if missing := next((part for part in absent if part not in parts), None):
        raise UserError(f"{directory / INDEX} names no {missing}, without which the model makes no image; get the rest")


def _check_task(directory: Path) -> None:
    """UserError for a pipeline that takes more than text, by its name or its denoiser's channels."""
    index = json_object(directory / INDEX)
    name = index.get("_class_name")
    if not isinstance(name, str) or not name:
        raise UserError(f"{directory / INDEX} names no pipeline (_class_name); get the model again")
    other = next((task for word, task in OTHER_TASKS.items() if word in name), None)
    if other is None and index.get("requires_aesthetics_score"):
        other = "refining"
    unet, vae = directory / "unet" / "config.json", directory / "vae" / "config.json"
    if other is None and unet.is_file() and vae.is_file():
        taken, made = json_object(unet).get("in_channels"), json_object(vae).get("latent_channels")
        if isinstance(taken, int) and isinstance(made, int) and taken != made:
            other = f"more than noise (its unet reads {taken} channels, its vae makes {made})"
    if other is not None:
        raise UserError(
            f"{directory} is a {name}, for {other}: only models that make images from text alone can be calibrated; "
            "give such a one"
        )


def _file(folder: Path, name: str) -> Path:
    if not (folder / name).is_file():
        raise UserError(f"{folder} has no {name}: the model is not here whole; get it again")
    return folder / name


def _check_vocabulary(folder: Path) -> None:
    """UserError for a tokenizer without words, which gives every caption the same tokens."""
    found = [folder / name for name in VOCABULARIES if (folder / name).is_file() and (folder / name).stat().st_size]
    if not found:
        raise UserError(
            f"{folder} has no vocabulary ({' or '.join(VOCABULARIES[:2])}): all captions would be one; get it"
        )
    for file in found:
        if file.name == "tokenizer.json":
            model = json_object(file).get("model")
            if not isinstance(model, dict) or not model.get("vocab"):
                raise UserError(f"{file} has an empty vocabulary; get the tokenizer again")
        elif file.name == "vocab.json" and not json_object(file):
            raise UserError(f"{file} has an empty vocabulary; get the tokenizer again")
    if [file.name for file in found] == ["vocab.json"]:
        _file(folder, "merges.txt")


def _check_model(folder: Path, kind: str, *, variant: str | None) -> None:
    config = json_object(_file(folder, "config.json"))
    if folder.name in DENOISERS and config.get("_class_name") != kind:
        raise UserError(
            f"{folder / 'config.json'} says _class_name={str(config.get('_class_name'))[:80]!r} where "
            f"{INDEX} says {kind}: one is damaged; get the model again"
        )
    for file in weight_files(folder, variant=variant):
        header = safetensors_header(file)
        if config.get("quantization_config"):  # its codes are integers
            continue
        for name, entry in header.items():
            if name.endswith((".weight", ".bias")) and _INTEGERS.fullmatch(str(entry.get("dtype"))):
                raise UserError(f"{file}: the weight {name} is of {entry['dtype']}: give a model with floats")


def weight_files(folder: Path, *, variant: str | None) -> list[Path]:
    """The safetensors files of a part that diffusers reads: the variant's, else those without one; all shards."""
    files = {
        path: found["variant"]
        for path in sorted(folder.glob("*.safetensors"))
        if (found := _WEIGHTS.fullmatch(path.name))
    }
    for wanted in dict.fromkeys((variant, None)):
        chosen = [path for path, own in files.items() if own == wanted]
        if chosen:
            for index in _indices(folder, wanted):
                _check_shards(index, chosen)
            return chosen
    others = sorted({own for own in files.values() if own is not None})
    if others:
        raise UserError(
            f"{folder} has weights of the variant {' and '.join(others)} only: add model.variant={others[0]} "
            "to this command"
        )
    if next(folder.glob("*.bin"), None) is not None:
        raise UserError(f"{folder} has weights as pickles only (.bin), which can run code; get its .safetensors files")
    raise UserError(f"{folder} has no weights (.safetensors): only the configs are here; get the whole model")


def _indices(folder: Path, variant: str | None) -> Iterator[Path]:
    end = ".safetensors.index.json" if variant is None else f".safetensors.index.{variant}.json"
    yield from sorted(folder.glob(f"*{end}"))


def _check_shards(index: Path, files: list[Path]) -> None:
    """UserError unless all shards that an index of weights names are there."""
    weights = json_object(index).get("weight_map")
    if not isinstance(weights, dict) or not weights or not all(isinstance(name, str) for name in weights.values()):
        raise UserError(f"{index} has no weight_map of tensors and files; get the model again")
    if absent := sorted(set(weights.values()) - {path.name for path in files}):
        raise UserError(f"{index.parent} has no {absent[0]}, which {index.name} names ({len(absent)} in all); get it")
