"""The bits a denoiser takes, by three definitions, counted from its tensors: real ones, or those of a plan on meta."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass

from torch import Tensor, nn

from vqdm.weights.base import QuantizedWeight, SharedPart


@dataclass(frozen=True)
class BitCounts:
    """Three bit counts of a denoiser, and its bytes.

    bits_per_weight: everything stored ÷ the full-precision denoiser's parameters.
    bits_quantized: quantized weights with all their scales and codebooks ÷ the weights they stand for (16 if there are
    none). bits_as_in_paper: codes, fp16 codebooks and the 16-bit weights of the other Linear and Conv layers ÷ the
    full-precision parameters (no scales, biases, norms; 16 if nothing is quantized). bytes: those of all tensors.
    """

    bits_per_weight: float
    bits_quantized: float
    bits_as_in_paper: float
    bytes: int

    def to_dict(self) -> dict[str, float | int]:
        return asdict(self)


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors as stored: every tensor once, floats in 16 bit."""
    unique = {id(tensor): tensor for tensor in tensors}.values()
    return sum(t.numel() * (2 if t.is_floating_point() else t.element_size()) for t in unique)


def count_bits(denoiser: nn.Module) -> BitCounts:
    """The three bit counts of a denoiser, quantized or not. ValueError if it has no parameters."""
    quantized = _outermost(denoiser)
    shared = [module for module in denoiser.modules() if isinstance(module, SharedPart)]
    coded = [*quantized, *shared]
    weights = sum(weight.shape[0] * weight.shape[1] for weight in quantized)
    parameters = weights + sum(p.numel() for p in _others(denoiser, coded))
    if parameters == 0:
        raise ValueError("a denoiser without parameters has no bits per weight")
    total = tensor_bytes(_state(denoiser))
    in_paper = sum(weight.paper_bits() for weight in quantized) + 8 * tensor_bytes(_states(shared))
    return BitCounts(
        bits_per_weight=8 * total / parameters,
        bits_quantized=8 * tensor_bytes(_states(coded)) / weights if weights else 16.0,
        bits_as_in_paper=(in_paper + 16 * _unquantized_weights(denoiser)) / parameters if weights else 16.0,
        bytes=total,
    )


def _outermost(denoiser: nn.Module) -> list[QuantizedWeight]:
    """The quantized weights that are in no other, as codes are beside a low-rank branch."""
    found = [module for module in denoiser.modules() if isinstance(module, QuantizedWeight)]
    inner = {id(module) for weight in found for module in weight.modules() if module is not weight}
    return [weight for weight in found if id(weight) not in inner]


def _state(module: nn.Module) -> Iterable[Tensor]:
    return module.state_dict(keep_vars=True).values()


def _states(modules: Iterable[nn.Module]) -> list[Tensor]:
    return [tensor for module in modules for tensor in _state(module)]


def _others(denoiser: nn.Module, coded: Iterable[nn.Module]) -> list[Tensor]:
    """The parameters that the full-precision denoiser has too, outside of quantized weights and shared parts."""
    new = {id(parameter) for module in coded for parameter in module.parameters()}
    return [parameter for parameter in denoiser.parameters() if id(parameter) not in new]


def _unquantized_weights(denoiser: nn.Module) -> int:
    """The number of weights of the Linear and Conv layers that stay in 16 bit."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    layers = [m for m in denoiser.modules() if isinstance(m, kinds) and isinstance(m.weight, nn.Parameter)]
    return sum(weight.numel() for weight in {id(layer.weight): layer.weight for layer in layers}.values())
