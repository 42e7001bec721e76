"""Peak memory and time of every stage of an experiment, from shapes and counts: memory by formula, time by rates.

Left out of the time: loading models, text encoders, schedulers, reading and writing files, and training codebooks that
layers share.
"""

import copy
import dataclasses
import math

import torch
from torch import nn

from vqdm.acceleration.operators import operators
from vqdm.calibration.blocks import LARGE
from vqdm.calibration.hessian import add_second_moment, token_count
from vqdm.codecs.encode import needs_hessians, trains_blocks
from vqdm.config.codecs import PeerConfig, QuantizeConfig
from vqdm.config.options import Config, SamplerConfig
from vqdm.models.location import decodes_sliced
from vqdm.models.specs import LayerSpec
from vqdm.runs.device import encoding_room
from vqdm.runs.texts import duration
from vqdm.stages.graph import acceleration
from vqdm.stages.graph.samplers import image_sampler, original_sampler
from vqdm.stages.make import hessian_room
from vqdm.stages.plan import memory
from vqdm.stages.plan.distillation import DistillationPlan
from vqdm.stages.plan.forward import (
    BATCH,
    DenoiserCost,
    ForwardCost,
    latent_size,
    measure,
    measure_decoder,
    measure_denoiser,
)
from vqdm.stages.plan.groups import groups_of, readers, reads_both
from vqdm.stages.plan.memory import Memory
from vqdm.stages.plan.rates import SCORING, Machine, Rates, cpu_rates
from vqdm.stages.plan.recorded import Recorded
from vqdm.stages.plan.stage import Experiment, StageCost, gibibytes
from vqdm.stages.plan.training import measure_blocks
from vqdm.stages.prune import CALLS as CALLS_OF_PRUNING
from vqdm.stages.sensitivity import CALLS, CODE_BITS

FORWARD_AND_BACKWARD = 3  # forwards
JUDGED = 64  # rows at once, in fp32
TRAINED_COPIES = 8  # of a block's weights: the weight, its floor and step, logits, gradients, two moments, h
DISTILLATION = ("tune_blocks", "trajectories", "finetune")
GUIDED_INSIDE = ("FluxTransformer2DModel",)  # guidance is an input of theirs and takes no second sample


def stage_costs(
    config: Config,
    denoiser: nn.Module,
    specs: list[LayerSpec],
    *,
    parts: dict[str, int],
    vae: nn.Module | None,
    images: int,
    calibration_prompts: int,
    machine: Machine,
    recorded: Recorded,
    student: nn.Module | None = None,
    finetune_prompts: int = 0,
) -> list[StageCost]:
    """Costs of every stage that `config` needs, in the order of `Graph.stages`.

    denoiser, vae: on meta, and cast to the model's dtype; vae None: decoding is left out. specs: the layers that are
    quantized. parts: parameters by part of the pipeline. images: to be scored. student: the quantized denoiser on meta,
    which changes here; needed if `config.finetune` asks for anything. finetune_prompts: the validation's included.
    """
    names, first = stage_names(config), _few_step(config)
    nn.Module.to(denoiser, dtype=getattr(torch, config.model.dtype))
    cost = measure_denoiser(denoiser, specs, size=config.model.sampler.size)
    if cost is None:
        note = f"not estimated: the plan does not know what {type(denoiser).__name__} takes"
        return [*first, *(StageCost(name, None, None, note) for name in names)]
    model, decoding = _model(config, denoiser, vae, parts=parts, cost=cost)
    stages = _Stages(
        config,
        denoiser,
        student,
        vae,
        specs=[spec for spec in specs if spec.name in cost.inputs],
        cost=cost,
        model=model,
        decoding=decoding,
        machine=machine,
        recorded=recorded,
        guided=guidance_factor(denoiser, config.model.sampler.guidance),
        scored=images,
        calibration_prompts=calibration_prompts,
        finetune_prompts=finetune_prompts,
    )
    found = {name: getattr(stages, name)() for name in names if name not in DISTILLATION}
    if any(name in DISTILLATION for name in names):
        found |= {stage.name: stage for stage in DistillationPlan(**vars(stages)).costs()}
    return [*first, *(found[name] for name in names)]


