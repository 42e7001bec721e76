"""Block-wise distillation: given the student's inputs, each block learns to give what the teacher's block gives.

It is AdaRound's routine (`reconstruct`) with distillation's parameters: scales, codebooks, norms, biases. Parts that
the whole model shares do not train here, as every block would want different ones.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from vqdm.calibration.blocks import (
    Block,
    BlockData,
    block_loss,
    blocks_of,
    reconstruct,
    record_block,
    relative_squared_error,
)
from vqdm.calibration.recording import OUTPUT, Call, in_fp32
from vqdm.config.options import FinetuneConfig
from vqdm.distillation.moving_codes import let_drift, stop_drifting
from vqdm.distillation.optimizer import RelativeAdam, learning_rate
from vqdm.distillation.parameters import trained_parameters
from vqdm.models.specs import LayerSpec
from vqdm.runs.heap import return_free_pages
from vqdm.seeds import torch_generator

RATE = 0.03  # peak of the relative rate, divided by the root of the block's relative error at the start
JUDGES = 8  # one sample in this many is not trained on but judges
Changed = dict[str, Tensor]  # changed entries of a block's state dict, by their names in the denoiser


@dataclass(frozen=True)
class TuningReport:
    """Relative squared errors of a block's output on the judging samples, before and after, and which was kept."""

    before: float
    after: float
    kept: bool
    codes_moved: int
    seconds: float


def tune_blocks(
    student: nn.Module,
    teacher: nn.Module,
    specs: Iterable[LayerSpec],
    calls: Callable[[], Iterable[Call]],
    *,
    config: FinetuneConfig,
    stored: Callable[[Block], Changed | None] = lambda block: None,
    progress: Callable[[Block, int, float], None] | None = None,
) -> Iterator[tuple[Block, Changed, TuningReport | None]]:
    """Train the student's blocks in place, in execution order; yields the changes of each block when it is done.

    student: fp32; teacher: a separate module. calls: gives the recorded calls anew each time; config.block_samples of
    their rows are used. stored: a block's changes from an interrupted run, which are put in place, with the report
    None. A block that does not get better on the judging samples stays as it was.
    """
    chosen = _calls_for(calls, config.block_samples)
    for block in blocks_of(teacher, specs, next(iter(calls()))):
        module, report = student.get_submodule(block.name), None
        changed = stored(block)
        if changed is None:
            inputs = record_block(student, block.name, map(in_fp32, chosen()))
            targets = record_block(teacher, block.name, chosen()).output
            return_free_pages()  # of the weights that were decoded on the way, before the block's own steps
            report = _tune(module, inputs, targets, config=config, block=block, progress=progress)
            changed = {f"{block.name}.{name}": value.detach().clone() for name, value in _state(module, config).items()}
        for name, value in _state(module, config).items():
            value.copy_(changed[f"{block.name}.{name}"])
        yield block, changed, report


def _calls_for(calls: Callable[[], Iterable[Call]], rows: int) -> Callable[[], Iterator[Call]]:
    """Evenly spread calls, as many as hold the given number of rows."""
    sizes = [len(call[OUTPUT]) for call in calls()]
    count = min(len(sizes), max(1, round(rows * len(sizes) / sum(sizes))))
    chosen = {int((i + 0.5) * len(sizes) / count) for i in range(count)}
    return lambda: (call for index, call in enumerate(calls()) if index in chosen)


@torch.no_grad()
def _state(module: nn.Module, config: FinetuneConfig) -> dict[str, Tensor]:
    """State that training may change in a block: the parameters that train, and codes where they move."""
    found = {part.name: part.parameter.data for part in trained_parameters(module, config.train)}
    if config.tune_codes:
        found |= {name: buffer for name, buffer in module.named_buffers() if name.endswith("weight.codes")}
    return found


def _tune(
    module: nn.Module, inputs: BlockData, targets: Tensor, *, config: FinetuneConfig, block: Block, progress
) -> TuningReport:
    began = time.monotonic()
    rows = torch.randperm(
        len(inputs), generator=torch_generator(config.seed, "blocks/judges", block.name), device="cpu"
    )
    judges, learned = rows[: max(1, len(rows) // JUDGES)], rows[max(1, len(rows) // JUDGES) :]
    loss = relative_squared_error(targets)
    judge = partial(block_loss, module, inputs.part(judges), targets[judges], loss=loss)
    before, old = judge(), {name: value.clone() for name, value in _state(module, config).items()}
    drifting = let_drift(module) if config.tune_codes else {}
    trained = trained_parameters(module, config.train, code_rate=config.code_rate)
    moved = 0

    def settle(step: int) -> None:
        nonlocal moved
        if step % config.code_every == 0:
            moved += sum(weight.settle() for weight in drifting.values())

    def rate(step: int) -> float:
        peak = config.block_rate or RATE * math.sqrt(before)
        return learning_rate(
            step, steps=config.block_steps, peak=peak, warmup=config.warmup, decay_from=config.decay_from
        )

    if trained and len(learned):  # a single row can only judge
        reconstruct(
            module,
            inputs.part(learned),
            targets[learned],
            RelativeAdam((part.parameter, part.unit) for part in trained),
            steps=config.block_steps,
            batch_size=config.block_batch_size,
            rate=rate,
            loss=loss,
            after_step=settle,
            generator=torch_generator(config.seed, "blocks", block.name),
            name=block.name,
            progress=None if progress is None else partial(progress, block),
        )
    stop_drifting(module)
    after = judge()
    if not after < before:
        for name, value in _state(module, config).items():
            value.copy_(old[name])
    return TuningReport(before, after, after < before, moved, round(time.monotonic() - began, 3))
