"""Stages of a feature cache: what reusing features costs, what corrects them, and the cache that follows from both.

Both sample calibration's first prompts without a cache; every batch is an item.
"""

import functools
import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes

from vqdm.acceleration.branch_cache import source_of
from vqdm.acceleration.caching import make_schedule, timesteps_of
from vqdm.acceleration.features import CorrectionSums, FeatureTap, ReuseCosts, corrections
from vqdm.acceleration.schedules import check_calls
from vqdm.acceleration.stored_cache import Schedule, StoredCache
from vqdm.calibration.calls import sample_batches
from vqdm.config.acceleration import CacheConfig
from vqdm.config.options import CalibrationConfig, SamplerConfig
from vqdm.models.loader import denoiser_of
from vqdm.prompts import PromptList
from vqdm.runs.files import atomic_write, write_json
from vqdm.runs.items import make_missing, read_item
from vqdm.stages.layout import label_of

SCHEDULE_FILE, CORRECTION_FILE = "schedule.json", "correction.safetensors"


def _observe(
    directory: Path,
    pipeline,
    prompts: PromptList,
    *,
    config: CacheConfig,
    calibration: CalibrationConfig,
    sampler: SamplerConfig,
    make: Callable[[str], tuple[object, Callable[[], tuple[dict[str, bytes], dict]]]],
) -> list[str]:
    """Sample every batch that is missing under a tap of the feature; returns the items' names.

    make: gives, by a batch's name, what takes its features, and a function for its item: files, record.
    """

    def observed(name: str, run: Callable[[], None]) -> tuple[dict[str, bytes], dict]:
        taker, finish = make(name)
        with FeatureTap(denoiser_of(pipeline), config.depth, taker.take):
            run()
        return finish()

    chosen = PromptList(prompts.prompts[: config.prompts], prompts.origin)
    batches = sample_batches(pipeline, chosen, config=calibration, sampler=sampler)
    makers = {name: functools.partial(observed, name, run) for name, _, run in batches}
    make_missing(directory, makers, title=f"features {label_of(directory)}")
    return [*makers]


def measure_schedule(
    directory: Path,
    pipeline,
    prompts: PromptList,
    *,
    config: CacheConfig,
    calibration: CalibrationConfig,
    sampler: SamplerConfig,
) -> dict:
    """Fill the stage's directory with `schedule.json`: the costs of reuse, [start][call], and the full calls."""
    calls = len(timesteps_of(pipeline.scheduler, sampler.steps))

    def make(_name):
        costs = ReuseCosts(calls, 2 * config.interval)
        return costs, lambda: ({}, {"costs": costs.costs})

    names = _observe(directory, pipeline, prompts, config=config, calibration=calibration, sampler=sampler, make=make)
    found = torch.tensor([read_item(directory, name)["costs"] for name in names], dtype=torch.float64, device="cpu")
    costs = found.mean(0).tolist()
    schedule = cache_schedule(pipeline, config, sampler, costs=costs)
    write_json(directory / SCHEDULE_FILE, {"costs": costs, "full": list(schedule.full)})
    return {"calls": calls, "full": len(schedule.full)}


def cache_schedule(pipeline, config: CacheConfig, sampler: SamplerConfig, *, costs=None) -> Schedule:
    """The schedule that a configuration asks for. costs: as `measure_schedule` found them, for schedule=dynamic."""
    source_of(denoiser_of(pipeline), config.depth)
    return make_schedule(
        pipeline.scheduler,
        steps=sampler.steps,
        interval=config.interval,
        kind=config.schedule,
        depth=config.depth,
        predict=config.predict,
        costs=costs,
    )


def fit_corrections(
    directory: Path,
    pipeline,
    prompts: PromptList,
    *,
    config: CacheConfig,
    calibration: CalibrationConfig,
    sampler: SamplerConfig,
    measured: Path | None,
) -> dict:
    """Fill the stage's directory with `correction.safetensors`: scales and shifts [calls, channels] in fp16.

    measured: directory of the schedule stage, for schedule=dynamic.
    """
    schedule = cache_schedule(pipeline, config, sampler, costs=_costs(measured))

    def make(name):
        sums = CorrectionSums(schedule)
        return sums, lambda: ({f"sums/{name}.safetensors": to_bytes({"sums": sums.sums})}, {})

    names = _observe(directory, pipeline, prompts, config=config, calibration=calibration, sampler=sampler, make=make)
    total = sum(load_file(directory / "sums" / f"{name}.safetensors")["sums"] for name in names)
    scales, shifts = (values.half().contiguous() for values in corrections(total))
    atomic_write(directory / CORRECTION_FILE, to_bytes({"scales": scales, "shifts": shifts}))
    return {"calls": len(schedule.timesteps), "mean_scale": float(scales.float().mean())}


def _costs(measured: Path | None):
    return None if measured is None else json.loads((measured / SCHEDULE_FILE).read_text())["costs"]


def make_cache(
    pipeline, config: CacheConfig, sampler: SamplerConfig, *, measured: Path | None, corrected: Path | None
) -> StoredCache:
    """The cache of a configuration, for the pipeline's denoiser, with what its stages found."""
    check_calls(len(timesteps_of(pipeline.scheduler, sampler.steps)))
    schedule = cache_schedule(pipeline, config, sampler, costs=_costs(measured))
    if corrected is None:
        return StoredCache(schedule)
    found = load_file(corrected / CORRECTION_FILE)
    stored = StoredCache(schedule, found["scales"].shape[1])
    stored.load_state_dict(found)
    return stored
