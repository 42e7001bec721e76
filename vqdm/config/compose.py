"""Everything to do with Hydra: schemas, turning a composed configuration into dataclasses, and leading a sweep."""

import contextlib
import dataclasses
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from vqdm.config import acceleration
from vqdm.config import options as schema
from vqdm.config.checks import check
from vqdm.config.codecs import OPTIONS
from vqdm.config.few_step import FewStepConfig
from vqdm.config.parts import PartsConfig
from vqdm.errors import UserError
from vqdm.runs import processes, sweeps
from vqdm.runs.texts import nearest

GROUPS = {
    "model": schema.ModelConfig,
    "few_step": FewStepConfig,
    "calibration": schema.CalibrationConfig,
    "finetune": schema.FinetuneConfig,
    "prune": acceleration.PruneConfig,
    "parts": PartsConfig,
    "activations": acceleration.ActivationsConfig,
    "cache": acceleration.CacheConfig,
    "evaluate": schema.EvaluateConfig,
    "tracker": schema.TrackerConfig,
    "tiny_train": schema.TinyTrainConfig,
}


def register_schemas() -> None:
    """Register `base_<group>` for each group's YAML and `base_<kind>` for codecs, so that unknown keys fail early."""
    store = ConfigStore.instance()
    if "base_config.yaml" in store.repo:
        return
    store.store(name="base_config", node=schema.Config)
    for group, node in GROUPS.items():
        store.store(group=group, name=f"base_{group}", node=node)
    for kind, node in OPTIONS.items():
        store.store(group="quantize", name=f"base_{kind}", node=node)


def to_config(composed: DictConfig) -> schema.Config:
    """Turn a composed configuration into checked dataclasses; a UserError of one line for bad values or options."""
    try:
        config = OmegaConf.to_object(composed)
    except OmegaConfBaseException as error:
        raise UserError(str(error).splitlines()[0]) from error
    _check_keys(config, "")
    check(config)
    return config


def _check_keys(config, prefix: str) -> None:
    """Raise UserError for a key that `+key=…` added and no dataclass has."""
    known = {field.name for field in dataclasses.fields(config)}
    for name, value in vars(config).items():
        if name not in known:
            raise UserError(no_option(prefix + name))
        if dataclasses.is_dataclass(value):
            _check_keys(value, f"{prefix}{name}.")


def _keys(node: type, prefix: str = "") -> list[str]:
    """Keys of all options; under quantize those of all codecs."""
    found: list[str] = []
    for field in dataclasses.fields(node):
        key = prefix + field.name
        nodes = OPTIONS.values() if key == "quantize" else [field.type]
        inner = [name for node in nodes if dataclasses.is_dataclass(node) for name in _keys(node, f"{key}.")]
        found += inner or [key]
    return found


def no_option(key: str) -> str:
    """A message on why there is no such option, naming the codecs that have it, or the nearest known one."""
    name = key.removeprefix("quantize.")
    owners = [kind for kind, node in OPTIONS.items() if name in {field.name for field in dataclasses.fields(node)}]
    if key != name and owners:
        return f"{key} is an option of {', '.join(owners)}, not of the codec that was chosen: give quantize={owners[0]}"
    known = _keys(schema.Config)
    return f"there is no option {key}: did you mean {nearest(key, [*known, *GROUPS, 'quantize', 'experiment'])}?"


def _no_choice(key: str, found: str, choices: str) -> str:
    """A message on why a group has no such choice, with the nearest one; names that begin with base_ are schemas."""
    known = [choice for choice in choices.split() if not choice.startswith("base_")]
    like = f"did you mean {nearest(found, known)}? " if known else ""
    return f"there is no {key}={found}: {like}there are {', '.join(known)}"


def one_line(error: BaseException) -> str:
    """An error in one line: for unknown keys the nearest known one, else the message of Hydra or of the error."""
    text, cause = (" ".join(str(one or "").split()) for one in (error, error.__cause__))
    unknown = re.search(r"Key '[^']*' (?:is )?not in .* full_key: (\S+)", f"{text} {cause}")
    if unknown:
        return no_option(unknown[1])
    if other := re.search(
        r"Could not find '([^']+)/([^'/]+)' Available options in '[^']*': (.*?)( Config search|$)", text
    ):
        return _no_choice(*other.groups()[:3])
    merging = text.startswith("Error merging override") and cause
    return f"{text}: {cause.partition(' full_key:')[0]}" if merging else text


