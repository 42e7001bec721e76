"""Blocks of a denoiser: finding them, recording what goes in and comes out of each, and training one on that.

A block is a residual unit with its quantized layers, or a single layer outside of any. Block-wise methods (AdaRound,
distillation) take them in the order in which the denoiser runs them (BRECQ, Li et al. 2021, section 3.2).
"""

import math
import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vqdm.calibration.recording import Call, play_back
from vqdm.errors import UserError
from vqdm.models.specs import LayerSpec
from vqdm.runs.device import one_order_of_sums

RESIDUAL_UNITS = ("ResnetBlock2D", "BasicTransformerBlock")  # class names; each one's output is its input + something
CALL_IN_MEMORY, IN_MEMORY = 4 << 20, 1 << 30  # bytes from which a call's tensor, or all calls', is a mapped file
LARGE = 4 << 30  # bytes of targets whose variance is summed part by part
CHECK_EVERY = 100  # steps between two looks at the losses, as each look waits for the GPU


@dataclass(frozen=True)
class Block:
    """A submodule of the denoiser and the layers in it that are quantized."""

    name: str
    specs: tuple[LayerSpec, ...]


def execution_order(denoiser: nn.Module, call: Call, names: Iterable[str]) -> list[str]:
    """The submodules `names` in the order of their first execution in a recorded call, without those never executed.

    This is not module order: diffusers registers a U-Net's up_blocks before its mid_block, which runs first.
    """
    order: dict[str, None] = {}
    hooks = []
    try:
        for name in names:
            module = denoiser.get_submodule(name)
            hooks.append(module.register_forward_pre_hook(lambda *_, name=name: order.setdefault(name)))
        play_back(denoiser, call, device=device_of(denoiser))
    finally:
        for hook in hooks:
            hook.remove()
    return list(order)


def blocks_of(denoiser: nn.Module, specs: Iterable[LayerSpec], call: Call) -> list[Block]:
    """The layers of `specs` divided into blocks, in execution order; within a block they keep their order.

    A layer belongs to the innermost residual unit around it, or is a block of its own.
    UserError for a layer that the call does not execute, as nothing is known about its inputs.
    """
    members: dict[str, list[LayerSpec]] = {}
    for spec in specs:
        members.setdefault(unit_around(denoiser, spec.name), []).append(spec)
    layers = [spec.name for specs in members.values() for spec in specs]
    executed = execution_order(denoiser, call, {**members, **dict.fromkeys(layers)})
    idle = sorted(set(layers) - set(executed))
    if idle:
        raise UserError(f"the recorded calls never run layer {idle[0]}: leave it out of the pattern")
    return [Block(name, tuple(members[name])) for name in executed if name in members]


def unit_around(denoiser: nn.Module, name: str) -> str:
    """The innermost ancestor of a layer that is a residual unit, else the layer itself."""
    parts = name.split(".")
    for length in range(len(parts) - 1, 0, -1):
        ancestor = ".".join(parts[:length])
        if type(denoiser.get_submodule(ancestor)).__name__ in RESIDUAL_UNITS:
            return ancestor
    return name


@dataclass(frozen=True)
class _Samples:
    """A tensor with one row per sample, marked as such among a block's other arguments."""

    tensor: Tensor


@dataclass(frozen=True)
class BlockData:
    """A block's inputs and outputs from many calls, joined along the samples' dimension.

    arguments: (positional, keyword) as the block was called, with tensors that have a row per sample wrapped.
    output: [samples, …].
    """

    arguments: tuple[tuple, dict]
    output: Tensor

    def __len__(self) -> int:
        return len(self.output)

    def part(self, rows: Tensor) -> "BlockData":
        """The data of some of the samples."""

        def of(leaf: Any) -> Any:
            return _Samples(leaf.tensor[rows]) if isinstance(leaf, _Samples) else leaf

        return BlockData(_map(of, self.arguments), self.output[rows])

    def take(self, rows: Tensor | slice, *, device: torch.device) -> tuple[tuple, dict]:
        """(positional, keyword) arguments for calling the block on some samples, on a device, with floats as fp32."""
        return _map(lambda leaf: _taken(leaf, rows, device), self.arguments)


def _taken(leaf: Any, rows: Tensor | slice, device: torch.device) -> Any:
    leaf = leaf.tensor[rows] if isinstance(leaf, _Samples) else leaf
    if not isinstance(leaf, Tensor):
        return leaf
    return leaf.to(device, torch.float32) if leaf.is_floating_point() else leaf.to(device)


