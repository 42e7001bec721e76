"""The stages that lead to a compressed denoiser and to how it is sampled, and the identity of each."""

import dataclasses
from pathlib import Path

from vqdm.config.codecs import PeerConfig, TrellisConfig
from vqdm.config.options import Config, ModelConfig, layer_pattern
from vqdm.config.ranges import settings_of
from vqdm.errors import UserError
from vqdm.models.foreign import json_object
from vqdm.models.location import configs_directory, denoiser_directory
from vqdm.prompts import PromptList
from vqdm.runs.provenance import installed_version
from vqdm.runs.stage import Stage
from vqdm.stages.caption_images import images_identity
from vqdm.stages.graph import acceleration
from vqdm.stages.graph.parts import parts_stage
from vqdm.stages.graph.prompts import read_prompts
from vqdm.stages.graph.samplers import image_sampler
from vqdm.stages.graph.student import matched_stage, model_of, name_of, stages_of_model
from vqdm.stages.graph.versions import new_stage

_END_TO_END_OPTIONS = (  # without micro_batch_size and checkpointing, which may change when memory runs out
    "steps", "batch_size", "learning_rate", "relative_rate", "warmup", "decay_from", "precision", "loss", "weighting",
    "feature_weight", "check_every", "validation_samples",
)  # fmt: skip
_BLOCK_OPTIONS = ("block_steps", "block_rate", "block_samples", "block_batch_size", "warmup", "decay_from")


@dataclasses.dataclass(frozen=True)
class Quantization:
    """The stages that lead to a compressed denoiser, and to how it is sampled; None = not needed."""

    prompts: PromptList | None  # of the calibration, where a stage needs them
    calibrate: Stage | None = None
    scores: Stage | None = None
    prune: Stage | None = None
    sensitivity: Stage | None = None
    quantize: Stage | None = None
    tune_blocks: Stage | None = None
    finetune_prompts: PromptList | None = None
    trajectories: Stage | None = None
    finetune: Stage | None = None
    parts: Stage | None = None
    schedule: Stage | None = None
    activations: Stage | None = None
    correct: Stage | None = None

    @property
    def denoiser(self) -> Stage | None:
        """The last stage that makes a denoiser; None: it is the model's own."""
        return self.finetune or self.tune_blocks or self.quantize or self.prune

    @property
    def sampling(self) -> Stage | None:
        """The last stage that images depend on; None: only on the model."""
        return self.correct or self.activations or self.schedule or self.denoiser

    def named(self) -> dict[str, Stage]:
        """The stages in order, by the names of the fields."""
        trained, sampled = ("tune_blocks", "trajectories", "finetune"), ("parts", "schedule", "activations", "correct")
        own = those_there(self, "calibrate", "scores", "prune", "sensitivity", "quantize", *trained, *sampled)
        return (stages_of_model(self.calibrate) if self.calibrate else {}) | own

    def stages(self) -> list[Stage]:
        return list(self.named().values())


def those_there(holder, *names: str) -> dict[str, Stage]:
    return {name: getattr(holder, name) for name in names if getattr(holder, name) is not None}


def build_quantization(config: Config, *, cache: Path) -> Quantization:
    """Build the stages up to the compressed denoiser. Missing prompts or models are reported here, before any work."""
    model = model_of(config, read_prompts, cache=cache)
    found = Quantization(None)
    smaller = config.quantize.kind != "none" or config.prune.kind != "none"
    if smaller or acceleration.looks_at_prompts(config):
        found = Quantization(read_prompts(config.calibration))
    if smaller:
        calibrate = _calibrate(config, found.prompts, model)
        found = dataclasses.replace(found, calibrate=calibrate, **acceleration.prune(config, calibrate, model))
        pruned = those_there(found, "prune")
        if config.quantize.kind != "none":
            sensitivity = _sensitivity(config, calibrate, model, **pruned)
            quantize = _quantize(config, calibrate, sensitivity, model, **pruned)
            found = dataclasses.replace(found, sensitivity=sensitivity, quantize=quantize)
        found = dataclasses.replace(_distilled(config, found, model), parts=parts_stage(config, calibrate, model))
    return _cached(config, found, model)


def _cached(config: Config, found: Quantization, model: Stage | str) -> Quantization:
    """Add the stages of a cache and of activations that look at the denoiser while it samples."""
    upstream = {"model": model} if found.denoiser is None else {"model": model, found.denoiser.name: found.denoiser}
    label = f"{name_of(config, model)}-fp" if found.denoiser is None else found.denoiser.label
    looking = acceleration.looking(config, found.prompts, label, sampler=image_sampler(config), upstream=upstream)
    return dataclasses.replace(found, **looking)


def _calibrate(config: Config, prompts: PromptList, model: Stage | str) -> Stage:
    settings = settings_of(config.calibration, "recorded_steps", "timesteps", "batch_size", "noise_seed")
    settings |= {"prompts": prompts.sha256, "sampler": settings_of(config.model.sampler)}
    settings |= {"dtype": config.model.dtype, "rescale": settings_of(config.model.rescale)}
    label = f"{name_of(config, model)}-{config.calibration.source}-{len(prompts.prompts)}"
    return new_stage("calibrate", label, settings, model=model)


