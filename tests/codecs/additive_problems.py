"""Small problems for the tests of additive codes."""

import torch

from vqdm.codecs.additive_steps import Parts
from vqdm.seeds import torch_generator


def generator(seed=0):
    return torch_generator(seed, "encode")


def matrix(out=64, inputs=64, seed=0):
    """Rows of very different size."""
    return torch.randn(out, inputs, generator=torch_generator(seed, "test")) * torch.logspace(-2, 0, out)[:, None]


def hessian(inputs=64, rank=None, seed=0):
    """Of correlated inputs of very different power, from `rank` samples (by default many)."""
    draws = torch_generator(seed, "hessian")
    mix = torch.randn(inputs, inputs, generator=draws) * torch.logspace(0, -1.5, inputs)[:, None]
    samples = torch.randn(rank or 8 * inputs, inputs, generator=draws) @ mix
    return samples.T @ samples / len(samples)


def random_parts(out=12, groups=4, count=2, size=8, group_size=4, seed=0):
    draws = torch_generator(seed, "parts")
    return Parts(
        codebooks=torch.randn(count, size, group_size, generator=draws),
        codes=torch.randint(size, (out, groups, count), generator=draws, dtype=torch.int32),
        scales=torch.rand(out, generator=draws) + 0.5,
    )


def loss_of(weight, decoded, moment):
    """tr(ΔW H ΔWᵀ) in fp64."""
    error = (weight - decoded).double()
    return float((error @ moment.double() * error).sum())
