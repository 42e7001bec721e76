"""Record a denoiser's calls while a pipeline samples, and play them back to another denoiser.

A call is kept with all its tensors by keyword, so the same code serves every architecture.
"""

import inspect

import torch
from torch import nn

Call = dict[str, torch.Tensor]  # "sample", "timestep", "encoder_hidden_states", "added_cond_kwargs.text_embeds", …
OUTPUT = "output"


def _flatten(prefix: str, value, into: Call) -> None:
    if isinstance(value, dict):
        for key, inner in value.items():
            _flatten(f"{prefix}.{key}" if prefix else key, inner, into)
    elif isinstance(value, torch.Tensor):
        into[prefix] = value.detach().to("cpu", copy=True)


def _unflatten(call: Call, device: torch.device) -> dict:
    arguments: dict = {}
    for name, value in call.items():
        *parents, leaf = name.split(".")
        place = arguments
        for parent in parents:
            place = place.setdefault(parent, {})
        place[leaf] = value.to(device)
    return arguments


class Recorder:
    """Context: keeps the calls of `denoiser` whose position in the sampling loop is in `steps`."""

    def __init__(self, denoiser: nn.Module, *, steps: set[int]):
        self.denoiser, self.steps = denoiser, steps
        self.calls: list[Call] = []
        self._position = 0

    def __enter__(self):
        self._hook = self.denoiser.register_forward_hook(self._keep, with_kwargs=True)
        return self

    def __exit__(self, *_):
        self._hook.remove()

    def _keep(self, module, args, kwargs, output):
        if self._position in self.steps:
            call: Call = {}
            names = inspect.signature(module.forward).parameters
            _flatten("", dict(zip(names, args, strict=False)) | kwargs, call)
            _flatten(OUTPUT, output[0] if isinstance(output, tuple) else output.sample, call)
            self.calls.append(call)
        self._position += 1


@torch.no_grad()
def play_back(denoiser: nn.Module, call: Call, *, device: str) -> torch.Tensor:
    """The denoiser's output for a recorded call, on the CPU."""
    arguments = _unflatten({k: v for k, v in call.items() if k != OUTPUT}, torch.device(device))
    return denoiser(**arguments, return_dict=False)[0].cpu()


def evenly_spread(total: int, count: int) -> set[int]:
    """`count` positions of range(total), the middle of equal parts."""
    count = min(total, count)
    return {int((i + 0.5) * total / count) for i in range(count)}
