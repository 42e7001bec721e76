"""The stage that quantizes text encoders and VAE. Without `parts` there is none, and no fingerprint changes."""

from vqdm.config.options import Config
from vqdm.config.ranges import settings_of
from vqdm.runs.stage import Stage
from vqdm.stages.graph.versions import new_stage


def parts_stage(config: Config, calibrate: Stage, model: Stage | str) -> Stage | None:
    """The stage of all parts together; None if all stay as they are."""
    if not config.parts.given:
        return None
    codecs = {key: codec.settings() for key, codec in config.parts.codecs().items()}
    settings = {"codecs": codecs, "dtype": config.model.dtype, "noise_seed": config.calibration.noise_seed}
    settings |= {"embeddings": config.parts.embeddings} if "text_encoders" in codecs else {}
    settings |= {"images": config.parts.images, "sampler": settings_of(config.model.sampler)} if "vae" in codecs else {}
    return new_stage("parts", config.model.name, settings, calibrate=calibrate, model=model)
