"""Memory and time of the stages that distil: counts in closed form, the rest from a step on the meta device.

Left out: searches for nearer codes, the optimizer's time, checkpoints, reading samples, and what kernels scratch. Of
tuning blocks only the rough size.
"""

import dataclasses
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from vqdm.config.options import Config
from vqdm.models.specs import LayerSpec
from vqdm.stages.finetune import teacher_runs_along
from vqdm.stages.plan import memory
from vqdm.stages.plan.counts import (
    BACKWARD,
    TrainingCounts,
    TrajectoryCounts,
    micro_batch,
    training_counts,
    trajectory_counts,
)
from vqdm.stages.plan.forward import DenoiserCost, ForwardCost, denoiser_inputs, latent_size, measure
from vqdm.stages.plan.memory import Memory
from vqdm.stages.plan.probe import Hardware, Speeds
from vqdm.stages.plan.stage import StageCost, gibibytes, two_digits
from vqdm.stages.plan.training import StepCost, Student, measure_blocks, measure_step, prepare_student

ASSUMED_GPU_FLOPS, ASSUMED_FP32_FLOPS = 2e14, 4e13  # in 16 bit, and in fp32
ASSUMED_GPU_WRITING = 1e12  # bytes/s, of decoding
DECODING, DECODING_GRADIENTS = 2e-9, 3e-9  # seconds per weight of the CPU's kernels, one thread of a Zen 4 core
MOMENTS = 2  # of Adam, in fp32 as all that trains


@dataclass(frozen=True)
class _Rates:
    """Of one device: its speeds in the wanted precision, seconds to decode all weights, and to do so for gradients."""

    speeds: Speeds
    decoding: float
    gradients: float
    origin: str


