"""The layers of a denoiser that are quantized, and each one's weight as a matrix [out, in]."""

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from vqdm.config.options import layer_pattern
from vqdm.errors import UserError


@dataclass(frozen=True)
class ConvGeometry:
    """Arguments of F.conv2d besides the weight. padding: (rows, columns), "same" or "valid"."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int] | str
    dilation: tuple[int, int]
    groups: int
    padding_mode: str = "zeros"


@dataclass(frozen=True)
class LayerSpec:
    """Everything a codec's caller knows about a layer."""

    name: str  # the module's name in the denoiser
    kind: str  # "linear" | "conv" | "embedding"
    shape: tuple[int, int]  # the matrix: [out, in]; [out, kh·kw·in_channels] of a convolution, [tokens, width]
    conv: ConvGeometry | None = None
    split: int | None = None  # inputs that are the hidden state, where the others are a skip connection

    @property
    def size(self) -> int:
        """The number of weights."""
        return math.prod(self.shape)


def weight_to_matrix(weight: Tensor) -> Tensor:
    """A layer's weight as [out, in]: Linear as is; Conv2d [out, in, kh, kw] as [out, kh·kw·in], channels last.

    Consecutive inputs of a convolution are then channels at one kernel tap.
    """
    return weight if weight.ndim == 2 else weight.permute(0, 2, 3, 1).flatten(1)


def matrix_to_weight(matrix: Tensor, spec: LayerSpec) -> Tensor:
    """The inverse of `weight_to_matrix`: the weight for the layer of `spec`, contiguous in the default layout.

    A mere permutation would have channels_last layout, and F.conv2d would choose that for its output.
    """
    if spec.conv is None:
        return matrix
    out, taps = matrix.shape[0], math.prod(spec.conv.kernel)
    rows = matrix.reshape(out, taps, -1).transpose(1, 2).reshape(out, -1)
    return rows.view(out, -1, *spec.conv.kernel)


def layer_specs(denoiser: nn.Module, *, pattern: str | None = None, min_size: int = 16) -> list[LayerSpec]:
    """The layers to quantize, in module order: every Linear and Conv2d whose name matches `pattern` (re.search).

    pattern: None takes the one for the denoiser's class (`layer_pattern`).
    Layers with fewer than `min_size` inputs (input channels) or outputs are left out. UserError for an invalid pattern.
    """
    return [spec for spec, reason in _specs(denoiser, pattern, min_size) if reason is None]


def skipped_specs(
    denoiser: nn.Module, *, pattern: str | None = None, min_size: int = 16
) -> list[tuple[LayerSpec, str]]:
    """Every Linear and Conv2d of the denoiser that stays in 16 bit, with the reason why."""
    return [(spec, reason) for spec, reason in _specs(denoiser, pattern, min_size) if reason is not None]


def _specs(denoiser: nn.Module, pattern: str | None, min_size: int) -> Iterator[tuple[LayerSpec, str | None]]:
    pattern = layer_pattern(type(denoiser).__name__, pattern)
    try:
        selected = re.compile(pattern)
    except re.error as error:
        raise UserError(f"the layer pattern is no regular expression: {pattern!r} ({error})") from error
    splits = shortcut_splits(denoiser)
    for name, module in denoiser.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            spec = dataclasses.replace(spec_of(name, module), split=splits.get(name))
            yield spec, _reason_to_skip(name, module, selected=selected, min_size=min_size)
        elif isinstance(module, nn.Embedding) and selected.search(name):
            yield LayerSpec(name, "embedding", tuple(module.weight.shape)), None


def shortcut_splits(denoiser: nn.Module) -> dict[str, int]:
    """The 1×1 convolutions that take a hidden state and a skip connection, joined, with the channels of the first.

    These are the shortcuts in the up blocks of a U-Net, where the hidden state comes from the residual unit before; the
    first of them follows the mid block, which has as many channels as the last down block.
    """
    if type(denoiser).__name__ != "UNet2DConditionModel":
        return {}
    splits, hidden = {}, 0
    for part in ("down_blocks", "up_blocks"):
        for name, unit in denoiser.get_submodule(part).named_modules(prefix=part):
            if type(unit).__name__ in ("ResnetBlock2D", "Shortcut"):  # the latter is what pruning leaves of the former
                if part == "up_blocks" and unit.conv_shortcut is not None and 0 < hidden < unit.in_channels:
                    splits[f"{name}.conv_shortcut"] = hidden
                hidden = unit.out_channels
    return splits


def spec_of(name: str, module: nn.Linear | nn.Conv2d) -> LayerSpec:
    """The spec of a layer that is not quantized yet."""
    weight = module.weight
    if isinstance(module, nn.Linear):
        return LayerSpec(name, "linear", tuple(weight.shape))
    geometry = ConvGeometry(
        kernel=module.kernel_size,
        stride=module.stride,
        padding=module.padding,
        dilation=module.dilation,
        groups=module.groups,
        padding_mode=module.padding_mode,
    )
    return LayerSpec(name, "conv", (weight.shape[0], weight[0].numel()), geometry)


def _reason_to_skip(name: str, module: nn.Module, *, selected: re.Pattern, min_size: int) -> str | None:
    if not selected.search(name):
        return "the pattern does not select it"
    if isinstance(module, nn.Conv2d) and module.groups != 1:
        return f"it is a convolution of {module.groups} groups"
    smallest = min(module.weight.shape[:2])
    if smallest < min_size:
        return f"min(in, out) is {smallest}, below {min_size}"
    if isinstance(module, nn.Conv2d) and module.padding_mode != "zeros":
        return f"it is a convolution with padding_mode {module.padding_mode}"
    return None


def group_of(layer: str) -> str:
    """The group of layers that one round of calibration serves: `down_blocks.1`, `mid_block` (the paper's seven)."""
    first, *others = layer.split(".")
    return f"{first}.{others[0]}" if others and others[0].isdigit() else first


def in_groups(specs: Iterable[LayerSpec]) -> list[list[LayerSpec]]:
    """The layers divided into their groups; groups and layers keep the order of `specs`."""
    groups: dict[str, list[LayerSpec]] = {}
    for spec in specs:
        groups.setdefault(group_of(spec.name), []).append(spec)
    return list(groups.values())
