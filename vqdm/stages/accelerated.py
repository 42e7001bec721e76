"""Stages and settings that acceleration adds to an experiment. With kind=none it adds none: no fingerprint changes."""

from dataclasses import asdict

from vqdm.config.options import Config, SamplerConfig
from vqdm.prompts import PromptList
from vqdm.runs.store import Stage

VERSIONS = {"prune": 1, "schedule": 1, "correct": 1}
_CACHE = ("kind", "interval", "depth", "schedule", "predict", "correction")


def settings(config: Config) -> dict:
    """What the images' stage has in addition."""
    return {} if config.cache.kind == "none" else {"cache": _picked(config.cache, *_CACHE)}


def looks_at_prompts(config: Config) -> bool:
    """True if a stage of these samples calibration's prompts."""
    return config.cache.kind != "none" and (config.cache.schedule == "dynamic" or config.cache.correction != "none")


def is_on(config: Config) -> bool:
    return config.prune.kind != "none" or config.cache.kind != "none"


def prune(config: Config, calibrate: Stage, model: str) -> Stage | None:
    """The stage that scores operators and takes some out; None without."""
    own = config.prune
    if own.kind == "none":
        return None
    options = _picked(own, "kind", "score", "share", "keep") | {"sampler": asdict(config.model.sampler)}
    if own.score == "latents":
        options |= {"prompts": own.prompts} | _picked(config.calibration, "batch_size", "noise_seed")
    options |= {"dtype": config.model.dtype, "rescale": asdict(config.model.rescale)}
    label = f"{config.model.name}-pruned{100 * own.share:g}"
    return Stage("prune", VERSIONS["prune"], label, options, {"calibrate": calibrate, "model": model})


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
