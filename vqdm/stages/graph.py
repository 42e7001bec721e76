"""The stages that a configuration needs, and the identity of each. Imports no torch: plan=true runs in a second.

A stage's configuration names exactly what can change its output. A number in `VERSIONS` is raised whenever a stage's
code may give other output from the same configuration.
"""

import dataclasses
import functools
from pathlib import Path

from vqdm.config.codecs import PeerConfig, TrellisConfig
from vqdm.config.options import Config, ModelConfig, PromptsConfig, SamplerConfig, TinyTrainConfig, layer_pattern
from vqdm.config.ranges import settings_of
from vqdm.errors import UserError
from vqdm.metrics.available import Scoring, find_scoring
from vqdm.metrics.families import FAMILIES
from vqdm.models.foreign import json_object
from vqdm.models.location import (
    check_pipeline_directory,
    configs_directory,
    decodes_sliced,
    denoiser_directory,
)
from vqdm.models.shipped import check_parts
from vqdm.prompts import ImageList, PromptList, load_prompts
from vqdm.runs.identity import files_identity
from vqdm.runs.provenance import installed_version
from vqdm.runs.store import Stage
from vqdm.stages import accelerated
from vqdm.stages.caption_images import images_identity
from vqdm.stages.part_stages import parts_stage
from vqdm.stages.samplers import compares_with_teacher, image_sampler, original_sampler
from vqdm.stages.student import matched_stage, model_of, name_of, stages_of_model

VERSIONS = {
    "calibrate": 1,
    "sensitivity": 1,
    "quantize": 4,
    "peer": 1,
    "tune_blocks": 2,
    "trajectories": 1,
    "finetune": 2,
    "generate": 2,
    "features": 1,
    "evaluate": 3,
    "tiny_train": 1,
}


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
        own = _there(self, "calibrate", "scores", "prune", "sensitivity", "quantize", *trained, *sampled)
        return (stages_of_model(self.calibrate) if self.calibrate else {}) | own

    def stages(self) -> list[Stage]:
        return list(self.named().values())


def _there(holder, *names: str) -> dict[str, Stage]:
    return {name: getattr(holder, name) for name in names if getattr(holder, name) is not None}


@dataclasses.dataclass(frozen=True)
class Graph:
    """The stages of one experiment; None = not needed."""

    quantization: Quantization | None
    prompts: PromptList
    images: Stage
    teacher_images: Stage | None  # full precision, from the same captions and noise
    scoring: Scoring
    features: dict[str, Stage]  # of the images, by family of metrics
    teacher_features: dict[str, Stage]  # for families that compare the features of both
    evaluate: Stage

    def named(self) -> dict[str, Stage]:
        """The stages in order, by the names of the fields; features by their family."""
        first = {} if self.quantization is None else self.quantization.named()
        features = {f"teacher_features/{name}": stage for name, stage in self.teacher_features.items()}
        features |= {f"features/{name}": stage for name, stage in self.features.items()}
        first = stages_of_model(self.images) | first | _there(self, "teacher_images", "images")
        return first | features | {"evaluate": self.evaluate}

    def stages(self) -> list[Stage]:
        return list(self.named().values())


_load = functools.lru_cache(maxsize=8)(load_prompts)  # the rows of a table share their lists


def read_prompts(config: PromptsConfig) -> PromptList:
    return _load(
        source=config.source,
        path=config.path,
        column=config.column,
        n=config.n,
        order=config.order,
        seed=config.seed,
        split=config.split,
        sha256=config.sha256,
    )


def _stage(name: str, label: str, config: dict, **upstream: Stage | str) -> Stage:
    return Stage(name, VERSIONS[name], label, config, upstream)


def _calibrate(config: Config, prompts: PromptList, model: Stage | str) -> Stage:
    settings = settings_of(config.calibration, "recorded_steps", "timesteps", "batch_size", "noise_seed")
    settings |= {"prompts": prompts.sha256, "sampler": settings_of(config.model.sampler)}
    settings |= {"dtype": config.model.dtype, "rescale": settings_of(config.model.rescale)}
    label = f"{name_of(config, model)}-{config.calibration.source}-{len(prompts.prompts)}"
    return _stage("calibrate", label, settings, model=model)


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


def _decodes_sliced(config: ModelConfig) -> bool:
    """`decodes_sliced`; a hub model without configs counts as large until it is downloaded: ask again then."""
    try:
        return decodes_sliced(config)
    except UserError:
        return True


def _sensitivity(config: Config, calibrate: Stage, model: Stage | str, **pruned: Stage) -> Stage | None:
    """The sensitivity stage, one for all bit-widths of a model; None if bits are uniform."""
    settings = config.quantize.sensitivity()
    if settings is None:
        return None
    settings |= _layers(config)
    return _stage("sensitivity", config.model.name, settings, calibrate=calibrate, model=model, **pruned)


