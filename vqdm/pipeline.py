"""The order of the stages. What is done is skipped, so the same command again is a resume."""

import dataclasses
import functools
import json
import logging
import time
from dataclasses import asdict
from pathlib import Path

from vqdm.config import Config
from vqdm.errors import UserError
from vqdm.stages.graph import Graph, build_graph, tiny_train_stage
from vqdm.store import Store

log = logging.getLogger("vqdm")


def run(config: Config) -> dict | None:
    """One experiment; returns its run record (None for plan=true)."""
    store = Store(Path(config.results_dir))
    if config.task == "tiny_train":
        return _tiny_train(config, store)
    if config.plan:
        return _print_plan(config, store)
    graph = _ready(config, store)
    return _compress(config, store, graph)


def run_table(table, rows: list[list[Config]]) -> None:
    """Every run of every row of a table, which is written anew after each row; rows share stages through the store."""
    from vqdm.report.tables import write_table

    configs = [config for row in rows for config in row]
    if configs[0].plan:
        for config in configs:
            run(config)
        return
    store = Store(Path(configs[0].results_dir))  # one command, so one folder
    graphs = iter([_ready(config, store) for config in configs])  # all checks before any work
    made: list[list[dict]] = []
    for row in rows:
        made.append([])
        for config in row:
            log.info("— %s", config.name)
            config = dataclasses.replace(config, tracker=dataclasses.replace(config.tracker, group=table.name))
            made[-1].append(_compress(config, store, next(graphs)))
        text, files = write_table(table, made, of=len(rows), model=config.model.name, results=store.root)
    print(text)
    print("wrote " + ", ".join(str(file) for file in files))


def _cache(store: Store) -> Path:
    return store.root / "cache" / "file_hashes.json"


def _ready(config: Config, store: Store) -> Graph:
    """Everything the run needs is there, or all that is missing is said at once, before any work."""
    from vqdm.models.location import download

    problems, graph = [], None
    try:
        graph = build_graph(config, cache=_cache(store))
    except UserError as error:
        problems.append(str(error))
    if config.model.hub_id is not None:
        try:
            download(config.model, allow_network=not problems)
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError(" — and: ".join(problems))
    if config.model.hub_id is not None:
        graph = build_graph(config, cache=_cache(store))  # now that the files say which layers the model has
    if graph.quantize is not None and store.status(graph.quantize) != "done":
        _check_layers(config)
    return graph


def _check_layers(config: Config) -> None:
    """The scheme fits every layer, known from the shapes; says the bits to come."""
    from vqdm.models.loader import denoiser_on_meta
    from vqdm.schemes import planned_bits

    bits = planned_bits(
        denoiser_on_meta(config.model), config.quantize, pattern=config.model.layers, min_size=config.model.min_size
    )
    log.info("%s: will take %.3f bits per weight, %.2f MiB", config.name, bits.bits_per_weight, bits.bytes / 2**20)


def _print_plan(config: Config, store: Store) -> None:
    try:
        graph = build_graph(config, cache=_cache(store))
    except UserError as error:
        print(f"{config.name}: the stages are known once this is mended: {error}")
        return
    for stage in graph.stages():
        state = store.status(stage)
        if stage.name == "generate":
            made = _images_made(store.directory(stage), graph, config)
            state = "done" if made == len(graph.prompts) else f"{made} of {len(graph.prompts)} images made"
        print(f"{stage.name:10s} {state if state == 'done' else f'to run ({state})':32s} {store.directory(stage)}")


def _images_made(directory: Path, graph: Graph, config: Config) -> int:
    from vqdm.stages.layout import batches

    ranges = batches(len(graph.prompts), config.evaluate.batch_size)
    return sum(len(rows) for name, rows in ranges if (directory / "items" / f"{name}.json").is_file())


class _Models:
    """Pipelines of one run, loaded when first needed."""

    def __init__(self, config: Config, device):
        self.config, self.device = config, device

    @functools.cached_property
    def teacher(self):
        from vqdm.models.loader import load_pipeline

        return load_pipeline(self.config.model, device=self.device.name)

    def own(self):
        """A full-precision pipeline that may be changed."""
        from vqdm.models.loader import load_pipeline

        self.__dict__.pop("teacher", None)  # one pipeline at a time, so that a small GPU will do
        return load_pipeline(self.config.model, device=self.device.name)

    def student(self, quantized: Path | None):
        """The teacher itself, or a pipeline of its own with the quantized denoiser."""
        from vqdm.hub.pipelines import load_denoiser, replace_denoiser
        from vqdm.stages.layout import DENOISER

        if quantized is None:
            return self.teacher
        pipeline = self.own()
        denoiser = load_denoiser(quantized / DENOISER, dtype=pipeline.dtype, decode="cached")
        replace_denoiser(pipeline, denoiser.to(self.device.name))
        return pipeline


