"""Memory of training a quantized denoiser: the step itself runs on the meta device, and its live bytes are followed.

Parameters, their gradients, buffers, inputs and the kernels' scratch are not included. Decoding is measured on the
largest weight; its bytes stand in for all others, so that SDXL takes seconds.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint

from vqdm.calibration.blocks import unit_around
from vqdm.calibration.recording import play
from vqdm.config.options import FinetuneConfig
from vqdm.distillation.losses import block_outputs, feature_errors, squared_errors
from vqdm.distillation.moving_codes import let_drift
from vqdm.distillation.parameters import trained_parameters
from vqdm.models.live_bytes import LiveBytes
from vqdm.stages.plan.forward import denoiser_inputs
from vqdm.weights.base import QuantizedWeight
from vqdm.weights.layers import quantized_layers
from vqdm.weights.scalar import ScalarWeight

PRODUCTS = {F.linear, F.conv2d, torch.matmul, torch.bmm, torch.baddbmm, Tensor.matmul, Tensor.bmm}  # in 16 bit
NORMS = {F.group_norm, F.layer_norm, F.rms_norm, F.softmax, torch.softmax, Tensor.softmax}  # on a GPU in fp32


class Autocast(TorchFunctionMode):
    """Context: autocast for tensors on meta, which torch's own ignores. Attention is one kernel with an empty output.

    precision: float32 | bfloat16. device: cpu | cuda, whose rules differ for norms.
    """

    def __init__(self, precision: str, *, device: str):
        super().__init__()
        self.products = torch.bfloat16 if precision == "bfloat16" else None
        self.norms = torch.float32 if self.products and device != "cpu" else None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            named = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
            return _Attention.apply(*(_cast(named[name], self.products) for name in ("query", "key", "value")))
        dtype = self.products if func in PRODUCTS else self.norms if func in NORMS else None
        if dtype is not None:
            args = [_cast(value, dtype) for value in args]
            kwargs = {name: _cast(value, dtype) for name, value in kwargs.items()}
        return func(*args, **kwargs)


def _cast(value, dtype: torch.dtype | None):
    is_float = isinstance(value, Tensor) and value.is_floating_point()
    return value.to(dtype) if is_float and dtype is not None else value


class _Attention(torch.autograd.Function):
    """Attention as one kernel that keeps no [tokens, tokens] matrix: only its inputs and output, for the gradients."""

    @staticmethod
    def forward(ctx, query, key, value):
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, output)
        return output

    @staticmethod
    def backward(ctx, _gradient):
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


@dataclass(frozen=True)
class DecodeCost:
    """Bytes per weight that decoding, and its gradient, hold beside their fp32 result (scratch) and write."""

    scratch: float
    written: float
    gradient_scratch: float
    gradient_written: float
    has_gradient_kernel: bool  # on a CPU

    def on(self, device: str) -> "DecodeCost":
        """The same on a device: a CPU's kernels hold nothing."""
        if device != "cpu":
            return self
        return dataclasses.replace(
            self, scratch=0, gradient_scratch=0 if self.has_gradient_kernel else self.gradient_scratch
        )


def measure_decoding(weight: QuantizedWeight) -> DecodeCost:
    """Cost of decoding a weight on meta in fp32, as torch does on a GPU."""
    parameters = [parameter for module in (weight, *weight.shared) for parameter in module.parameters()]
    for parameter in parameters:
        parameter.requires_grad_()
    with LiveBytes() as forward:
        decoded = weight()
    gradient = torch.empty_like(decoded)
    with LiveBytes() as backward:
        torch.autograd.grad(decoded, parameters, gradient)
    for parameter in parameters:
        parameter.requires_grad_(False)
    held = forward.peak - decoded.nbytes, forward.written, backward.peak, backward.written
    return DecodeCost(
        *(size / decoded.numel() for size in held), has_gradient_kernel=not isinstance(weight, ScalarWeight)
    )