def stage_names(config: Config) -> list[str]:
    """Names of the stages that `config` needs, as fields of `Graph` and in its order."""
    cached = [name for name, stage in _of_cache(config).items() if stage]
    pruned = [] if config.prune.kind == "none" else ["scores", "prune"]
    if config.quantize.kind == "none" and not acceleration.is_on(config):
        return ["images", "evaluate"]
    sensitivity = ["sensitivity"] if config.quantize.sensitivity() is not None else []
    distillation = ["tune_blocks"] if config.finetune.block_steps else []
    if config.finetune.steps:
        distillation += ["finetune"] if config.finetune.loss == "dmd" else ["trajectories", "finetune"]
    quantized = [] if config.quantize.kind == "none" else [*sensitivity, "quantize"]
    smaller = ["calibrate", *pruned, *quantized, *distillation] if pruned or quantized else []
    return [*smaller, *cached, "teacher_images", "images", "evaluate"]


def _few_step(config: Config) -> list[StageCost]:
    """The stages that make a few-step student, whose cost is not estimated."""
    names = () if config.few_step.kind == "none" else ("pairs", "few_step")
    return [StageCost(name, None, None, "not estimated") for name in names]


def _of_cache(config: Config) -> dict[str, bool]:
    """The stages that look at a sampling denoiser, and whether they are needed."""
    own = config.cache
    on = own.kind != "none"
    static = config.activations.kind == "static"
    correct = on and own.correction != "none"
    return {"schedule": on and own.schedule == "dynamic", "activations": static, "correct": correct}


def guidance_factor(denoiser: nn.Module, guidance: float) -> int:
    """Samples that the denoiser's batch has for one image, as in diffusers' pipelines: two under guidance."""
    inside = type(denoiser).__name__ in GUIDED_INSIDE or getattr(denoiser.config, "time_cond_proj_dim", None)
    return 2 if guidance > 1 and not inside else 1


def _model(
    config: Config, denoiser: nn.Module, vae: nn.Module | None, *, parts: dict[str, int], cost: DenoiserCost
) -> tuple[memory.Model, ForwardCost]:
    """What memory needs to know of the pipeline, and the cost of decoding one image."""
    dtype = getattr(torch, config.model.dtype)
    decoding, upcast, numbers = ForwardCost(), False, 0
    if vae is not None:
        height, width = latent_size(denoiser, config.model.sampler.size)
        upcast = memory.decoder_upcasts(vae.config, config.model.dtype)
        decoding = measure_decoder(vae, (height, width), dtype=torch.float32 if upcast else dtype)
        numbers = 3 * height * width * 4 ** (len(vae.config.block_out_channels) - 1)
    sliced, in_files = decodes_sliced(config.model), memory.used_in_files(config.model)
    peaks = cost.sample.peak_bytes, decoding.peak_bytes
    packed = max((m.weight.nbytes for m in denoiser.modules() if isinstance(m, nn.Conv2d)), default=0)
    return memory.Model(parts, dtype.itemsize, *peaks, upcast, numbers, sliced, in_files, packed), decoding


