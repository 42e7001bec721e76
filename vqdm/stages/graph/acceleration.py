"""Stages and settings that acceleration adds to an experiment. With kind=none it adds none: no fingerprint changes."""

from vqdm.config.options import Config, SamplerConfig
from vqdm.config.ranges import settings_of
from vqdm.prompts import PromptList
from vqdm.runs.stage import Stage
from vqdm.stages.graph.samplers import compares_with_teacher
from vqdm.stages.graph.versions import new_stage

_CACHE = ("kind", "interval", "depth", "schedule", "predict", "correction")


def settings(config: Config) -> dict:
    """What the images' stage has in addition."""
    cached = {} if config.cache.kind == "none" else {"cache": settings_of(config.cache, *_CACHE)}
    return cached | _activations(config)


def _activations(config: Config) -> dict:
    """Settings of quantized activations, with what decides which layers these are; empty without."""
    own = config.activations
    if own.kind == "none":
        return {}
    options = ["kind", "bits", "per", "column_scales", "keep"]
    options += ["block"] if own.per == "block" else ["groups"] if own.per == "groups" else []
    options += [] if own.product == "simulated" else ["product"]
    options += [] if own.scores_bits is None else ["scores_bits", "scores", "bos"]
    layers = {"layers": config.model.layers, "min_size": config.model.min_size}
    return {"activations": settings_of(own, *options) | layers}


def looks_at_prompts(config: Config) -> bool:
    """True if a stage of these samples calibration's prompts."""
    if config.activations.kind == "static":
        return True
    return config.cache.kind != "none" and (config.cache.schedule == "dynamic" or config.cache.correction != "none")


def is_on(config: Config) -> bool:
    return any(own.kind != "none" for own in (config.prune, config.activations, config.cache))


def tells_work(config: Config) -> bool:
    """True if the work of an image is told beside the original's: where it is less, or `original_steps` asks for it."""
    if compares_with_teacher(config):  # whose guidance doubles its calls
        return False
    return is_on(config) or config.evaluate.original_steps is not None


def prune(config: Config, calibrate: Stage, model: str) -> dict[str, Stage]:
    """The stages that score operators, once for all shares, and take some out; empty without."""
    own = config.prune
    if own.kind == "none":
        return {}
    options = settings_of(own, "score") | {"sampler": settings_of(config.model.sampler)}
    if own.score == "latents":
        options |= {"prompts": own.prompts} | settings_of(config.calibration, "batch_size", "noise_seed")
    options |= {"dtype": config.model.dtype, "rescale": settings_of(config.model.rescale)}
    upstream = {"calibrate": calibrate, "model": model}
    scores = new_stage("scores", f"{config.model.name}-{own.score}", options, **upstream)
    label = f"{config.model.name}-pruned{100 * own.share:g}"
    chosen = settings_of(own, "kind", "share", "keep")
    return {"scores": scores, "prune": new_stage("prune", label, chosen, **upstream, scores=scores)}


def looking(
    config: Config, prompts: PromptList | None, label: str, *, sampler: SamplerConfig, upstream: dict
) -> dict[str, Stage]:
    """The stages that look at a denoiser while it samples, each after those before it; empty without.

    schedule: what reusing features costs. activations: static ranges, with the cache running. correct: the cache's
    corrections, which see everything else.
    """
    cache, found = config.cache, {}

    def add(name: str, count: int, chosen: dict) -> None:
        options = _sampled(config, prompts, sampler, count) | chosen
        found[name] = new_stage(name, label, options, **upstream, **found)

    if cache.kind != "none" and cache.schedule == "dynamic":
        add("schedule", cache.prompts, settings_of(cache, "interval", "depth"))
    if config.activations.kind == "static":
        add("activations", config.activations.prompts, settings(config))
    if cache.kind != "none" and cache.correction != "none":
        add("correct", cache.prompts, settings(config))
    return found


def _sampled(config: Config, prompts: PromptList, sampler: SamplerConfig, count: int) -> dict:
    """Settings of a stage that samples the first of calibration's prompts."""
    chosen = PromptList(prompts.prompts[:count], prompts.origin)
    options = {"prompts": chosen.sha256, "sampler": settings_of(sampler), "dtype": config.model.dtype}
    options |= settings_of(config.calibration, "batch_size", "noise_seed")
    return options | {"rescale": settings_of(config.model.rescale)}
