"""Memory and time of the stages that measure layers' sensitivity and quantize them.

Left out of the time: training codebooks that layers share.
"""

import copy
import dataclasses
import functools
import math

import torch
from torch import nn

from vqdm.calibration.blocks import LARGE
from vqdm.calibration.hessian import add_second_moment, token_count
from vqdm.codecs.encode import needs_hessians, trains_blocks
from vqdm.config.codecs import PeerConfig, QuantizeConfig
from vqdm.models.specs import ConvGeometry, LayerSpec
from vqdm.runs.device import encoding_room
from vqdm.runs.texts import duration
from vqdm.stages.make import hessian_room
from vqdm.stages.plan import memory
from vqdm.stages.plan.forward import BATCH, ForwardCost, measure
from vqdm.stages.plan.groups import groups_of, readers, reads_both
from vqdm.stages.plan.memory import Memory
from vqdm.stages.plan.rates import cpu_rates
from vqdm.stages.plan.stage import Experiment, StageCost, gibibytes
from vqdm.stages.plan.training import measure_blocks
from vqdm.stages.sensitivity import CALLS, CODE_BITS

FORWARD_AND_BACKWARD = 3  # forwards
JUDGED = 64  # rows at once, in fp32
TRAINED_COPIES = 8  # of a block's weights: the weight, its floor and step, logits, gradients, two moments, h