def overrides_for_rows(task_overrides: list[str]) -> list[str]:
    """The user's overrides for every row of a table: all but the choice of experiment, table and row."""
    return [o for o in task_overrides if not re.match(r"\+*(experiment|table|row|name|method)=", o)]


class NamedSweep(Callback):
    """Callback that gives a sweep the directory named by its overrides, and at its end says which jobs failed."""

    directory: Path | None = None  # directory of the sweep that this process leads
    jobs: int | None = None  # how many it has; None: not known beforehand
    report: Callable[[Path, Path], None] | None = (
        None  # (sweep, results): says what was found, when all jobs have ended
    )

    def on_multirun_start(self, config: DictConfig, **_) -> None:
        overrides = [
            *config.hydra.overrides.task,
            *(f"{k}={v}" for k, v in (config.hydra.sweeper.params or {}).items()),
        ]
        parsed = OverridesParser.create().parse_overrides(overrides)
        swept = [override.key_or_group for override in parsed if override.is_sweep_override()]
        NamedSweep.jobs = _count([override for override in parsed if override.is_sweep_override()])
        if not any(o.startswith("hydra.sweep.dir=") for o in config.hydra.overrides.hydra):
            where = f"${{results_dir}}/sweeps/{sweeps.sweep_name(overrides, swept)}"
            with read_write(config), open_dict(config):
                config.hydra.sweep.dir = where
                config.hydra.overrides.hydra.append(f"hydra.sweep.dir='{where}'")  # each job is composed from these
        NamedSweep.directory = Path(config.hydra.sweep.dir)
        try:
            sweeps.write_sweep(NamedSweep.directory, overrides=overrides, swept=swept)
        except (OSError, UserError) as error:  # Hydra would turn it into a warning
            sys.exit(f"error: the sweep cannot be written down: {error}; mend that, or set results_dir=…")
        _say(f"— sweep {NamedSweep.directory}")

    def on_multirun_end(self, config: DictConfig, **_) -> None:
        runs = Path(config.results_dir) / "tracker" / "wandb"
        if next(runs.glob("offline-run-*"), None):
            _say(f"tracker: offline; upload with `wandb sync {runs}`")
        if NamedSweep.report is not None:
            NamedSweep.report(NamedSweep.directory, Path(config.results_dir))
        if lines := sweeps.failures(NamedSweep.directory):
            sys.exit("\n".join(lines))


def _count(swept: list) -> int | None:
    """How many jobs these overrides make; None if that takes a look at files, as for a glob."""
    with contextlib.suppress(HydraException):
        return math.prod(len(list(override.sweep_iterator())) for override in swept)
    return None


def run_as_job(program: list[str]) -> None:
    """Run the job that Hydra has just composed as a command of its own that does the same: Python with `program`."""
    hydra = HydraConfig.get()
    overrides, directory = list(hydra.overrides.task), Path(hydra.runtime.output_dir)
    label = sweeps.job_label(directory.parent, overrides)
    command = [sys.executable, *program, *_flags(hydra), *overrides, *_method(label, overrides)]
    one_by_one = hydra.launcher._target_.endswith(".BasicLauncher")  # several at once would all print
    _say(f"— job {hydra.job.num}: {label}" + ("" if one_by_one else f"; its log: {directory / sweeps.LOG}"))
    error = sweeps.run_job(
        command,
        directory,
        number=hydra.job.num,
        overrides=overrides,
        label=label,
        show=one_by_one,
        of=NamedSweep.jobs if one_by_one else None,
    )
    _say(f"— job {hydra.job.num}: " + ("done" if error is None else f"failed: {error}"))


def _method(label: str, overrides: list[str]) -> list[str]:
    """Override for the job's name in tables, unless the user gave one or only the experiment varies."""
    if not label or re.fullmatch(r"experiment=\S*", label) or any(o.startswith("method=") for o in overrides):
        return []
    return ["method='{}'".format(label.replace("'", r"\'"))]


def _flags(hydra: DictConfig) -> list[str]:
    """Flags of the sweep's command that point to other places of configurations."""
    paths = [source.path for source in hydra.runtime.config_sources if source.provider == "command-line"]
    searched = [o for o in hydra.overrides.hydra if o.startswith("hydra.searchpath=")]
    return [*(f"--config-dir={path.removeprefix('file://')}" for path in paths), *searched]


def _say(text: str) -> None:
    """A line on the terminal in one piece, as jobs side by side write there too."""
    if processes.is_main():
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()
