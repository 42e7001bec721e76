"""The stages that an experiment needs, up to its scores, and the identity of each.

Imports no torch, as all of this folder: plan=true runs in a second. A stage's settings name exactly what can change its
output.
"""

import dataclasses
from pathlib import Path

from vqdm.config.options import Config, ModelConfig, SamplerConfig
from vqdm.config.ranges import settings_of
from vqdm.errors import UserError
from vqdm.metrics.available import Scoring, find_scoring
from vqdm.metrics.families import FAMILIES
from vqdm.models.location import decodes_sliced
from vqdm.prompts import ImageList, PromptList
from vqdm.runs.stage import Stage
from vqdm.stages.graph import acceleration
from vqdm.stages.graph.denoiser import Quantization, build_quantization, those_there
from vqdm.stages.graph.prompts import read_prompts
from vqdm.stages.graph.samplers import compares_with_teacher, image_sampler, original_sampler
from vqdm.stages.graph.student import model_of, name_of, stages_of_model
from vqdm.stages.graph.versions import new_stage


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
        first = stages_of_model(self.images) | first | those_there(self, "teacher_images", "images")
        return first | features | {"evaluate": self.evaluate}

    def stages(self) -> list[Stage]:
        return list(self.named().values())


def image_list(config: Config, prompts: PromptList) -> ImageList:
    """The images to make and score."""
    return ImageList(prompts.prompts, config.evaluate.images_per_prompt)


def build_stages(config: Config, *, cache: Path) -> Graph | Quantization:
    """Build the stages of an experiment or, to compress a model, only those up to the quantized denoiser."""
    return (build_quantization if config.task == "compress" else build_graph)(config, cache=cache)


def build_graph(config: Config, *, cache: Path) -> Graph:
    """Build the stages of a whole experiment, including the prompts and evaluators that score it."""
    model = model_of(config, read_prompts, cache=cache)
    changed = config.quantize.kind != "none" or acceleration.is_on(config)
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


def _needs_captions_of(world: str, prompts: PromptList, family: str) -> None:
    from vqdm.tiny.captions import requested
    from vqdm.tiny.worlds import WORLDS

    strange = next((p for p in prompts.prompts if requested(p.text, world=WORLDS[world]) is None), None)
    if strange is not None:
        raise UserError(
            f"evaluate.metrics: {family} is for captions of the {world} world, and prompt {strange.id} "
            f"({strange.text[:60]!r}) is none; use evaluate.metrics=[paired]"
        )


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
        return new_stage("generate", f"{name_of(config, model)}-fp", settings, model=model)
    denoiser, last = quantization.denoiser, quantization.sampling
    label = f"{name_of(config, model)}-fp" if denoiser is None else denoiser.label
    upstream = {stage.name: stage for stage in (last, quantization.parts) if stage is not None}
    return new_stage("generate", label, settings | acceleration.settings(config), model=model, **upstream)


def _decodes_sliced(config: ModelConfig) -> bool:
    """`decodes_sliced`; a hub model without configs counts as large until it is downloaded: ask again then."""
    try:
        return decodes_sliced(config)
    except UserError:
        return True


def _looks(config: Config, scoring: Scoring, images: Stage, originals: Stage | None) -> tuple[dict, dict]:
    """{family: stage} of the images' features and, for families that compare both, of the full-precision ones'."""
    own, teacher = {}, {}
    for name, weights in scoring.weights_sha256.items():
        pair = {"originals": originals} if FAMILIES[name].pairs else {}
        own[name] = _features(config, name, weights, images=images, **pair)
        if originals is not None and FAMILIES[name].against_originals and not pair:
            teacher[name] = _features(config, name, weights, images=originals)
    return own, teacher


def _features(config: Config, family: str, weights: tuple[str, ...], **images: Stage) -> Stage:
    """The features stage, extendable like images.

    images: the set to look at, and its originals for families of pairs.
    """
    settings = {"family": family, "family_version": FAMILIES[family].version, "weights": list(weights)}
    settings |= settings_of(config.evaluate, "batch_size")
    return new_stage("features", f"{images['images'].label}-{family}", settings, **images)


def _evaluate(config: Config, prompts: PromptList, scoring: Scoring, *, upstream: dict[str, Stage]) -> Stage:
    """The evaluation stage. upstream: includes images, though only features are read, for runs without features."""
    settings = {"n": len(prompts), "prompts": prompts.sha256, "bootstrap": config.evaluate.bootstrap}
    settings |= {"not_run": sorted(scoring.not_run)}
    if config.evaluate.original_steps is not None:  # the protocol states it, even where it is the images' own
        settings |= settings_of(config.evaluate, "original_steps")
    if scoring.reference is not None:
        upstream = upstream | {"reference": scoring.reference.sha256}
    return new_stage("evaluate", upstream["images"].label, settings, **upstream)
