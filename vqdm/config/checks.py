"""Checks of configurations that span several options; each refusal is one line that names the key."""

import dataclasses
import re

from vqdm.config.acceleration import LEAST_CALLS, SCALES
from vqdm.config.codecs import PeerConfig
from vqdm.config.options import (
    METRIC_FAMILIES,
    PLAN_CARDS,
    PROMPT_ORDERS,
    PROMPT_SOURCES,
    TINY_WORLDS,
    Config,
    EvaluateConfig,
    TrajectoriesConfig,
)
from vqdm.config.ranges import check_fields
from vqdm.errors import UserError
from vqdm.runs import processes
from vqdm.runs.texts import check_file_name

CHOICES = {
    "task": ("experiment", "compress", "tiny_train"),
    "model.dtype": ("float32", "bfloat16", "float16"),
    "model.sampler.timestep_spacing": (None, "leading", "linspace", "trailing"),
    "model.sampler.scheduler": ("ddim", "euler", "euler_ancestral", "dpm_solver", "native"),
    "calibration.source": PROMPT_SOURCES,
    "calibration.order": PROMPT_ORDERS,
    "evaluate.prompts.source": PROMPT_SOURCES,
    "evaluate.prompts.order": PROMPT_ORDERS,
    "calibration.timesteps": ("uniform", "normal"),
    "finetune.trajectories.along": ("teacher", "student", "data"),
    "finetune.trajectories.source": PROMPT_SOURCES,
    "finetune.trajectories.order": PROMPT_ORDERS,
    "finetune.loss": ("guided", "halves", "dmd"),
    "finetune.weighting": ("uniform", "min_snr"),
    "finetune.precision": ("float32", "bfloat16"),
    "tiny_train.world": TINY_WORLDS,
    "model.world": TINY_WORLDS,
    "tracker.kind": ("wandb", "none"),
    "tracker.mode": ("auto", "offline", "online"),
    "tracker.artifacts": ("reference", "upload"),
}

DEVICES = ("auto", "cpu", "cuda")


def _value(config: Config, key: str):
    value = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def _check_names(config: Config) -> None:
    """What names files below the results may not lead out of them."""
    check_file_name("name", config.name, folders=True)
    check_file_name("model.name", config.model.name)
    for key in ("table", "row"):
        if getattr(config, key) is not None:
            check_file_name(key, getattr(config, key))


def check(config: Config) -> None:
    """Refuse values that make no sense, before any work; one line that names the key."""
    config.quantize.check()
    config.few_step.check()
    if config.few_step.kind != "none" and config.model.rescale.sigma:
        raise UserError("few_step learns from a model as it is: set model.rescale.sigma=0, or few_step=none")
    _check_names(config)
    check_fields(config, "")
    for key, choices in CHOICES.items():
        if _value(config, key) not in choices:
            known = ", ".join("null" if choice is None else choice for choice in choices)
            raise UserError(f"{key}={_value(config, key)!r} is not one of {known}")
    _check_device(config.device)
    _check_plan_for(config)
    for key in ("calibration", "evaluate.prompts", "finetune.trajectories"):
        prompts = _value(config, key)
        if prompts.source == "file" and prompts.path is None:
            raise UserError(f"{key}.path is missing: {key}.source=file needs the path of a caption file")
    _check_evaluate(config.evaluate)
    if (config.probes.path is not None) != ("pictures" in config.evaluate.metrics):
        raise UserError("evaluate.metrics=[pictures] and probes.path=FILE go together: give both, or neither")
    if config.row is not None and config.table is None:
        raise UserError(f"row={config.row} is of a table: give table=NAME of experiments/ too")
    sources = [k for k in ("builtin", "path", "hub_id") if getattr(config.model, k) is not None]
    if config.task != "tiny_train" and len(sources) != 1:
        found = ", ".join(f"model.{k}" for k in sources) or "none of them"
        raise UserError(f"give exactly one of model.builtin, model.path, model.hub_id; found {found}")
    if config.model.random_seed is not None and None in (config.model.path, config.model.configs):
        raise UserError(
            f"model.random_seed={config.model.random_seed} draws a model: give model.configs, such as sdxl, and "
            "model.path, the folder to make"
        )
    if config.model.hub_id is not None and config.model.revision is None:
        raise UserError(
            f"model.hub_id={config.model.hub_id} needs model.revision=<commit>, so that results can be repeated"
        )
    check_finetune(config)
    _check_samples(config)
    _check_acceleration(config)
    if isinstance(config.quantize, PeerConfig) and config.prune.kind != "none":
        raise UserError("quantize=peer quantizes the whole model: give prune=none, or another of conf/quantize")
    if config.parts.given and (config.quantize.kind == "none" or isinstance(config.quantize, PeerConfig)):
        raise UserError("parts are quantized beside the denoiser: give quantize=trellis3 too, or parts=none")
    config.parts.codecs()
    if isinstance(config.quantize, PeerConfig) and (config.task == "compress" or config.finetune.steps):
        raise UserError(
            "quantize=peer makes rows to compare with, which are neither saved as a pipeline nor distilled: "
            f"use {config.quantize.library} itself, or another of conf/quantize"
        )
    if config.task == "compress" and config.quantize.kind == "none" and config.prune.kind == "none":
        raise UserError("quantize=none leaves nothing to compress: give quantize=trellis3, or another of conf/quantize")


