"""Work of sampling one image, from shapes alone: multiply-adds of full and cached calls, and bit operations.

A bit operation is a multiply-add times the bits of both its factors (as DGQ and others count); attention's products
count as 16 × 16, those with quantized scores as 16 × their bits. It says nothing of time: where activations are only
rounded, everything is computed in floats.
"""

from dataclasses import asdict, dataclass
from math import ceil

import torch
from torch import nn

from vqdm.acceleration.activations import layers_with_inputs
from vqdm.acceleration.branch_cache import add_cache, source_of
from vqdm.acceleration.operators import remove
from vqdm.acceleration.stored_cache import Schedule, StoredCache
from vqdm.calibration.hessian import token_count
from vqdm.config.acceleration import LEAST_CALLS
from vqdm.config.options import Config, layer_pattern
from vqdm.models.loader import denoiser_on_meta
from vqdm.models.specs import LayerSpec, layer_specs
from vqdm.stages.graph.samplers import image_sampler, original_sampler
from vqdm.stages.plan.forward import BATCH, measure_call

FLOATS = 16  # bits of what is not quantized
MULTIPLY_ADD = 2  # FLOPs


@dataclass(frozen=True)
class CallWork:
    """One sample of one call: multiply-adds of every layer that runs, and of attention's products."""

    layers: dict[str, float]
    attention: float

    @property
    def macs(self) -> float:
        return sum(self.layers.values()) + self.attention

    def bit_operations(self, weights: dict[str, float], inputs: dict[str, float], *, scores: int) -> float:
        """weights, inputs: bits by layer, of those that are quantized. scores: of attention's, in half its products."""
        own = (macs * weights.get(n, FLOATS) * inputs.get(n, FLOATS) for n, macs in self.layers.items())
        return sum(own) + self.attention * FLOATS * (FLOATS + scores) / 2


@dataclass(frozen=True)
class Work:
    """Sampling one image, per sample of the denoiser's batch (guidance doubles both sides of every ratio).

    Relative numbers are to the full-precision denoiser at the original's number of steps.
    """

    macs: float
    relative_macs: float
    relative_bit_operations: float
    calls: int
    full_calls: int
    cached_call: float  # multiply-adds of a cached call ÷ those of a full one; 1 without a cache
    kept_bytes: int  # features that a cache keeps, in 16 bit
    input_bits: int  # of activations
    quantized_inputs: float  # share of the multiply-adds whose inputs are quantized
    attention: float  # share of attention's products

    def to_dict(self) -> dict:
        return asdict(self)


def work_of(config: Config, *, weights: dict[str, float], removed: list[str]) -> Work | None:
    """The work of a configuration; None for a denoiser whose inputs are not known.

    weights: bits of the quantized layers. removed: operators that are gone.
    """
    original, denoiser = denoiser_on_meta(config.model), remove(denoiser_on_meta(config.model), removed)
    whole = _call_work(original, size=config.model.sampler.size)
    if whole is None:
        return None
    full, cached, kept = _calls(config, denoiser)
    calls = image_sampler(config).steps
    cache_is_on = config.cache.kind != "none"
    full_calls = ceil(calls / config.cache.interval) if cache_is_on else calls
    inputs = dict.fromkeys(_rounded_layers(config, denoiser), config.activations.bits)
    macs = full_calls * full.macs + (calls - full_calls) * cached.macs
    own = config.activations
    scores = FLOATS if own.kind == "none" or own.scores_bits is None else own.scores_bits
    full_bits, cached_bits = (call.bit_operations(weights, inputs, scores=scores) for call in (full, cached))
    bits = full_calls * full_bits + (calls - full_calls) * cached_bits
    steps = original_sampler(config).steps
    return Work(
        macs=macs,
        relative_macs=macs / (steps * whole.macs),
        relative_bit_operations=bits / (steps * whole.bit_operations({}, {}, scores=FLOATS)),
        calls=calls,
        full_calls=full_calls,
        cached_call=cached.macs / full.macs,
        kept_bytes=kept * (2 if config.cache.predict == "linear" else 1) if cache_is_on else 0,
        input_bits=config.activations.bits if inputs else FLOATS,
        quantized_inputs=sum(full.layers[name] for name in inputs if name in full.layers) / full.macs,
        attention=full.attention / full.macs,
    )


