"""Static ranges of activations, found while calibration's captions are sampled, and quantizers put into a denoiser."""

import functools
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from vqdm.acceleration.activations import (
    InputRanges,
    StaticQuantizer,
    add_quantizers,
    input_quantizers,
    layers_with_inputs,
)
from vqdm.acceleration.products import add_products
from vqdm.acceleration.scores import quantize_scores
from vqdm.calibration.calls import sample_batches
from vqdm.config.acceleration import ActivationsConfig
from vqdm.config.options import CalibrationConfig, ModelConfig, SamplerConfig, layer_pattern
from vqdm.config.ranges import settings_of
from vqdm.models.loader import denoiser_of
from vqdm.prompts import PromptList
from vqdm.runs.files import atomic_write
from vqdm.runs.items import make_missing
from vqdm.stages.layout import label_of

RANGES_FILE = "ranges.safetensors"
_QUANTIZER = ("kind", "bits", "per", "block", "groups", "column_scales")  # options that a checkpoint keeps


def find_ranges(
    directory: Path,
    pipeline,
    prompts: PromptList,
    *,
    config: ActivationsConfig,
    model: ModelConfig,
    calibration: CalibrationConfig,
    sampler: SamplerConfig,
) -> dict:
    """Fill the stage's directory with `ranges.safetensors`: every layer's grids. Each batch of captions is an item."""
    denoiser = denoiser_of(pipeline)
    _add(denoiser, config, model)

    def seen(name: str, run: Callable[[], None]) -> tuple[dict[str, bytes], dict]:
        with InputRanges(denoiser) as ranges:
            run()
        pairs = {layer: torch.stack(pair) for layer, pair in ranges.found.items()}
        return {f"seen/{name}.safetensors": to_bytes(pairs)}, {}

    chosen = PromptList(prompts.prompts[: config.prompts], prompts.origin)
    batches = sample_batches(pipeline, chosen, config=calibration, sampler=sampler)
    makers = {name: functools.partial(seen, name, run) for name, _, run in batches}
    make_missing(directory, makers, title=f"ranges {label_of(directory)}")
    parts = [load_file(directory / "seen" / f"{name}.safetensors") for name in makers]
    quantizers, grids = input_quantizers(denoiser), {}
    for layer in parts[0]:
        least, most = _joined([part[layer] for part in parts])
        quantizers[layer].fit(least, most)
        grids |= {f"{layer}.{name}": value for name, value in _stored(quantizers[layer]).items()}
    atomic_write(directory / RANGES_FILE, to_bytes(grids))
    return {"layers": len(parts[0])}


def _joined(pairs: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The smallest and the largest of all batches, [channels] each, from [2, channels] of each."""
    stacked = torch.stack(pairs)
    return stacked[:, 0].amin(0), stacked[:, 1].amax(0)


def _stored(quantizer: StaticQuantizer) -> dict[str, Tensor]:
    return {name: (b.half() if b.is_floating_point() else b).cpu() for name, b in quantizer.state_dict().items()}


def _add(denoiser: nn.Module, config: ActivationsConfig, model: ModelConfig) -> None:
    """Put quantizers before the layers of the configuration, or products of 8 bits into them, and into attention."""
    if config.scores_bits is not None:
        quantize_scores(denoiser, bits=config.scores_bits, grid=config.scores, bos=config.bos)
    pattern = layer_pattern(type(denoiser).__name__, model.layers)
    names = layers_with_inputs(denoiser, pattern=pattern, min_size=model.min_size, keep=config.keep)
    if config.product != "simulated":  # these round their inputs themselves
        real = add_products(denoiser, names, config.product)
        names = [name for name in names if name not in real]
        if not names:
            return
    add_quantizers(denoiser, names, settings_of(config, *_QUANTIZER))


@torch.no_grad()
def quantize_activations(
    denoiser: nn.Module, config: ActivationsConfig, model: ModelConfig, *, ranges: Path | None
) -> None:
    """Let the denoiser's layers read quantized inputs. ranges: directory of the activations stage, for static ones."""
    _add(denoiser, config, model)
    if ranges is None:
        return
    found = load_file(ranges / RANGES_FILE)
    for layer, quantizer in input_quantizers(denoiser).items():
        if f"{layer}.scale" in found:  # a layer that never ran has none
            quantizer.load_state_dict({name: found[f"{layer}.{name}"] for name in ("scale", "zero", "group")})