class _Decoded(torch.autograd.Function):
    """Stand-in for decoding that only takes its memory."""

    @staticmethod
    def forward(ctx, weight: QuantizedWeight, cost: DecodeCost, *parameters: Tensor):
        ctx.cost, ctx.count, ctx.likes = cost, weight.shape[0] * weight.shape[1], parameters
        decoded = torch.empty(weight.shape, device="meta")
        _hold(cost.scratch * ctx.count)
        return decoded

    @staticmethod
    def backward(ctx, _gradient):
        _hold(ctx.cost.gradient_scratch * ctx.count)
        wanted = zip(ctx.likes, ctx.needs_input_grad[2:], strict=True)
        return None, None, *(torch.empty_like(like) if needed else None for like, needed in wanted)


def _hold(size: float) -> None:
    """Allocate so many bytes and free them."""
    torch.empty(int(size), dtype=torch.uint8, device="meta")


def _decoded(weight: QuantizedWeight, cost: DecodeCost) -> Tensor:
    return _Decoded.apply(weight, cost, *weight.parameters(), *(part() for part in weight.shared))


@dataclass(frozen=True)
class Student:
    """A quantized denoiser on meta that is ready to train, as memory sees it. Bytes; trained, drifting: numbers."""

    denoiser: nn.Module
    matrices: list[QuantizedWeight]
    decode: DecodeCost
    state: int  # parameters in fp32, and codes; no drift
    codes: int
    units: int  # the units that step sizes are relative to
    trained: int  # drifts included
    drifting: int
    frozen: dict[str, int]  # of parameters that do not train, by name

    @property
    def weights(self) -> int:
        """Numbers that are quantized."""
        return sum(weight.shape[0] * weight.shape[1] for weight in self.matrices)

    def decodes(self, device: str) -> None:
        """Let a stand-in take the place of decoding: memory alone, as on this device."""
        cost = self.decode.on(device)
        for weight in self.matrices:
            weight.forward = functools.partial(_decoded, weight, cost)

    def has_gradients(self, has: bool) -> None:
        for parameter in self.denoiser.parameters():
            parameter.grad = torch.empty_like(parameter) if has and parameter.requires_grad else None


def prepare_student(denoiser: nn.Module, config: FinetuneConfig) -> Student:
    """Get a student ready to train. denoiser: quantized, on meta; changed in place: in fp32, and what trains requires
    gradients."""
    nn.Module.to(denoiser, dtype=torch.float32).eval().requires_grad_(False)
    codes = sum(tensor.nbytes for tensor in denoiser.buffers())
    state = codes + sum(tensor.nbytes for tensor in denoiser.parameters())
    matrices = [layer.weight for layer in quantized_layers(denoiser).values()]
    decode = measure_decoding(max(matrices, key=lambda weight: weight.shape[0] * weight.shape[1]))
    for weight in matrices:
        weight.forward = functools.partial(_decoded, weight, decode)  # units of drifts are taken from decoded weights
    if config.tune_codes:
        let_drift(denoiser)
    parts = trained_parameters(denoiser, config.train, code_rate=config.code_rate)
    for part in parts:
        part.parameter.requires_grad_()
    return Student(
        denoiser,
        matrices,
        decode,
        state,
        codes,
        units=sum(part.unit.nbytes for part in parts),
        trained=sum(part.parameter.numel() for part in parts),
        drifting=sum(part.parameter.numel() for part in parts if part.kind == "drift"),
        frozen={name: p.nbytes for name, p in denoiser.named_parameters() if not p.requires_grad},
    )


@dataclass(frozen=True)
class StepCost:
    """Bytes of a forward without gradients, and of a step: forward, backward and the parameters' gradients.

    output: numbers that the denoiser gives for a row.
    """

    forward: float
    step: float
    output: int


