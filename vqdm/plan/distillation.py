"""Memory and time of the stages that distil: counts in closed form, the rest from a step on the meta device.

Left out: searches for nearer codes, the optimizer's time, checkpoints, reading samples, and what kernels scratch. Of
tuning blocks only the rough size.
"""

import dataclasses
from dataclasses import dataclass

import torch
from torch import nn

from vqdm.config import Config
from vqdm.models.specs import LayerSpec
from vqdm.plan import memory
from vqdm.plan.forward import DenoiserCost, ForwardCost, denoiser_inputs, latent_size, measure
from vqdm.plan.memory import Memory
from vqdm.plan.probe import Hardware, Speeds
from vqdm.plan.stage import StageCost, duration, gibibytes, two_digits
from vqdm.plan.training import StepCost, Student, measure_blocks, measure_step, prepare_student
from vqdm.stages.finetune import SHOWN, teacher_runs_along

ASSUMED_GPU_FLOPS = 2e14  # in bf16
ASSUMED_FP32_FLOPS = 4e13
ASSUMED_GPU_WRITING = 1e12  # bytes/s, of operations that are no products
ASSUMED = "assumed: 200 TFLOP/s in bf16, as an H100 may reach; not measured"
ASSUMED_FP32 = "assumed: 40 TFLOP/s in fp32, as an H100 may reach; not measured"
BACKWARD = 2  # times the FLOPs of a forward
DECODING, DECODING_GRADIENTS = 3e-9, 5e-9  # seconds per weight of the CPU's kernels: one thread of a Zen 4 core
ADAM_MOMENTS = 2


@dataclass(frozen=True)
class TrajectoryCounts:
    """prompts: sampled, the validation's included. rows: of all forwards. samples: kept for training and validation."""

    prompts: int
    rows: int
    samples: int
    captions: int  # rows of text embeddings are kept for, once for every number of steps
    encoded: int  # images that the VAE encodes


def trajectory_counts(config: Config, *, prompts: int, guided: int) -> TrajectoryCounts:
    """prompts: those to train on and the validation's. guided: rows of an image, two under guidance."""
    own = config.finetune.trajectories
    steps, kept = sampled_steps(config)
    validation = min(own.validation, prompts)
    train = 0 if own.along == "student" else prompts - validation
    noised = train if own.along == "data" else 0
    return TrajectoryCounts(
        train + validation, ((train + validation) * sum(steps) + noised * kept) * guided, (train + validation) * kept,
        (train + validation) * len(steps), noised * len(steps),
    )  # fmt: skip


def sampled_steps(config: Config) -> tuple[list[int], int]:
    """The numbers of steps that a caption is sampled with, and how many of all are kept."""
    own = config.finetune.trajectories
    steps = own.sampler_steps or [config.model.sampler.steps]
    return steps, sum(min(own.recorded_steps or count, count) for count in steps)


@dataclass(frozen=True)
class TrainingCounts:
    """rows: forward and backward passes. The others are forwards: of validations, of the images they show, of the
    student's own sampling (along=student), and of the teacher.
    """

    steps: int
    samples: int
    rows: int
    parts: int  # micro-batches
    validations: int
    validation_rows: int
    shown_rows: int
    shown_images: int
    own_rows: int
    teacher_rows: int

    def forwards(self, *, checkpointing: bool) -> int:
        """All as forwards of a row."""
        passes = 1 + BACKWARD + checkpointing
        others = self.validation_rows + self.shown_rows + self.own_rows + self.teacher_rows
        return passes * self.rows + others