class QuantizationPlan(Experiment):
    """Each stage is a method."""

    def sensitivity(self) -> StageCost:
        """Cost of the Hessians, as for quantizing, and of encoding and judging every layer at every number of bits."""
        config = dataclasses.replace(self.config.quantize, hessian_from="teacher")
        used = self._quantize_memory(self._groups(config), workers=1, student=False)
        rates = self.rates()
        if rates is None:
            return self.stage("sensitivity", used, (None, ""))
        encode, origin = self._encoding(self.specs, workers=1)
        judged = len(self.specs) * CALLS * self.samples_per_call() * rates.seconds(self.cost.sample)
        seconds = self._hessian_seconds(self._groups(config), config) + len(CODE_BITS) * (encode + judged)
        return self.stage("sensitivity", used, (seconds, rates.origin), f"encoding: {origin}")

    def quantize(self) -> StageCost:
        config = self.config.quantize
        if isinstance(config, PeerConfig):
            return StageCost("quantize", None, None, f"not estimated: {config.library} quantizes")
        if trains_blocks(config):
            return self._by_blocks()
        groups = [group for group in self._groups(config) if group]
        used = self._quantize_memory(groups, workers=self.machine.threads)
        rates = self.rates()
        if rates is None:
            return self.stage("quantize", used, (None, ""))
        found = [self._encoding(group, workers=self.machine.threads) for group in groups]
        encode = sum(seconds for seconds, _ in found)
        hessians, note = 0.0, ""
        if needs_hessians(config):
            hessians = self._hessian_seconds(groups, config)
            passes = 1 if self._waiting()[0] == 1 else len(groups)
            note = f"Hessians {duration(hessians)} in {passes} pass{'es' if passes > 1 else ''}, "
        error = self.recorded_samples() * rates.seconds(self.cost.sample)
        note += f"encoding {duration(encode)} ({found[0][1] if found else 'nothing'})"
        return self.stage("quantize", used, (hessians + encode + error, rates.origin), note)

    def _denoiser_bytes(self) -> int:
        return self.model.item_size * sum(parameter.numel() for parameter in self.denoiser.parameters())

    def _by_blocks(self) -> StageCost:
        """Cost of running both denoisers up to every block, half of one on average, its steps, and two judgements.

        Host: a batch to judge by, and the targets' variance; inputs and outputs of the student and outputs of the
        teacher lie on disk if they are large, twice while calls become one tensor.
        Device: both denoisers; of the largest block, beside a step, eight fp32 numbers for each of its weights.
        """
        config, recorded = self.config.quantize, self.recorded_samples()
        rows = recorded if config.samples is None else min(config.samples, recorded)
        denoiser = nn.Module.to(copy.deepcopy(self.denoiser), dtype=torch.float32).requires_grad_(False)
        for spec in self.specs:
            denoiser.get_submodule(spec.name).weight.requires_grad_()
        names, batch = [spec.name for spec in self.specs], min(config.batch_size, rows)
        blocks = measure_blocks(denoiser, names, rows=batch, size=self.config.model.sampler.size)
        kept = int(rows * blocks.recorded * self.model.item_size / 4)
        on_device = self.model.resident(self.machine.device) + self._denoiser_bytes()
        on_device += blocks.step + TRAINED_COPIES * 4 * blocks.trained
        on_host, model = min(3 * kept, 2 * LARGE + JUDGED * blocks.recorded), self.model
        used = memory.placed(on_device, on_host, device=self.machine.device, mapped=model.mapped, loading=model.weights)
        read = (config.iterations * batch + 2 * rows) * blocks.together * self.model.item_size / 4
        note = (
            f"{blocks.count} blocks, {config.iterations:,} steps of {batch} rows each, on {rows:,} rows; "
            f"the largest block's rows take {gibibytes(kept)} up to three times, on disk where memory is short of "
            f"them: {gibibytes(3 * kept)} of disk, and {gibibytes(read)} read in all, whose time is left out"
        )
        half, single = self.rates(), self.machine.rates("float32")
        if half is None:
            return self.stage("quantize", used, (None, ""), note)
        trained = FORWARD_AND_BACKWARD * config.iterations * batch + 2 * rows
        seconds = blocks.count * recorded * half.seconds(self.cost.sample) + trained * single.seconds(self.cost.sample)
        return self.stage("quantize", used, (seconds, half.origin), note)

    def _encoding(self, specs: list[LayerSpec], *, workers: int) -> tuple[float, str]:
        """Seconds of encoding with so many workers, at least those of the largest layer; and where they come from."""
        here, host = self.recorded.encoding(), cpu_rates(1)
        each = [least_encoding_flops(spec.shape, self.config.quantize) / host.flops for spec in specs]
        origin = "estimate, at least: products with Hessians alone"
        if here is not None:
            each, origin = [here.times(spec.size) for spec in specs], here.origin
        return max(sum(each) / workers, max(each, default=0.0)), origin

    def _groups(self, config: QuantizeConfig) -> list[list[LayerSpec]]:
        return groups_of(self.specs, self.cost.inputs, config, room=hessian_room(self.config))

    def _quantize_memory(self, groups: list[list[LayerSpec]], *, workers: int, student: bool = True) -> Memory:
        return memory.quantize_memory(
            self.model,
            groups,
            self.cost.inputs,
            config=self.config.quantize,
            samples=self.samples_per_call(),
            workers=workers,
            room=encoding_room(),
            device=self.machine.device,
            needs_hessians=needs_hessians(self.config.quantize),
            original=self._denoiser_bytes() + self._waiting()[1] if reads_both(self.config.quantize) else 0,
            student=student,
        )

    def _waiting(self) -> tuple[float, int]:
        """(share of the recorded calls that wait between layers in both denoisers, bytes that these hold)."""
        if not reads_both(self.config.quantize):
            return 0.0, 0
        each = math.ceil(2 * self.samples_per_call() * self.cost.sample.peak_bytes)
        calls = max(1, math.ceil(self.recorded_samples() / self.samples_per_call()))
        held = min(calls, hessian_room(self.config) // max(1, each))
        return held / calls, held * each

    def _hessian_seconds(self, groups: list[list[LayerSpec]], config: QuantizeConfig) -> float:
        """Seconds of every group's calls (the recorded ones, or all of a sampling student) and of summing their inputs.

        Where both denoisers read the calls, those that wait between layers go once through both, and others end
        half way on average. On the CPU one thread does it, so that the sums have one order.
        """
        rates = self.machine.rates(self.config.model.dtype, threads=1)
        sums_rates = self.machine.rates("float32", threads=1)
        forwards = self.recorded_samples()
        if config.hessian_from == "student":
            forwards = self.calibration_prompts * self.guided * self.config.model.sampler.steps
        waiting = self._waiting()[0] if config.hessian_from == "both" else 0.0
        passes = 2 * waiting + (1 - waiting) * len(groups)
        seconds = passes * forwards * rates.seconds(self.cost.sample)
        samples = self.samples_per_call()
        for spec in readers(groups, self.cost.inputs):
            shape, columns = self.cost.inputs[spec.name].shape, spec.shape[1]
            cost = second_moment_cost(columns, spec.conv, shape, samples=samples, limit=config.tokens_per_call)
            seconds += sums_rates.seconds(cost.times(self.recorded_samples() / samples))
        return seconds


def least_encoding_flops(shape: tuple[int, int], config: QuantizeConfig) -> float:
    """FLOPs of the output error and, where the codec needs a Hessian, of its factor; the codec's search is left out."""
    out, size = shape
    return 2 * out * size**2 + size**3 / 3 if needs_hessians(config) else 2 * out * size


@functools.cache  # most layers share their shapes, and rows of a table their layers
def second_moment_cost(
    columns: int, conv: ConvGeometry | None, shape: tuple[int, ...], *, samples: int, limit: int | None
) -> ForwardCost:
    """Cost of adding one call's tokens to a layer's Hessian [columns, columns], measured on meta.

    shape: of what the layer reads in a batch of BATCH; samples: of the call's batch; limit: tokens_per_call.
    """
    parts = BATCH if shape[0] % BATCH == 0 else 1  # one sample stands for the batch, in half the time
    sample, square = (shape[0] // parts, *shape[1:]), (columns, columns)
    inputs, total = (torch.empty(size, device="meta") for size in (sample, square))
    if limit is None or limit >= token_count(inputs, conv) * parts * samples / BATCH:
        return measure(lambda: add_second_moment(total, inputs, conv)).times(parts * samples / BATCH)
    chosen = torch.empty(limit, dtype=torch.int64, device="meta")
    return measure(lambda: add_second_moment(total, inputs, conv, chosen=chosen))
