"""Refuses configurations that make no sense, in one line that names the key, before any work."""

import dataclasses

from vqdm.config.options import (
    METRIC_FAMILIES,
    PROMPT_ORDERS,
    PROMPT_SOURCES,
    Config,
    EvaluateConfig,
    TrajectoriesConfig,
)
from vqdm.config.ranges import check_fields
from vqdm.errors import UserError

CHOICES = {
    "task": ("experiment", "compress", "tiny_train"),
    "device": ("auto", "cpu", "cuda"),
    "model.dtype": ("float32", "bfloat16", "float16"),
    "model.sampler.scheduler": ("ddim", "euler", "euler_ancestral", "dpm_solver", "native"),
    "calibration.source": PROMPT_SOURCES,
    "calibration.order": PROMPT_ORDERS,
    "evaluate.prompts.source": PROMPT_SOURCES,
    "evaluate.prompts.order": PROMPT_ORDERS,
    "calibration.timesteps": ("uniform", "normal"),
    "finetune.trajectories.along": ("teacher", "student", "data"),
    "finetune.trajectories.source": PROMPT_SOURCES,
    "finetune.trajectories.order": PROMPT_ORDERS,
    "finetune.loss": ("guided", "halves"),
    "finetune.weighting": ("uniform", "min_snr"),
    "finetune.precision": ("float32", "bfloat16"),
    "tracker.kind": ("wandb", "none"),
    "tracker.mode": ("auto", "offline", "online"),
}
POSITIVE = (
    "model.min_size", "model.sampler.steps", "calibration.recorded_steps", "calibration.batch_size",
    "evaluate.batch_size", "evaluate.images_per_prompt", "finetune.batch_size",
    "finetune.block_batch_size", "finetune.block_samples", "finetune.refresh", "finetune.check_every",
    "finetune.code_every", "finetune.validation_samples", "finetune.trajectories.validation",
    "finetune.trajectories.batch_size",
)  # fmt: skip


def _value(config: Config, key: str):
    value = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def check(config: Config) -> None:
    """Refuse values that make no sense, before any work; one line that names the key."""
    config.quantize.check()
    check_fields(config, "")
    for key, choices in CHOICES.items():
        if _value(config, key) not in choices:
            raise UserError(f"{key}={_value(config, key)!r} is not one of {', '.join(choices)}")
    for key in POSITIVE:
        if _value(config, key) < 1:
            raise UserError(f"{key}={_value(config, key)} must be at least 1")
    for key in ("calibration", "evaluate.prompts", "finetune.trajectories"):
        prompts = _value(config, key)
        if prompts.source == "file" and prompts.path is None:
            raise UserError(f"{key}.path is missing: {key}.source=file needs the path of a caption file")
        if prompts.n is not None and prompts.n < 1:
            raise UserError(f"{key}.n={prompts.n} must be at least 1")
    _check_evaluate(config.evaluate)
    if config.seeds is not None and config.seeds < 1:
        raise UserError(f"seeds={config.seeds} must be at least 1")
    if config.row is not None and config.table is None:
        raise UserError(f"row={config.row} is of a table: give table=NAME of experiments/ too")
    sources = [k for k in ("builtin", "path", "hub_id") if getattr(config.model, k) is not None]
    if config.task != "tiny_train" and len(sources) != 1:
        found = ", ".join(f"model.{k}" for k in sources) or "none of them"
        raise UserError(f"give exactly one of model.builtin, model.path, model.hub_id; found {found}")
    if config.model.hub_id is not None and config.model.revision is None:
        raise UserError(
            f"model.hub_id={config.model.hub_id} needs model.revision=<commit>, so that results can be repeated"
        )
    check_finetune(config)
    if config.task == "compress" and config.quantize.kind == "none":
        raise UserError("quantize=none leaves nothing to compress: give quantize=trellis3, or another of conf/quantize")


def _check_evaluate(config: EvaluateConfig) -> None:
    known = ", ".join(METRIC_FAMILIES)
    if not config.metrics:
        raise UserError(f"evaluate.metrics=[] scores nothing: give some of {known}")
    if strange := [family for family in config.metrics if family not in METRIC_FAMILIES]:
        raise UserError(f"evaluate.metrics: {strange[0]!r} is not one of {known}")
    if config.bootstrap < 2:
        raise UserError(f"evaluate.bootstrap={config.bootstrap} must be at least 2: errors are the resamples' spread")
    if config.steps is not None and config.steps < 1:
        raise UserError(f"evaluate.steps={config.steps} must be at least 1, or null for the model's")


def check_finetune(config: Config) -> None:
    """Distillation that cannot be: refused before the model is calibrated for it."""
    own = config.finetune
    for name in ("steps", "block_steps", "feature_weight", "warmup"):
        if getattr(own, name) < 0:
            raise UserError(f"finetune.{name}={getattr(own, name):g} must not be negative")
    for name in ("learning_rate", "block_rate", "code_rate", "min_snr"):
        if getattr(own, name) is not None and not 0 < getattr(own, name) < float("inf"):
            raise UserError(f"finetune.{name}={getattr(own, name):g} must be above 0")
    if (own.steps or own.block_steps) and config.quantize.kind == "none":
        raise UserError("finetune needs a quantized model to distil into: give quantize=trellis3, or finetune=none")
    if own.steps and own.trajectories.n is None:
        raise UserError("finetune.trajectories.n is missing: give the number of captions to train on")
    if not 0 <= own.decay_from <= 1:
        raise UserError(f"finetune.decay_from={own.decay_from:g} must be from 0 to 1, a part of the steps")
    if (own.steps or own.block_steps) and not (own.tune_codes or any(dataclasses.asdict(own.train).values())):
        raise UserError("finetune.train leaves nothing to train: switch something on, or give finetune=none")
    if own.learning_rate is None and not own.relative_rate:
        raise UserError("finetune.learning_rate is missing: with finetune.relative_rate=false it must be given")
    steps = own.trajectories.sampler_steps
    if steps is not None and not all(count >= 1 for count in steps or [0]):
        raise UserError(f"finetune.trajectories.sampler_steps={steps} must be numbers of steps, 1 or more each")
    _check_trajectories(own.trajectories)
    if own.micro_batch_size is not None and own.micro_batch_size < 1:
        raise UserError(f"finetune.micro_batch_size={own.micro_batch_size} must be at least 1, or null for all")


def _check_trajectories(config: TrajectoriesConfig) -> None:
    if config.images is not None and config.along != "data":
        raise UserError("finetune.trajectories.images is for finetune.trajectories.along=data")
    if config.along == "data" and config.images is None and config.source != "tiny":
        raise UserError(
            "finetune.trajectories.along=data needs the captions' images: give finetune.trajectories.images=<folder>"
        )
    if config.recorded_steps is not None and config.recorded_steps < 1:
        raise UserError(f"finetune.trajectories.recorded_steps={config.recorded_steps} must be at least 1, or null")
