"""One trainer for all few-step students: Adam, an average of weights, validations, checkpoints as items.

A step's samples follow from the seed and the step's number alone, so that a killed run goes on to the same bytes.
"""

import copy
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from vqdm.calibration.blocks import device_of
from vqdm.config.few_step import FewStepConfig
from vqdm.distillation.checkpoints import State, read_checkpoint, write_checkpoint
from vqdm.distillation.optimizer import learning_rate, optimizer_tensors, restore_optimizer
from vqdm.distillation.trajectories import Trajectories
from vqdm.errors import UserError
from vqdm.few_step import losses
from vqdm.few_step.adapters import Frequencies
from vqdm.few_step.divergences import Discriminator, Divergence
from vqdm.few_step.pairs import Pairs, read_pairs, sampled, student_scheduler
from vqdm.runs import progress
from vqdm.runs.device import one_order_of_sums
from vqdm.runs.items import item_names, read_item
from vqdm.seeds import torch_generator

DISTANCE = "distance"  # what validations compare
STUDENT = "student"  # the learner that is to become the model
LIMIT = 1.0  # of the norm of a step's gradient


class Learner:
    """A network with its optimizer, for which `loss_of` is minimised at every call of `step`.

    optimizer: None: AdamW for all parameters. Those that it does not have stay as they are.
    """

    def __init__(
        self,
        name: str,
        network: nn.Module,
        loss_of: Callable[[torch.Generator], Tensor],
        *,
        peak: float,
        optimizer: torch.optim.Optimizer | None = None,
    ):
        self.name, self.network, self.loss_of, self.peak = name, network.train().requires_grad_(False), loss_of, peak
        self.optimizer = optimizer or torch.optim.AdamW(
            network.parameters(), lr=peak, betas=(0.9, 0.99), weight_decay=0.0
        )
        trained = set(self.optimizer.param_groups[0]["params"])
        self.names = {parameter: key for key, parameter in network.named_parameters() if parameter in trained}
        for parameter in self.names:
            parameter.requires_grad_(True)

    def step(self, number: int, generator: torch.Generator, *, config: FewStepConfig) -> float:
        """Take a step at the rate of the student's step `number`; returns the loss. UserError if it is not finite."""
        rate = learning_rate(
            number, steps=config.steps, peak=self.peak, warmup=config.warmup, decay_from=config.decay_from
        )
        self.optimizer.param_groups[0]["lr"] = rate
        loss = self.loss_of(generator)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(list(self.names), LIMIT)
        if not (torch.isfinite(loss) and torch.isfinite(norm)):
            raise UserError(
                f"few_step: the {self.name}'s loss is {loss.item()} at step {number}: lower few_step.learning_rate or "
                "few_step.critic_rate"
            )
        self.optimizer.step()
        return loss.item()

    def tensors(self) -> dict[str, Tensor]:
        state = stored(self.network) | optimizer_tensors(self.optimizer, self.names)
        return {f"{self.name}.{key}": tensor for key, tensor in state.items()}

    def restore(self, tensors: dict[str, Tensor], *, steps: int) -> None:
        own = {key.removeprefix(f"{self.name}."): t for key, t in tensors.items() if key.startswith(f"{self.name}.")}
        load_stored(self.network, own)
        restore_optimizer(self.optimizer, self.names, own, step=steps)


