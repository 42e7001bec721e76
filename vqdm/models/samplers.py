"""The schedulers to sample a model with, by name. Imports no torch until one is made."""

import inspect
import json
from pathlib import Path

from vqdm.config.options import SamplerConfig
from vqdm.errors import UserError

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
    try:
        settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError as error:
        raise UserError(f"{file} is not JSON ({error}); download the model again") from error
    is_flow = settings.get("use_flow_sigmas") or settings.get("prediction_type") == "flow_prediction"
    return bool(is_flow or settings.get("_class_name", "").startswith("FlowMatch"))


def check_sampler(directory: Path, sampler: SamplerConfig) -> None:
    """Refuse samplers of diffusion for a flow-matching model."""
    if is_flow_matching(directory) and sampler.scheduler != NATIVE:
        raise UserError(
            f"model.sampler.scheduler={sampler.scheduler} does not fit {directory}, which is a flow-matching model: "
            f"give model.sampler.scheduler={NATIVE}"
        )


def set_sampler(pipeline, sampler: SamplerConfig) -> None:
    """Replace the pipeline's scheduler but keep the model's own noise schedule; "native" keeps the scheduler too."""
    import diffusers

    own = pipeline.scheduler
    kind = type(own) if sampler.scheduler == NATIVE else getattr(diffusers, SCHEDULERS[sampler.scheduler])
    extra = {} if sampler.timestep_spacing is None else {"timestep_spacing": sampler.timestep_spacing}
    if not extra.keys() <= inspect.signature(kind.__init__).parameters.keys():
        raise UserError(
            f"model.sampler.timestep_spacing={sampler.timestep_spacing}: {kind.__name__} has no such setting; "
            "set it to null"
        )
    pipeline.scheduler = kind.from_config(own.config, **extra)
