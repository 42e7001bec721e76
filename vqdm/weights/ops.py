"""Decoding as operators of torch, `torch.ops.vqdm.decode_*`: the compiled loops on a CPU, Triton on a GPU.

Each operator is one call to torch.compile, to CUDA graphs and to whoever counts; nothing of it waits for a device.
Elsewhere, for float64, and with VQDM_KERNELS=off in the environment, the same arithmetic runs in torch.
"""

import functools
import importlib.util
import logging
import os
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

log = logging.getLogger("vqdm")

LIBRARY = torch.library.Library("vqdm", "DEF")
HAS_TRITON = importlib.util.find_spec("triton") is not None
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
MOST = 1 << 31  # bits and weights that the 32-bit offsets of GPU kernels reach

enabled = os.environ.get("VQDM_KERNELS", "on") != "off"
devices = {"cpu", "cuda", "meta"}  # types of those that have an implementation (ROCm's are "cuda", too)


def operator(
    schema: str, *, cpu: Callable, gpu: Callable, fake: Callable, save: Callable, backward: Callable
) -> Callable[..., Tensor]:
    """Define `vqdm::<schema>` with implementations for each kind of device; returns the operator.

    fake: its output without values. save(ctx, inputs, output) keeps what backward(ctx, gradient) needs, which returns
    a gradient or None for every input, and is not differentiated again.
    """
    LIBRARY.define(schema, tags=torch.Tag.pt2_compliant_tag)
    name = schema.partition("(")[0]
    LIBRARY.impl(name, cpu, "CPU")
    LIBRARY.impl(name, gpu, "CUDA")
    torch.library.register_fake(f"vqdm::{name}", fake, lib=LIBRARY)
    decode = getattr(torch.ops.vqdm, name).default

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *arguments):
            with torch._C._AutoDispatchBelowAutograd():
                output = decode(*arguments)
            save(ctx, arguments, output)
            return output

    Differentiable.backward = staticmethod(once_differentiable(backward))

    def with_gradients(*arguments):
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in arguments):
            return Differentiable.apply(*arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return decode(*arguments)

    # what torch.library.register_autograd does, without its 60 µs a call
    LIBRARY.impl(name, with_gradients, "Autograd")
    return decode


def apply_to(*floats: Tensor | None) -> bool:
    """True if the operators decode with these float parameters: on their device and in their dtypes."""
    present = [tensor for tensor in floats if tensor is not None]
    device = present[0].device.type
    if not enabled or device not in devices or any(tensor.dtype not in FLOATS for tensor in present):
        return False
    if device == "cuda" and not HAS_TRITON:
        if not torch.compiler.is_compiling():
            _say_that_triton_is_missing()
        return False
    return True


@functools.cache
def _say_that_triton_is_missing() -> None:
    log.warning(
        "weights are decoded by torch, some 6 to 15 times slower than the full-precision model for trellis codes (an "
        "estimate: docs/gpu.md), since triton is missing: pip install triton, or give decode=cached"
    )


def in_reach(codes: Tensor, shape: Sequence[int]) -> bool:
    """True if GPU kernels can address codes and weight of this shape."""
    return 8 * codes.numel() < MOST and shape[0] * shape[1] < MOST


Gradients = Callable[[Sequence, Sequence[bool], Tensor], tuple[Tensor | None, ...]]  # arguments, which are wanted, the
# gradient of what was decoded from them: a gradient or None for each


class Recomputed(torch.autograd.Function):
    """decode(*arguments), whose gradients keep nothing but the arguments: backward decodes again."""

    @staticmethod
    def forward(ctx, decode, gradients, *arguments):
        ctx.gradients, ctx.tensors = gradients, [isinstance(argument, Tensor) for argument in arguments]
        ctx.others = [argument for argument in arguments if not isinstance(argument, Tensor)]
        ctx.save_for_backward(*(argument for argument in arguments if isinstance(argument, Tensor)))
        return decode(*arguments)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        tensors, others = iter(ctx.saved_tensors), iter(ctx.others)
        arguments = [next(tensors if is_tensor else others) for is_tensor in ctx.tensors]
        return None, None, *ctx.gradients(arguments, ctx.needs_input_grad[2:], gradient)


def by_torch(decode: Callable[..., Tensor], *arguments, gradients: Gradients | None = None) -> Tensor:
    """decode(*arguments) in torch, as it is where it is traced, else so that backward keeps only the arguments.

    gradients: makes those of the arguments; None: autograd, of a repeated decode.
    """
    if torch.compiler.is_compiling():
        return decode(*arguments)
    return Recomputed.apply(decode, gradients or functools.partial(recomputed_gradients, decode), *arguments)


def recomputed_gradients(
    decode: Callable[..., Tensor], arguments: Sequence, wanted: Sequence[bool], gradient: Tensor
) -> tuple[Tensor | None, ...]:
    """Gradients of the `wanted` arguments, None for others, from the `gradient` of a recomputed decode(*arguments)."""
    with torch.enable_grad():
        inputs = [a.detach().requires_grad_() if w else a for a, w in zip(arguments, wanted, strict=True)]
        weight = decode(*inputs)
    found = iter(torch.autograd.grad(weight, [i for i, w in zip(inputs, wanted, strict=True) if w], gradient))
    return tuple(next(found) if w else None for w in wanted)