def _quantize(
    config: Config, calibrate: Stage, sensitivity: Stage | None, model: Stage | str, **pruned: Stage
) -> Stage:
    label = f"{pruned['prune'].label if pruned else name_of(config, model)}-{config.quantize.name}"
    if isinstance(config.quantize, PeerConfig):
        versions = {name: installed_version(name) for name in (config.quantize.package, "diffusers")}
        settings = config.quantize.settings() | settings_of(config.model, "dtype") | {"versions": versions}
        settings |= {"rescale": settings_of(config.model.rescale)}
        return _stage("peer", label, settings, calibrate=calibrate, model=model)
    upstream = pruned if sensitivity is None else pruned | {"sensitivity": sensitivity}
    settings = config.quantize.settings() | _layers(config)
    if isinstance(config.quantize, TrellisConfig) and config.model.min_size < TrellisConfig.fewest_outputs:
        settings["scalar_bits"] = TrellisConfig.scalar_bits  # of layers that were left in 16 bit before
    return _stage("quantize", label, settings, calibrate=calibrate, model=model, **upstream)


_END_TO_END_OPTIONS = (  # without micro_batch_size and checkpointing, which may change when memory runs out
    "steps", "batch_size", "learning_rate", "relative_rate", "warmup", "decay_from", "precision", "loss", "weighting",
    "feature_weight", "check_every", "validation_samples",
)  # fmt: skip
_BLOCK_OPTIONS = ("block_steps", "block_rate", "block_samples", "block_batch_size", "warmup", "decay_from")


def _trained(config: Config) -> dict:
    """Settings for what trains and how codes move, in both kinds of distillation."""
    codes = ("tune_codes", "code_rate", "code_every") if config.finetune.tune_codes else ()
    return settings_of(config.finetune, "train", "seed", *codes)


def _tune_blocks(config: Config, calibrate: Stage, quantize: Stage, model: Stage | str) -> Stage | None:
    if not config.finetune.block_steps:
        return None
    settings = settings_of(config.finetune, *_BLOCK_OPTIONS) | _trained(config)
    upstream = {"calibrate": calibrate, "quantize": quantize, "model": model}
    return _stage("tune_blocks", f"{quantize.label}-blocks", settings, **upstream)


def _trajectories(config: Config, prompts: PromptList, model: Stage | str) -> Stage:
    """The trajectories stage, one for all students of a model."""
    own = config.finetune.trajectories
    settings = settings_of(own, "along", "validation", "sampler_steps", "recorded_steps", "batch_size", "noise_seed")
    settings |= {"prompts": prompts.sha256, "sampler": settings_of(config.model.sampler)}
    settings |= {"dtype": config.model.dtype, "rescale": settings_of(config.model.rescale)}
    upstream = {"model": model}
    if own.images is not None:
        upstream["images"] = images_identity(own.images, prompts.prompts[: own.n])
    return _stage("trajectories", f"{config.model.name}-{own.along}-{len(prompts)}", settings, **upstream)


def _finetune(config: Config, student: Stage, trajectories: Stage, calibrate: Stage) -> Stage:
    extra = ["min_snr"] if config.finetune.weighting == "min_snr" else []
    extra += ["refresh"] if config.finetune.trajectories.along == "student" else []
    settings = settings_of(config.finetune, *_END_TO_END_OPTIONS, *extra) | _trained(config)
    upstream = {"student": student, "trajectories": trajectories, "calibrate": calibrate}
    return _stage("finetune", f"{student.label}-finetuned", settings, **upstream)


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


def image_list(config: Config, prompts: PromptList) -> ImageList:
    """The images to make and score."""
    return ImageList(prompts.prompts, config.evaluate.images_per_prompt)


def _images(
    config: Config, sampler: SamplerConfig, model: Stage | str, source: str, *, quantization: Quantization | None
) -> Stage:
    """The images stage, without the number of images, as it is extendable; every batch keeps its prompts beside it.

    source: identity of the whole list that prompts are taken from.
    """
    settings = {"sampler": settings_of(sampler), "dtype": config.model.dtype}
    settings |= settings_of(config.evaluate, "batch_size", "images_per_prompt", "seed")
    settings |= {"rescale": settings_of(config.model.rescale), "prompts": source}
    if _decodes_sliced(config.model):  # a batch's convolutions sum in another order
        settings["decoding"] = "sliced"
    if quantization is None:
        return _stage("generate", f"{name_of(config, model)}-fp", settings, model=model)
    denoiser, last = quantization.denoiser, quantization.sampling
    label = f"{name_of(config, model)}-fp" if denoiser is None else denoiser.label
    upstream = {stage.name: stage for stage in (last, quantization.parts) if stage is not None}
    return _stage("generate", label, settings | accelerated.settings(config), model=model, **upstream)