@torch.no_grad()
def record_block(
    denoiser: nn.Module,
    name: str,
    calls: Iterable[Call],
    *,
    keep_on: str = "cpu",
    directory: Path | None = None,
    rows: Iterable[Tensor] | None = None,
) -> BlockData:
    """Play back recorded calls and keep the inputs and outputs of the block `name`, on the device `keep_on`.

    directory: where large tensors lie as nameless files while they are used, so that they need not fit into memory.
    rows: int64, the samples to keep of every call; None: all.
    Tensors with a row per sample (or one row for all) are kept by sample; other tensors and everything else must be
    the same in every call (ValueError). Each call is cut short after the block's first execution.
    """
    arguments, outputs = [], []
    pairs = ((call, None) for call in calls) if rows is None else zip(calls, rows, strict=True)
    for call, kept in pairs:
        if kept is not None and len(kept) == 0:
            continue
        taken, output = _run_until(denoiser, name, call, keep_on=keep_on)
        data = BlockData(_map(partial(_by_sample, count=len(output)), taken), output)
        data = data if kept is None else data.part(kept)
        taken, output = _map(partial(_put_down, directory=directory), (data.arguments, data.output))
        arguments.append(taken)
        outputs.append(output)
    if not outputs:
        raise ValueError(f"no calls to record block {name} from")
    return BlockData(_merge(arguments, name, directory), _joined(outputs, directory))


def _put_down(leaf: Any, *, directory: Path | None) -> Any:
    """Move a call's tensor out of memory, if it is large."""
    if isinstance(leaf, _Samples):
        return _Samples(_put_down(leaf.tensor, directory=directory))
    is_kept = not isinstance(leaf, Tensor) or leaf.nbytes < CALL_IN_MEMORY or leaf.ndim == 0
    return leaf if is_kept else _joined([leaf], directory, least=CALL_IN_MEMORY)


def _joined(parts: list[Tensor], directory: Path | None, *, least: int | None = None) -> Tensor:
    """Concatenate rows; a result of `least` bytes is mapped from a file without a name, which nothing leaves behind."""
    first = parts[0]
    count, size = sum(len(part) for part in parts), sum(part.nbytes for part in parts)
    if directory is None or size < (IN_MEMORY if least is None else least) or first.device.type != "cpu":
        return torch.cat(parts)
    file, shape = directory / f"rows-{secrets.token_hex(4)}.tmp", (count, *first.shape[1:])
    try:
        with file.open("wb") as whole:
            os.posix_fallocate(whole.fileno(), 0, size)  # a full disk is an OSError here, and deadly once it is mapped
        rows = torch.from_file(str(file), shared=True, size=math.prod(shape), dtype=first.dtype).view(shape)
    finally:
        file.unlink(missing_ok=True)
    done = 0
    for part in parts:
        rows[done : done + len(part)] = part
        done += len(part)
    return rows


class _CutShortError(Exception):
    """Ends a played-back call once all that was asked for has been seen."""


def _run_until(denoiser: nn.Module, name: str, call: Call, *, keep_on: str) -> tuple[tuple[tuple, dict], Tensor]:
    """A block's (positional, keyword) arguments and output in one call, copied to `keep_on`."""
    seen: list = []

    def keep(leaf):
        return leaf.detach().to(keep_on, copy=True) if isinstance(leaf, Tensor) else leaf

    def before(_module, args, kwargs):
        seen.append(_map(keep, (args, kwargs)))

    def after(_module, _args, output):
        if not isinstance(output, Tensor):
            raise TypeError(f"block {name} gives a {type(output).__name__}, not a tensor")
        seen.append(keep(output))
        raise _CutShortError

    module = denoiser.get_submodule(name)
    hooks = [module.register_forward_pre_hook(before, with_kwargs=True), module.register_forward_hook(after)]
    try:
        play_back(denoiser, call, device=device_of(denoiser))
    except _CutShortError:
        arguments, output = seen
        return arguments, output
    finally:
        for hook in hooks:
            hook.remove()
    raise ValueError(f"the recorded call does not run block {name}")


def _by_sample(leaf: Any, *, count: int) -> Any:
    if isinstance(leaf, Tensor) and leaf.ndim and leaf.shape[0] in (1, count):
        return _Samples(leaf.expand(count, *leaf.shape[1:]))
    return leaf