class _Stages(Experiment):
    """Costs of all stages but those of distillation; each is a method."""

    def calibrate(self) -> StageCost:
        config = self.config.calibration
        samples = self.guided * min(config.batch_size, self.calibration_prompts)
        used = memory.generate_memory(self.model, samples, 0, device=self.machine.device)
        return self.stage("calibrate", used, self._sampling(self.calibration_prompts, self.config.model.sampler))

    def sensitivity(self) -> StageCost:
        """Cost of the Hessians, as for quantizing, and of encoding and judging every layer at every number of bits."""
        config = dataclasses.replace(self.config.quantize, hessian_from="teacher")
        used = self._quantize_memory(self._groups(config), workers=1, student=False)
        rates = self._rates()
        if rates is None:
            return self.stage("sensitivity", used, (None, ""))
        encode, origin = self._encoding(self.specs, workers=1)
        judged = len(self.specs) * CALLS * self._samples_per_call() * rates.seconds(self.cost.sample)
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
        rates = self._rates()
        if rates is None:
            return self.stage("quantize", used, (None, ""))
        found = [self._encoding(group, workers=self.machine.threads) for group in groups]
        encode = sum(seconds for seconds, _ in found)
        hessians, note = 0.0, ""
        if needs_hessians(config):
            hessians = self._hessian_seconds(groups, config)
            note = f"Hessians {duration(hessians)} in {len(groups)} pass{'es' if len(groups) > 1 else ''}, "
        error = self._recorded_samples() * rates.seconds(self.cost.sample)
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
        config, recorded = self.config.quantize, self._recorded_samples()
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
        half, single = self._rates(), self.machine.rates("float32")
        if half is None:
            return self.stage("quantize", used, (None, ""), note)
        trained = FORWARD_AND_BACKWARD * config.iterations * batch + 2 * rows
        seconds = blocks.count * recorded * half.seconds(self.cost.sample) + trained * single.seconds(self.cost.sample)
        return self.stage("quantize", used, (seconds, half.origin), note)

    def prune(self) -> StageCost:
        """Cost of the output's error on the recorded calls."""
        used, rates = (
            memory.generate_memory(self.model, self._samples_per_call(), 0, device=self.machine.device),
            self._rates(),
        )
        timed = (
            (None, "") if rates is None else (self._recorded_samples() * rates.seconds(self.cost.sample), rates.origin)
        )
        return self.stage("prune", used, timed)

    def scores(self) -> StageCost:
        """Cost of running the model once without each operator: on captions, or on a few recorded calls."""
        own, sampler, count = self.config.prune, self.config.model.sampler, len(operators(self.denoiser))
        used = memory.generate_memory(self.model, self._samples_per_call(), 0, device=self.machine.device)
        if own.score == "latents":
            samplings = (count + 1) * min(own.prompts, self.calibration_prompts)
            note = f"{count} operators, each with {own.prompts} captions of {sampler.steps} steps"
            return self.stage("scores", used, self._sampling(samplings, sampler), note)
        rates = self._rates()
        samples = count * CALLS_OF_PRUNING * self._samples_per_call()
        timed = (None, "") if rates is None else (samples * rates.seconds(self.cost.sample), rates.origin)
        return self.stage("scores", used, timed, f"{count} operators, each on {CALLS_OF_PRUNING} recorded calls")

    def schedule(self) -> StageCost:
        """Cost of sampling the cache's captions, without decoding."""
        used = memory.generate_memory(self.model, self._samples_per_call(), 0, device=self.machine.device)
        return self.stage("schedule", used, self._sampling(self.config.cache.prompts, image_sampler(self.config)))

    def activations(self) -> StageCost:
        used = memory.generate_memory(self.model, self._samples_per_call(), 0, device=self.machine.device)
        timed = self._sampling(self.config.activations.prompts, image_sampler(self.config))
        return self.stage("activations", used, timed)

    def correct(self) -> StageCost:
        return dataclasses.replace(self.schedule(), name="correct")

    def teacher_images(self) -> StageCost:
        return self._images("teacher_images", original_sampler(self.config), codes=0)

    def images(self) -> StageCost:
        codes = memory.code_bytes(self.specs, self.config.quantize)
        found = self._images("images", image_sampler(self.config), codes=codes)
        if self.config.activations.kind != "none":  # a time would be taken for what real integers need
            return dataclasses.replace(
                found, seconds=None, origin="", note="activations are simulated: no time is said"
            )
        return (
            found if self.config.cache.kind == "none" else dataclasses.replace(found, note="as if all calls were full")
        )

    def _images(self, name: str, sampler: SamplerConfig, *, codes: float) -> StageCost:
        size = self.config.evaluate.batch_size
        used = memory.generate_memory(self.model, self.guided * size, size, device=self.machine.device, codes=codes)
        made = size * math.ceil(self.scored / size)  # the last batch is filled up
        seconds, origin = self._sampling(made, sampler)
        rates = self._rates()
        found = (None, "") if rates is None else (seconds + made * rates.seconds(self.decoding), origin)
        return self.stage(name, used, found)

    def evaluate(self) -> StageCost:
        """Cost of comparing with the originals image by image; metrics that take a network are left out."""
        compared = self.config.quantize.kind != "none" or acceleration.is_on(self.config)
        paired = "paired" in self.config.evaluate.metrics and compared
        at_once = min(self.scored, self.config.evaluate.batch_size)
        used = memory.evaluate_memory(self.model.image_numbers, at_once, device=self.machine.device)
        seconds = SCORING * self.scored * self.model.image_numbers if paired else 0.0
        others = [family for family in self.config.evaluate.metrics if family != "paired"]
        note = f"without the networks of {', '.join(others)}" if others else ""
        return StageCost("evaluate", used, seconds, note, "estimate")

    def _rates(self) -> Rates | None:
        return self.machine.rates(self.config.model.dtype)

    def _sampling(self, images: int, sampler: SamplerConfig) -> tuple[float | None, str]:
        """Seconds of sampling without decoding, and where they come from."""
        steps = images * sampler.steps
        cost = self.cost.sample.times(self.guided * steps)
        return self.timed(self.recorded.sampling(), steps, [cost], dtype=self.config.model.dtype)

    def _encoding(self, specs: list[LayerSpec], *, workers: int) -> tuple[float, str]:
        """Seconds of encoding with so many workers, at least those of the largest layer; and where they come from."""
        here, host = self.recorded.encoding(), cpu_rates(1)
        each = [least_encoding_flops(spec.shape, self.config.quantize) / host.flops for spec in specs]
        origin = "estimate, at least: products with Hessians alone"
        if here is not None:
            each, origin = [here.times(spec.size) for spec in specs], here.origin
        return max(sum(each) / workers, max(each, default=0.0)), origin

    def _samples_per_call(self) -> int:
        return self.guided * max(1, min(self.config.calibration.batch_size, self.calibration_prompts))

    def _recorded_samples(self) -> int:
        """Number of samples in all recorded calls."""
        steps = min(self.config.calibration.recorded_steps, self.config.model.sampler.steps)
        return self.calibration_prompts * self.guided * steps

    def _groups(self, config: QuantizeConfig) -> list[list[LayerSpec]]:
        return groups_of(self.specs, self.cost.inputs, config, room=hessian_room(self.config))

    def _quantize_memory(self, groups: list[list[LayerSpec]], *, workers: int, student: bool = True) -> Memory:
        return memory.quantize_memory(
            self.model,
            groups,
            self.cost.inputs,
            config=self.config.quantize,
            samples=self._samples_per_call(),
            workers=workers,
            room=encoding_room(),
            device=self.machine.device,
            needs_hessians=needs_hessians(self.config.quantize),
            original=self._denoiser_bytes() if reads_both(self.config.quantize) else 0,
            student=student,
        )

    def _hessian_seconds(self, groups: list[list[LayerSpec]], config: QuantizeConfig) -> float:
        """Seconds of every group's calls (the recorded ones, or all of a sampling student) and of summing their inputs.

        Where both denoisers read the calls, each of them ends half way on average. On the CPU one thread does it, so
        that the sums have one order.
        """
        rates = self.machine.rates(self.config.model.dtype, threads=1)
        sums_rates = self.machine.rates("float32", threads=1)
        forwards = self._recorded_samples()
        if config.hessian_from == "student":
            forwards = self.calibration_prompts * self.guided * self.config.model.sampler.steps
        seconds = len(groups) * forwards * rates.seconds(self.cost.sample)
        samples = self._samples_per_call()
        limit = config.tokens_per_call
        costs: dict[tuple, ForwardCost] = {}  # layers of one shape cost the same
        for spec in readers(groups, self.cost.inputs):
            shape = self.cost.inputs[spec.name].shape
            key = spec.shape, spec.conv, shape
            if key not in costs:
                costs[key] = second_moment_cost(spec, shape, samples=samples, limit=limit)
            seconds += sums_rates.seconds(costs[key].times(self._recorded_samples() / samples))
        return seconds


