"""One experiment through the store: a quantized model, its images, those of full precision, and their scores."""

import dataclasses
import functools
import importlib.metadata
import json
import logging
from pathlib import Path

from vqdm.config.options import Config, SamplerConfig
from vqdm.metrics.families import FAMILIES
from vqdm.models.location import full_precision_bytes, part_bytes
from vqdm.runs import processes
from vqdm.runs.device import Device
from vqdm.runs.store import Store
from vqdm.runs.tracker import MAX_IMAGES
from vqdm.stages.accelerate import accelerated_pipeline, ensure_acceleration
from vqdm.stages.graph.acceleration import tells_work
from vqdm.stages.graph.denoiser import Quantization
from vqdm.stages.graph.experiment import Graph, build_graph, image_list
from vqdm.stages.graph.samplers import compares_with_teacher, image_sampler, original_sampler
from vqdm.stages.layout import MADE_BY, SCORES_FILE, captions_of, image_path
from vqdm.stages.make import ensure_denoiser, ensure_parts, ensure_student, environment_of
from vqdm.stages.pipelines import Models

log = logging.getLogger("vqdm")
ON_CPU = ("tiny",)  # families that always run on the CPU


@dataclasses.dataclass(frozen=True)
class Work:
    """What the scoring of a run needs, whichever number of prompts it is on. compressed: None: the model's own."""

    config: Config
    store: Store
    models: Models
    compressed: Path | None
    device: Device
    environment: dict


def run_experiment(config: Config, store: Store, graph: Graph, *, device: Device, tracker) -> dict:
    """Run calibrate → quantize → distil → generate → evaluate. Returns the result's part of the run's record."""
    for reason in graph.scoring.reasons():
        log.info("not run: %s", reason)
    environment = environment_of(config, device)
    model = ensure_student(config, store, graph.images, device=device, environment=environment)
    models, stages, compressed = Models(config, device.name, model=model), graph.quantization, None
    if stages is not None:
        compressed = ensure_denoiser(config, store, stages, models, environment=environment, tracker=tracker)
        ensure_acceleration(config, store, stages, models, compressed=compressed, environment=environment)
        ensure_parts(config, store, stages, models, environment=environment)
    work = Work(config, store, models, compressed, device, environment)
    for count in rungs(config, len(graph.prompts)):
        _climb(work, count, of=len(graph.prompts), tracker=tracker)
    scores = _score(work, graph)
    tracker.log({f"evaluate/{name}": score["value"] for name, score in scores["metrics"].items()})
    tracker.table("evaluate/metrics", [_tracked(name, s, scores["protocol"]) for name, s in scores["metrics"].items()])
    _show_images(tracker, store.directory(graph.images), graph)
    return {"bits": _bits(dataclasses.replace(config, model=model), store, graph)} | _work(config, store, graph)


def _score(work: Work, graph: Graph) -> dict:
    """Make the images, look at them and score them: what is missing of all that."""
    config, store, models, stages = work.config, work.store, work.models, graph.quantization
    versions = {name: importlib.metadata.version(name) for name in MADE_BY}
    made = {"environment": {**work.device.environment(), "dtype": config.model.dtype, **versions}}
    with processes.opened(store, graph.teacher_images or graph.images) as originals:
        sampler = image_sampler(config) if graph.teacher_images is None else original_sampler(config)
        _generate(config, graph, originals, models.originals, sampler=sampler, **made)
    if graph.teacher_images is not None:

        def pipeline():
            if stages is None:
                return models.teacher
            return accelerated_pipeline(config, store, stages, models, work.compressed)

        if stages is not None:
            models.release()
        with processes.opened(store, graph.images) as images:
            _generate(config, graph, images, pipeline, sampler=image_sampler(config), **made)
    models.release()
    _look(work, graph)
    return _evaluate(config, store, graph, environment=work.environment)


def rungs(config: Config, prompts: int) -> list[int]:
    """Numbers of prompts after which to score on the way to all `prompts`."""
    return sorted({count for count in config.evaluate.ladder or () if count < prompts})


def _climb(work: Work, count: int, *, of: int, tracker) -> None:
    """Score the first `count` prompts, whose images and features all that follow go on with."""
    own = work.config.evaluate
    fewer = dataclasses.replace(own, prompts=dataclasses.replace(own.prompts, n=count))
    config = dataclasses.replace(work.config, evaluate=fewer)
    scores = _score(dataclasses.replace(work, config=config), build_graph(config, cache=work.store.hashes))
    found = {name: score for name, score in scores["metrics"].items() if score["value"] is not None}
    said = ", ".join(f"{name} {score['value']:.4g} ± {score['se'] or 0:.1g}" for name, score in found.items())
    log.info("%s: %d of %d prompts: %s", config.name, count, of, said)
    tracker.log({"ladder/prompts": count} | {f"ladder/{name}": score["value"] for name, score in found.items()})


def _generate(
    config: Config, graph: Graph, directory: Path, make_pipeline, *, sampler: SamplerConfig, environment: dict
) -> None:
    from vqdm.stages.generate import generate

    generate(
        directory,
        make_pipeline,
        image_list(config, graph.prompts),
        sampler=sampler,
        batch_size=config.evaluate.batch_size,
        seed=config.evaluate.seed,
        environment=environment,
    )


