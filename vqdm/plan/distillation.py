"""Memory and time of the stages that distil: counts in closed form, the rest from a step on the meta device.

Left out: searches for nearer codes, the optimizer's time, checkpoints, reading samples, and what kernels scratch. Of
tuning blocks only the rough size.
"""

import dataclasses
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from vqdm.config import Config
from vqdm.models.specs import LayerSpec
from vqdm.plan import memory
from vqdm.plan.forward import DenoiserCost, ForwardCost, denoiser_inputs, latent_size, measure
from vqdm.plan.memory import Memory
from vqdm.plan.probe import Hardware, Speeds
from vqdm.plan.stage import StageCost, gibibytes, two_digits
from vqdm.plan.training import StepCost, Student, measure_blocks, measure_step, prepare_student
from vqdm.stages.finetune import SHOWN, teacher_runs_along

ASSUMED_GPU_FLOPS, ASSUMED_FP32_FLOPS = 2e14, 4e13  # in 16 bit, and in fp32
ASSUMED_GPU_WRITING = 1e12  # bytes/s, of decoding
BACKWARD = 2  # forwards that a backward pass costs
DECODING, DECODING_GRADIENTS = 2e-9, 3e-9  # seconds per weight of the CPU's kernels, one thread of a Zen 4 core
MOMENTS = 2  # of Adam, in fp32 as all that trains


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
        student = prepare_student(self.student, own, device=self.device)
        if own.block_steps:
            found.append(self._tune_blocks(student))
        if own.steps:
            step = self._step(student, None)
            trajectories = self._trajectories(student, step)
            found += [trajectories, self._finetune(student, step, trajectories)]
        return found

    def _step(self, student: Student, teacher: nn.Module | None) -> StepCost:
        rows = self.guided * micro_batch(self.config)
        return measure_step(
            student, self.config.finetune, rows=rows, rows_each=self.guided, size=self.config.model.sampler.size,
            device=self.device, teacher=teacher,
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
        """Latents and predictions of every sample, and all else once for every caption: rows as the denoiser has them."""
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
        with_features = self._step(student, self.teacher) if own.feature_weight > 0 else step
        variants = {
            "cached": self._parts(student, step),
            "resident": self._parts(student, with_features, resident=True),
        }
        used = {name: self._placed(parts, student) for name, parts in variants.items()}
        cached, resident = (gibibytes(size.device or size.host) for size in used.values())
        here, gpu = self._here(own.precision, student), self._on_a_gpu(own.precision, student)
        hours = self._seconds(counts, gpu) / 3600 + trajectories.detail["gpu_hours"]
        note = (
            f"{counts.steps:,} steps of {own.batch_size} = {counts.samples:,} samples, {counts.rows:,} rows; "
            f"{cached} with the teacher's predictions cached, {resident} with the teacher resident; "
            f"{two_digits(hours)} GPU-hours with the trajectories ({gpu.origin}){self._no_gpu()}"
        )
        detail = dataclasses.asdict(counts) | {"gpu_hours": hours, "gpu_hours_from": gpu.origin}
        detail |= {f"memory_{name}": dataclasses.asdict(size) for name, size in used.items()}
        detail |= {f"parts_{name}": parts for name, parts in variants.items()}
        chosen = used["resident" if teacher_runs_along(own) else "cached"]
        return StageCost("finetune", chosen, None if here is None else self._seconds(counts, here), note, detail)

    def _seconds(self, counts: TrainingCounts, rates: _Rates) -> float:
        own = self.config.finetune
        found = counts.forwards(checkpointing=own.checkpointing) * rates.speeds.seconds(self.cost.sample)
        found += counts.parts * ((1 + own.checkpointing) * rates.decoding + rates.gradients)
        found += counts.validations * rates.decoding  # cached for as long as nothing trains
        return found + counts.shown_images * rates.speeds.seconds(self.decoding)

    def _parts(self, student: Student, step: StepCost, *, resident: bool = False) -> dict[str, int]:
        """Bytes on the device, by what takes them: what is always there, then what comes on top at the worst moment."""
        teacher = self.model.item_size * sum(parameter.numel() for parameter in self.teacher.parameters())
        moments = self._moments(student, step, resident=resident)
        worst = max(moments, key=moments.get)
        found = {
            "other parts of the pipeline": self.model.weights - teacher,
            "student": student.state,
            "drift": 4 * student.drifting,
            "Adam's moments": 4 * MOMENTS * student.trained,
            "units of steps": student.units,
            "decoded weights that validations leave": step.kept,
            worst: moments[worst],
        }
        if resident:
            found["teacher, less what is shared"] = teacher - self._shared(student)
        return {name: int(size) for name, size in found.items()}

    def _moments(self, student: Student, step: StepCost, *, resident: bool) -> dict[str, float]:
        """What comes and goes, in bytes. On a GPU Adam goes through all parameters at once, with one more copy."""
        own, model = self.config.finetune, self.model
        gradients, on_gpu = 4 * student.trained, self.device != "cpu"
        row = step.forward / (self.guided * micro_batch(self.config))
        shown = min(SHOWN, own.trajectories.validation)
        found = {
            "a step": gradients + step.step,
            "an update": (1 + own.relative_rate + on_gpu) * gradients,
            "images shown": memory.sampling_bytes(model, 0, shown) - model.weights,
            "sampling of images shown": shown * self.guided * row,
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

    def _placed(self, parts: dict[str, int], student: Student) -> Memory:
        """Host, beside a GPU: a checkpoint, as tensors and as a file."""
        saving = 2 * (1 + MOMENTS) * 4 * student.trained if self.device != "cpu" else 0
        return memory.placed(sum(parts.values()), saving, device=self.device)

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