def least_encoding_flops(shape: tuple[int, int], config: QuantizeConfig) -> float:
    """FLOPs of the output error and, where the codec needs a Hessian, of its factor; the codec's search is left out."""
    out, size = shape
    return 2 * out * size**2 + size**3 / 3 if needs_hessians(config) else 2 * out * size


def second_moment_cost(spec: LayerSpec, shape: tuple[int, ...], *, samples: int, limit: int | None) -> ForwardCost:
    """Cost of adding one call's tokens to a layer's Hessian, measured on meta.

    shape: of what the layer reads in a batch of BATCH; samples: of the call's batch; limit: tokens_per_call.
    """
    parts = BATCH if shape[0] % BATCH == 0 else 1  # one sample stands for the batch, in half the time
    sample, square = (shape[0] // parts, *shape[1:]), (spec.shape[1], spec.shape[1])
    inputs, total = (torch.empty(size, device="meta") for size in (sample, square))
    if limit is None or limit >= token_count(inputs, spec.conv) * parts * samples / BATCH:
        return measure(lambda: add_second_moment(total, inputs, spec.conv)).times(parts * samples / BATCH)
    chosen = torch.empty(limit, dtype=torch.int64, device="meta")
    return measure(lambda: add_second_moment(total, inputs, spec.conv, chosen=chosen))
