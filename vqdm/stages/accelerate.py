"""The stages of acceleration, run through the store, and the pipeline that samples with what they found."""

from pathlib import Path

from vqdm.config.options import Config
from vqdm.runs.store import Store
from vqdm.stages.graph import Quantization
from vqdm.stages.layout import SCRATCH
from vqdm.stages.make import Models
from vqdm.stages.samplers import image_sampler


def ensure_cache(
    config: Config, store: Store, stages: Quantization, models: Models, *, compressed: Path | None, environment: dict
) -> None:
    """Make the stages of a cache that look at features. compressed: directory of the denoiser; None: the model's."""

    def options() -> dict:
        return {"config": config.cache, "calibration": config.calibration, "sampler": image_sampler(config)}

    def make_schedule(directory: Path) -> dict:
        from vqdm.stages.cache import measure_schedule

        return measure_schedule(directory, models.student(compressed), stages.prompts, **options())

    def make_corrections(directory: Path) -> dict:
        from vqdm.stages.cache import fit_corrections

        pipeline = models.student(compressed)
        return fit_corrections(directory, pipeline, stages.prompts, **options(), measured=measured)

    measured = None
    if stages.schedule is not None:
        measured = store.ensure(stages.schedule, make_schedule, environment=environment)
    if stages.correct is not None:
        store.ensure(stages.correct, make_corrections, environment=environment, scratch=SCRATCH["correct"])


def accelerated_pipeline(config: Config, store: Store, stages: Quantization, models: Models, compressed: Path | None):
    """A pipeline with the denoiser that was made, ready to sample as the configuration says."""
    pipeline = models.own() if compressed is None else models.student(compressed)
    if config.cache.kind != "none":
        from vqdm.acceleration.branch_cache import add_cache
        from vqdm.models.loader import denoiser_of

        add_cache(denoiser_of(pipeline), stored_cache(config, store, stages, pipeline))
    return pipeline


def stored_cache(config: Config, store: Store, stages: Quantization, pipeline):
    """The configuration's cache, from what its stages found."""
    from vqdm.stages.cache import make_cache

    places = [None if stage is None else store.directory(stage) for stage in (stages.schedule, stages.correct)]
    found = make_cache(pipeline, config.cache, image_sampler(config), measured=places[0], corrected=places[1])
    return found.to(pipeline.device)
