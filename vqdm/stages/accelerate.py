"""The stages of acceleration, run through the store, and the pipeline that samples with what they found."""

from pathlib import Path

from vqdm.config.options import Config
from vqdm.runs.store import Store
from vqdm.stages.graph.denoiser import Quantization
from vqdm.stages.graph.samplers import image_sampler
from vqdm.stages.layout import SCRATCH
from vqdm.stages.pipelines import Models


def check_acceleration(config: Config) -> None:
    """Raise UserError for a denoiser without operators to take out, features to keep, or codes to compute with."""
    from vqdm.acceleration.branch_cache import source_of
    from vqdm.acceleration.operators import operators
    from vqdm.acceleration.scores import attentions
    from vqdm.models.loader import denoiser_on_meta

    denoiser, activations = denoiser_on_meta(config.model), config.activations
    if config.prune.kind != "none":
        operators(denoiser)
    if config.cache.kind != "none":
        source_of(denoiser, config.cache.depth)
    if activations.kind != "none" and activations.scores_bits is not None:
        attentions(denoiser)
    if _computes_with_codes(config):
        _check_codes(config, denoiser)


def _check_codes(config: Config, denoiser) -> None:
    """Raise UserError if no layer will have codes that the product of the activations takes."""
    from vqdm.acceleration.products import add_products
    from vqdm.codecs.allocation import assign_schemes
    from vqdm.weights.layers import quantized_layers, swap_empty

    if config.quantize.kind not in ("none", "peer"):
        pattern, size = config.model.layers, config.model.min_size
        swap_empty(denoiser, assign_schemes(denoiser, config.quantize, pattern=pattern, min_size=size).quantized)
    add_products(denoiser, list(quantized_layers(denoiser)), config.activations.product)


def _computes_with_codes(config: Config) -> bool:
    return config.activations.kind != "none" and config.activations.product != "simulated"


def check_products(config: Config, device: str) -> None:
    """Raise UserError for a device without the products that activations ask for."""
    if _computes_with_codes(config):
        from vqdm.acceleration.products import check_device

        check_device(config.activations.product, device)


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