def _layers(config: Config) -> dict:
    """Settings that decide which matrices are quantized."""
    settings = settings_of(config.model, "min_size", "dtype") | {"rescale": settings_of(config.model.rescale)}
    layers = config.model.layers
    return settings | {"layers": layer_pattern(_denoiser_class(config.model), None) if layers is None else layers}


def _denoiser_class(config: ModelConfig) -> str:
    """The denoiser's class by the model's files.

    A hub model counts as a U-Net until it is downloaded: ask again then.
    """
    try:
        directory = denoiser_directory(configs_directory(config))
    except UserError:
        return "UNet2DConditionModel"
    return str(json_object(directory / "config.json").get("_class_name"))


def _sensitivity(config: Config, calibrate: Stage, model: Stage | str, **pruned: Stage) -> Stage | None:
    """The sensitivity stage, one for all bit-widths of a model; None if bits are uniform."""
    settings = config.quantize.sensitivity()
    if settings is None:
        return None
    settings |= _layers(config)
    return new_stage("sensitivity", config.model.name, settings, calibrate=calibrate, model=model, **pruned)


def _quantize(
    config: Config, calibrate: Stage, sensitivity: Stage | None, model: Stage | str, **pruned: Stage
) -> Stage:
    label = f"{pruned['prune'].label if pruned else name_of(config, model)}-{config.quantize.name}"
    if isinstance(config.quantize, PeerConfig):
        versions = {name: installed_version(name) for name in (config.quantize.package, "diffusers")}
        settings = config.quantize.settings() | settings_of(config.model, "dtype") | {"versions": versions}
        settings |= {"rescale": settings_of(config.model.rescale)}
        return new_stage("peer", label, settings, calibrate=calibrate, model=model)
    upstream = pruned if sensitivity is None else pruned | {"sensitivity": sensitivity}
    settings = config.quantize.settings() | _layers(config)
    if isinstance(config.quantize, TrellisConfig) and config.model.min_size < TrellisConfig.fewest_outputs:
        settings["scalar_bits"] = TrellisConfig.scalar_bits  # of layers that were left in 16 bit before
    return new_stage("quantize", label, settings, calibrate=calibrate, model=model, **upstream)


def _trained(config: Config) -> dict:
    """Settings for what trains and how codes move, in both kinds of distillation."""
    codes = ("tune_codes", "code_rate", "code_every") if config.finetune.tune_codes else ()
    return settings_of(config.finetune, "train", "seed", *codes)


def _tune_blocks(config: Config, calibrate: Stage, quantize: Stage, model: Stage | str) -> Stage | None:
    if not config.finetune.block_steps:
        return None
    settings = settings_of(config.finetune, *_BLOCK_OPTIONS) | _trained(config)
    upstream = {"calibrate": calibrate, "quantize": quantize, "model": model}
    return new_stage("tune_blocks", f"{quantize.label}-blocks", settings, **upstream)


def _trajectories(config: Config, prompts: PromptList, model: Stage | str) -> Stage:
    """The trajectories stage, one for all students of a model."""
    own = config.finetune.trajectories
    settings = settings_of(own, "along", "validation", "sampler_steps", "recorded_steps", "batch_size", "noise_seed")
    settings |= {"prompts": prompts.sha256, "sampler": settings_of(config.model.sampler)}
    settings |= {"dtype": config.model.dtype, "rescale": settings_of(config.model.rescale)}
    upstream = {"model": model}
    if own.images is not None:
        upstream["images"] = images_identity(own.images, prompts.prompts[: own.n])
    return new_stage("trajectories", f"{config.model.name}-{own.along}-{len(prompts)}", settings, **upstream)


def _finetune(config: Config, student: Stage, trajectories: Stage, calibrate: Stage) -> Stage:
    extra = ["min_snr"] if config.finetune.weighting == "min_snr" else []
    extra += ["refresh"] if config.finetune.trajectories.along == "student" else []
    settings = settings_of(config.finetune, *_END_TO_END_OPTIONS, *extra) | _trained(config)
    upstream = {"student": student, "trajectories": trajectories, "calibrate": calibrate}
    return new_stage("finetune", f"{student.label}-finetuned", settings, **upstream)


def _distilled(config: Config, quantization: Quantization, model: Stage | str) -> Quantization:
    """Add the stages of distillation that `config` asks for."""
    calibrate, student = quantization.calibrate, quantization.denoiser
    tuned = _tune_blocks(config, calibrate, student, model)
    if not config.finetune.steps:
        return dataclasses.replace(quantization, tune_blocks=tuned)
    if config.finetune.loss == "dmd":
        finetune = matched_stage(config, _trained(config), model, student=tuned or student, calibrate=calibrate)
        return dataclasses.replace(quantization, tune_blocks=tuned, finetune=finetune)
    own = config.finetune.trajectories
    try:
        prompts = read_prompts(dataclasses.replace(own, n=own.n + own.validation))
    except UserError as error:
        raise UserError(f"finetune.trajectories (n + validation): {error}") from error
    trajectories = _trajectories(config, prompts, model)
    finetune = _finetune(config, tuned or student, trajectories, calibrate)
    return dataclasses.replace(
        quantization, tune_blocks=tuned, finetune_prompts=prompts, trajectories=trajectories, finetune=finetune
    )
