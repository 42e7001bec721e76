"""Operators of a U-Net that can go: residual units, attentions, feed-forwards, whole transformers.

Each is a branch beside an identity, so that the rest computes on without it (LD-Pruner, arXiv 2404.11936). Names are
those of the original model; of a residual unit the shortcut stays, as shapes need it.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from vqdm.errors import UserError
from vqdm.weights.layers import replace_layer

PARTS = ("attn1", "attn2", "ff")  # of a BasicTransformerBlock


class Nothing(nn.Module):
    """A branch that adds nothing."""

    def forward(self, hidden_states: Tensor, *_, **__) -> Tensor:
        return hidden_states.new_zeros(()).expand_as(hidden_states)


class Through(nn.Module):
    """A transformer that gives what it gets."""

    def forward(self, hidden_states: Tensor, *_, **__) -> tuple[Tensor]:
        return (hidden_states,)


class Shortcut(nn.Module):
    """What is left of a residual unit: x, or its 1×1 convolution, over the unit's output scale."""

    def __init__(self, unit: nn.Module):
        super().__init__()
        self.in_channels, self.out_channels = unit.in_channels, unit.out_channels
        self.conv_shortcut, self.output_scale_factor = unit.conv_shortcut, unit.output_scale_factor

    def forward(self, input_tensor: Tensor, *_, **__) -> Tensor:
        hidden = input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor.contiguous())
        return hidden / self.output_scale_factor


GONE = (Nothing, Through, Shortcut)


def operators(unet: nn.Module) -> dict[str, int]:
    """{name: parameters} of every operator that can go, in module order. UserError for what is no U-Net."""
    if type(unet).__name__ != "UNet2DConditionModel":
        raise UserError(f"prune=operators is for U-Nets, and {type(unet).__name__} is none: leave prune=none")
    found = {}
    for name, module in unet.named_modules():
        kind = type(module).__name__
        if kind == "Transformer2DModel" or (kind == "ResnetBlock2D" and not (module.up or module.down)):
            found[name] = _parameters(module) - _parameters(getattr(module, "conv_shortcut", None))
        elif kind == "BasicTransformerBlock":
            parts = ((f"{name}.{part}", getattr(module, part, None)) for part in PARTS)
            found |= {path: _parameters(part) for path, part in parts if not isinstance(part, (*GONE, type(None)))}
    return found


def _parameters(module: nn.Module | None) -> int:
    return 0 if module is None else sum(parameter.numel() for parameter in module.parameters())


def without(module: nn.Module) -> nn.Module:
    """What takes the place of an operator."""
    kind = type(module).__name__
    if kind == "ResnetBlock2D":
        return Shortcut(module)
    return Through() if kind == "Transformer2DModel" else Nothing()


@torch.no_grad()
def remove(unet: nn.Module, names: Iterable[str]) -> nn.Module:
    """Take operators out in place; returns the U-Net. UserError, naming it, for what is no operator of this one."""
    for name in names:
        if name not in operators(unet):
            raise UserError(f"{name} is no operator of this {type(unet).__name__} that could be taken out")
        module = unet.get_submodule(name)
        replace_layer(unet, name, without(module).train(module.training))
    return unet


def removed_operators(denoiser: nn.Module) -> list[str]:
    """Names of the operators that are gone, in module order."""
    return [name for name, module in denoiser.named_modules() if isinstance(module, GONE)]


def inside(name: str, others: Iterable[str]) -> bool:
    """True if an operator is a part of one of the others."""
    return any(name.startswith(f"{other}.") for other in others)


def choose(scores: dict[str, float], weights: dict[str, int], *, least: float) -> list[str]:
    """The operators of the lowest scores that together have at least so many weights, in the order of `weights`.

    A whole transformer takes the place of its parts. UserError if all together have fewer.
    """
    chosen: list[str] = []
    for name in sorted(scores, key=lambda name: (scores[name], name)):
        if sum(weights[one] for one in chosen) >= least:
            break
        if not inside(name, chosen):
            chosen = [one for one in chosen if not inside(one, [name])] + [name]
    if (total := sum(weights[one] for one in chosen)) < least:
        raise UserError(f"prune.share asks for {least:,.0f} weights, and all operators have {total:,}: give less")
    return [name for name in weights if name in chosen]


def listed(names: object) -> Sequence[str]:
    """Names of operators from JSON; UserError if they are none."""
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise UserError(f"removed operators are a list of names, not {str(names)[:80]!r}: config.json is damaged")
    if len(set(names)) != len(names):
        raise UserError("an operator is removed twice: config.json is damaged")
    return list(names)
