"""Memory and time of the stages that distil: counts in closed form, the rest from a step on the meta device.

Left out: searches for nearer codes, the optimizer's time, checkpoints, reading samples, and the kernels' scratch. The
cost of tuning blocks is rough.
"""

import dataclasses

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from vqdm.runs.texts import two_digits
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
from vqdm.stages.plan.forward import ForwardCost, denoiser_inputs, latent_size, measure
from vqdm.stages.plan.memory import Memory
from vqdm.stages.plan.rates import ASSUMED, Rates, card_rates
from vqdm.stages.plan.stage import Experiment, StageCost, gibibytes
from vqdm.stages.plan.training import StepCost, Student, measure_blocks, measure_step, prepare_student

# free pieces of glibc's heap for each weight that is decoded, where nothing of torch lies: measured, not foretold.
# 1.7 on a smaller U-Net (scripts/lab/heap_of_training.py, docs/sdxl.md); SDXL itself had 1.3, 1.7 and 1.8 in three runs
HEAP_BYTES = 1.7
MOMENTS = 2  # of Adam, in fp32 as all that trains
OTHERS, TEACHER = "other parts of the pipeline", "teacher, less what is shared"


class DistillationPlan(Experiment):
    """Costs of the three stages that distil; the student is changed."""

    def costs(self) -> list[StageCost]:
        """Costs of the stages that are asked for, in the order in which they run."""
        own, found = self.config.finetune, []
        student = prepare_student(self.student, own)
        if own.block_steps:
            found.append(self._tune_blocks(student))
        if own.steps and own.loss == "dmd":
            found.append(StageCost("finetune", None, None, "not estimated"))
        elif own.steps:
            step = self._step(student)
            trajectories = self._trajectories(student, step)
            found += [trajectories, self._finetune(student, step, trajectories)]
        return found

    def _step(self, student: Student, *, teacher: nn.Module | None = None) -> StepCost:
        own, micro = self.config.finetune, micro_batch(self.config)
        return measure_step(
            student,
            own,
            rows=self.guided * micro,
            rows_each=self.guided,
            size=self.config.model.sampler.size,
            device=self.machine.device,
            accumulates=micro < own.batch_size,
            teacher=teacher,
        )

    def _tune_blocks(self, student: Student) -> StageCost:
        """Cost of running both denoisers up to every block, half of one on average, for every row, and of its steps."""
        own = self.config.finetune
        batch = min(own.block_batch_size, own.block_samples)
        names = [spec.name for spec in self.specs]
        student.has_gradients(False)
        blocks = measure_blocks(student.denoiser, names, rows=batch, size=self.config.model.sampler.size)
        recording, training = blocks.count * own.block_samples, own.block_steps * batch
        state = (1 + MOMENTS + 1) * 4 * blocks.trained  # gradients, moments, and what RelativeAdam copies
        step = max(
            blocks.step + state,
            self.model.forward(self.guided * self.config.calibration.batch_size, self.machine.device),
        )
        rows = 2 * own.block_samples * blocks.recorded
        used = memory.placed(
            self.model.resident(self.machine.device) + student.state + step,
            rows,
            device=self.machine.device,
            mapped=self.model.mapped + min(student.codes, step),
            loading=self.model.weights,
        )
        written = own.block_steps * student.weights * (student.decode.written + student.decode.gradient_written)
        work = [self.cost.sample.times(recording + (1 + BACKWARD) * training), ForwardCost(written_bytes=written)]
        timed = self.timed(self.recorded.training("tune_blocks"), training, work, dtype="float32")
        note = f"rough; {blocks.count} blocks, {own.block_steps:,} steps of {batch} rows each"
        rows = {"recorded_rows": recording, "trained_rows": blocks.count * training}
        return self.stage("tune_blocks", used, timed, note, blocks=blocks.count, **rows)

    def _trajectories(self, student: Student, step: StepCost) -> StageCost:
        own, dtype = self.config.finetune.trajectories, self.config.model.dtype
        counts = trajectory_counts(self.config, prompts=self.finetune_prompts, guided=self.guided)
        rows = self.guided * min(own.batch_size, counts.prompts)
        used = memory.generate_memory(self.model, rows, 0, device=self.machine.device)
        size = self._bytes_on_disk(counts, step.output)
        encoding = self._encoding() if counts.encoded else ForwardCost()
        work = [self.cost.sample.times(counts.rows), encoding.times(counts.encoded)]
        note = f"{counts.prompts:,} captions, {counts.rows:,} rows, {counts.samples:,} samples kept"
        hours = sum(map(self._on_a_gpu(dtype).seconds, work)) / 3600
        timed = self.timed(self.recorded.sampling(), counts.rows / self.guided, work, dtype=dtype)
        detail = dataclasses.asdict(counts) | {"disk_bytes": size, "gpu_hours": hours}
        return self.stage("trajectories", used, timed, note, **detail)

    def _bytes_on_disk(self, counts: TrajectoryCounts, output: int) -> int:
        """Bytes of the latents and predictions of every sample, and, once for every caption, of all other arguments."""
        first, *others = denoiser_inputs(self.denoiser, batch=1, size=self.config.model.sampler.size).values()
        once = sum(leaf.nbytes for leaf in tree_leaves(others) if isinstance(leaf, torch.Tensor) and leaf.ndim > 1)
        each = first.nbytes + self.model.item_size * output
        return self.guided * (counts.samples * each + counts.captions * once)

    def _encoding(self) -> ForwardCost:
        """Cost of encoding one image with the VAE."""
        if self.vae is None:
            return ForwardCost()
        height, width = latent_size(self.denoiser, self.config.model.sampler.size)
        scale, first = 2 ** (len(self.vae.config.block_out_channels) - 1), next(self.vae.parameters())
        image = first.new_empty(1, self.vae.config.in_channels, scale * height, scale * width)
        return measure(lambda: self.vae.encode(image, return_dict=False))

    def _finetune(self, student: Student, step: StepCost, trajectories: StageCost) -> StageCost:
        own = self.config.finetune
        counts = training_counts(self.config, prompts=self.finetune_prompts, guided=self.guided)
        work, gpu = self._training(counts, student), self._on_a_gpu(own.precision)
        hours = sum(map(gpu.seconds, work)) / 3600 + trajectories.detail["gpu_hours"]
        parts = self._variants(student, step)
        placed = {name: self._placed(found, student) for name, found in parts.items()}
        cached, resident = (gibibytes(used.device or used.host) for used in placed.values())
        note = (
            f"{counts.steps:,} steps of {own.batch_size} = {counts.samples:,} samples, {counts.rows:,} rows; "
            f"{cached} with the teacher's predictions cached, {resident} with the teacher resident; "
            f"{two_digits(hours)} GPU-hours with the trajectories ({gpu.origin})"
            f"{', without the search for codes' if own.tune_codes else ''}"
        )
        detail = dataclasses.asdict(counts) | {"gpu_hours": hours, "gpu_hours_from": gpu.origin, "bytes": parts}
        used = placed["resident" if teacher_runs_along(own) else "cached"]
        timed = self.timed(self.recorded.training("finetune"), counts.samples, work, dtype=own.precision)
        return self.stage("finetune", used, timed, note, **detail)

    def _variants(self, student: Student, step: StepCost) -> dict[str, dict[str, int]]:
        """Bytes by what takes them, with the teacher's predictions cached and with the teacher resident."""
        watches = self.config.finetune.feature_weight > 0
        watching = self._step(student, teacher=self.denoiser) if watches else step
        return {
            "cached": self._parts(student, step, resident=False),
            "resident": self._parts(student, watching, resident=True),
        }

    def _training(self, counts: TrainingCounts, student: Student) -> list[ForwardCost]:
        """Cost of forwards and backwards, of decoding weights, and of decoding the images that are shown."""
        own, decode = self.config.finetune, student.decode
        decodings = counts.parts * (1 + own.checkpointing)
        decodings += counts.validation_rows / (self.guided * micro_batch(self.config))
        decodings += counts.shown_images * self.config.model.sampler.steps
        written = student.weights * (decodings * decode.written + counts.parts * decode.gradient_written)
        forwards = self.cost.sample.times(counts.forwards(checkpointing=own.checkpointing))
        return [forwards, ForwardCost(written_bytes=written), self.decoding.times(counts.shown_images)]

    def _parts(self, student: Student, step: StepCost, *, resident: bool) -> dict[str, int]:
        """Bytes on the device by what takes them: what is always there, then what the worst moment adds."""
        teacher = self.model.item_size * sum(parameter.numel() for parameter in self.denoiser.parameters())
        moments = self._moments(student, step, resident=resident)
        worst = max(moments, key=moments.get)
        found = {
            OTHERS: self.model.resident(self.machine.device) - teacher,
            "student": student.state,
            "drift": 4 * student.drifting,
            "Adam's moments": 4 * MOMENTS * student.trained,
            "units of steps": student.units,
            worst: moments[worst],
        }
        if resident:
            found[TEACHER] = teacher - self._shared(student)
        return {name: int(size) for name, size in found.items()}

    def _moments(self, student: Student, step: StepCost, *, resident: bool) -> dict[str, float]:
        """Bytes held for a while, by what holds them; Adam on a GPU takes all parameters at once, and a copy."""
        own, model, device = self.config.finetune, self.model, self.machine.device
        gradients, on_gpu = 4 * student.trained, self.machine.on_gpu
        row = step.forward / (self.guided * micro_batch(self.config))
        found = {
            "a step": step.step + (0 if on_gpu else HEAP_BYTES * student.weights),
            "an update": (1 + own.relative_rate + on_gpu) * gradients,
            "an image shown": memory.sampling_bytes(model, 0, 1, device=device) - model.resident(device),
            "sampling of an image shown": self.guided * row,
        }
        if not on_gpu:
            found["a checkpoint"] = (1 + MOMENTS) * gradients
        if resident and own.trajectories.along == "student":
            found["the student's own sampling"] = own.trajectories.batch_size * self.guided * row
        return found

    def _shared(self, student: Student) -> int:
        """Bytes of the frozen parameters that student and teacher share, as in vqdm/stages/finetune.py."""
        own, dtype = self.config.finetune, self.config.model.dtype
        if own.precision == "float32" and dtype != "float32":
            return 0
        theirs = {name for name, _ in self.denoiser.named_parameters()}
        return sum(size for name, size in student.frozen.items() if name in theirs)

    def _placed(self, parts: dict[str, int], student: Student) -> Memory:
        """Memory of these parts; beside a GPU the host holds a checkpoint, as tensors and as a file.

        Codes are used in their file until they are rounded for the next, when the worst moment is over.
        """
        saving = 2 * (1 + MOMENTS) * 4 * student.trained if self.machine.on_gpu else 0
        *_, worst = (size for name, size in parts.items() if name != TEACHER)
        mapped = parts[OTHERS] + parts.get(TEACHER, 0) if self.model.in_files else 0
        return memory.placed(
            sum(parts.values()),
            saving,
            device=self.machine.device,
            mapped=mapped + min(student.codes, worst),
            loading=self.model.weights,
        )

    def _on_a_gpu(self, dtype: str) -> Rates:
        """Rates of the GPU that is planned for, or of the assumed one."""
        return (self.machine.on_gpu and self.machine.rates(dtype)) or card_rates(ASSUMED, dtype)
