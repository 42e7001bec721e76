"""The schedulers to sample a model with, by name. Imports no torch until one is made."""

import inspect
from pathlib import Path

from vqdm.config.options import SamplerConfig
from vqdm.errors import UserError
from vqdm.models.foreign import json_object

SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_ancestral": "EulerAncestralDiscreteScheduler",
    "dpm_solver": "DPMSolverMultistepScheduler",
}
NATIVE = "native"  # the model's own scheduler


def is_flow_matching(directory: Path) -> bool:
    """True if the pipeline's scheduler file names a flow-matching scheduler."""
    file = directory / "scheduler" / "scheduler_config.json"
    settings = json_object(file) if file.is_file() else {}
    is_flow = settings.get("use_flow_sigmas") or settings.get("prediction_type") == "flow_prediction"
    return bool(is_flow or str(settings.get("_class_name")).startswith("FlowMatch"))


def check_sampler(directory: Path, sampler: SamplerConfig) -> None:
    """Refuse diffusion's samplers for flow matching, and more steps or other sizes than the model has."""
    if is_flow_matching(directory) and sampler.scheduler != NATIVE:
        raise UserError(
            f"model.sampler.scheduler={sampler.scheduler} does not fit {directory}, which is a flow-matching model: "
            f"give model.sampler.scheduler={NATIVE}"
        )
    trained = _setting(directory / "scheduler" / "scheduler_config.json", "num_train_timesteps", 1000)
    if isinstance(trained, int) and sampler.steps > trained:
        raise UserError(
            f"model.sampler.steps={sampler.steps}: {directory} was trained with {trained} timesteps, not more"
        )
    widths = _setting(directory / "vae" / "config.json", "block_out_channels", [])
    unit = 2 ** (len(widths) - 1) if isinstance(widths, list) and widths else 1
    unit *= _setting(directory / "transformer" / "config.json", "patch_size", 1) or 1
    if sampler.size is not None and sampler.size % unit:
        near = max(unit, round(sampler.size / unit) * unit)
        raise UserError(
            f"model.sampler.size={sampler.size} must be a multiple of {unit} for {directory}, such as {near}"
        )


def _setting(file: Path, name: str, default):
    """A setting of a model's config; `default` where there is no such file or setting."""
    return json_object(file).get(name, default) if file.is_file() else default


def set_sampler(pipeline, sampler: SamplerConfig) -> None:
    """Replace the pipeline's scheduler but keep the model's own noise schedule; "native" keeps the scheduler too.

    Estimates of the clean image are not clipped, unless the model's own settings ask for it: DDIM's default is for
    pixels from −1 to 1, and latents reach farther.
    """
    import diffusers

    own = pipeline.scheduler
    kind = type(own) if sampler.scheduler == NATIVE else getattr(diffusers, SCHEDULERS[sampler.scheduler])
    extra = {} if sampler.timestep_spacing is None else {"timestep_spacing": sampler.timestep_spacing}
    known = inspect.signature(kind.__init__).parameters.keys()
    if not extra.keys() <= known:
        raise UserError(
            f"model.sampler.timestep_spacing={sampler.timestep_spacing}: {kind.__name__} has no such setting; "
            "set it to null"
        )
    if "clip_sample" in known and "clip_sample" not in own.config:
        extra["clip_sample"] = False
    pipeline.scheduler = kind.from_config(own.config, **extra)