def _features(config: Config, family: str, weights: tuple[str, ...], **images: Stage) -> Stage:
    """The features stage, extendable like images.

    images: the set to look at, and its originals for families of pairs.
    """
    settings = {"family": family, "family_version": FAMILIES[family].version, "weights": list(weights)}
    settings |= settings_of(config.evaluate, "batch_size")
    return _stage("features", f"{images['images'].label}-{family}", settings, **images)


def _looks(config: Config, scoring: Scoring, images: Stage, originals: Stage | None) -> tuple[dict, dict]:
    """{family: stage} of the images' features and, for families that compare both, of the full-precision ones'."""
    own, teacher = {}, {}
    for name, weights in scoring.weights_sha256.items():
        pair = {"originals": originals} if FAMILIES[name].pairs else {}
        own[name] = _features(config, name, weights, images=images, **pair)
        if originals is not None and FAMILIES[name].against_originals and not pair:
            teacher[name] = _features(config, name, weights, images=originals)
    return own, teacher


def build_quantization(config: Config, *, cache: Path) -> Quantization:
    """Build the stages up to the compressed denoiser. Missing prompts or models are reported here, before any work."""
    model = model_of(config, read_prompts, cache=cache)
    found = Quantization(None)
    smaller = config.quantize.kind != "none" or config.prune.kind != "none"
    if smaller or accelerated.looks_at_prompts(config):
        found = Quantization(read_prompts(config.calibration))
    if smaller:
        calibrate = _calibrate(config, found.prompts, model)
        found = dataclasses.replace(found, calibrate=calibrate, **accelerated.prune(config, calibrate, model))
        pruned = _there(found, "prune")
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
    looking = accelerated.looking(config, found.prompts, label, sampler=image_sampler(config), upstream=upstream)
    return dataclasses.replace(found, **looking)


def build_graph(config: Config, *, cache: Path) -> Graph:
    """Build the stages of a whole experiment, including the prompts and evaluators that score it."""
    model = model_of(config, read_prompts, cache=cache)
    changed = config.quantize.kind != "none" or accelerated.is_on(config)
    quantization = build_quantization(config, cache=cache) if changed else None
    compared = changed or original_sampler(config) != image_sampler(config)
    prompts = read_prompts(config.evaluate.prompts)
    for name in config.evaluate.metrics:
        if (FAMILIES[name].evaluators or FAMILIES[name].of_model) and not FAMILIES[name].of_file:
            _needs_captions_of(config.model.world, prompts, name)
    source = prompts.source_id
    images = _images(config, image_sampler(config), model, source, quantization=quantization)
    own = model.upstream["model"] if compares_with_teacher(config) else model
    originals = _images(config, original_sampler(config), own, source, quantization=None)
    teacher_images = originals if compared else None
    scoring = find_scoring(config.evaluate, originals=compared, cache=cache, pictures=config.probes.path)
    features, teacher_features = _looks(config, scoring, images, teacher_images)
    upstream = {"images": images} | {f"features/{name}": stage for name, stage in features.items()}
    upstream |= {f"originals/{name}": stage for name, stage in teacher_features.items()}
    evaluate = _evaluate(config, prompts, scoring, upstream=upstream)
    return Graph(quantization, prompts, images, teacher_images, scoring, features, teacher_features, evaluate)


def _evaluate(config: Config, prompts: PromptList, scoring: Scoring, *, upstream: dict[str, Stage]) -> Stage:
    """The evaluation stage. upstream: includes images, though only features are read, for runs without features."""
    settings = {"n": len(prompts), "prompts": prompts.sha256, "bootstrap": config.evaluate.bootstrap}
    settings |= {"not_run": sorted(scoring.not_run)}
    if scoring.reference is not None:
        upstream = upstream | {"reference": scoring.reference.sha256}
    return _stage("evaluate", upstream["images"].label, settings, **upstream)


def build_stages(config: Config, *, cache: Path) -> Graph | Quantization:
    """Build the stages of an experiment or, to compress a model, only those up to the quantized denoiser."""
    return (build_quantization if config.task == "compress" else build_graph)(config, cache=cache)


def _needs_captions_of(world: str, prompts: PromptList, family: str) -> None:
    from vqdm.tiny.captions import requested
    from vqdm.tiny.worlds import WORLDS

    strange = next((p for p in prompts.prompts if requested(p.text, world=WORLDS[world]) is None), None)
    if strange is not None:
        raise UserError(
            f"evaluate.metrics: {family} is for captions of the {world} world, and prompt {strange.id} "
            f"({strange.text[:60]!r}) is none; use evaluate.metrics=[paired]"
        )


def tiny_train_stage(config: TinyTrainConfig, *, cache: Path) -> Stage:
    settings = settings_of(config)
    start, parts = settings.pop("init_from"), settings.pop("parts")
    upstream = {} if start is None else {"init_from": files_identity(check_pipeline_directory(Path(start)), cache)}
    if parts is not None:
        upstream["parts"] = files_identity(check_parts(Path(parts), world=config.world), cache)
    return _stage("tiny_train", f"{config.world}-seed{config.seed}", settings, **upstream)