def training_counts(config: Config, *, prompts: int, guided: int) -> TrainingCounts:
    """As `trajectory_counts`."""
    own = config.finetune
    steps, kept = sampled_steps(config)
    validation = min(own.trajectories.validation, prompts)
    samples = own.steps * own.batch_size
    validations = own.steps // own.check_every + 1 + (own.steps % own.check_every > 0)
    captions = own_captions(config, train=prompts - validation) if own.trajectories.along == "student" else 0
    relabelled = captions * kept * guided
    shown = validations * min(SHOWN, validation)
    return TrainingCounts(
        own.steps, samples, samples * guided, own.steps * -(-own.batch_size // micro_batch(config)), validations,
        validations * min(own.validation_samples, validation * kept) * guided,
        shown * config.model.sampler.steps * guided, shown, captions * sum(steps) * guided,
        relabelled + (samples * guided if own.feature_weight > 0 else 0),
    )  # fmt: skip


def own_captions(config: Config, *, train: int) -> int:
    """Captions that the student samples in all rounds, as vqdm/stages/finetune.py chooses them."""
    own, size = config.finetune, config.finetune.trajectories.batch_size
    wanted = -(-own.refresh * own.batch_size // sampled_steps(config)[1])
    return -(-own.steps // own.refresh) * min(train, -(-wanted // size) * size)


def micro_batch(config: Config) -> int:
    own = config.finetune
    return min(own.micro_batch_size or own.batch_size, own.batch_size)


@dataclass(frozen=True)
class _Rates:
    """Seconds of a denoiser's row, and of decoding all its weights and of that for gradients; where they come from."""

    row: float
    decoding: float
    gradients: float
    origin: str


@dataclass(frozen=True)
class DistillationPlan:
    """What the costs of the three stages follow from; each stage is a method.

    teacher, student: on meta; the student quantized and changed here. prompts: of the trajectories.
    """

    config: Config
    teacher: nn.Module
    student: nn.Module
    vae: nn.Module | None
    specs: list[LayerSpec]
    cost: DenoiserCost
    model: memory.Model
    decoding: ForwardCost  # of one image
    hardware: Hardware | None
    guided: int
    prompts: int
    device: str

    def costs(self) -> list[StageCost]:
        """In the order in which the stages run; all that need the student share its preparation."""
        own, found = self.config.finetune, []
        student = prepare_student(self.student, own, device=self.device)
        if own.block_steps:
            found.append(self._tune_blocks(student))
        if own.steps:
            trajectories = self._trajectories()
            found += [trajectories, self._finetune(student, trajectories)]
        return found

    def _trajectories(self) -> StageCost:
        own = self.config.finetune.trajectories
        counts = trajectory_counts(self.config, prompts=self.prompts, guided=self.guided)
        rows = self.guided * min(own.batch_size, counts.prompts)
        used = memory.generate_memory(self.model, rows, 0, device=self.device)
        size = self._bytes_on_disk(counts)
        encoding = self._encoding().times(counts.encoded)
        seconds, hours = None, self._hours(counts.rows * self._gpu().row + self._gpu_seconds(encoding))
        if self.hardware is not None:
            speeds = self.hardware.sampling
            seconds = counts.rows * speeds.seconds(self.cost.sample) + speeds.seconds(encoding)
        note = (
            f"{counts.prompts:,} captions, {counts.rows:,} rows sampled, {counts.samples:,} samples kept in "
            f"{gibibytes(size)} on disk{self._no_gpu()}"
        )
        detail = dataclasses.asdict(counts) | {"disk_bytes": size, "gpu_hours": hours}
        return StageCost("trajectories", used, seconds, note, detail)

    def _finetune(self, student: Student, trajectories: StageCost) -> StageCost:
        config, own = self.config, self.config.finetune
        counts = training_counts(config, prompts=self.prompts, guided=self.guided)
        variants = {
            name: self._parts(student, resident=resident) for name, resident in (("cached", False), ("resident", True))
        }
        used = {name: self._placed(parts, student) for name, parts in variants.items()}
        chosen = "resident" if teacher_runs_along(own) else "cached"
        gpu = self._gpu(student)
        hours = self._hours(self._seconds(counts, gpu)) + trajectories.detail["gpu_hours"]
        here = None if self.hardware is None else self._seconds(counts, self._here(student))
        cached, resident = (gibibytes(used[name].device or used[name].host) for name in ("cached", "resident"))
        note = (
            f"{counts.steps:,} steps of {own.batch_size} = {counts.samples:,} samples, {counts.rows:,} rows; "
            f"{cached} with the teacher's predictions cached, {resident} with the teacher resident; "
            f"{two_digits(hours)} GPU-hours with the trajectories ({gpu.origin}){self._no_gpu()}"
        )
        detail = dataclasses.asdict(counts) | {"gpu_hours": hours, "gpu_hours_from": gpu.origin}
        detail |= {f"memory_{name}": dataclasses.asdict(size) for name, size in used.items()}
        detail |= {f"bytes_{name}": parts for name, parts in variants.items()}
        return StageCost("finetune", used[chosen], here, note, detail)

    def _tune_blocks(self, student: Student) -> StageCost:
        """Both denoisers up to every block, half of one on average, by every recorded row; then all blocks' steps."""
        own = self.config.finetune
        batch = min(own.block_batch_size, own.block_samples)
        blocks = measure_blocks(student, [s.name for s in self.specs], rows=batch, size=self.config.model.sampler.size)
        recording, trained = blocks.count * own.block_samples, own.block_steps * batch
        state = (1 + ADAM_MOMENTS + 1) * 4 * blocks.trained  # gradients, moments, what RelativeAdam copies
        on_device = self.model.weights + student.state + max(blocks.step + state, self.model.activations * batch)
        host = 2 * own.block_samples * blocks.recorded
        seconds = None
        if self.hardware is not None:
            here = self._here(student)
            seconds = (recording + (1 + BACKWARD) * trained) * here.row
            seconds += blocks.count * (here.decoding + 0) / max(blocks.count, 1) * own.block_steps
        note = f"rough: {blocks.count} blocks, {own.block_steps:,} steps of {batch} rows each{self._no_gpu()}"
        detail = {"blocks": blocks.count, "recording_rows": recording, "training_rows": trained}
        return StageCost("tune_blocks", memory.placed(on_device, host, device=self.device), seconds, note, detail)
