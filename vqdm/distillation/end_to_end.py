"""End-to-end distillation: the student learns to give the teacher's predictions on recorded latents.

A step's samples follow from the seed and the step's number alone, and a process's share of them from its rank. So a
killed run goes on to the same weights, and more processes at the same batch size see the same samples.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vqdm.calibration.blocks import device_of, only_these_train
from vqdm.calibration.recording import LATENTS, play
from vqdm.config.options import FinetuneConfig
from vqdm.distillation.checkpoints import Checkpoints, State
from vqdm.distillation.losses import block_outputs, feature_errors, squared_errors, timestep_weights
from vqdm.distillation.moving_codes import let_drift, stop_drifting
from vqdm.distillation.optimizer import RelativeAdam, learning_rate
from vqdm.distillation.parameters import Trained, trained_parameters
from vqdm.distillation.trajectories import Batch, Trajectories
from vqdm.errors import UserError
from vqdm.runs import processes, progress
from vqdm.runs.device import one_order_of_sums
from vqdm.seeds import torch_generator

BUCKETS, TIMESTEPS = 5, 1000  # validation losses are also given by fifths of the training timesteps
RATE = 0.01  # peak of the relative rate, divided by the root of the first error: lower for a student nearly there
DIVERGED = 4.0  # a validation loss this many times the first one ends the training


@dataclass
class Distillation:
    """Everything a training step needs: the student, in fp32 on its device, and the source of its samples.

    samples: gives the trajectories to draw from at a step. guidance: that of sampling. scheduler: for timestep weights.
    teacher: needed only for the outputs of its blocks. report: takes numbers by name, for a tracker. show: called at
    every validation.
    """

    student: nn.Module
    samples: Callable[[int], Trajectories]
    validation: Trajectories
    config: FinetuneConfig
    guidance: float
    scheduler: object
    teacher: nn.Module | None = None
    report: Callable[[dict], None] = lambda values: None
    show: Callable[[int], None] = lambda step: None

    def run(self, directory) -> State:
        """Train to the end, from the last checkpoint in `directory` if there is one, and restore the best weights.

        UserError for a loss that is not finite or a validation loss beyond DIVERGED times the first; checkpoints stay.
        """
        config, student = self.config, self.student
        drifting = let_drift(student) if config.tune_codes else {}
        trained = trained_parameters(student, config.train, code_rate=config.code_rate)
        if not trained:
            raise UserError("finetune: finetune.train leaves nothing to train: switch something on")
        optimizer = optimizer_of(trained, config)
        checkpoints = Checkpoints(directory, student, trained, optimizer)
        state = checkpoints.restore()
        learned = only_these_train(student, [part.parameter for part in trained])
        repeatable = one_order_of_sums(device_of(student))
        shown = progress.bar("finetune", config.steps, unit="step")
        with learned, repeatable, _checkpointed(student, checkpointing=config.checkpointing), shown as bar:
            module = _distributed(student)
            bar.skip(state.step, items=state.step)
            for step in range(state.step, config.steps):
                self._check(state, checkpoints)
                loss = self._gradients(module, step)
                if not math.isfinite(loss):
                    raise UserError(
                        f"finetune: the loss is {loss} at step {step}: lower finetune.learning_rate; the best weights "
                        f"so far, of step {state.best['step']}, are kept in {directory}/checkpoints"
                    )
                rate = self._rate(step, state)
                optimizer.param_groups[0]["lr"] = rate
                optimizer.step()
                optimizer.zero_grad()
                moved = 0
                if (step + 1) % config.code_every == 0:
                    moved = sum(weight.settle() for weight in drifting.values())
                state.step = step + 1
                state.losses.append(loss)
                bar.add(note=f"loss {loss:.5f}")
                self.report({"step": step + 1, "loss": loss, "learning_rate": rate, "codes_moved": moved})
            self._check(state, checkpoints)
        checkpoints.load_best(state)
        stop_drifting(student)
        return state

    def _rate(self, step: int, state: State) -> float:
        peak = self._peak(state.validations[0]["loss"])
        return learning_rate(
            step, steps=self.config.steps, peak=peak, warmup=self.config.warmup, decay_from=self.config.decay_from
        )

    def _peak(self, first: float) -> float:
        """The learning rate's peak. first: the validation loss at the start."""
        return self.config.learning_rate or RATE * math.sqrt(first)

    def _check(self, state: State, checkpoints: Checkpoints) -> None:
        """Validate and write a checkpoint, if they are due and not there yet."""
        due = state.step % self.config.check_every == 0 or state.step == self.config.steps
        if not due or any(found["step"] == state.step for found in state.validations):
            return
        found = {"step": state.step, **self._validate()}
        self.report({f"validation/{name}": value for name, value in found.items()})
        first = state.validations[0]["loss"] if state.validations else found["loss"]
        if not math.isfinite(first):
            raise UserError(
                f"finetune: the validation loss is {first} before any step: student or teacher overflows; load the "
                "model in another dtype (model.dtype), or set finetune.precision=float32"
            )
        if not found["loss"] <= DIVERGED * first:
            raise UserError(
                f"finetune: the validation loss went from {first:.3g} to {found['loss']:.3g} in {state.step} steps: "
                f"lower finetune.learning_rate, whose peak is {self._peak(first):.2g}; the best weights so far are "
                f"kept in {checkpoints.directory}/checkpoints"
            )
        state.validations.append(found)
        if processes.is_main():
            checkpoints.save(state)
            self.show(state.step)
        processes.wait_for_all()

    def _gradients(self, module: nn.Module, step: int) -> float:
        """Add the gradients of the batch's mean loss to the parameters; returns the loss, equal in every process."""
        config, trajectories = self.config, self.samples(step)
        rank, count = processes.rank_and_count()
        own = list(samples_of(step, len(trajectories), config))[rank::count]
        size = config.micro_batch_size or len(own)
        parts = [own[start : start + size] for start in range(0, len(own), size)]
        total = torch.zeros((), device="cpu")
        for index, part in enumerate(parts):
            last = index == len(parts) - 1
            together = contextlib.nullcontext() if last or module is self.student else module.no_sync()
            with together:
                loss = self._losses(module, trajectories.batch(part, device=device_of(self.student))).sum() / len(own)
                loss.backward()
            total += loss.detach().cpu()
        return float(processes.sum_over(total.to(device_of(self.student)))) / count

    def _losses(self, module: nn.Module, batch: Batch) -> Tensor:
        """The weighted loss of every sample."""
        config = self.config
        watched = [] if self.teacher is None else [self.student, self.teacher]
        with self._precision(), block_outputs(*watched) as outputs:
            prediction = play(module, batch.arguments)
            errors = self._errors(prediction, batch)
            if watched:
                with torch.no_grad(), self._precision(self.teacher):
                    play(self.teacher, batch.arguments)
                student, teacher = (found.take() for found in outputs)
                errors = errors + config.feature_weight * feature_errors(student, teacher, rows_each=batch.rows_each)
        weights = timestep_weights(batch.timesteps, self.scheduler, weighting=config.weighting, limit=config.min_snr)
        return errors * weights.to(errors.device)

    def _errors(self, prediction: Tensor, batch: Batch) -> Tensor:
        """Errors of the channels that sampling uses: PixArt predicts variances in further ones, which it drops."""
        guidance = self.guidance if self.config.loss == "guided" else None
        latents = next(batch.arguments[name] for name in LATENTS if name in batch.arguments)
        used = slice(None), slice(latents.shape[1])
        return squared_errors(prediction[used], batch.target[used], rows_each=batch.rows_each, guidance=guidance)

    @torch.no_grad()
    def _validate(self) -> dict[str, float]:
        """The unweighted error over the validation samples, in all and by timestep."""
        config, device = self.config, device_of(self.student)
        rank, processes_count = processes.rank_and_count()
        count = min(config.validation_samples, len(self.validation))
        chosen = [int((i + 0.5) * len(self.validation) / count) for i in range(count)][rank::processes_count]
        sums = torch.zeros(2, BUCKETS, dtype=torch.float64, device="cpu")
        size = config.micro_batch_size or config.batch_size
        for start in range(0, len(chosen), size):
            batch = self.validation.batch(chosen[start : start + size], device=device)
            with self._precision():
                prediction = play(self.student, batch.arguments)
            errors = self._errors(prediction, batch).double().cpu()
            bucket = (batch.timesteps.double() * BUCKETS / TIMESTEPS).long().clamp(0, BUCKETS - 1)
            sums[0].index_add_(0, bucket, errors)
            sums[1].index_add_(0, bucket, torch.ones_like(errors))
        errors, counts = processes.sum_over(sums.to(device)).cpu()
        width, filled = TIMESTEPS // BUCKETS, counts.nonzero().flatten().tolist()
        by_timestep = {f"t{i * width}-{(i + 1) * width - 1}": float(errors[i] / counts[i]) for i in filled}
        return {"loss": float(errors.sum() / counts.sum()), **by_timestep}

    def _precision(self, denoiser: nn.Module | None = None):
        """Autocast as configured; without it a 16-bit denoiser, as the teacher may be, computes in its own dtype."""
        kind = device_of(self.student).type
        if self.config.precision == "bfloat16":
            return torch.autocast(kind, torch.bfloat16)
        dtype = torch.float32 if denoiser is None else next(denoiser.parameters()).dtype
        return torch.autocast(kind, dtype) if dtype != torch.float32 else contextlib.nullcontext()


