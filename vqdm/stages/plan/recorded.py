"""Rates from the seconds that the store recorded of finished stages on this machine."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from vqdm.config.options import Config
from vqdm.runs.files import read_sealed
from vqdm.runs.stage import Stage
from vqdm.runs.store import Store

NOT_THE_TIMES = {"seed", "noise_seed", "prompts"}  # options of a stage that it takes as long without
NOT_THE_CODECS = {"seed", "damping", "hessian_from", "tokens_per_call", "layers", "min_size", "dtype", "rescale"}


@dataclass(frozen=True)
class Rate:
    """Seconds of one unit of work, and the stages that they were recorded in."""

    seconds: float
    origin: str

    def times(self, count: float) -> float:
        return count * self.seconds


@dataclass(frozen=True)
class Recorded:
    """Rates of a configuration on a device, from the store's finished stages.

    A stage that was interrupted records only its last part; so of several stages the slowest counts.
    """

    store: Store | None  # None: plan for another machine, of which nothing is recorded
    config: Config
    device: str

    def sampling(self) -> Rate | None:
        """Rate of one step of one image by the full-precision model with its guidance, from stages that only sample."""
        found = []
        for name in ("calibrate", "trajectories"):
            for directory, stage, manifest in self._finished(name):
                options, (model, _, count) = stage["config"], stage["label"].rsplit("-", 2)
                if model == self.config.model.name and self._samples_alike(options):
                    steps = sum(options.get("sampler_steps") or [options["sampler"]["steps"]])
                    found.append((manifest["seconds"] / (int(count) * steps), directory))
        return _slowest(found)

    def like(self, stage: Stage) -> float | None:
        """Seconds of the newest finished stage of this name, label and options, whatever its seed and captions."""
        options, found = _timed_options(stage.config), []
        for _, theirs, manifest in self._finished(stage.name):
            if theirs["label"] == stage.label and _timed_options(theirs["config"]) == options:
                found.append((manifest["created"], manifest["seconds"]))
        return max(found)[1] if found else None

    def _samples_alike(self, options: dict) -> bool:
        own, theirs = self.config.model.sampler, options["sampler"]
        guided = (own.guidance > 1) == (theirs["guidance"] > 1)
        alike = options["dtype"] == self.config.model.dtype and own.size == theirs["size"]
        return guided and alike and options.get("along", "teacher") == "teacher"

    def training(self, name: str) -> Rate | None:
        """Rate of one sample of a step of `tune_blocks` or `finetune`, for this model, scheme and precision."""
        prefix, found = "block_" if name == "tune_blocks" else "", []
        student, precision = f"{self.config.model.name}-{self.config.quantize.name}-", self.config.finetune.precision
        for directory, stage, manifest in self._finished(name):
            options = stage["config"]
            if stage["label"].startswith(student) and options.get("precision", precision) == precision:
                samples = options[f"{prefix}steps"] * options[f"{prefix}batch_size"]
                found.append((manifest["seconds"] / samples, directory))
        return _slowest(found)

    def encoding(self) -> Rate | None:
        """Rate of one weight on one thread, from layers of any model that were encoded here with the same options."""
        options = {key: value for key, value in asdict(self.config.quantize).items() if key not in NOT_THE_CODECS}
        found = []
        for directory, stage, _ in self._finished("quantize", any_device=True):
            theirs = stage["config"]
            if all(theirs[key] == value for key, value in options.items() if key in theirs):
                layers = json.loads((directory / "layers.json").read_bytes())["quantized"]
                weights = sum(layer["shape"][0] * layer["shape"][1] for layer in layers)
                found.append((sum(layer.get("seconds", 0) for layer in layers) / weights, directory))
        return _slowest(found)

    def _finished(self, name: str, *, any_device: bool = False) -> Iterator[tuple[Path, dict, dict]]:
        folder = None if self.store is None else self.store.root / "stages" / name
        for directory in [] if folder is None else sorted(folder.glob("[!.]*/")):
            try:
                manifest = read_sealed(directory / "manifest.json")
                stage = json.loads((directory / "config.json").read_bytes())
            except (OSError, ValueError):
                continue
            if manifest is not None and (any_device or manifest["environment"].get("device") == self.device):
                yield directory, stage, manifest


def _timed_options(config: dict) -> dict:
    return json.loads(json.dumps({key: value for key, value in config.items() if key not in NOT_THE_TIMES}))


def _slowest(found: list[tuple[float, Path]]) -> Rate | None:
    if not found:
        return None
    seconds, directory = max(found)
    return Rate(seconds, f"recorded here in {directory.parent.name}/{directory.name}")
