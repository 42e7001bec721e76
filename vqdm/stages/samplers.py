"""The samplers of a run: of the images to score, of their originals, and every one that is used."""

import dataclasses

from vqdm.config.options import Config, SamplerConfig


def image_sampler(config: Config) -> SamplerConfig:
    """The sampler of the images to score: the model's, with a number of steps of their own if given."""
    sampler = config.model.sampler
    return sampler if config.evaluate.steps is None else dataclasses.replace(sampler, steps=config.evaluate.steps)


def original_sampler(config: Config) -> SamplerConfig:
    """The sampler of the full-precision images that the others are compared with."""
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
