"""One experiment through the store: a quantized model, its images, the original's, and their scores."""

import json
from pathlib import Path

from vqdm.config import Config
from vqdm.device import Device
from vqdm.models.location import evaluators_directory, full_precision_bytes
from vqdm.stages.graph import Graph, image_sampler
from vqdm.stages.layout import image_path
from vqdm.stages.quantization import Models, ensure_denoiser, environment_of
from vqdm.store import Store
from vqdm.tracker import MAX_IMAGES


def run_experiment(config: Config, store: Store, graph: Graph, *, device: Device, tracker) -> dict:
    """calibrate → quantize → distil → generate → evaluate. Returns what the run's record should say of its result."""
    environment = environment_of(config, device)
    models, quantized = Models(config, device.name), None
    if graph.quantization is not None:
        quantized = ensure_denoiser(config, store, graph.quantization, models, environment=environment, tracker=tracker)
    with store.open(graph.teacher_images or graph.images) as originals:
        _generate(config, graph, originals, lambda: models.teacher)
    images = originals
    if graph.teacher_images is not None:
        with store.open(graph.images) as images:
            _generate(config, graph, images, lambda: models.student(quantized))
    scores = _evaluate(config, store, graph, images, originals, environment=environment)
    tracker.log({f"evaluate/{name}": score["value"] for name, score in scores["metrics"].items()})
    tracker.table("metrics", [{"metric": name, **score} for name, score in scores["metrics"].items()])
    _show_images(tracker, images, graph)
    return {"bits": _bits(config, store, graph)}


def _generate(config: Config, graph: Graph, directory: Path, make_pipeline) -> None:
    from vqdm.stages.generate import generate

    generate(
        directory, make_pipeline, graph.prompts, sampler=image_sampler(config), batch_size=config.evaluate.batch_size,
        seed=config.evaluate.seed,
    )  # fmt: skip


def _evaluate(config: Config, store: Store, graph: Graph, images: Path, originals: Path, *, environment: dict) -> dict:
    def make(directory: Path) -> None:
        from vqdm.stages.evaluate import evaluate

        evaluators = evaluators_directory(config.evaluate.evaluators) if config.evaluate.metrics == "tiny" else None
        evaluate(
            directory, images, None if originals is images else originals, graph.prompts, config=config.evaluate,
            evaluators_directory=evaluators,
        )  # fmt: skip

    directory = store.ensure(graph.evaluate, make, environment=environment)
    return json.loads((directory / "metrics.json").read_text())


def _bits(config: Config, store: Store, graph: Graph) -> dict:
    """bits and file size, from the last stage that makes a denoiser, or of the model as it is: all of it at 16 bit."""
    if graph.quantization is not None:
        return store.summary(graph.quantization.denoiser)
    return {
        "bits_per_weight": 16.0,
        "bits_quantized": 16.0,
        "bits_as_in_paper": 16.0,
        "file_bytes": full_precision_bytes(config.model),
    }


def _show_images(tracker, images: Path, graph: Graph) -> None:
    shown = graph.prompts.prompts[:MAX_IMAGES]
    tracker.images("images", [image_path(images, i) for i in range(len(shown))], [p.text for p in shown])
