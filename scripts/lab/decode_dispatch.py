"""What it costs on a CPU that additive weights (3x8g8) are decoded through an operator of torch.

python scripts/lab/decode_dispatch.py [--shapes 64x64 320x320 1280x1280] [--repeat 200]

In one process, in turns: the weight as a layer calls it, by the operator; the same compiled loop in an autograd
function, as before there were operators; the loop alone; the same arithmetic in torch. Printed are medians of the CPU
time of a call in microseconds, and the median of operator : function, turn by turn.
"""

import argparse
from statistics import median
from time import process_time_ns

from vqdm.runs.command_line import run_script

import torch

from vqdm.runs.device import one_thread_each
from vqdm.weights import kernels
from vqdm.weights.additive import AdditiveScheme, AdditiveWeight, decode_by_torch
from vqdm.weights.base import kernels_apply, widened


class Before(torch.autograd.Function):
    """The loop as it was called: gradients need nothing but the arguments."""

    @staticmethod
    def forward(ctx, codes, width, inputs, *factors):
        ctx.save_for_backward(codes, *factors)
        assert kernels_apply(codes, *factors)
        return alone(codes, width, inputs, *factors)


def alone(codes, width, inputs, codebooks, scales, input_scales):
    return kernels.decode_additive(codes, width, codebooks, inputs=inputs, scales=scales, input_scales=input_scales)


def before(weight: AdditiveWeight) -> torch.Tensor:
    dtype, factors = widened(weight.effective_codebooks(), weight.scales, weight.input_scales)
    return Before.apply(weight.codes, weight.code_width, weight.shape[1], *factors).to(dtype)


WAYS = {
    "operator": lambda weight: weight(),
    "function": before,
    "loop": lambda weight: alone(
        weight.codes, weight.code_width, weight.shape[1], weight.codebooks, weight.scales, weight.input_scales
    ),
    "torch": lambda weight: decode_by_torch(
        weight.codes, weight.codebooks, weight.scales, weight.input_scales, weight.shape, weight.code_width
    ),
}


def random_weight(shape: tuple[int, int]) -> AdditiveWeight:
    """A weight of random codes in fp32, as it is sampled with on a CPU."""
    weight = AdditiveWeight(AdditiveScheme(num_codebooks=3), shape).float().requires_grad_(False)
    weight.codes.random_(0, 256)
    for parameter in weight.parameters():
        parameter.data.normal_()
    return weight


@torch.inference_mode()
def measure(shape: tuple[int, int], *, repeat: int) -> dict[str, list[int]]:
    """CPU nanoseconds of every turn, by way; all ways give the same weight."""
    weight = random_weight(shape)
    expected = weight()
    assert all(torch.equal(decode(weight), expected) for decode in WAYS.values())
    taken: dict[str, list[int]] = {name: [] for name in WAYS}
    for turn in range(repeat):
        names = list(WAYS) if turn % 2 else list(WAYS)[::-1]  # what runs after which must not matter
        for name in names:
            began = process_time_ns()
            WAYS[name](weight)
            taken[name].append(process_time_ns() - began)
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["64x64", "320x320", "1280x1280"])
    parser.add_argument("--repeat", type=int, default=200)
    options = parser.parse_args()
    print(f"| shape | {' | '.join(WAYS)} | operator : function |\n|{'---|' * (len(WAYS) + 2)}")
    with one_thread_each():
        for shape in options.shapes:
            taken = measure(tuple(map(int, shape.split("x"))), repeat=options.repeat)
            ratio = median(new / old for new, old in zip(taken["operator"], taken["function"], strict=True))
            print(f"| {shape} | {' | '.join(f'{median(t) / 1000:.0f}' for t in taken.values())} | {ratio:.3f} |")


if __name__ == "__main__":
    run_script(main)
