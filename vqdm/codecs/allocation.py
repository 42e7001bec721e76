"""The scheme that a configuration gives to each layer of a denoiser, and the layers that stay in 16 bit."""

import json
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from vqdm.codecs.cards import CODECS
from vqdm.codecs.codec import Harm
from vqdm.config.codecs import QuantizeConfig
from vqdm.config.options import ModelConfig
from vqdm.errors import UserError
from vqdm.models.specs import LayerSpec, layer_specs, skipped_specs
from vqdm.weights.base import Scheme
from vqdm.weights.bits import BitCounts, count_bits
from vqdm.weights.layers import swap_empty
from vqdm.weights.scalar import ScalarScheme

SHOWN = 4  # layers that a message names
MIN_SIZE = ModelConfig.min_size  # of layers in parts beside the denoiser


@dataclass(frozen=True)
class Assignment:
    """Every Linear and Conv2d of a denoiser, in module order, with its scheme or the reason why it has none."""

    quantized: list[tuple[LayerSpec, Scheme]]
    skipped: list[tuple[LayerSpec, str]]
    unfit: int = 0  # the last of the skipped: they were selected, but the codec cannot hold them

    @property
    def specs(self) -> list[LayerSpec]:
        return [spec for spec, _ in self.quantized]

    def exceptions(self, codec: str) -> str | None:
        """What selected layers take where it is not the codes of `codec`, in a line; None if all take them."""
        found = [f"{spec.name} takes {scheme.name}" for spec, scheme in self.quantized if scheme.codec != codec]
        unfit = self.skipped[len(self.skipped) - self.unfit :]
        found += [f"{spec.name} stays in 16 bit ({reason})" for spec, reason in unfit]
        more = f", and {len(found) - SHOWN} others" if len(found) > SHOWN else ""
        return f"not in {codec} codes: {', '.join(found[:SHOWN])}{more}" if found else None


def assign_schemes(
    denoiser: nn.Module,
    config: QuantizeConfig,
    *,
    pattern: str | None,
    min_size: int,
    harm: Harm | None = None,
) -> Assignment:
    """The schemes that `config` asks for. UserError if bits leave no room for codes, or if the pattern finds no layer.

    pattern: None takes the default for the denoiser's class.
    harm: measured for every layer that a trellis can hold, it gives each its own bits. None: the same for all, in the
    same number of bytes.
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
    return Assignment(quantized, skipped + unfit, len(unfit))


def assign_part(module: nn.Module, config: QuantizeConfig, *, embeddings: int) -> Assignment:
    """Schemes for a text encoder or VAE: those of `config`, and `embeddings` bits by row for token embeddings."""
    specs = layer_specs(module, min_size=MIN_SIZE)
    coded = [spec for spec in specs if spec.kind != "embedding"]
    found = CODECS[config.kind].schemes(coded, config, None)
    found |= {spec.name: ScalarScheme(bits=embeddings) for spec in specs if spec.kind == "embedding"}
    quantized = [(spec, found[spec.name]) for spec in specs if not isinstance(found[spec.name], str)]
    unfit = [(spec, found[spec.name]) for spec in specs if isinstance(found[spec.name], str)]
    return Assignment(quantized, skipped_specs(module, min_size=MIN_SIZE) + unfit)


def read_harm(directory: Path) -> Harm:
    """Read what the sensitivity stage measured; bits include scales and rates, harm is the output's squared error."""
    content = json.loads((directory / "harm.json").read_text())
    return {layer: {float(bits): harm for bits, harm in points.items()} for layer, points in content.items()}


def planned_bits(denoiser: nn.Module, config: QuantizeConfig, *, pattern: str | None, min_size: int) -> BitCounts:
    """Bits that the quantized denoiser will take, from shapes alone: `denoiser` is on the meta device, and is changed.

    UserError, with the layer's name, if the scheme does not fit a layer.
    """
    swap_empty(denoiser, assign_schemes(denoiser, config, pattern=pattern, min_size=min_size).quantized)
    return count_bits(denoiser)
