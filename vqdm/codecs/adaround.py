"""AdaRound: learns from a block's target outputs whether each of its weights is rounded up or down.

It works on whole blocks (`reconstruct`). Nagel et al. 2020, "Up or Down?", eqs. 21-25, with the blocks of BRECQ
(Li et al. 2021) and, as in Q-Diffusion (Li et al. 2023), grids of least squared weight error.
"""

import copy
import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqdm.calibration.blocks import Block, BlockData, block_loss, blocks_of, reconstruct, record_block
from vqdm.calibration.recording import OUTPUT, Call
from vqdm.codecs import rtn
from vqdm.codecs.codec import Codec
from vqdm.config.codecs import AdaroundConfig
from vqdm.errors import UserError
from vqdm.models.specs import LayerSpec, weight_to_matrix
from vqdm.seeds import torch_generator
from vqdm.weights.base import QuantizedWeight
from vqdm.weights.layers import swap
from vqdm.weights.scalar import ScalarScheme, ScalarWeight, decode_scalar, per_input

ZETA, GAMMA = 1.1, -0.1  # the sigmoid is stretched to this range and clipped to [0, 1], so that it reaches both
FIRST_BETA, LAST_BETA = 20.0, 2.0


class SoftRounding(QuantizedWeight):
    """A weight [out, in] between the two grid points around each entry: h = 0 is the lower one, 1 the upper.

    w̃ = s·(clip(⌊w/s⌋ + h(V) + z, 0, 2^b − 1) − z), h(V) = clip(σ(V)·(ζ − γ) + γ, 0, 1): at first h = w/s − ⌊w/s⌋,
    so w̃ = w inside the grid. Only V is trained, in fp32.
    """

    scheme_type = ScalarScheme

    def __init__(self, weight: Tensor, grid: ScalarWeight):
        """Start from weight [out, in]. grid: any weight on the grid; its scheme, scales and zero points are kept."""
        super().__init__(grid.scheme, grid.shape)
        self.scales, self.zeros = grid.scales.detach().float(), grid.zeros.detach().float()
        split, inputs = grid.scheme.split, self.shape[1]
        zeros = per_input(self.zeros, inputs, split)
        quotients = weight.detach().float() / per_input(self.scales, inputs, split)
        below = torch.floor(quotients)
        largest = 2**grid.scheme.bits - 1
        down, up = ((code + zeros).clamp(0, largest) for code in (below, below + 1))
        # clip(⌊w/s⌋ + h + z) = down + h·(up − down): up − down is 0 where the grid clips, else 1
        self.down = down.to(torch.uint8)
        self.floor = decode_scalar(down, self.scales, self.zeros, split=split)
        self.step = decode_scalar(up, self.scales, self.zeros, split=split) - self.floor
        fraction = (quotients - below).clamp(1e-4, 1 - 1e-4)
        self.logits = nn.Parameter(torch.logit((fraction - GAMMA) / (ZETA - GAMMA)))

    def rounding(self) -> Tensor:
        """The rounding h(V), [out, in] in [0, 1]."""
        return F.hardtanh((torch.sigmoid(self.logits) * (ZETA - GAMMA)).add_(GAMMA), 0.0, 1.0)

    def forward(self) -> Tensor:
        self.latest = self.rounding()
        return torch.addcmul(self.floor, self.latest, self.step)

    def undecided(self, beta: float) -> Tensor:
        """The number of entries between grid points, Σ (1 − |2h − 1|^β), in the last forward (Nagel et al., eq. 24)."""
        return _Undecided.apply(self.latest, beta)

    @torch.no_grad()
    def hardened(self) -> ScalarWeight:
        """The weight with every entry at the grid point nearer to its h."""
        up = (self.rounding() >= 0.5) & (self.step != 0)
        return ScalarWeight.from_parts(self.scheme, self.down + up, scales=self.scales, zeros=self.zeros)


class _Undecided(torch.autograd.Function):
    """Σ (1 − |2h − 1|^β) with one power where autograd takes two, which took half of a step's time."""

    @staticmethod
    def forward(ctx, rounding: Tensor, beta: float) -> Tensor:
        offset = 2 * rounding - 1
        distance = offset.abs()
        power = distance.log().mul_(beta - 1).exp_()  # |2h − 1|^(β − 1), 0 at 0
        ctx.save_for_backward((power * -2 * beta).mul_(offset.sign_()))
        return rounding.numel() - torch.dot(power.flatten(), distance.flatten())

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.saved_tensors[0], None


