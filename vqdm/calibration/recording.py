"""Record a denoiser's calls while a pipeline samples, and play them back to another denoiser.

A call is kept with all its arguments by keyword, so the same code serves every architecture.
"""

import inspect
import json

import torch
from torch import nn

from vqdm.errors import UserError
from vqdm.models.finite import check_call

Call = dict[str, torch.Tensor]  # "sample", "timestep", "encoder_hidden_states", "added_cond_kwargs.text_embeds", …
OUTPUT = "output"
LATENTS = ("sample", "hidden_states")  # the names of the latents in U-Nets and in transformers
PLAIN = "plain"  # uint8: JSON of the arguments that are neither tensors nor dicts of tensors only, made by `_described`
_NOT_KEPT = ("return_dict",)


class Recorder:
    """Context that keeps the calls of `denoiser` whose position in the sampling loop is in `steps`.

    UserError, with its name, for an argument that cannot be kept. Kept are tensors, None, numbers, text, and lists,
    tuples and dicts of these.
    """

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
            call = record_call(module, args, kwargs)
            call[OUTPUT] = _kept(output[0] if isinstance(output, tuple) else output.sample)
            check_call(call, denoiser=type(module).__name__)
            self.calls.append(call)
        self._position += 1


def record_call(denoiser: nn.Module, args: tuple, kwargs: dict) -> Call:
    """The arguments of one call by name, leaving out those that are None and are so by default."""
    parameters = inspect.signature(denoiser.forward).parameters
    call: Call = {}
    plain: dict = {}
    for name, value in (dict(zip(parameters, args, strict=False)) | kwargs).items():
        is_default = value is None and name in parameters and parameters[name].default is None
        if name in _NOT_KEPT or is_default:
            continue
        if name in (OUTPUT, PLAIN):
            raise UserError(
                f"{type(denoiser).__name__} takes an argument {name!r}: that name is taken in a recorded call"
            )
        described = _described(name, value, call, denoiser)
        if not _is_tensors(value):
            plain[name] = described
    if plain:
        text = json.dumps(plain, separators=(",", ":"), sort_keys=True)
        call[PLAIN] = torch.tensor(list(text.encode()), dtype=torch.uint8, device="cpu")
    return call


def _is_tensors(value) -> bool:
    """True for a tensor, or a non-empty dict of such values: names alone then tell how to put it together again."""
    if isinstance(value, dict):
        return bool(value) and all(map(_is_tensors, value.values()))
    return isinstance(value, torch.Tensor)


def _described(name: str, value, into: Call, denoiser: nn.Module) -> dict:
    """A JSON description from which the value can be remade, {its kind: its content}.

    The value's tensors go `into` the call.
    """
    if isinstance(value, torch.Tensor):
        into[name] = _kept(value)
        return {"tensor": name}
    if type(value) in (bool, int, float, str, type(None)):
        return {"value": value}
    if type(value) in (list, tuple):
        parts = [_described(f"{name}.{i}", inner, into, denoiser) for i, inner in enumerate(value)]
        return {type(value).__name__: parts}
    if isinstance(value, dict) and all(isinstance(key, str) and "." not in key for key in value):
        return {"dict": {key: _described(f"{name}.{key}", inner, into, denoiser) for key, inner in value.items()}}
    raise UserError(
        f"{type(denoiser).__name__} is called with {name} of type {type(value).__name__}, which cannot be recorded: "
        "this model cannot be calibrated"
    )


def _kept(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def _made(described: dict, tensors: Call, device: torch.device):
    """Remake a value from its description: the inverse of `_described`."""
    ((kind, content),) = described.items()
    if kind == "tensor":
        return tensors[content].to(device, copy=True)
    if kind == "value":
        return content
    if kind == "dict":
        return {key: _made(inner, tensors, device) for key, inner in content.items()}
    parts = [_made(inner, tensors, device) for inner in content]
    return tuple(parts) if kind == "tuple" else parts


def call_arguments(call: Call, *, device: str | torch.device) -> dict:
    """The keyword arguments from which a call was recorded, on a device.

    Tensors are copies: those of a file lie at odd addresses, for which CPU kernels give other last bits.
    """
    plain = json.loads(bytes(call[PLAIN].tolist())) if PLAIN in call else {}
    arguments: dict = {name: _made(described, call, device) for name, described in plain.items()}
    for name, value in call.items():
        first, *others = name.split(".")
        if first in (OUTPUT, PLAIN) or first in plain:
            continue
        *parents, leaf = first, *others
        place = arguments
        for parent in parents:
            place = place.setdefault(parent, {})
        place[leaf] = value.to(device, copy=True)
    return arguments


def in_fp32(call: Call) -> Call:
    """The call with floats in fp32, whatever dtype it was recorded in."""
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in call.items()}


@torch.no_grad()
def play_back(denoiser: nn.Module, call: Call, *, device: str) -> torch.Tensor:
    """The denoiser's output for a recorded call, on the CPU."""
    return play(denoiser, call_arguments(call, device=device)).cpu()


def play(denoiser: nn.Module, arguments: dict) -> torch.Tensor:
    """The denoiser's output for arguments by name, on its device."""
    return denoiser(**arguments, return_dict=False)[0]


def evenly_spread(total: int, count: int) -> set[int]:
    """`count` positions of range(total), each in the middle of one of `count` equal parts."""
    count = min(total, count)
    return {int((i + 0.5) * total / count) for i in range(count)}
