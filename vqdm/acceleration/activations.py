"""Quantized inputs of layers, simulated: they are rounded to the grid of their bits and computed with as floats.

Dynamic scales come from each token (Linear) or position (Conv2d) alone, static ones from calibration. Neither depends
on other images in the batch. `vqdm/acceleration/products.py` has the products that are really of integers.
"""

import re
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqdm.config.acceleration import SCALES
from vqdm.errors import UserError
from vqdm.weights.layers import quantized_layers

INPUTS, SETTINGS = "inputs", "vqdm_activations"  # names of a layer's quantizer, and of a denoiser's settings
_TYPES = {"kind": str, "bits": int, "per": str, "block": int, "groups": int, "column_scales": bool}
LEAST = 1e-8  # scale of what is all zeros
ROUNDS = 50  # of Lloyd's algorithm


def rounded(values: Tensor, scales: Tensor, lows: Tensor, bits: int) -> Tensor:
    """Values on the grid of 2^bits steps from `low` on, low + s · clamp(round((x − low) / s)), in their own dtype."""
    steps = ((values - lows) / scales).round().clamp(0, 2**bits - 1)
    return (steps * scales + lows).to(values.dtype)


def token_grids(values: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Steps (max − min) / (2^bits − 1) and lowest values of the last dimension, fp32, kept as a dimension of one.

    From the least value on, not symmetric around 0: behind SiLU and GELU a symmetric grid wastes nearly a bit.
    """
    lows, highs = (end(-1, keepdim=True).float() for end in (values.amin, values.amax))
    return (highs - lows).clamp(min=LEAST) / (2**bits - 1), lows


class InputQuantizer(nn.Module):
    """Rounds what a layer reads. Channels are the last dimension of a Linear's input and the second of a Conv2d's."""

    def __init__(self, layer: nn.Module, *, bits: int, columns: bool):
        super().__init__()
        self.bits, self.conv = bits, isinstance(layer, nn.Conv2d)
        self.channels = layer.in_channels if self.conv else layer.in_features
        self._weight = (layer.weight,) if columns else None  # in a tuple, so that it is no part of this module
        self._factors: Tensor | None = None

    def forward(self, inputs: Tensor) -> Tensor:
        values = inputs.movedim(1, -1) if self.conv else inputs
        if self._weight is not None:
            factors = self._columns().to(values)
            values = self.quantized(values * factors) / factors
        else:
            values = self.quantized(values)
        return values.movedim(-1, 1) if self.conv else values

    def quantized(self, values: Tensor) -> Tensor:
        raise NotImplementedError

    def _columns(self) -> Tensor:
        if self._factors is None:
            self._factors = column_factors(self._weight[0], self.channels)
        return self._factors

    def _apply(self, fn, recurse=True):
        self._factors = None
        return super()._apply(fn, recurse)


class DynamicQuantizer(InputQuantizer):
    """Scales from every token, or from blocks of its channels, as they come."""

    def __init__(self, layer: nn.Module, *, bits: int, block: int | None, columns: bool = False):
        super().__init__(layer, bits=bits, columns=columns)
        self.block = block

    def quantized(self, values: Tensor) -> Tensor:
        if self.block is None:
            return rounded(values, *token_grids(values, self.bits), self.bits)
        missing = -values.shape[-1] % self.block
        blocks = F.pad(values, (0, missing)).unflatten(-1, (-1, self.block))
        found = rounded(blocks, *token_grids(blocks, self.bits), self.bits).flatten(-2)
        return found[..., : values.shape[-1]]

    def extra_repr(self) -> str:
        return f"{self.bits} bits, per {'token' if self.block is None else f'{self.block} channels'}"


class StaticQuantizer(InputQuantizer):
    """Asymmetric grids of groups of channels, known beforehand (DGQ, arXiv 2501.04304; one group: per tensor).

    scale, zero: [groups], the step and the smallest value; group: uint8 [channels].
    """

    def __init__(self, layer: nn.Module, *, bits: int, groups: int, columns: bool = False):
        super().__init__(layer, bits=bits, columns=columns)
        device = next(layer.parameters()).device
        self.register_buffer("scale", torch.ones(groups, device=device))
        self.register_buffer("zero", torch.zeros(groups, device=device))
        self.register_buffer("group", torch.zeros(self.channels, dtype=torch.uint8, device=device))

    @torch.no_grad()
    def fit(self, least: Tensor, most: Tensor) -> None:
        """Take the grids from the smallest and largest value of every channel [channels] that calibration saw."""
        group = grouped(torch.stack([least, most], 1), len(self.scale))
        low, high = torch.zeros(2, len(self.scale), device="cpu")
        for number in range(len(self.scale)):
            if (own := group == number).any():
                low[number], high[number] = least[own].min(), most[own].max()
        scale = ((high - low) / (2**self.bits - 1)).clamp(min=2.0**-14).half().float()
        for name, values in (("scale", scale), ("zero", low.half().float()), ("group", group)):
            buffer = getattr(self, name)
            buffer.copy_(values.to(buffer))

    def quantized(self, values: Tensor) -> Tensor:
        group = self.group.long()
        return rounded(values, self.scale.float()[group], self.zero.float()[group], self.bits)

    def extra_repr(self) -> str:
        return f"{self.bits} bits, {len(self.scale)} groups"


def grouped(points: Tensor, count: int) -> Tensor:
    """The group of every channel by k-means of its (min, max) [channels, 2]: int64 [channels].

    It starts from equal parts of the channels in the order of their spread, so that nothing is drawn; with as many
    groups as channels, or more, each has its own.
    """
    if count >= len(points):
        return torch.arange(len(points), device="cpu")
    order, points = (points[:, 1] - points[:, 0]).argsort(stable=True), points.double()
    group = torch.empty(len(points), dtype=torch.int64, device="cpu")
    group[order] = torch.arange(len(points), device="cpu") * count // len(points)
    centers = torch.zeros(count, 2, dtype=torch.float64, device="cpu")
    for _ in range(ROUNDS):
        for number in range(count):
            if (own := group == number).any():  # an empty group keeps its center
                centers[number] = points[own].mean(0)
        nearest = torch.cdist(points, centers).argmin(1)
        if torch.equal(nearest, group):
            break
        group = nearest
    return group


def column_factors(weight: nn.Module, channels: int) -> Tensor:
    """A code's own scales of its inputs, per channel [channels]: of a convolution the root mean square over its taps.

    A scale of 0, of a column that is all zeros, counts as 1. UserError for codes without such scales.
    """
    found = getattr(weight, "input_scales", None)
    if found is None and hasattr(weight, "factors"):
        *_, found = weight.factors()
    if found is None:
        raise UserError("activations.column_scales=true is for codes with scales of their inputs, such as trellis3")
    found = found.detach().float().view(-1, channels).square().mean(0).sqrt()
    return torch.where(found > 0, found, 1.0)


def layers_with_inputs(denoiser: nn.Module, *, pattern: str, min_size: int, keep: str | None) -> list[str]:
    """Names of the layers whose inputs are quantized: as those whose weights are, but for what `keep` matches."""
    found = []
    for name, module in denoiser.named_modules():
        if isinstance(module, nn.Conv2d):
            smallest, whole = min(module.in_channels, module.out_channels), module.groups == 1
        elif isinstance(module, nn.Linear):
            smallest, whole = min(module.in_features, module.out_features), True
        else:
            continue
        if whole and smallest >= min_size and re.search(pattern, name) and not (keep and re.search(keep, name)):
            found.append(name)
    return found


def _quantize_inputs(layer: nn.Module, args: tuple) -> tuple:
    return (layer.inputs(args[0]), *args[1:])


def add_quantizers(denoiser: nn.Module, names: Sequence[str], settings: dict) -> None:
    """Let layers read quantized inputs. settings: kind, bits, per, block, groups, column_scales, as in the options.

    UserError, naming it, for a layer that the denoiser lacks, and for codes without scales of their inputs.
    """
    if not names:
        raise UserError("activations: no layer's inputs would be quantized: mend activations.keep or model.layers")
    modules, coded = dict(denoiser.named_modules()), quantized_layers(denoiser)
    for name in names:
        layer = modules.get(name)
        if not isinstance(layer, nn.Linear | nn.Conv2d):
            raise UserError(f"the inputs of {name} are quantized, which is no layer of this {type(denoiser).__name__}")
        columns = settings["column_scales"] and name in coded
        quantizer = _quantizer(layer, settings, columns=columns)
        if columns and not any(parameter.is_meta for parameter in layer.weight.parameters()):
            column_factors(layer.weight, quantizer.channels)
        layer.add_module(INPUTS, quantizer)
        layer.register_forward_pre_hook(_quantize_inputs)
    setattr(denoiser, SETTINGS, settings | {"layers": list(names)})


def _quantizer(layer: nn.Module, settings: dict, *, columns: bool) -> InputQuantizer:
    bits, per = settings["bits"], settings["per"]
    if settings["kind"] == "dynamic":
        return DynamicQuantizer(layer, bits=bits, block=settings["block"] if per == "block" else None, columns=columns)
    return StaticQuantizer(layer, bits=bits, groups=settings["groups"] if per == "groups" else 1, columns=columns)


def settings_in(denoiser: nn.Module) -> dict | None:
    """What `add_quantizers` was given, the layers' names included; None if inputs are not quantized."""
    return denoiser.__dict__.get(SETTINGS)


def checked_settings(fields: object) -> dict:
    """Settings and layers from JSON, as `settings_in` gives them; UserError if they are none."""
    try:
        found = {name: fields[name] for name in (*_TYPES, "layers")}
    except (KeyError, TypeError) as error:
        raise UserError(f"activations of a quantization_config lack {error}: config.json is damaged") from error
    right = all(type(found[name]) is kind for name, kind in _TYPES.items())
    names = found["layers"]
    right = right and isinstance(names, list) and all(isinstance(name, str) for name in names)
    if not right or found["per"] not in SCALES.get(found["kind"], ()) or len(set(names)) != len(names):
        raise UserError(f"activations of a quantization_config are damaged: {str(found)[:120]}")
    if not 2 <= found["bits"] <= 8 or not 1 <= found["groups"] <= 256 or not 1 <= found["block"] <= 65_536:
        raise UserError(f"activations of a quantization_config have numbers out of range: {str(found)[:120]}")
    return found


def remove_quantizers(denoiser: nn.Module) -> None:
    """Let all layers read their inputs as they come again."""
    for name in input_quantizers(denoiser):
        layer = denoiser.get_submodule(name)
        delattr(layer, INPUTS)
        hooks = layer._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if hook is _quantize_inputs]:
            del hooks[key]
    denoiser.__dict__.pop(SETTINGS, None)


