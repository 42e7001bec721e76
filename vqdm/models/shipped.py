"""Models and configurations that come with the package, or lie in the repository beside it. Imports no torch."""

import functools
import hashlib
from pathlib import Path

from vqdm.config.options import TINY_WORLDS
from vqdm.errors import UserError

_HERE = Path(__file__).parent
CONFIGS = _HERE / "configs"
BESIDE = _HERE.parents[1] / "models"  # of the repository: models too large for the package
SUMS = "SHA256SUMS"
UNET_BEGUN = "unet_begun"  # among the parts of a world: a denoiser whose training is to go on


def builtin_directory(name: str) -> Path:
    shipped = {path.parent.name: path.parent for place in (BESIDE, _HERE) for path in place.glob("*/model_index.json")}
    if name in shipped:
        return _checked(shipped[name])
    if name.removesuffix("_turbo") in TINY_WORLDS:
        raise _not_made(f"model.builtin={name!r}", name)
    raise UserError(f"model.builtin={name!r} is not shipped; there are {', '.join(sorted(shipped)) or 'none'}")


def part_names(world: str) -> tuple[str, ...]:
    """Folders of the parts that a world's training finishes before its few-step student."""
    return "vae", "tokenizer", "text_encoder", "text_encoder_2", f"{world}_evaluators", "unet"


def finished_parts(directory: Path, *, world: str) -> dict[str, Path]:
    """{name: folder} of the part_names that are there: <directory>/<name>, else <directory>/<world>/<name>.

    The second is where the pipelines of models/ have them.
    """
    places = ((name, place / name) for name in part_names(world) for place in (directory / world, directory))
    return {name: path for name, path in places if path.is_dir()}


def check_parts(directory: Path, *, world: str) -> Path:
    """The directory, if it has one finished part of the world at least; else UserError."""
    if not finished_parts(directory, world=world):
        raise UserError(f"tiny_train.parts={directory}: none of {', '.join(part_names(world))} lies there")
    for place in (directory, directory / world, directory / f"{world}_evaluators"):
        if place.is_dir():
            _checked(place.resolve())
    return directory


def _not_made(what: str, folder: str) -> UserError:
    world = folder.partition("_")[0]
    return UserError(
        f"{what} is not here: it is no part of the package, and {BESIDE / folder} is missing; take that folder from "
        f"the repository, or make it: `python run.py +experiment=tiny_train tiny_train={world}` (docs/small.md says "
        "how long it takes), then scripts/publish_tiny.py"
    )


@functools.cache
def _checked(directory: Path) -> Path:
    """The directory, if its files are those that the list beside it names; the package's own need no list."""
    sums = directory.parent / SUMS
    if directory.parent != BESIDE:
        return directory
    if not sums.is_file():
        raise UserError(f"{sums} is missing, so {directory} cannot be checked; take it from the repository")
    for line in sums.read_text().splitlines():
        expected, _, name = line.partition("  ")
        if name.startswith(f"{directory.name}/") and _sha256(BESIDE / name) != expected:
            raise UserError(f"{BESIDE / name} is not the file of {sums}; take it from the repository again")
    return directory


def _sha256(path: Path) -> str | None:
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def shipped_configs(name: str) -> Path:
    """Directory with a pipeline's configs and no weights, which is what a single-file checkpoint lacks."""
    shipped = sorted(path.parent.name for path in CONFIGS.glob("*/model_index.json"))
    if name not in shipped:
        raise UserError(f"model.configs={name!r} is not shipped; there are {', '.join(shipped) or 'none'}")
    return CONFIGS / name


def named_configs(name: str) -> Path:
    """A directory of configs, given by its path or as the name of shipped ones."""
    return Path(name) if Path(name).is_dir() else shipped_configs(name)


def evaluators_directory(named: str | None) -> Path:
    """The directory of a world's evaluators, given by its path or as the name of the world; None is tiny."""
    world = "tiny" if named is None else named
    if world not in TINY_WORLDS:
        directory = Path(world)
    elif world == "tiny":
        directory = _HERE / "tiny_evaluators"
    else:
        directory = BESIDE / f"{world}_evaluators"
        if not directory.is_dir():
            raise _not_made(f"evaluate.evaluators={world!r}", directory.name)
        directory = _checked(directory)
    if not (directory / "attribute_net.safetensors").is_file():
        raise UserError(f"no evaluators in {directory}; give evaluate.evaluators=DIR as tiny_train writes it")
    return directory
