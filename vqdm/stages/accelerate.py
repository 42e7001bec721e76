"""The stages of acceleration, run through the store, and the pipeline that samples with what they found."""

from pathlib import Path

from vqdm.config.options import Config
from vqdm.runs.store import Store
from vqdm.stages.graph import Quantization
from vqdm.stages.layout import SCRATCH
from vqdm.stages.make import Models
from vqdm.stages.samplers import image_sampler


def ensure_acceleration(
    config: Config, store: Store, stages: Quantization, models: Models, *, compressed: Path | None, environment: dict
) -> None:
    """Make the stages that look at a sampling denoiser. compressed: its directory; None: it is the model's own."""

    def options() -> dict:
        return {"calibration": config.calibration, "sampler": image_sampler(config)}

    def make_schedule(directory: Path) -> dict:
        from vqdm.stages.cache import measure_schedule

        return measure_schedule(directory, models.student(compressed), stages.prompts, config=config.cache, **options())

    def make_ranges(directory: Path) -> dict:
        from vqdm.stages.activations import find_ranges

        pipeline = _student(models, compressed)
        if config.cache.kind != "none":
            _cache(pipeline, _stored_cache(config, store, stages, pipeline, corrected=False))
        return find_ranges(
            directory, pipeline, stages.prompts, config=config.activations, model=config.model, **options()
        )

    def make_corrections(directory: Path) -> dict:
        from vqdm.stages.cache import fit_corrections

        pipeline = _student(models, compressed)
        _quantize_activations(config, store, stages, pipeline)
        measured = None if stages.schedule is None else store.directory(stages.schedule)
        return fit_corrections(directory, pipeline, stages.prompts, config=config.cache, measured=measured, **options())

    makers = {"schedule": make_schedule, "activations": make_ranges, "correct": make_corrections}
    for name, make in makers.items():
        if (stage := getattr(stages, name)) is not None:
            store.ensure(stage, make, environment=environment, scratch=SCRATCH.get(name, ()))


def accelerated_pipeline(config: Config, store: Store, stages: Quantization, models: Models, compressed: Path | None):
    """A pipeline with the denoiser that was made, ready to sample as the configuration says."""
    pipeline = _student(models, compressed)
    _quantize_activations(config, store, stages, pipeline)
    if config.cache.kind != "none":
        _cache(pipeline, _stored_cache(config, store, stages, pipeline))
    return pipeline


def prepare_to_save(config: Config, store: Store, stages: Quantization, pipeline) -> None:
    """Make activations' quantizers and the cache parts of a compressed denoiser that is going to be saved."""
    if config.cache.kind == config.activations.kind == "none":
        return
    from vqdm.acceleration.stored_cache import store_cache
    from vqdm.hub.quantizer import attach
    from vqdm.models.loader import denoiser_of

    denoiser = denoiser_of(pipeline)
    _quantize_activations(config, store, stages, pipeline)
    if config.cache.kind != "none":
        store_cache(denoiser, _stored_cache(config, store, stages, pipeline))
    attach(denoiser, metrics=denoiser.hf_quantizer.quantization_config.metrics)


def _student(models: Models, compressed: Path | None):
    """A pipeline whose denoiser may be changed."""
    return models.own() if compressed is None else models.student(compressed)


def _quantize_activations(config: Config, store: Store, stages: Quantization, pipeline) -> None:
    if config.activations.kind == "none":
        return
    from vqdm.models.loader import denoiser_of
    from vqdm.stages.activations import quantize_activations

    ranges = None if stages.activations is None else store.directory(stages.activations)
    quantize_activations(denoiser_of(pipeline), config.activations, config.model, ranges=ranges)


def _cache(pipeline, stored) -> None:
    from vqdm.acceleration.branch_cache import add_cache
    from vqdm.models.loader import denoiser_of

    add_cache(denoiser_of(pipeline), stored)


def _stored_cache(config: Config, store: Store, stages: Quantization, pipeline, *, corrected: bool = True):
    """The configuration's cache, from what its stages found."""
    from vqdm.stages.cache import make_cache

    used = (stages.schedule, stages.correct if corrected else None)
    measured, fitted = (None if stage is None else store.directory(stage) for stage in used)
    found = make_cache(pipeline, config.cache, image_sampler(config), measured=measured, corrected=fitted)
    return found.to(pipeline.device)
