"""Which scheme every layer of a denoiser gets from a configuration, and which layers stay in 16 bit."""

import json
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from vqdm.codecs.cards import CODECS
from vqdm.codecs.codec import Harm
from vqdm.config.codecs import QuantizeConfig
from vqdm.errors import UserError
from vqdm.models.specs import LayerSpec, layer_specs, skipped_specs
from vqdm.weights.base import Scheme
from vqdm.weights.bits import BitCounts, count_bits
from vqdm.weights.layers import swap_empty


@dataclass(frozen=True)
class Assignment:
    """Every Linear and Conv2d of a denoiser, in module order: with its scheme, or with the reason why it has none."""

    quantized: list[tuple[LayerSpec, Scheme]]
    skipped: list[tuple[LayerSpec, str]]

    @property
    def specs(self) -> list[LayerSpec]:
        return [spec for spec, _ in self.quantized]


def assign_schemes(
    denoiser: nn.Module,
    config: QuantizeConfig,
    *,
    pattern: str | None,
    min_size: int,
    harm: Harm | None = None,
) -> Assignment:
    """The schemes that `config` asks for. UserError where bits leave no room, or the pattern finds no layer.

    pattern: None is the one that goes with the denoiser's class.
    harm: of every layer that a trellis can hold; gives each its own bits. None: the same for all, in as many bytes.
    """
    specs = layer_specs(denoiser, pattern=pattern, min_size=min_size)
    skipped = skipped_specs(denoiser, pattern=pattern, min_size=min_size)
    if not specs:
        raise UserError(
            f"model.layers={pattern or 'null'} selects no layer of {type(denoiser).__name__}: give a regular "
            "expression that finds names of its Linear or Conv2d layers"
        )
    found = CODECS[config.kind].schemes(specs, config, harm)
    quantized = [(spec, found[spec.name]) for spec in specs if not isinstance(found[spec.name], str)]
    unfit = [(spec, found[spec.name]) for spec in specs if isinstance(found[spec.name], str)]
    return Assignment(quantized, skipped + unfit)


def read_harm(directory: Path) -> Harm:
    """What the sensitivity stage measured; bits count scales and rates, harm is squared error of the output."""
    content = json.loads((directory / "harm.json").read_text())
    return {layer: {float(bits): harm for bits, harm in points.items()} for layer, points in content.items()}


def planned_bits(denoiser: nn.Module, config: QuantizeConfig, *, pattern: str | None, min_size: int) -> BitCounts:
    """What the quantized denoiser will take, from its shapes alone: `denoiser` is on the meta device, and changed.

    UserError, with the layer's name, where the scheme does not fit a layer.
    """
    swap_empty(denoiser, assign_schemes(denoiser, config, pattern=pattern, min_size=min_size).quantized)
    return count_bits(denoiser)