def input_quantizers(denoiser: nn.Module) -> dict[str, InputQuantizer]:
    """Layers with quantized inputs, by name."""
    found = {name: getattr(module, INPUTS, None) for name, module in denoiser.named_modules()}
    return {name: quantizer for name, quantizer in found.items() if isinstance(quantizer, InputQuantizer)}


class InputRanges:
    """Context that notes the smallest and largest input of every channel of layers: {name: (min, max)} [channels].

    The layers' static quantizers stand aside meanwhile.
    """

    def __init__(self, denoiser: nn.Module):
        self.quantizers = {n: q for n, q in input_quantizers(denoiser).items() if isinstance(q, StaticQuantizer)}
        self.found: dict[str, tuple[Tensor, Tensor]] = {}

    def __enter__(self):
        for name, quantizer in self.quantizers.items():
            quantizer.quantized = lambda values, name=name: self._seen(name, values)
        return self

    def __exit__(self, *_):
        for quantizer in self.quantizers.values():
            del quantizer.quantized

    def _seen(self, name: str, values: Tensor) -> Tensor:
        flat = values.detach().flatten(0, -2).float()
        least, most = flat.amin(0).cpu(), flat.amax(0).cpu()
        if name in self.found:
            least, most = torch.minimum(least, self.found[name][0]), torch.maximum(most, self.found[name][1])
        self.found[name] = least, most
        return values