@dataclasses.dataclass(frozen=True)
class BlockReport:
    """Losses of a block: relative squared errors of its output on all its data, in the student's place."""

    nearest: float  # loss of nearest rounding to the same grids
    learned: float  # loss of the learned rounding, made hard
    kept: str  # "learned" | "nearest", whichever loss is smaller
    moved: float  # fraction of the learned codes that are not the nearest
    seconds: float


def reconstruct_block(
    denoiser: nn.Module,
    block: Block,
    inputs: BlockData,
    targets: Tensor,
    *,
    bits: int,
    group_size: int | None = None,
    clip: str = "mse",
    split_shortcuts: bool = False,
    iterations: int = 2000,
    batch_size: int = 32,
    learning_rate: float = 0.1,
    strength: float = 1000.0,
    warmup: float = 0.2,
    generator: torch.Generator,
    progress: Callable[[int, float], None] | None = None,
) -> tuple[dict[str, ScalarWeight], BlockReport]:
    """Round the weights of a block's layers so that the block gives `targets`; `denoiser` is not changed.

    inputs: the block's inputs in the partly quantized student; targets: [samples, …], the full-precision block's
    outputs for its own inputs. bits, group_size, clip: for the grids, as in `rtn.encode`. split_shortcuts: shortcuts
    that join a hidden state and a skip connection have a grid for each, as in `rtn.encode_split`. The loss is that of
    `reconstruct` + λ Σ (1 − |2h − 1|^β); β falls from 20 to 2 after the fraction `warmup` of the iterations, before
    which λ = 0. λ = strength · (loss of nearest rounding) / (weights of the block), which makes one strength fit all
    blocks and bits; 1,000 is of the order of BRECQ's λ = 0.01 in its unnormalised loss. learning_rate: BRECQ's 1e-3 is
    for 20,000 iterations; 2,000 need steps that cross from one grid point to the other in a few dozen. UserError, with
    a name, for what is not finite.
    """
    began = time.monotonic()
    part, specs = _working_copy(denoiser, block)
    matrices = {spec.name: weight_to_matrix(part.get_submodule(spec.name).weight.detach()) for spec in specs}
    grid = partial(_nearest, bits=bits, group_size=group_size, clip=clip, split_shortcuts=split_shortcuts)
    nearest = {own.name: grid(matrices[own.name], spec) for own, spec in zip(specs, block.specs, strict=True)}
    losses = {"nearest": _loss_with(part, specs, nearest, inputs, targets)}
    soft = {name: SoftRounding(matrices[name], grid) for name, grid in nearest.items()}
    for spec in specs:
        swap(part, spec, soft[spec.name])
    count = sum(spec.size for spec in specs)
    reconstruct(
        part.block,
        inputs,
        targets,
        torch.optim.Adam([weight.logits for weight in soft.values()], lr=learning_rate, fused=True),
        steps=iterations,
        batch_size=batch_size,
        generator=generator,
        regulariser=_regulariser(
            soft, strength * losses["nearest"] / count, start=int(warmup * iterations), end=iterations
        ),
        progress=progress,
        name=block.name,
    )
    learned = {name: weight.hardened() for name, weight in soft.items()}
    losses["learned"] = _loss_with(part, specs, learned, inputs, targets)
    moved = sum(int((learned[n].unpacked_codes() != nearest[n].unpacked_codes()).sum()) for n in learned) / count
    kept = min(losses, key=losses.get)
    weights = learned if kept == "learned" else nearest
    named = {spec.name: weights[local.name] for local, spec in zip(specs, block.specs, strict=True)}
    return named, BlockReport(**losses, kept=kept, moved=moved, seconds=round(time.monotonic() - began, 3))


def _regulariser(
    soft: dict[str, SoftRounding], strength: float, *, start: int, end: int
) -> Callable[[int], Tensor | float]:
    """λ Σ (1 − |2h − 1|^β) by step, with λ = strength: 0 before the step `start`, from which β falls linearly."""

    def at(step: int) -> Tensor | float:
        if step < start:
            return 0.0
        done = (step - start) / max(1, end - start)
        beta = LAST_BETA + (FIRST_BETA - LAST_BETA) * (1 - done)
        return strength * sum(weight.undecided(beta) for weight in soft.values())

    return at


def _nearest(
    matrix: Tensor, spec: LayerSpec, *, bits: int, group_size: int | None, clip: str, split_shortcuts: bool
) -> ScalarWeight:
    """Nearest rounding by `rtn`, labelled as this codec's: it stands in where nothing better was learned."""
    if split_shortcuts and spec.split is not None:
        weight = rtn.encode_split(matrix, spec.split, bits=bits, clip=clip, layer=spec.name)
    else:
        weight = rtn.encode(matrix, bits=bits, group_size=group_size, clip=clip, layer=spec.name)
    weight.scheme = dataclasses.replace(weight.scheme, codec="adaround")
    return weight