def stored(network: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of a network that belong into a checkpoint, each once however often it is shared."""
    kept = network.state_dict().keys()
    return {key: tensor for key, tensor in (*network.named_parameters(), *network.named_buffers()) if key in kept}


@torch.no_grad()
def load_stored(network: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put the tensors of `stored` back in place."""
    for key, own in stored(network).items():
        own.copy_(tensors[key])


class Training:
    """A student's training from pairs.

    student: in fp32 on its device, the teacher's copy, another few-step model, or a quantized one. optimizer: of what
    trains in it; None: of everything. after_step: called with the number of steps done, before the average follows.
    decode: latents to images, for hipa.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        pairs: Trajectories,
        validation: Trajectories,
        *,
        scheduler,
        config: FewStepConfig,
        directory: Path,
        optimizer: torch.optim.Optimizer | None = None,
        after_step: Callable[[int], None] = lambda step: None,
        decode: Callable[[Tensor], Tensor] | None = None,
    ):
        self.config, self.directory, self.pairs, self.validation = config, directory, pairs, validation
        self.optimizer, self.after_step = optimizer, after_step
        self.device = device_of(student)
        self.scheduler = student_scheduler(scheduler)
        self.schedule = losses.Schedule(scheduler.alphas_cumprod.float().to(self.device))
        self.average = copy.deepcopy(student).eval().requires_grad_(False)
        self.best = copy.deepcopy(self.average)
        teacher.eval().requires_grad_(False)
        if config.kind in ("dmd", "fdistill"):
            self.learners = self._matching(student, teacher)
        else:
            loss = self._alone(teacher, decode)
            self.learners = [self._learner(STUDENT, student, loss, config.learning_rate)]

    def _alone(self, teacher: nn.Module, decode: Callable[[Tensor], Tensor] | None) -> Callable[..., Tensor]:
        """The loss of a student that nothing is trained beside."""
        config = self.config
        if config.kind == "hipa":
            return Frequencies(decode, config.frequency_weight).loss
        if config.kind == "lcm":
            aim = self.average if config.aim == "average" else None
            return losses.Consistency(teacher, aim, config.teacher_guidance, self._grid()).loss
        return losses.velocity if config.kind == "reflow" else losses.direct

    def _grid(self) -> losses.Grid:
        """The student's own scheduler in the solver's number of steps."""
        steps = self.config.solver_steps
        self.scheduler.set_timesteps(steps)
        times = self.scheduler.timesteps[:steps].to(self.device)  # the last of some counts is there twice
        levels = torch.cat([self.schedule.alphas[times], torch.ones(1, device=self.device)])
        return losses.Grid(times, levels.view(-1, 1, 1, 1), every=steps // self.config.learned_steps)

    def _matching(self, student: nn.Module, teacher: nn.Module) -> list[Learner]:
        """The student and those that judge its images: a critic and, for f-distill, a discriminator."""
        config, judge = self.config, partial(self._learner, student=student)
        matching = losses.Matching(teacher, copy.deepcopy(teacher), config.teacher_guidance)
        critic = judge("critic", matching.critic, matching.critic_loss, config.critic_rate)
        if config.kind == "dmd":
            return [self._learner(STUDENT, student, matching.loss, config.learning_rate), critic]
        channels = teacher.config.block_out_channels[-1]
        head = Discriminator(channels, seed=config.seed).to(self.device)
        weighted = Divergence(matching, head, config.divergence, config.adversarial_weight)
        told = judge("discriminator", head, weighted.discriminator_loss, config.critic_rate)
        return [self._learner(STUDENT, student, weighted.loss, config.learning_rate), critic, told]

    def _learner(self, name: str, network: nn.Module, loss, peak: float, *, student: nn.Module | None = None):
        """A learner of `loss(student, pairs, schedule, generator)` on pairs that its generator draws."""

        def loss_of(generator: torch.Generator) -> Tensor:
            rows = torch.randint(len(self.pairs), (self.config.batch_size,), generator=generator, device="cpu")
            pairs = self._read(self.pairs, rows.tolist())
            return loss(student or network, pairs, self.schedule, generator)

        return Learner(name, network, loss_of, peak=peak, optimizer=self.optimizer if name == STUDENT else None)

    def _read(self, files: Trajectories, rows) -> Pairs:
        return read_pairs(files, rows, device=self.device, precision=self.config.precision)

    def run(self) -> tuple[nn.Module, State]:
        """Train to the end, from the last checkpoint if there is one; returns the student and what was seen."""
        config, history = self.config, self._restore()
        student, *critics = self.learners
        shown = progress.bar("few_step", config.steps, unit="step")
        with one_order_of_sums(self.device), shown as bar:
            bar.skip(history.step, items=history.step)
            if critics and config.steps and config.critic_first and not history.validations:
                self._teach_first(critics)
            self._check(history)
            for step in range(history.step, config.steps):
                for critic in critics:
                    for turn in range(step * config.critic_steps, (step + 1) * config.critic_steps):
                        critic.step(step, torch_generator(config.seed, f"few_step/{critic.name}", turn), config=config)
                loss = student.step(step, torch_generator(config.seed, "few_step", step), config=config)
                self.after_step(step + 1)
                self._follow(step)
                history.losses.append(loss)
                history.step = step + 1
                bar.add(note=f"loss {loss:.5f}")
                self._check(history)
        return self.best if config.keep == "best" else self.average, history

    def _teach_first(self, critics: list[Learner]) -> None:
        """Steps of those that judge before the student's first, at their full rate: they begin as the teacher."""
        for turn in progress.over(range(self.config.critic_first), "critic", unit="step"):
            for critic in critics:
                generator = torch_generator(self.config.seed, f"few_step/{critic.name}/first", turn)
                critic.step(self.config.warmup, generator, config=self.config)

    @torch.no_grad()
    def _follow(self, step: int) -> None:
        """Move the average towards the student, faster in the first steps; codes, which have none, are copied."""
        decay, student = min(self.config.average, (step + 1) / (step + 10)), self.learners[0]
        averages = dict(self.average.named_parameters())
        for new, name in student.names.items():
            averages[name].lerp_(new, 1 - decay)
        for own, new in zip(self.average.buffers(), student.network.buffers(), strict=True):
            own.copy_(new)

    def _check(self, history: State) -> None:
        """Validate and write a checkpoint, if they are due and not there yet."""
        due = history.step % self.config.check_every == 0 or history.step == self.config.steps
        if not due or any(found["step"] == history.step for found in history.validations):
            return
        history.validations.append({"step": history.step, DISTANCE: self._distance()})
        if not math.isfinite(history.validations[-1][DISTANCE]):
            raise UserError(f"few_step: images are not finite at step {history.step}: lower few_step.learning_rate")
        if history.best["step"] == history.step:
            load_stored(self.best, stored(self.average))
        self._save(history)

    @torch.no_grad()
    def _distance(self) -> float:
        """Mean squared distance of the average's latents from the teacher's, over the validation's pairs."""
        total, count = 0.0, len(self.validation)
        for start in range(0, count, self.config.batch_size):
            rows = range(start, min(start + self.config.batch_size, count))
            pairs = self._read(self.validation, rows)
            made = sampled(self.average, pairs, self.scheduler, steps=self.config.validated_steps)
            total += float((made - pairs.clean).square().mean((1, 2, 3)).double().sum())
        return total / count

    def _save(self, history: State) -> None:
        """Write the checkpoint beside the last one, which is removed then."""
        tensors = {}
        for prefix, network in (("average", self.average), ("best", self.best)):
            tensors |= {f"{prefix}.{key}": tensor for key, tensor in stored(network).items()}
        for learner in self.learners:
            tensors |= learner.tensors()
        write_checkpoint(self.directory, history, tensors)

    def _restore(self) -> State:
        """Load the last checkpoint that is whole; a new history if there is none."""
        for name in reversed(item_names(self.directory, "step-")):
            record = read_item(self.directory, name)
            if record is None:
                continue
            tensors = read_checkpoint(self.directory, name)
            for prefix, network in (("average", self.average), ("best", self.best)):
                load_stored(network, {key: tensors[f"{prefix}.{key}"] for key in stored(network)})
            for learner in self.learners:
                turns, first = self.config.critic_steps, self.config.critic_first
                taken = record["step"] if learner is self.learners[0] else first + turns * record["step"]
                learner.restore(tensors, steps=taken)
            return State(record["step"], tensors["losses"].tolist(), record["validations"], judged_by=DISTANCE)
        return State(judged_by=DISTANCE)