@dataclass(frozen=True)
class DistillationPlan:
    """What the costs of the three stages follow from.

    teacher, student: on meta; the student quantized, and changed here. prompts: of the trajectories.
    """

    config: Config
    teacher: nn.Module
    student: nn.Module
    vae: nn.Module | None
    specs: list[LayerSpec]
    cost: DenoiserCost
    model: memory.Model
    decoding: ForwardCost  # of one image
    hardware: Hardware | None  # None: there is none of the wanted kind to measure
    guided: int
    prompts: int
    device: str

    def costs(self) -> list[StageCost]:
        """In the order in which the stages run."""
        own, found = self.config.finetune, []
        student = prepare_student(self.student, own)
        if own.block_steps:
            found.append(self._tune_blocks(student))
        if own.steps:
            step = self._step(student, device=self.device)
            trajectories = self._trajectories(student, step)
            found += [trajectories, self._finetune(student, step, trajectories)]
        return found

    def _step(self, student: Student, *, device: str, teacher: nn.Module | None = None) -> StepCost:
        micro = micro_batch(self.config)
        return measure_step(
            student, self.config.finetune, rows=self.guided * micro, rows_each=self.guided,
            size=self.config.model.sampler.size, device=device, accumulates=micro < self.config.finetune.batch_size,
            teacher=teacher,
        )  # fmt: skip

    def _tune_blocks(self, student: Student) -> StageCost:
        """Every block: both denoisers up to it, half of one on average, for every row; its steps."""
        own = self.config.finetune
        batch = min(own.block_batch_size, own.block_samples)
        names = [spec.name for spec in self.specs]
        blocks = measure_blocks(student, names, rows=batch, size=self.config.model.sampler.size)
        recording, training = blocks.count * own.block_samples, own.block_steps * batch
        state = (1 + MOMENTS + 1) * 4 * blocks.trained  # gradients, moments, and what RelativeAdam copies
        step = max(blocks.step + state, self._rows_in_a_call() * self.model.activations)
        used = memory.placed(
            self.model.weights + student.state + step, 2 * own.block_samples * blocks.recorded, device=self.device
        )
        here = self._here("float32", student)
        seconds = None
        if here is not None:
            row = here.speeds.seconds(self.cost.sample)
            seconds = (recording + (1 + BACKWARD) * training) * row + own.block_steps * (here.decoding + here.gradients)
        note = f"rough; {blocks.count} blocks, {own.block_steps:,} steps of {batch} rows each{self._no_gpu()}"
        detail = {"blocks": blocks.count, "recorded_rows": recording, "trained_rows": blocks.count * training}
        return StageCost("tune_blocks", used, seconds, note, detail)

    def _rows_in_a_call(self) -> int:
        return self.guided * self.config.calibration.batch_size

    def _trajectories(self, student: Student, step: StepCost) -> StageCost:
        own, dtype = self.config.finetune.trajectories, self.config.model.dtype
        counts = trajectory_counts(self.config, prompts=self.prompts, guided=self.guided)
        rows = self.guided * min(own.batch_size, counts.prompts)
        used = memory.generate_memory(self.model, rows, 0, device=self.device)
        size = self._bytes_on_disk(counts, step.output)
        work = [
            (counts.rows, self.cost.sample),
            (counts.encoded, self._encoding() if counts.encoded else ForwardCost()),
        ]

        def seconds(rates: _Rates) -> float:
            return sum(count * rates.speeds.seconds(cost) for count, cost in work)

        here = self._here(dtype, student)
        note = (
            f"{counts.prompts:,} captions, {counts.rows:,} rows, {counts.samples:,} samples kept, "
            f"{gibibytes(size)} on disk{self._no_gpu()}"
        )
        detail = dataclasses.asdict(counts) | {"disk_bytes": size}
        detail["gpu_hours"] = seconds(self._on_a_gpu(dtype, student)) / 3600
        return StageCost("trajectories", used, None if here is None else seconds(here), note, detail)

    def _bytes_on_disk(self, counts: TrajectoryCounts, output: int) -> int:
        """Latents and predictions of every sample, all else once for every caption; rows as the denoiser has them."""
        first, *others = denoiser_inputs(self.teacher, batch=1, size=self.config.model.sampler.size).values()
        once = sum(leaf.nbytes for leaf in tree_leaves(others) if isinstance(leaf, torch.Tensor) and leaf.ndim > 1)
        each = first.nbytes + self.model.item_size * output
        return self.guided * (counts.samples * each + counts.captions * once)

    def _encoding(self) -> ForwardCost:
        """Of one image, by the VAE."""
        if self.vae is None:
            return ForwardCost()
        height, width = latent_size(self.teacher, self.config.model.sampler.size)
        scale, first = 2 ** (len(self.vae.config.block_out_channels) - 1), next(self.vae.parameters())
        image = first.new_empty(1, self.vae.config.in_channels, scale * height, scale * width)
        return measure(lambda: self.vae.encode(image, return_dict=False))

    def _finetune(self, student: Student, step: StepCost, trajectories: StageCost) -> StageCost:
        own = self.config.finetune
        counts = training_counts(self.config, prompts=self.prompts, guided=self.guided)
        here, gpu = self._here(own.precision, student), self._on_a_gpu(own.precision, student)
        hours = self._seconds(counts, gpu) / 3600 + trajectories.detail["gpu_hours"]
        parts = self._variants(student, step, device=self.device)
        on_gpu = parts
        if self.device == "cpu":
            on_gpu = self._variants(student, self._step(student, device="cuda"), device="cuda")
        cached, resident = (gibibytes(self._placed(found, student, device="cuda").device) for found in on_gpu.values())
        note = (
            f"{counts.steps:,} steps of {own.batch_size} = {counts.samples:,} samples, {counts.rows:,} rows; on a GPU "
            f"{cached} with the teacher's predictions cached, {resident} with the teacher resident; "
            f"{two_digits(hours)} GPU-hours with the trajectories ({gpu.origin})"
            f"{', without the search for codes' if own.tune_codes else ''}{self._no_gpu()}"
        )
        detail = dataclasses.asdict(counts) | {"gpu_hours": hours, "gpu_hours_from": gpu.origin}
        detail |= {"bytes_on_this_device": parts, "bytes_on_a_gpu": on_gpu}
        chosen = parts["resident" if teacher_runs_along(own) else "cached"]
        used = self._placed(chosen, student, device=self.device)
        return StageCost("finetune", used, None if here is None else self._seconds(counts, here), note, detail)

    def _variants(self, student: Student, step: StepCost, *, device: str) -> dict[str, dict[str, int]]:
        """Bytes by what takes them, with the teacher's predictions cached and with the teacher resident."""
        watching = step
        if self.config.finetune.feature_weight > 0:
            watching = self._step(student, device=device, teacher=self.teacher)
        return {
            "cached": self._parts(student, step, device=device, resident=False),
            "resident": self._parts(student, watching, device=device, resident=True),
        }

    def _seconds(self, counts: TrainingCounts, rates: _Rates) -> float:
        own = self.config.finetune
        found = counts.forwards(checkpointing=own.checkpointing) * rates.speeds.seconds(self.cost.sample)
        found += counts.parts * ((1 + own.checkpointing) * rates.decoding + rates.gradients)
        judged = counts.validation_rows / (self.guided * micro_batch(self.config))
        sampled = counts.shown_images * self.config.model.sampler.steps
        found += (judged + sampled) * rates.decoding
        return found + counts.shown_images * rates.speeds.seconds(self.decoding)

    def _parts(self, student: Student, step: StepCost, *, device: str, resident: bool) -> dict[str, int]:
        """Bytes on the device, by what takes them: what is always there, then what comes on top at the worst moment."""
        teacher = self.model.item_size * sum(parameter.numel() for parameter in self.teacher.parameters())
        moments = self._moments(student, step, device=device, resident=resident)
        worst = max(moments, key=moments.get)
        found = {
            "other parts of the pipeline": self.model.weights - teacher,
            "student": student.state,
            "drift": 4 * student.drifting,
            "Adam's moments": 4 * MOMENTS * student.trained,
            "units of steps": student.units,
            worst: moments[worst],
        }
        if resident:
            found["teacher, less what is shared"] = teacher - self._shared(student)
        return {name: int(size) for name, size in found.items()}

    def _moments(self, student: Student, step: StepCost, *, device: str, resident: bool) -> dict[str, float]:
        """What comes and goes, in bytes. On a GPU Adam goes through all parameters at once, with one more copy."""
        own, model = self.config.finetune, self.model
        gradients, on_gpu = 4 * student.trained, device != "cpu"
        row = step.forward / (self.guided * micro_batch(self.config))
        found = {
            "a step": step.step,
            "an update": (1 + own.relative_rate + on_gpu) * gradients,
            "an image shown": memory.sampling_bytes(model, 0, 1) - model.weights,
            "sampling of an image shown": self.guided * row,
        }
        if not on_gpu:
            found["a checkpoint"] = (1 + MOMENTS) * gradients
        if resident and own.trajectories.along == "student":
            found["the student's own sampling"] = own.trajectories.batch_size * self.guided * row
        return found

    def _shared(self, student: Student) -> int:
        """Bytes of the student's that are the teacher's own, as vqdm/stages/finetune.py shares them."""
        own, dtype = self.config.finetune, self.config.model.dtype
        if own.precision == "float32" and dtype != "float32":
            return 0
        theirs = {name for name, _ in self.teacher.named_parameters()}
        return sum(size for name, size in student.frozen.items() if name in theirs)

    def _placed(self, parts: dict[str, int], student: Student, *, device: str) -> Memory:
        """Host, beside a GPU: a checkpoint, as tensors and as a file."""
        saving = 2 * (1 + MOMENTS) * 4 * student.trained if device != "cpu" else 0
        return memory.placed(sum(parts.values()), saving, device=device)

    def _here(self, dtype: str, student: Student) -> _Rates | None:
        """Of this machine; its speeds are measured in the model's dtype, and for products in fp32."""
        if self.hardware is None:
            return None
        speeds, on_gpu = self.hardware.sampling, self.device != "cpu"
        if dtype != self.config.model.dtype and not (on_gpu and "float32" not in (dtype, self.config.model.dtype)):
            rate = speeds.fp32_matmul
            speeds = dataclasses.replace(speeds, matmul=rate, convolution=rate, attention=rate)
        if not on_gpu:
            return _Rates(speeds, student.weights * DECODING, student.weights * DECODING_GRADIENTS, "measured here")
        return _rates(student, speeds, speeds.writing, "at the rate measured here")

    def _on_a_gpu(self, dtype: str, student: Student) -> _Rates:
        """Of the GPU that is here, or of one that is assumed."""
        if self.device != "cpu" and self.hardware is not None:
            return self._here(dtype, student)
        rate, name = (ASSUMED_FP32_FLOPS, "fp32") if dtype == "float32" else (ASSUMED_GPU_FLOPS, "bf16")
        speeds = Speeds(rate, rate, rate, writing=float("inf"), fp32_matmul=rate)
        origin = f"assumed: {rate / 1e12:.0f} TFLOP/s in {name}, as an H100 may reach; not measured"
        return _rates(student, speeds, ASSUMED_GPU_WRITING, origin)

    def _no_gpu(self) -> str:
        return "" if self.hardware else "; time not estimated: no GPU here to measure"


def _rates(student: Student, speeds: Speeds, writing: float, origin: str) -> _Rates:
    """Of a GPU, where torch decodes: as fast as it writes."""
    decode, count = student.decode, student.weights
    return _Rates(speeds, count * decode.written / writing, count * decode.gradient_written / writing, origin)
