"""vqdm from Python, without Hydra: compress a pipeline that is loaded, in place."""

import hashlib
import inspect
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

from torch import nn

from vqdm.atomic import canonical_json
from vqdm.config import CalibrationConfig, ModelConfig, QuantizeConfig, SamplerConfig, check_quantize, parse_scheme
from vqdm.errors import UserError
from vqdm.hub.checkpoint import checksum
from vqdm.hub.pipelines import set_decode
from vqdm.models.loader import denoiser_of
from vqdm.models.samplers import NATIVE
from vqdm.prompts import load_prompts, prompt_list
from vqdm.stages.calibrate import calibrate
from vqdm.stages.quantize import quantize

__all__ = ["compress"]


def compress(
    pipeline,
    scheme: str | QuantizeConfig = "trellis3",
    prompts: Sequence[str] | None = None,
    *,
    steps: int | None = None,
    guidance: float | None = None,
    size: int | None = None,
    batch_size: int = 4,
    recorded_steps: int = 4,
    layers: str | None = None,
    folder: str | Path | None = None,
):
    """Quantize the denoiser of a diffusers pipeline in place, with calibration; returns the pipeline.

    scheme: such as `trellis3`, `trellis2.5`, `vq3`, `3x8g8`, `gptq4`, `rtn4`, or a QuantizeConfig.
    prompts: captions to calibrate on; None: 64 that come with vqdm. steps, guidance, size (pixels): of sampling them;
    None: the pipeline's own. recorded_steps: of them, whose calls calibrate. layers: a regular expression of the layers
    to quantize; None: by the model. folder: keeps what is made, so that the same call goes on after a stop (another
    model or other arguments get a place of their own there); None: nothing is kept.
    """
    config = parse_scheme(scheme) if isinstance(scheme, str) else scheme
    check_quantize(config)
    if config.kind == "none" or config.allocation != "uniform":
        raise UserError("vqdm.compress quantizes with uniform bits; allocation=sensitivity is for run.py")
    if getattr(denoiser_of(pipeline), "is_quantized", False):
        raise UserError("the pipeline's denoiser is quantized already: load the original, or dequantize() it first")
    chosen = load_prompts(source="builtin", n=64) if prompts is None else prompt_list(prompts)
    parameters = inspect.signature(pipeline.__call__).parameters
    sampler = SamplerConfig(
        scheduler=NATIVE,
        steps=parameters["num_inference_steps"].default if steps is None else steps,
        guidance=parameters["guidance_scale"].default if guidance is None else guidance,
        size=size,
    )
    calibration = CalibrationConfig(recorded_steps=recorded_steps, batch_size=batch_size)
    model = ModelConfig(layers=layers, sampler=sampler)
    with tempfile.TemporaryDirectory() if folder is None else nullcontext(folder) as place:
        if folder is not None:
            settings = [chosen.sha256, *map(asdict, (config, calibration, model))]
            place = Path(folder) / f"{config.kind}{config.bits:g}-{_identity(pipeline, settings)[:8]}"
        calls, made = Path(place) / "calibration", Path(place) / "quantized"
        calibrate(calls, pipeline, chosen, config=calibration, sampler=sampler)
        quantize(
            made, pipeline, calls, config=config, model=model, calibration_config=calibration,
            device=denoiser_of(pipeline).device.type,
        )  # fmt: skip
    set_decode(denoiser_of(pipeline), "per_call")
    return pipeline


def _identity(pipeline, settings: list) -> str:
    """sha256 over the pipeline's weights and all that the quantized ones depend on."""
    digest = hashlib.sha256(canonical_json(settings))
    for part, module in sorted(pipeline.components.items()):
        if isinstance(module, nn.Module):
            for name, tensor in module.state_dict().items():
                digest.update(checksum(f"{part}.{name}", tensor).encode())
    return digest.hexdigest()
