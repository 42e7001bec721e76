"""Weights of random codes and parameters, and their values by the plain formulas, for tests to share."""

import torch
from torch import Tensor

from vqdm.seeds import torch_generator
from vqdm.weights.additive import decode_additive
from vqdm.weights.base import QuantizedWeight, Scheme, widened
from vqdm.weights.bitpack import pack
from vqdm.weights.registry import empty_shared, empty_weight
from vqdm.weights.scalar import decode_scalar
from vqdm.weights.trellis import TrellisScheme
from vqdm.weights.trellis_codes import decode_trellis, unpack_states
from vqdm.weights.trellis_format import BYTE, RATE_BITS, WIDE, column_bits, side_bytes


def random_weight(scheme: Scheme, shape: tuple[int, int], *, dtype=torch.float32, seed=0) -> QuantizedWeight:
    """Of random bytes, which are valid codes whatever they are, and random parameters of either sign."""
    draw = torch_generator(seed, "weight")
    weight = empty_weight(scheme, shape, empty_shared(scheme))
    for buffer in weight.buffers():
        buffer.random_(0, 256, generator=draw)
    for module in (weight, *weight.shared):
        module.to(dtype)
        for parameter in module.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=draw))
    return weight


def trellis_weight(out: int, rates: list[int], *, spare: int = 0, side: str = WIDE, **options) -> QuantizedWeight:
    """With `spare` bytes in the stream that no column reads."""
    shape = (out, len(rates))
    stream = (int(column_bits(out, torch.tensor(rates)).sum()) + 7) // 8 + spare
    bits = 8 * (stream + side_bytes(shape, side)) / (out * len(rates))
    weight = random_weight(TrellisScheme(bits=bits, side=side), shape, **options)
    if side == BYTE:
        weight.columns[0] = out % 2
        weight.columns[1:] = weight.columns[1:] & 240 | torch.tensor([rate // 2 - 1 if rate else 0 for rate in rates])
    else:
        weight.columns.copy_(pack((torch.tensor(rates) - 3).clamp(min=0), RATE_BITS))
    assert len(weight.stream) == stream and weight.unpacked_rates().tolist() == rates
    return weight


def parameters_of(weight: QuantizedWeight) -> list[torch.nn.Parameter]:
    """Its own, then those of its shared part."""
    return [parameter for module in (weight, *weight.shared) for parameter in module.parameters()]


def by_formula(weight: QuantizedWeight) -> Tensor:
    """The weight in plain torch arithmetic on unpacked codes, which autograd follows step by step."""
    if weight.scheme.kind == "trellis":
        dtype, *factors = weight.factors()
        rates = weight.unpacked_rates()
        states = unpack_states(weight.stream, rates, weight.shape[0])
        return decode_trellis(states, rates, *factors).to(dtype)
    if weight.scheme.kind == "scalar":
        dtype, (scales, zeros) = widened(weight.scales, weight.zeros)
        return decode_scalar(weight.unpacked_codes(), scales, zeros, split=weight.scheme.split).to(dtype)
    codebooks = weight.shared[0].codebooks if weight.shared else weight.codebooks
    dtype, floats = widened(codebooks, weight.scales, weight.input_scales)
    return decode_additive(weight.unpacked_codes(), *floats).to(dtype)