def _compress(config: Config, store: Store, graph: Graph) -> dict:
    """calibrate → quantize → generate → evaluate, under one tracker run."""
    from vqdm.device import resolve_device
    from vqdm.tracker import start_tracker

    began = time.monotonic()
    device = resolve_device(config.device, threads=config.threads)
    log.info("%s", device)
    record = _record(config, store, graph)
    store.record_run(config.name, record)  # before any work: a concurrent prune spares what a run refers to
    tracker = start_tracker(
        config.tracker, name=f"{config.name}-{graph.evaluate.short}", run_id=graph.evaluate.fingerprint[:16],
        settings=asdict(config), directory=store.root / "tracker",
    )  # fmt: skip
    failed = True
    try:
        record |= _run_stages(config, store, graph, device, tracker) | {"tracker": tracker.id}
        store.record_run(config.name, record)
        failed = False
    finally:
        tracker.finish(failed=failed)
    log.info("%s: finished in %.1f s", config.name, time.monotonic() - began)
    return record


def _record(config: Config, store: Store, graph: Graph) -> dict:
    directories = {stage.name: store.directory(stage) for stage in graph.stages() if stage is not graph.teacher_images}
    return {
        "fingerprint": graph.evaluate.fingerprint,
        "experiment": config.name,
        "method": config.method or config.name,
        "model": config.model.name,
        "stages": [str(store.directory(stage).relative_to(store.root)) for stage in graph.stages()],
        "directories": {name: str(path.relative_to(store.root)) for name, path in directories.items()},
    }


def _run_stages(config: Config, store: Store, graph: Graph, device, tracker) -> dict:
    environment = {
        "device": device.name,
        "reason": device.reason,
        "threads": device.threads,
        "dtype": config.model.dtype,
    }
    models = _Models(config, device)
    quantized = _quantize(config, store, graph, models, environment=environment, tracker=tracker)
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


def _quantize(
    config: Config, store: Store, graph: Graph, models: _Models, *, environment: dict, tracker
) -> Path | None:
    if graph.quantize is None:
        return None

    def make_calibration(directory: Path) -> dict:
        from vqdm.stages.calibrate import calibrate

        return calibrate(
            directory,
            models.teacher,
            graph.calibration_prompts,
            config=config.calibration,
            sampler=config.model.sampler,
        )

    def make_sensitivity(directory: Path) -> dict:
        from vqdm.stages.sensitivity import sensitivity

        return sensitivity(
            directory, models.teacher, calibration, config=config.quantize, model=config.model,
            device=environment["device"],
        )  # fmt: skip

    def make_quantized(directory: Path) -> dict:
        from vqdm.stages.quantize import quantize

        return quantize(
            directory, models.own(), calibration, config=config.quantize, model=config.model,
            calibration_config=config.calibration, device=environment["device"], harm=harm,
        )  # fmt: skip

    calibration = store.ensure(graph.calibrate, make_calibration, environment=environment)
    harm = None
    if graph.sensitivity is not None:
        harm = store.ensure(graph.sensitivity, make_sensitivity, environment=environment)
    quantized = store.ensure(graph.quantize, make_quantized, environment=environment)
    layers = json.loads((quantized / "layers.json").read_text())["quantized"]
    tracker.table("layers", [{**layer, "scheme": layer["scheme"]["codec"]} for layer in layers])
    tracker.log({f"quantize/{name}": value for name, value in store.summary(graph.quantize).items()})
    return quantized


def _generate(config: Config, graph: Graph, directory: Path, make_pipeline) -> None:
    from vqdm.stages.generate import generate

    generate(
        directory, make_pipeline, graph.prompts, sampler=config.model.sampler, batch_size=config.evaluate.batch_size,
        seed=config.evaluate.seed,
    )  # fmt: skip


def _evaluate(config: Config, store: Store, graph: Graph, images: Path, originals: Path, *, environment: dict) -> dict:
    from vqdm.models.location import evaluators_directory

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
    """bits and file size, from the quantize stage, or of the model as it is: all of it at 16 bit."""
    if graph.quantize is not None:
        return store.summary(graph.quantize)
    from vqdm.models.location import full_precision_bytes

    return {
        "bits_per_weight": 16.0,
        "bits_quantized": 16.0,
        "bits_as_in_paper": 16.0,
        "file_bytes": full_precision_bytes(config.model),
    }


def _show_images(tracker, images: Path, graph: Graph) -> None:
    from vqdm.stages.layout import image_path
    from vqdm.tracker import MAX_IMAGES

    shown = graph.prompts.prompts[:MAX_IMAGES]
    tracker.images("images", [image_path(images, i) for i in range(len(shown))], [p.text for p in shown])


def _tiny_train(config: Config, store: Store) -> dict | None:
    """Train the tiny world into its own stage; `scripts/publish_tiny.py` makes it the shipped one."""
    stage = tiny_train_stage(config.tiny_train, cache=_cache(store))
    if config.plan:
        print(f"tiny_train {store.status(stage)} {store.directory(stage)}")
        return None
    from vqdm.device import resolve_device
    from vqdm.tiny.train import train_tiny

    device = resolve_device("cpu", threads=config.threads)
    environment = {"device": "cpu", "reason": "the tiny world trains on the CPU", "threads": device.threads}
    directory = store.ensure(stage, functools.partial(train_tiny, config.tiny_train), environment=environment)
    record = {
        "fingerprint": stage.fingerprint,
        "experiment": config.name,
        "stages": [str(directory.relative_to(store.root))],
    }
    store.record_run(config.name, record)
    print(f"trained: {directory}; publish with `python scripts/publish_tiny.py {directory}`")
    return record
