"""vqdm from Python, without Hydra: compress a loaded pipeline in place."""

import hashlib
import json
import logging
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from vqdm.codecs.allocation import planned_bits
from vqdm.config.codecs import QuantizeConfig, parse_scheme
from vqdm.config.options import CalibrationConfig, ModelConfig, SamplerConfig
from vqdm.config.ranges import check_fields
from vqdm.errors import UserError
from vqdm.hub.checkpoint import checksum
from vqdm.hub.pipelines import set_decode
from vqdm.models.finite import check_finite, check_storable
from vqdm.models.loader import call_parameters, check_on_device, denoiser_of, denoiser_part, execution_device
from vqdm.models.samplers import NATIVE
from vqdm.models.specs import layer_specs
from vqdm.prompts import load_prompts, prompt_list
from vqdm.runs.files import canonical_json
from vqdm.stages.calibrate import calibrate
from vqdm.stages.graph.versions import VERSIONS
from vqdm.stages.quantize import quantize

__all__ = ["compress"]
log = logging.getLogger("vqdm")


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

    scheme: such as `trellis3`, `trellis2.5`, `vq3`, `3x8g8`, `gptq4`, `rtn4`, or options of `vqdm/config/codecs.py`.
    prompts: captions to calibrate on; None: 64 that come with vqdm. steps, guidance, size (pixels): for sampling them;
    None: the pipeline's own. recorded_steps: number of steps whose calls calibrate. layers: a regular expression for
    the layers to quantize; None: the model's default. folder: keeps what is made, so that the same call goes on after a
    stop (another model or other arguments get a place of their own there); None: nothing is kept.
    """
    config = parse_scheme(scheme) if isinstance(scheme, str) else scheme
    config.check()
    if config.kind == "none" or config.sensitivity() is not None:
        raise UserError("vqdm.compress quantizes with uniform bits; allocation=sensitivity is for run.py")
    _check_pipeline(pipeline, config, layers=layers)
    parameters = call_parameters(pipeline)
    chosen = load_prompts(source="builtin", n=64) if prompts is None else prompt_list(prompts)
    sampler = SamplerConfig(
        scheduler=NATIVE,
        steps=parameters["num_inference_steps"].default if steps is None else steps,
        guidance=parameters["guidance_scale"].default if guidance is None else guidance,
        size=size,
    )
    calibration = CalibrationConfig(recorded_steps=recorded_steps, batch_size=batch_size)
    for options in (sampler, calibration):
        check_fields(options, "")
    _check_sampler(pipeline, sampler)
    model = ModelConfig(layers=layers, sampler=sampler)
    with tempfile.TemporaryDirectory() if folder is None else nullcontext(folder) as place:
        if folder is not None:
            settings = [chosen.sha256, *map(asdict, (config, calibration, model))]
            _make_folder(Path(folder))
            place = Path(folder) / f"{config.kind}{config.bits:g}-{_identity(pipeline, settings)[:8]}"
        calls, made = Path(place) / "calibration", Path(place) / "quantized"
        calibrate(calls, pipeline, chosen, config=calibration, sampler=sampler)
        quantize(
            made,
            pipeline,
            calls,
            config=config,
            model=model,
            calibration_config=calibration,
            device=str(execution_device(pipeline)),
        )
    pipeline.maybe_free_model_hooks()  # under model offloading, the next call finds it as the last one left it
    set_decode(denoiser_of(pipeline), "per_call")
    return pipeline


def _check_pipeline(pipeline, config: QuantizeConfig, *, layers: str | None) -> None:
    """UserError for what cannot be quantized; a denoiser inside torch.compile's wrapper is taken out of it."""
    denoiser_of(pipeline)
    call_parameters(pipeline)
    _take_out_of_compile(pipeline)
    _check_denoiser(denoiser_of(pipeline), config, layers=layers)
    check_on_device(pipeline)
    _check_dtypes(pipeline)
    check_finite(pipeline, type(pipeline).__name__)
    check_storable(denoiser_of(pipeline), layer_specs(denoiser_of(pipeline), pattern=layers))


def _check_sampler(pipeline, sampler: SamplerConfig) -> None:
    """UserError for more steps than the scheduler was trained with, and for sizes that the VAE does not make."""
    trained, unit = pipeline.scheduler.config.get("num_train_timesteps", 1000), getattr(pipeline, "vae_scale_factor", 1)
    if sampler.steps > trained:
        raise UserError(
            f"steps={sampler.steps}: the pipeline's scheduler was trained with {trained} timesteps, not more"
        )
    if sampler.size is not None and sampler.size % unit:
        raise UserError(f"size={sampler.size} must be a multiple of {unit}, the scale of the pipeline's VAE")


def _check_dtypes(pipeline) -> None:
    """UserError for text encoders in another dtype than the U-Net that reads them; transformers cast what they get."""
    if denoiser_part(pipeline) != "unet":
        return
    for part, module in pipeline.components.items():
        if part.startswith("text_encoder") and module is not None and module.dtype != pipeline.unet.dtype:
            raise UserError(
                f"the pipeline's {part} is in {module.dtype} and its unet in {pipeline.unet.dtype}: load all with one "
                f"dtype, or cast the text encoders (pipeline.{part}.to({pipeline.unet.dtype}))"
            )


def _take_out_of_compile(pipeline) -> None:
    """Put the denoiser that torch.compile wrapped where the wrapper was: it can be compiled again when quantized.

    UserError for one that was compiled in place, which cannot be undone.
    """
    denoiser = denoiser_of(pipeline)
    if (inner := getattr(denoiser, "_orig_mod", None)) is not None:
        pipeline.register_modules(**{denoiser_part(pipeline): inner})
        log.warning("the pipeline's denoiser was compiled: the module inside is quantized; compile it again after")
    if any(getattr(module, "_compiled_call_impl", None) is not None for module in denoiser_of(pipeline).modules()):
        raise UserError("the pipeline's denoiser is compiled in place: load it, quantize it, then compile it")


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"folder={folder} cannot be made ({error.strerror}): give another place") from error


def _check_denoiser(denoiser: nn.Module, config: QuantizeConfig, *, layers: str | None) -> None:
    """UserError unless the scheme fits every layer, known from the shapes, and the weights are in full precision."""
    if getattr(denoiser, "is_quantized", False):
        raise UserError(
            "the pipeline's denoiser is quantized already: load the full-precision model, or dequantize() it first"
        )
    if any(name.endswith(".base_layer") for name, _ in denoiser.named_modules()):
        raise UserError("the pipeline's denoiser carries a LoRA: unload it, and load it again when all is quantized")
    with torch.device("meta"):
        shapes = type(denoiser).from_config(denoiser.config)
    planned_bits(shapes, config, pattern=layers, min_size=ModelConfig.min_size)


def _identity(pipeline, settings: list) -> str:
    """sha256 over the pipeline's weights and everything else that the quantized ones depend on."""
    scheduler = type(pipeline.scheduler).__name__, json.loads(pipeline.scheduler.to_json_string())
    versions = {name: VERSIONS[name] for name in ("calibrate", "sensitivity", "quantize")}
    digest = hashlib.sha256(canonical_json([*settings, scheduler, versions]))
    for part, module in sorted(pipeline.components.items()):
        if isinstance(module, nn.Module):
            for name, tensor in module.state_dict().items():
                digest.update(checksum(f"{part}.{name}", tensor).encode())
    return digest.hexdigest()