def _check_acceleration(config: Config) -> None:
    """Refuse a cache for fewer calls than it can reuse, patterns that are none, and scales that do not go together."""
    for key, keep in (("prune.keep", config.prune.keep), ("activations.keep", config.activations.keep)):
        try:
            re.compile(keep or "")
        except re.error as error:
            raise UserError(f"{key} is no regular expression: {keep!r} ({error})") from error
    own = config.activations
    if own.kind != "none" and own.per not in SCALES[own.kind]:
        raise UserError(
            f"activations.per={own.per} does not go with activations.kind={own.kind}: give "
            f"{' or '.join(SCALES[own.kind])}"
        )
    per_token = own.kind == "dynamic" and own.per == "token" and own.bits == 8
    real = own.kind != "none" and own.product != "simulated"
    if real and (not per_token or own.column_scales):
        raise UserError(f"activations.product={own.product} is for 8 dynamic bits per token, without column scales")
    if real and config.task == "compress":
        raise UserError(
            f"activations.product={own.product} is not saved with a pipeline: give activations.product=simulated"
        )
    if own.kind != "none" and own.scores_bits is not None and config.task == "compress":
        raise UserError("activations.scores_bits is not saved with a pipeline: leave it out")
    if config.cache.kind == "none":
        return
    steps = config.model.sampler.steps if config.evaluate.steps is None else config.evaluate.steps
    if steps < LEAST_CALLS:
        raise UserError(
            f"cache={config.cache.kind} needs at least {LEAST_CALLS} sampling steps, and there are {steps}: there is "
            "nothing to reuse; give cache=none"
        )


def _check_samples(config: Config) -> None:
    """Refuse more rows for block reconstruction than calibration can record: two of a call under guidance, else one."""
    asked, sampler, prompts = getattr(config.quantize, "samples", None), config.model.sampler, config.calibration.n
    if asked is None or prompts is None:
        return
    recorded = prompts * min(config.calibration.recorded_steps, sampler.steps) * (2 if sampler.guidance > 1 else 1)
    if asked > recorded:
        raise UserError(
            f"quantize.samples={asked} of {recorded} rows that calibration records: raise calibration.n or "
            "calibration.recorded_steps, or give fewer"
        )


def _check_device(name: str) -> None:
    """Refuse what is neither one of the usual names nor the type of another accelerator that torch sees here."""
    if name in DEVICES:
        return
    from vqdm.runs.device import accelerator

    if name != accelerator():
        raise UserError(
            f"device={name!r} is not one of {', '.join(DEVICES)}, and torch sees no accelerator of that name"
        )


def _check_plan_for(config: Config) -> None:
    if config.plan_for is None:
        return
    if config.plan_for not in PLAN_CARDS:
        raise UserError(f"plan_for={config.plan_for!r} is not one of {', '.join(PLAN_CARDS)}")
    if not config.plan:
        raise UserError(f"plan_for={config.plan_for} is for plan=true: a run is made on the machine at hand")
    if config.device == "cpu":
        raise UserError(f"plan_for={config.plan_for} plans for a GPU: leave device=cpu out, or plan_for")


def _check_evaluate(config: EvaluateConfig) -> None:
    known = ", ".join(METRIC_FAMILIES)
    if not config.metrics:
        raise UserError(f"evaluate.metrics=[] scores nothing: give some of {known}")
    if strange := [family for family in config.metrics if family not in METRIC_FAMILIES]:
        raise UserError(f"evaluate.metrics: {strange[0]!r} is not one of {known}")


def check_finetune(config: Config) -> None:
    """Refuse impossible settings of distillation, before the model is calibrated for it."""
    own = config.finetune
    plain = config.quantize.kind == "none" and config.prune.kind == "none"
    if (own.steps or own.block_steps) and plain:
        raise UserError("finetune needs a quantized model to distil into: give quantize=trellis3, or finetune=none")
    if own.block_steps and config.prune.kind != "none":
        raise UserError("finetune.block_steps goes by the teacher's blocks, of which prune takes parts out: give 0")
    if own.steps and own.loss == "dmd":
        _check_matching(config)
    elif own.steps and own.trajectories.n is None:
        raise UserError("finetune.trajectories.n is missing: give the number of captions to train on")
    if (own.steps or own.block_steps) and not (own.tune_codes or any(dataclasses.asdict(own.train).values())):
        raise UserError("finetune.train leaves nothing to train: switch something on, or give finetune=none")
    if own.learning_rate is None and not own.relative_rate:
        raise UserError("finetune.learning_rate is missing: with finetune.relative_rate=false it must be given")
    steps = own.trajectories.sampler_steps
    if steps == []:
        raise UserError("finetune.trajectories.sampler_steps=[] samples nothing: give numbers of steps, or null")
    _check_trajectories(own.trajectories)


def _check_matching(config: Config) -> None:
    own = config.finetune
    if config.few_step.kind == "none":
        raise UserError(
            "finetune.loss=dmd trains a few-step student by its teacher: give few_step=dmd, with few_step.start and "
            "few_step.steps=0 for a student that is there"
        )
    if own.learning_rate is None:
        raise UserError("finetune.learning_rate is missing: with finetune.loss=dmd it must be given")
    if processes.launched():
        raise UserError("finetune.loss=dmd runs in one process: leave torchrun out")
    for name, none in (
        ("feature_weight", 0),
        ("weighting", "uniform"),
        ("micro_batch_size", None),
        ("checkpointing", False),
    ):
        if getattr(own, name) != none:
            raise UserError(f"finetune.{name} is for losses on recorded calls: leave it out with finetune.loss=dmd")


def _check_trajectories(config: TrajectoriesConfig) -> None:
    if config.images is not None and config.along != "data":
        raise UserError("finetune.trajectories.images is for finetune.trajectories.along=data")
    if config.along == "data" and config.images is None and config.source not in TINY_WORLDS:
        raise UserError(
            "finetune.trajectories.along=data needs the captions' images: give finetune.trajectories.images=<folder>"
        )