def _map(function: Callable[[Any], Any], value: Any) -> Any:
    """Apply `function` to every leaf of nested dicts, lists and tuples."""
    if isinstance(value, dict):
        return {key: _map(function, inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)([_map(function, inner) for inner in value])
    return function(value)


def _merge(calls: list, name: str, directory: Path | None) -> Any:
    """Merge the same nested value of several calls: samples are concatenated, the rest is taken from the first."""
    first = calls[0]
    if all(isinstance(value, _Samples) for value in calls):
        return _Samples(_joined([value.tensor for value in calls], directory))
    if all(isinstance(value, dict) and value.keys() == first.keys() for value in calls):
        return {key: _merge([value[key] for value in calls], name, directory) for key in first}
    if isinstance(first, (list, tuple)) and all(type(v) is type(first) and len(v) == len(first) for v in calls):
        return type(first)([_merge(list(values), name, directory) for values in zip(*calls, strict=True)])
    if not all(_same(value, first) for value in calls):
        raise ValueError(f"block {name} takes an argument without a row per sample that changes from call to call")
    return first


def _same(value: Any, other: Any) -> bool:
    if isinstance(value, Tensor) and isinstance(other, Tensor):
        return torch.equal(value, other)
    return type(value) is type(other) and not isinstance(value, (Tensor, _Samples)) and bool(value == other)


def device_of(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


Loss = Callable[[Tensor, Tensor], Tensor]  # (output, target), both [batch, …] -> scalar


def relative_squared_error(targets: Tensor) -> Loss:
    """Mean squared error divided by the variance of all `targets`.

    0 is perfect, 1 is as bad as predicting their mean.
    """
    variance = max(_variance(targets), 1e-30)
    return lambda output, target: (output.float() - target.float()).square().mean() / variance


def _variance(targets: Tensor) -> float:
    """In fp32; in float64 and part by part where all of it at once would not fit."""
    if targets.nbytes < LARGE:
        return float(targets.float().var(correction=0))
    sums = [(float(part.double().sum()), float(part.double().square().sum())) for part in targets.split(8)]
    mean, square = (sum(column) / targets.numel() for column in zip(*sums, strict=True))
    return square - mean**2


@torch.no_grad()
def block_loss(
    module: nn.Module, inputs: BlockData, targets: Tensor, *, batch_size: int = 64, loss: Loss | None = None
) -> float:
    """The loss of a block over all its data; `loss` as in `reconstruct`."""
    loss = loss or relative_squared_error(targets)
    device, total = device_of(module), 0.0
    for start in range(0, len(inputs), batch_size):
        rows = slice(start, min(start + batch_size, len(inputs)))
        args, kwargs = inputs.take(rows, device=device)
        total += float(loss(module(*args, **kwargs), targets[rows].to(device))) * (rows.stop - start)
    return total / len(inputs)


def reconstruct(
    module: nn.Module,
    inputs: BlockData,
    targets: Tensor,
    optimizer: torch.optim.Optimizer,
    *,
    steps: int,
    batch_size: int,
    generator: torch.Generator,
    rate: Callable[[int], float] | None = None,
    loss: Loss | None = None,
    regulariser: Callable[[int], Tensor | float] | None = None,
    after_step: Callable[[int], None] | None = None,
    progress: Callable[[int, float], None] | None = None,
    name: str = "",
) -> Tensor:
    """Train the optimizer's parameters so that the block gives `targets` for `inputs`; returns losses, fp32 [steps].

    module: the block, in fp32. inputs: only their arguments are used, not their output. targets: [samples, …].
    loss: default `relative_squared_error(targets)`, which has one scale for all blocks.
    regulariser: maps a step, counted from 0, to a term added to its loss; called after the block has run.
    rate: maps a step to its learning rate, if that changes. after_step: called with the number of every finished step.
    generator: on the CPU; samples come in passes over the data, reshuffled for every pass.
    progress: called every CHECK_EVERY steps with the steps done and their mean loss, without the regulariser.
    Only the optimizer's parameters get gradients, and every requires_grad is restored at the end.
    UserError, with the block's name, for a loss that is not finite.
    """
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    loss, device = loss or relative_squared_error(targets), device_of(module)
    losses: list[Tensor] = []
    with torch.enable_grad(), one_order_of_sums(device), only_these_train(module, trained):
        for step, rows in zip(range(steps), _minibatches(len(inputs), batch_size, generator), strict=False):
            if rate is not None:
                optimizer.param_groups[0]["lr"] = rate(step)
            args, kwargs = inputs.take(rows, device=device)
            error = loss(module(*args, **kwargs), targets[rows].to(device))
            total = error if regulariser is None else error + regulariser(step)
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
            losses.append(error.detach())
            if after_step is not None:
                after_step(step + 1)
            if (step + 1) % CHECK_EVERY == 0 or step + 1 == steps:
                _look(losses[step - step % CHECK_EVERY :], step + 1, name=name, progress=progress)
    return torch.stack(losses).float().cpu() if losses else torch.zeros(0, device="cpu")


def _look(recent: list[Tensor], steps: int, *, name: str, progress: Callable[[int, float], None] | None) -> None:
    mean = float(torch.stack(recent).mean())
    if not math.isfinite(mean):
        raise UserError(
            f"the reconstruction loss of block {name} is {mean} within {steps} steps: "
            "lower the learning rate, or load the model in another dtype"
        )
    if progress is not None:
        progress(steps, mean)


def _minibatches(count: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Row numbers without end: passes over range(count), each in a new order, cut into batches of min(size, count)."""
    size = min(size, count)
    while True:
        order = torch.randperm(count, generator=generator, device="cpu")
        yield from order[: count - count % size].split(size)


@contextmanager
def only_these_train(module: nn.Module, trained: list[nn.Parameter]) -> Iterator[None]:
    """Let `trained` and no other parameter of the module require gradients inside; restore them all afterwards."""
    before = [(parameter, parameter.requires_grad) for parameter in (*module.parameters(), *trained)]
    try:
        module.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)
        for parameter in trained:
            parameter.grad = None
