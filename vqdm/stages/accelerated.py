"""Which stages and settings caching adds to an experiment. With kind=none they add nothing: no fingerprint changes."""

from dataclasses import asdict

from vqdm.config.options import Config, SamplerConfig
from vqdm.prompts import PromptList
from vqdm.runs.store import Stage

VERSIONS = {"schedule": 1, "correct": 1}
_CACHE = ("kind", "interval", "depth", "schedule", "predict", "correction")


def settings(config: Config) -> dict:
    """What the images' stage has in addition."""
    return {} if config.cache.kind == "none" else {"cache": _picked(config.cache, *_CACHE)}


def looks_at_prompts(config: Config) -> bool:
    """True if a stage of these samples calibration's prompts."""
    return config.cache.kind != "none" and (config.cache.schedule == "dynamic" or config.cache.correction != "none")


def schedule(
    config: Config, prompts: PromptList | None, label: str, *, sampler: SamplerConfig, upstream: dict
) -> Stage | None:
    """The stage that measures what reusing features costs; None for schedules that need no data."""
    if config.cache.kind == "none" or config.cache.schedule != "dynamic":
        return None
    options = _sampled(config, prompts, sampler) | _picked(config.cache, "interval", "depth")
    return Stage("schedule", VERSIONS["schedule"], label, options, upstream)


def correct(
    config: Config,
    prompts: PromptList | None,
    label: str,
    *,
    sampler: SamplerConfig,
    upstream: dict,
    schedule: Stage | None,
) -> Stage | None:
    """The stage that fits the cache's corrections; None without."""
    if config.cache.kind == "none" or config.cache.correction == "none":
        return None
    options = _sampled(config, prompts, sampler) | {"cache": _picked(config.cache, *_CACHE)}
    upstream = upstream if schedule is None else upstream | {"schedule": schedule}
    return Stage("correct", VERSIONS["correct"], label, options, upstream)


def _sampled(config: Config, prompts: PromptList, sampler: SamplerConfig) -> dict:
    """Settings of a stage that samples the first of calibration's prompts."""
    chosen = PromptList(prompts.prompts[: config.cache.prompts], prompts.origin)
    options = {"prompts": chosen.sha256, "sampler": asdict(sampler), "dtype": config.model.dtype}
    options |= _picked(config.calibration, "batch_size", "noise_seed")
    return options | {"rescale": asdict(config.model.rescale)}


def _picked(config, *names: str) -> dict:
    everything = asdict(config)
    return {name: everything[name] for name in names}
