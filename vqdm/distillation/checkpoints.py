"""Checkpoints of a student in training, as items of its stage: the last one and the best one."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from vqdm.distillation.moving_codes import DriftingWeight
from vqdm.distillation.optimizer import optimizer_tensors, restore_optimizer
from vqdm.distillation.parameters import Trained
from vqdm.runs.items import item_names, read_item, remove_item, write_item


@dataclass
class State:
    """Progress of a training: steps done, their losses, and every validation so far as {step, …}.

    judged_by: the key of the validations that says which is the best.
    """

    step: int = 0
    losses: list[float] = field(default_factory=list)
    validations: list[dict] = field(default_factory=list)
    judged_by: str = "loss"

    @property
    def best(self) -> dict:
        """The least of the validations, the first if there are several."""
        return min(self.validations, key=lambda found: (found[self.judged_by], found["step"]))


class Checkpoints:
    """Checkpoints of one student and its optimizer in a stage's directory."""

    def __init__(self, directory: Path, denoiser: nn.Module, trained: list[Trained], optimizer: torch.optim.Adam):
        self.directory, self.denoiser, self.optimizer = directory, denoiser, optimizer
        self.parameters = {part.name: part.parameter for part in trained}

    def save(self, state: State) -> None:
        """Write a checkpoint and remove all others but the best."""
        names = {parameter: name for name, parameter in self.parameters.items()}
        tensors = {f"trained.{name}": tensor for name, tensor in self._tensors().items()}
        tensors |= optimizer_tensors(self.optimizer, names)
        write_checkpoint(self.directory, state, tensors, keep=(state.best["step"],))

    def restore(self) -> State:
        """Load the last checkpoint that is whole and whose best one is whole too; a new state if there is none."""
        for name in reversed(item_names(self.directory, "step-")):
            record = read_item(self.directory, name)
            if record is None:
                continue
            state = State(record["step"], [], record["validations"])
            if read_item(self.directory, checkpoint_name(state.best["step"])) is None:
                continue
            tensors = self._load(name)
            names = {parameter: key for key, parameter in self.parameters.items()}
            restore_optimizer(self.optimizer, names, tensors, step=state.step)
            state.losses = tensors["losses"].tolist()
            return state
        return State()

    def load_best(self, state: State) -> None:
        self._load(checkpoint_name(state.best["step"]))

    def _tensors(self) -> dict[str, Tensor]:
        """Tensors that training changes: parameters, and the codes of weights that drift."""
        codes = {
            f"{name}.inner.codes": module.inner.codes
            for name, module in self.denoiser.named_modules()
            if isinstance(module, DriftingWeight)
        }
        return self.parameters | codes

    @torch.no_grad()
    def _load(self, name: str) -> dict[str, Tensor]:
        tensors = read_checkpoint(self.directory, name)
        for key, own in self._tensors().items():
            own.copy_(tensors[f"trained.{key}"])
        return tensors


def write_checkpoint(directory: Path, state: State, tensors: dict[str, Tensor], *, keep: Iterable[int] = ()) -> None:
    """Write a state and its tensors as the item of its step; remove those of other steps, except `keep`."""
    name = checkpoint_name(state.step)
    tensors = tensors | {"losses": torch.tensor(state.losses, dtype=torch.float64, device="cpu")}
    content = to_bytes({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()})
    write_item(directory, name, {_file(name): content}, {"step": state.step, "validations": state.validations})
    kept = {name, *map(checkpoint_name, keep)}
    for other in item_names(directory, "step-"):
        if other not in kept:
            remove_item(directory, other, [_file(other)])


def read_checkpoint(directory: Path, name: str) -> dict[str, Tensor]:
    """The tensors of a checkpoint that is whole."""
    return load((directory / _file(name)).read_bytes())


def checkpoint_name(step: int) -> str:
    return f"step-{step:06d}"


def _file(name: str) -> str:
    return f"checkpoints/{name}.safetensors"