def _rounded_layers(config: Config, denoiser: nn.Module) -> list[str]:
    own, model = config.activations, config.model
    if own.kind == "none":
        return []
    pattern = layer_pattern(type(denoiser).__name__, model.layers)
    return layers_with_inputs(denoiser, pattern=pattern, min_size=model.min_size, keep=own.keep)


def _calls(config: Config, denoiser: nn.Module) -> tuple[CallWork, CallWork, int]:
    """A full call, a cached one (the same without a cache), and the bytes of a feature in 16 bit."""
    size = config.model.sampler.size
    if config.cache.kind == "none":
        full = _call_work(denoiser, size=size)
        return full, full, 0
    kept = []
    hook = source_of(denoiser, config.cache.depth).register_forward_hook(lambda *call: kept.append(call[-1]))
    timesteps = tuple(map(float, range(LEAST_CALLS, 0, -1)))
    schedule = Schedule("", LEAST_CALLS, timesteps, (0,), config.cache.depth, "reuse")
    add_cache(denoiser, StoredCache(schedule))
    full = _call_work(denoiser, size=size, timestep=timesteps[0])
    feature = kept[0][0] if isinstance(kept[0], tuple) else kept[0]
    hook.remove()
    cached = _call_work(denoiser, size=size, timestep=timesteps[1])
    return full, cached, 2 * feature.numel() // BATCH


def _call_work(denoiser: nn.Module, *, size: int | None, timestep: float | None = None) -> CallWork | None:
    """The work of one call on meta. timestep: for a cache, which goes by it."""
    specs = layer_specs(denoiser, pattern=".", min_size=1)
    cost = measure_call(denoiser, specs, size=size, timestep=timestep)
    if cost is None:
        return None
    layers = {spec.name: _macs(spec, cost.inputs[spec.name].shape) for spec in specs if spec.name in cost.inputs}
    return CallWork(layers, cost.sample.attention_flops / MULTIPLY_ADD)


def _macs(spec: LayerSpec, shape: tuple[int, ...]) -> float:
    """Multiply-adds of a layer for one sample; shape: of what it reads in a batch of BATCH."""
    tokens = token_count(torch.empty(shape, device="meta"), spec.conv)
    return tokens * spec.size / BATCH


def work_lines(config: Config, work: Work, *, removed: list[str], operators: int) -> list[str]:
    """What a plan says of the work, for configurations that `tells_work`."""
    lines, unknown = [], config.prune.kind != "none" and not removed
    if config.prune.kind != "none":
        gone = "which operators go is scored first" if unknown else f"{len(removed)} of {operators} operators are gone"
        lines.append(f"prune: {gone}; at least {config.prune.share:.0%} of the weights")
    if config.activations.kind != "none":
        own = config.activations.product
        real = f"{own} products in Linear layers, the others simulated"
        how = "simulated, no faster" if own == "simulated" else real
        bits = config.activations.scores_bits
        scores = "stay in 16 bits" if bits is None else f"read scores of {bits} bits"
        lines.append(
            f"activations: {work.input_bits} bits into layers with {work.quantized_inputs:.1%} of the multiply-adds, "
            f"attention's products ({work.attention:.1%}) {scores}; {how}"
        )
    if config.cache.kind != "none":
        lines.append(
            f"cache: {work.calls} calls, {work.full_calls} full; a cached call takes {work.cached_call:.1%} of a full "
            f"one's multiply-adds; {work.kept_bytes / 2**20:.2g} MiB kept per sample in 16 bits"
        )
    lines.append(
        f"work of an image: {'at most ' if unknown else ''}{work.relative_macs:.3f} of the original's multiply-adds, "
        f"{work.relative_bit_operations:.3f} of its bit operations"
    )
    return lines
