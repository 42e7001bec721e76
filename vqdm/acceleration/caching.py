"""A cache for a whole pipeline: the schedule of its sampler, and switching it on and off."""

import inspect
from collections.abc import Sequence

from vqdm.acceleration import schedules
from vqdm.acceleration.branch_cache import add_cache, remove_cache, source_of
from vqdm.acceleration.stored_cache import CACHE_NAME, PREDICTIONS, Schedule, StoredCache
from vqdm.errors import UserError
from vqdm.models.loader import denoiser_of

SCHEDULES = ("uniform", "quadratic")  # that need no data


def timesteps_of(scheduler, steps: int) -> tuple[float, ...]:
    """The timesteps of all calls that a sampler makes; the scheduler itself is not touched."""
    fresh = type(scheduler).from_config(scheduler.config)
    fresh.set_timesteps(steps)
    return tuple(map(float, fresh.timesteps))


def make_schedule(
    scheduler,
    *,
    steps: int,
    interval: int,
    kind: str,
    depth: int,
    predict: str,
    costs: Sequence[Sequence[float]] | None = None,
) -> Schedule:
    """The schedule for a pipeline's scheduler. costs: those of `schedules.dynamic`, for kind=dynamic."""
    timesteps = timesteps_of(scheduler, steps)
    schedules.check_calls(len(timesteps))
    if kind == "dynamic":
        full = schedules.dynamic(costs, interval)
    else:
        full = {"uniform": schedules.uniform, "quadratic": schedules.quadratic}[kind](len(timesteps), interval)
    return Schedule(type(scheduler).__name__, steps, timesteps, tuple(full), depth, predict)


def enable_cache(
    pipeline,
    *,
    steps: int | None = None,
    interval: int | None = None,
    depth: int = 1,
    schedule: str = "uniform",
    predict: str = "linear",
) -> None:
    """Let a U-Net pipeline reuse features between its calls, as its checkpoint says or as is asked for.

    Without arguments: the cache that the model was saved with; UserError if it is for another sampler. With them: steps
    of the sampler (None: the pipeline's default), calls per full one, residual units that run in every call, schedule
    (uniform | quadratic), prediction (linear | reuse).
    """
    denoiser = denoiser_of(pipeline)
    source_of(denoiser, depth)
    stored = denoiser._modules.get(CACHE_NAME)
    if steps is None and interval is None and stored is not None:
        _check_scheduler(pipeline.scheduler, stored.schedule)
        add_cache(denoiser, stored)
        return
    for name, value, known in (("schedule", schedule, SCHEDULES), ("predict", predict, PREDICTIONS)):
        if value not in known:
            raise UserError(f"enable_cache: {name}={value!r} is not one of {', '.join(known)}")
    if steps is None:
        steps = inspect.signature(pipeline.__call__).parameters["num_inference_steps"].default
    interval = 2 if interval is None else interval
    if interval < 1:
        raise UserError(f"enable_cache: interval={interval} must be at least 1")
    made = make_schedule(
        pipeline.scheduler, steps=steps, interval=interval, kind=schedule, depth=depth, predict=predict
    )
    add_cache(denoiser, StoredCache(made))


def disable_cache(pipeline) -> None:
    """Let every call of a pipeline's denoiser run whole again."""
    remove_cache(denoiser_of(pipeline))


def _check_scheduler(scheduler, schedule: Schedule) -> None:
    """UserError unless the scheduler makes the calls that a stored cache is for."""
    name = type(scheduler).__name__
    if name != schedule.scheduler or timesteps_of(scheduler, schedule.steps) != schedule.timesteps:
        other = f"{name}" if name != schedule.scheduler else f"{name} with other settings"
        raise UserError(
            f"the model's cache is for {schedule.steps} steps of {schedule.scheduler}, and the pipeline samples with "
            f"{other}: set that scheduler, or give enable_cache(pipeline, steps=…) a cache without corrections"
        )
