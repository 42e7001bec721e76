"""The samplers of a run: of the images to score, of their originals, and every one that is used."""

import dataclasses

from vqdm.config.options import Config, SamplerConfig


def image_sampler(config: Config) -> SamplerConfig:
    """The sampler of the images to score: the model's, with a number of steps of their own if given."""
    sampler = config.model.sampler
    return sampler if config.evaluate.steps is None else dataclasses.replace(sampler, steps=config.evaluate.steps)


def teacher_sampler(config: Config) -> SamplerConfig:
    """The sampler that makes a few-step student's pairs: DDIM, whose noise its first call sees as it is."""
    own = config.few_step
    return SamplerConfig("ddim", own.teacher_steps, own.teacher_guidance, size=config.model.sampler.size)


def compares_with_teacher(config: Config) -> bool:
    """True if a few-step student's images are compared with its teacher's."""
    return config.few_step.kind != "none" and config.few_step.originals == "teacher"


def original_sampler(config: Config) -> SamplerConfig:
    """The sampler of the full-precision images that the others are compared with."""
    if compares_with_teacher(config):
        return teacher_sampler(config)
    steps = config.evaluate.original_steps
    return image_sampler(config) if steps is None else dataclasses.replace(config.model.sampler, steps=steps)


def samplers(config: Config) -> list[SamplerConfig]:
    """Every way in which a run samples: for calibration, for the images to score, for trajectories."""
    own = config.model.sampler
    counts = config.finetune.trajectories.sampler_steps or [] if config.finetune.steps else []
    return [
        own,
        image_sampler(config),
        original_sampler(config),
        *(dataclasses.replace(own, steps=count) for count in counts),
    ]