def measure_step(
    student: Student,
    config: FinetuneConfig,
    *,
    rows: int,
    rows_each: int,
    size: int | None,
    device: str,
    accumulates: bool,
    teacher: nn.Module | None = None,
) -> StepCost:
    """Cost of a step on `rows` rows. accumulates: gradients of other rows are there already. size: pixels.

    teacher: on meta, where the outputs of its blocks are learned too.
    """
    denoiser = student.denoiser
    student.decodes(device)
    student.has_gradients(accumulates)
    precision = functools.partial(Autocast, config.precision, device=device)
    if config.checkpointing:
        again = functools.partial(
            checkpoint, use_reentrant=False, context_fn=lambda: (contextlib.nullcontext(), precision())
        )
        denoiser.enable_gradient_checkpointing(again)
    arguments = denoiser_inputs(denoiser, batch=rows, size=size)
    with LiveBytes() as live:
        with torch.no_grad(), precision():
            target = play(denoiser, arguments)
        live.live -= target.nbytes  # inputs are left out, and so is what is learned
        forward, live.peak = live.peak, live.live
        with precision():
            loss = _loss(denoiser, teacher, arguments, target, config=config, rows_each=rows_each, size=size)
        if loss.requires_grad:
            loss.backward()
        del loss
    if config.checkpointing:
        denoiser.disable_gradient_checkpointing()
    student.has_gradients(False)
    step = live.peak + (4 * student.trained if accumulates else 0)
    return StepCost(forward, step, target.numel() // rows)


def _loss(denoiser, teacher, arguments: dict, target: Tensor, *, config, rows_each: int, size: int | None) -> Tensor:
    """The loss of `vqdm.distillation.end_to_end`, without its scheduler and real latents."""
    watched = [] if teacher is None else [denoiser, teacher]
    with block_outputs(*watched) as outputs:
        errors = squared_errors(play(denoiser, arguments), target, rows_each=rows_each)
        if watched:
            with torch.no_grad():
                play(teacher, denoiser_inputs(teacher, batch=len(target), size=size))
            seen = [found.take() for found in outputs]
            errors = errors + config.feature_weight * feature_errors(*seen, rows_each=rows_each)
    return errors.sum()


@dataclass(frozen=True)
class BlocksCost:
    """What training a denoiser's blocks one by one takes: their count, and the largest block's numbers."""

    count: int
    recorded: float  # bytes of a row's inputs and output
    together: float  # bytes of a row's inputs and outputs, of all blocks
    step: float  # bytes of a batch's forward and backward pass
    trained: int  # parameters


def measure_blocks(denoiser: nn.Module, names: Iterable[str], *, rows: int, size: int | None) -> BlocksCost:
    """Measure the blocks, those of one kind and shape once. denoiser: in fp32, on meta. names: of the quantized layers.
    rows: of a batch.
    """
    calls = _block_calls(denoiser, names, size=size)
    recorded, steps, trained, seen, together = [], [], [], set(), 0
    for block, given, output in calls.values():
        tensors = [leaf for leaf in tree_leaves((given, output)) if isinstance(leaf, Tensor)]
        numbers = sum(p.numel() for p in block.parameters() if p.requires_grad)
        together += sum(tensor.nbytes for tensor in tensors)
        kind = type(block), numbers, *(tensor.shape for tensor in tensors)
        if kind in seen:
            continue
        seen.add(kind)
        recorded.append(sum(tensor.nbytes for tensor in tensors))
        trained.append(numbers)
        steps.append(_block_step(block, *tree_map(functools.partial(_rows, rows), given)))
    return BlocksCost(len(calls), max(recorded, default=0), together, max(steps, default=0), max(trained, default=0))


def _block_calls(denoiser: nn.Module, names: Iterable[str], *, size: int | None) -> dict[str, tuple]:
    """{block: (module, its (positional, keyword) arguments for one row, its output)}"""
    calls: dict[str, tuple] = {}

    def keep(name: str, module, args, kwargs, output):
        calls.setdefault(name, (module, (args, kwargs), output))

    hooks = [
        denoiser.get_submodule(name).register_forward_hook(functools.partial(keep, name), with_kwargs=True)
        for name in dict.fromkeys(unit_around(denoiser, name) for name in names)
    ]
    try:
        with torch.no_grad(), Autocast("float32", device="cpu"):
            play(denoiser, denoiser_inputs(denoiser, batch=1, size=size))
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _rows(count: int, leaf):
    is_row = isinstance(leaf, Tensor) and leaf.ndim > 0 and len(leaf) == 1
    return leaf.new_empty(count, *leaf.shape[1:]) if is_row else leaf


def _block_step(block: nn.Module, args: tuple, kwargs: dict) -> int:
    with LiveBytes() as live:
        with Autocast("float32", device="cpu"):
            loss = block(*args, **kwargs).square().mean()
        if loss.requires_grad:
            loss.backward()
    return live.peak