def _look(work: Work, graph: Graph) -> None:
    """Extract features for every family, the full-precision images' first, as other rows of a table need them."""
    from vqdm.stages.features import extract

    config, store, device = work.config, work.store, work.device
    count = len(image_list(config, graph.prompts))
    originals = graph.teacher_images and store.directory(graph.teacher_images)
    todo = [(family, stage, graph.teacher_images) for family, stage in graph.teacher_features.items()]
    todo += [(family, stage, graph.images) for family, stage in graph.features.items()]
    for family, stage, images in todo:
        environment = {"device": "cpu" if family in ON_CPU else device.name, "library": FAMILIES[family].installed()}
        weights = graph.scoring.weights[family]
        make_extractor = functools.partial(_extractor, family, weights, device.name)
        if FAMILIES[family].of_model:
            make_extractor = functools.partial(_asks_model, work, family, weights)
        with processes.opened(store, stage) as directory:
            extract(
                directory,
                store.directory(images),
                originals if FAMILIES[family].pairs else None,
                count=count,
                batch_size=config.evaluate.batch_size,
                make_extractor=make_extractor,
                environment=environment,
                of_model=FAMILIES[family].of_model,
            )


def _extractor(family: str, weights: list[Path], device: str):
    from vqdm.metrics.extractors import make_extractor

    return make_extractor(family, weights, device=device)


def _asks_model(work: Work, family: str, weights: list[Path]):
    """The extractor that asks the model whose images are scored, every call of it whole."""
    from vqdm.metrics.extractors import make_asking
    from vqdm.tiny.worlds import WORLDS

    pipeline, guidance = work.models.student(work.compressed), image_sampler(work.config).guidance
    return make_asking(family, pipeline, WORLDS[work.config.model.world], weights, guidance=guidance)


def _evaluate(config: Config, store: Store, graph: Graph, *, environment: dict) -> dict:
    """The scores, made again if images have been made again since: on another device these differ."""
    from vqdm.stages.features import images_sha256

    size, count = config.evaluate.batch_size, len(image_list(config, graph.prompts))
    folders = [store.directory(stage) for stage in (graph.images, graph.teacher_images) if stage is not None]
    looked_at = images_sha256(folders, count, size)

    def make(directory: Path) -> None:
        from vqdm.stages.evaluate import Columns, evaluate
        from vqdm.stages.features import environments
        from vqdm.tiny.evaluator import load_reference

        scoring = graph.scoring
        families = {
            name: Columns(
                store.directory(stage),
                store.directory(graph.teacher_features[name]) if name in graph.teacher_features else None,
                scoring.weights_sha256[name],
            )
            for name, stage in graph.features.items()
        }
        evaluate(
            directory,
            families,
            scoring.not_run,
            graph.prompts,
            config=config.evaluate,
            reference=scoring.reference,
            tiny_reference=load_reference(*scoring.weights["tiny"]) if "tiny" in families else None,
            sampler=image_sampler(config),
            originals=original_sampler(config) if compares_with_teacher(config) else None,
            images=environments(store.directory(graph.images), count, size),
            images_sha256=looked_at,
        )

    def holds(directory: Path) -> bool:
        return _scores(directory).get("images_sha256") == looked_at

    return _scores(processes.by_main(store, graph.evaluate, make, environment=environment, holds=holds))


def _scores(directory: Path) -> dict:
    return json.loads((directory / SCORES_FILE).read_text(encoding="utf-8"))


def _bits(config: Config, store: Store, graph: Graph) -> dict:
    """Bits and file size, from the last stage that makes a denoiser, or of the model as it is, all in 16 bit."""
    if graph.quantization is not None and graph.quantization.denoiser is not None:
        return store.summary(graph.quantization.denoiser) | _pipeline_bytes(config, store, graph.quantization)
    return {
        "bits_per_weight": 16.0,
        "bits_quantized": 16.0,
        "bits_as_in_paper": 16.0,
        "file_bytes": full_precision_bytes(config.model),
    }


def _pipeline_bytes(config: Config, store: Store, stages: Quantization) -> dict:
    """Bytes of the whole pipeline's weights on disk, where other parts are quantized too or their files are known."""
    made = {} if stages.parts is None else store.summary(stages.parts)["parts"]
    others = part_bytes(config.model) | {name: part["file_bytes"] for name, part in made.items()}
    if not others:
        return {}
    size = store.summary(stages.denoiser)["file_bytes"] + sum(others.values())
    return {"pipeline_bytes": size} | ({"parts": sorted(made)} if made else {})


def _work(config: Config, store: Store, graph: Graph) -> dict:
    """What sampling an image takes beside the original, where `tells_work`."""
    if not tells_work(config):
        return {}
    from vqdm.stages.plan.work import work_of
    from vqdm.stages.prune import removed_in

    stages, removed, weights = graph.quantization, [], {}
    if stages is not None and stages.prune is not None:
        removed = removed_in(store.directory(stages.prune))
    if stages is not None and stages.quantize is not None and stages.quantize.name == "quantize":
        layers = store.directory(stages.quantize) / "layers.json"
        weights = {layer["name"]: layer["bits"] for layer in json.loads(layers.read_text())["quantized"]}
    work = work_of(config, weights=weights, removed=removed)
    return {} if work is None else {"work": work.to_dict()}


def _tracked(name: str, score: dict, protocol: dict) -> dict:
    """A metric as a row of the tracker's table, with its protocol."""
    parts = {key: score.get(key) for key in ("value", "se", "bias", "note")}
    return {"metric": name, **parts, "protocol": protocol | score["protocol"]}


def _show_images(tracker, images: Path, graph: Graph) -> None:
    captions = captions_of(images, MAX_IMAGES)
    tracker.images("evaluate/images", [image_path(images, i) for i in range(len(captions))], captions)
