"""Models and configurations that come with the package. Imports no torch."""

from pathlib import Path

from vqdm.errors import UserError

_HERE = Path(__file__).parent
CONFIGS = _HERE / "configs"


def builtin_directory(name: str) -> Path:
    shipped = sorted(path.parent.name for path in _HERE.glob("*/model_index.json"))
    if name not in shipped:
        raise UserError(f"model.builtin={name!r} is not shipped; there are {', '.join(shipped) or 'none'}")
    return _HERE / name


def shipped_configs(name: str) -> Path:
    """Directory with a pipeline's configs and no weights, which is what a single-file checkpoint lacks."""
    shipped = sorted(path.parent.name for path in CONFIGS.glob("*/model_index.json"))
    if name not in shipped:
        raise UserError(f"model.configs={name!r} is not shipped; there are {', '.join(shipped) or 'none'}")
    return CONFIGS / name


def named_configs(name: str) -> Path:
    """A directory of configs, given by its path or as the name of shipped ones."""
    return Path(name) if Path(name).is_dir() else shipped_configs(name)


def evaluators_directory(path: str | None) -> Path:
    directory = _HERE / "tiny_evaluators" if path is None else Path(path)
    if not (directory / "attribute_net.safetensors").is_file():
        raise UserError(f"no evaluators in {directory}; give evaluate.evaluators=DIR as tiny_train writes it")
    return directory
