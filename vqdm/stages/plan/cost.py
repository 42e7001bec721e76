"""Peak memory and time of every stage of an experiment, from shapes and counts: memory by formula, time by rates.

Left out of the time: loading models, text encoders, schedulers, reading and writing files.
"""

import dataclasses
import math

import torch
from torch import nn

from vqdm.config.options import Config, SamplerConfig
from vqdm.models.location import decodes_sliced
from vqdm.models.specs import LayerSpec
from vqdm.stages.graph import acceleration
from vqdm.stages.graph.samplers import image_sampler, original_sampler
from vqdm.stages.plan import memory
from vqdm.stages.plan.acceleration import AccelerationPlan
from vqdm.stages.plan.distillation import DistillationPlan
from vqdm.stages.plan.forward import (
    DenoiserCost,
    ForwardCost,
    latent_size,
    measure_decoder,
    measure_denoiser,
)
from vqdm.stages.plan.quantization import QuantizationPlan
from vqdm.stages.plan.rates import SCORING, Machine
from vqdm.stages.plan.recorded import Recorded
from vqdm.stages.plan.stage import StageCost

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


class _Stages(QuantizationPlan, AccelerationPlan):
    """Costs of all stages but those of distillation; each is a method, here of those that every experiment has."""

    def calibrate(self) -> StageCost:
        config = self.config.calibration
        samples = self.guided * min(config.batch_size, self.calibration_prompts)
        used = memory.generate_memory(self.model, samples, 0, device=self.machine.device)
        return self.stage("calibrate", used, self.sampling(self.calibration_prompts, self.config.model.sampler))

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
        seconds, origin = self.sampling(made, sampler)
        rates = self.rates()
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
