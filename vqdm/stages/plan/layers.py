"""Every layer of a denoiser with its scheme, bits and bytes, or with why it stays in 16 bit; and the sum of all."""

import dataclasses
import math

from torch import Tensor, nn

from vqdm.codecs.allocation import Assignment, Harm, assign_schemes
from vqdm.config.codecs import PeerConfig, QuantizeConfig, RtnConfig
from vqdm.hub.checkpoint import checkpoint_size
from vqdm.models.specs import LayerSpec, group_of, skipped_specs
from vqdm.weights.base import SHARED_NAME
from vqdm.weights.bits import BitCounts, count_bits, tensor_bytes
from vqdm.weights.layers import swap_empty


@dataclasses.dataclass(frozen=True)
class LayerPlan:
    """One layer. bytes: weight, scales and codebooks of its own; bits: the same per weight. reason: why it is not
    quantized."""

    name: str
    shape: tuple[int, ...]  # of the weight
    scheme: str
    bits: float
    bytes: int
    reason: str | None

    @property
    def weights(self) -> int:
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class DenoiserPlan:
    """What a quantized denoiser will be, to the byte of its file."""

    layers: list[LayerPlan]
    counts: BitCounts
    rest: dict[str, int]  # bytes beside the layers' weights: shared, biases, other parameters, header

    @property
    def bytes(self) -> int:
        """Size of the denoiser's safetensors file."""
        return sum(layer.bytes for layer in self.layers) + sum(self.rest.values())

    @property
    def quantized(self) -> list[LayerPlan]:
        return [layer for layer in self.layers if layer.reason is None]

    def groups(self) -> dict[str, int]:
        """Bytes of the layers' weights by the paper's groups."""
        found: dict[str, int] = {}
        for layer in self.layers:
            found[group_of(layer.name)] = found.get(group_of(layer.name), 0) + layer.bytes
        return found


def assignment_of(
    denoiser: nn.Module, config: QuantizeConfig, *, pattern: str | None, min_size: int, harm: Harm | None = None
) -> Assignment:
    """Schemes from `assign_schemes`; for full precision no layer gets one, and that is the reason given."""
    if config.kind == "none" or isinstance(config, PeerConfig):
        reason = "full precision is asked for" if config.kind == "none" else f"{config.library} decides"
        skipped = skipped_specs(denoiser, pattern="^", min_size=1)
        everything = assign_schemes(denoiser, RtnConfig(), pattern="^", min_size=1).specs
        return Assignment([], [(spec, reason) for spec in everything] + skipped)
    return assign_schemes(denoiser, config, pattern=pattern, min_size=min_size, harm=harm)


def plan_denoiser(denoiser: nn.Module, assignment: Assignment) -> DenoiserPlan:
    """Sizes of all layers and of the file. denoiser: on the meta device; its layers are replaced."""
    shapes = {name: tuple(module.weight.shape) for name, module in _layers(denoiser, assignment).items()}
    swap_empty(denoiser, assignment.quantized)
    modules = _layers(denoiser, assignment)
    reasons = {spec.name: reason for spec, reason in assignment.skipped}
    layers = [_layer_plan(name, modules[name], shapes[name], reasons.get(name)) for name in _order(denoiser, modules)]
    size = checkpoint_size(denoiser)
    biases = tensor_bytes(m.bias for m in modules.values() if m.bias is not None)
    shared = tensor_bytes(denoiser._modules[SHARED_NAME].parameters()) if SHARED_NAME in denoiser._modules else 0
    others = size.tensors - sum(layer.bytes for layer in layers) - biases - shared
    rest = {"shared": shared, "biases": biases, "other parameters": others, "header": size.header}
    return DenoiserPlan(layers, count_bits(denoiser), rest)


def _layers(denoiser: nn.Module, assignment: Assignment) -> dict[str, nn.Module]:
    specs: list[LayerSpec] = [*assignment.specs, *(spec for spec, _ in assignment.skipped)]
    return {spec.name: denoiser.get_submodule(spec.name) for spec in specs}


def _order(denoiser: nn.Module, names) -> list[str]:
    return [name for name, _ in denoiser.named_modules() if name in names]


def _layer_plan(name: str, layer: nn.Module, shape: tuple[int, ...], reason: str | None) -> LayerPlan:
    tensors: list[Tensor] = [layer.weight] if reason else list(layer.weight.state_dict(keep_vars=True).values())
    size = tensor_bytes(tensors)
    scheme = "16 bit" if reason else layer.weight.scheme.name
    return LayerPlan(name, shape, scheme, 8 * size / math.prod(shape), size, reason)