def samples_of(step: int, total: int, config: FinetuneConfig) -> Iterator[int]:
    """Indices of a step's samples: passes over all `total`, each in an order of its own."""
    order, current = None, None
    for position in range(step * config.batch_size, (step + 1) * config.batch_size):
        epoch, place = divmod(position, total)
        if epoch != current:
            order = torch.randperm(total, generator=torch_generator(config.seed, "finetune/order", epoch), device="cpu")
            current = epoch
        yield int(order[place])


def optimizer_of(trained: list[Trained], config: FinetuneConfig) -> torch.optim.Adam:
    """Adam as in the paper for what trains: betas 0.9 and 0.999, no weight decay."""
    if not config.relative_rate:
        return torch.optim.Adam([part.parameter for part in trained], lr=config.learning_rate)
    return RelativeAdam((part.parameter, part.unit) for part in trained)


@contextlib.contextmanager
def _checkpointed(student: nn.Module, *, checkpointing: bool) -> Iterator[None]:
    """Recompute activations for the backward pass inside, if that is wanted."""
    if checkpointing:
        student.enable_gradient_checkpointing()
    try:
        yield
    finally:
        if checkpointing:
            student.disable_gradient_checkpointing()


def _distributed(student: nn.Module) -> nn.Module:
    """The student itself or, with several processes, a wrapper that averages gradients over them."""
    if not processes.launched():
        return student
    from torch.nn.parallel import DistributedDataParallel

    return DistributedDataParallel(student, broadcast_buffers=False)  # codes are the same in all processes