def _working_copy(denoiser: nn.Module, block: Block) -> tuple[nn.Module, list[LayerSpec]]:
    """A module whose `block` is an fp32 copy of the block, and the specs of the layers in it."""
    part = nn.Module()
    part.block = copy.deepcopy(denoiser.get_submodule(block.name)).float()
    local = [dataclasses.replace(s, name="block" + s.name.removeprefix(block.name)) for s in block.specs]
    return part, local


def _loss_with(
    part: nn.Module, specs: list[LayerSpec], weights: dict[str, ScalarWeight], inputs: BlockData, targets: Tensor
) -> float:
    """The block's loss with the weights as they will be stored."""
    for spec in specs:
        swap(part, spec, weights[spec.name], decode="cached")
    return block_loss(part.block, inputs, targets)


def quantize_blocks(
    student: nn.Module,
    teacher: nn.Module,
    specs: Iterable[LayerSpec],
    calls: Callable[[], Iterable[Call]],
    *,
    seed: int,
    samples: int | None = None,
    stored: Callable[[Block], dict[str, QuantizedWeight] | None] = lambda block: None,
    keep_on: str = "cpu",
    directory: Path | None = None,
    progress: Callable[[Block, int, float], None] | None = None,
    **options,
) -> Iterator[tuple[Block, dict[str, QuantizedWeight], BlockReport | None]]:
    """Quantize the layers of `specs` in the student block by block; yields each block's weights once they are in place.

    teacher: the full-precision denoiser, a module of its own. calls: gives the recorded calls anew each time.
    samples: how many of their rows are used, the same for all blocks; None: all. UserError if they have fewer.
    stored: a block's weights by layer, from a run that was cut off; they are put in place and come with the report
    None. A block's weights depend on the weights before it and the seed, not on where they came from.
    directory: of large blocks' rows, as in `record_block`. options: of `reconstruct_block`.
    """
    rows = None if samples is None else drawn_rows(calls(), samples, seed=seed)
    for block in blocks_of(teacher, specs, next(iter(calls()))):
        weights, report = stored(block), None
        if weights is None:
            record = partial(record_block, name=block.name, keep_on=keep_on, directory=directory, rows=rows)
            targets = record(teacher, calls=calls()).output
            weights, report = reconstruct_block(
                student,
                block,
                record(student, calls=calls()),
                targets,
                generator=torch_generator(seed, "adaround", block.name),
                progress=None if progress is None else partial(progress, block),
                **options,
            )
        for spec in block.specs:
            device = student.get_submodule(spec.name).weight.device
            swap(student, spec, weights[spec.name].to(device), decode="cached")
        yield block, weights, report


def drawn_rows(calls: Iterable[Call], samples: int, *, seed: int) -> list[Tensor]:
    """The rows of every call that are used, `samples` of all together, drawn without replacement: int64 per call."""
    counts = [len(call[OUTPUT]) for call in calls]
    if samples > sum(counts):
        raise UserError(
            f"quantize.samples={samples} of {sum(counts)} recorded rows: raise calibration.n or "
            "calibration.recorded_steps, or give fewer"
        )
    drawn = torch.zeros(sum(counts), dtype=torch.bool, device="cpu")
    drawn[
        torch.randperm(len(drawn), generator=torch_generator(seed, "adaround", "samples"), device="cpu")[:samples]
    ] = True
    return [part.nonzero()[:, 0] for part in drawn.split(counts)]


def _by_blocks(
    student: nn.Module, teacher: nn.Module, specs, calls, *, config: AdaroundConfig, stored, progress, directory=None
):
    return quantize_blocks(
        student,
        teacher,
        specs,
        calls,
        seed=config.seed,
        stored=stored,
        progress=progress,
        directory=directory,
        bits=int(config.bits),
        group_size=config.group_size,
        clip=config.clip,
        split_shortcuts=config.split_shortcuts,
        samples=config.samples,
        iterations=config.iterations,
        batch_size=config.batch_size,
    )


def _assign(specs: list[LayerSpec], config: AdaroundConfig, harm: None) -> dict[str, ScalarScheme]:
    if config.split_shortcuts and all(spec.split is None for spec in specs):
        raise UserError(
            "quantize.split_shortcuts=true: no layer to quantize joins a hidden state and a skip connection, as "
            "shortcuts in the up blocks of a UNet2DConditionModel do: leave it out"
        )
    scheme = partial(ScalarScheme, codec="adaround", bits=int(config.bits), group_size=config.group_size)
    return {spec.name: scheme(split=spec.split if config.split_shortcuts else None) for spec in specs}


ADAROUND = Codec(assign=_assign, by_blocks=_by_blocks)
