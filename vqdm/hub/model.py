"""The class of a diffusers model with quantized layers: its own, with what saving, casting and LoRA need added."""

import copyreg
import functools
from pathlib import Path

import torch
from torch import nn

from vqdm.errors import UserError
from vqdm.hub.card import CARD_FILE, model_card
from vqdm.runs.files import atomic_write
from vqdm.weights.base import NOT_MERGED
from vqdm.weights.layers import quantized_layers


def become_quantized(model: nn.Module) -> None:
    if not isinstance(type(model), _SameKind):
        model.__class__ = _quantized_class(type(model))


def become_plain(model: nn.Module) -> None:
    model.__class__ = type(model).__mro__[1]


class _SameKind(type):
    """Metaclass of a class that passes for its base: `from_pipe` compares types, and pickle stores the base."""

    def __eq__(cls, other: object) -> bool:
        return cls is other or cls.__mro__[1] is other

    def __hash__(cls) -> int:
        return hash(cls.__mro__[1])


copyreg.pickle(_SameKind, lambda kind: (_quantized_class, (kind.__mro__[1],)))


@functools.cache
def _quantized_class(kind: type) -> type:
    """A subclass of a diffusers model class, with its name, that also saves a card and refuses what codes cannot bear.

    Attributes of the instance would tie it into a reference cycle that holds its memory until the next collection.
    """

    @functools.wraps(kind.save_pretrained)
    def save_pretrained(self, save_directory, is_main_process=True, *args, **kwargs):
        kind.save_pretrained(self, save_directory, is_main_process, *args, **kwargs)
        if is_main_process:
            metrics = self.hf_quantizer.quantization_config.metrics
            base = self.config.get("_name_or_path") or None
            atomic_write(Path(save_directory) / CARD_FILE, model_card(self, metrics=metrics, base=base).encode())

    def fuse_lora(self, *args, **kwargs):
        """Raise UserError before anything is fused or scaled; a LoRA on other layers only can be fused."""
        if any(name.endswith(".base_layer") for name in quantized_layers(self)):
            raise UserError(NOT_MERGED)
        kind.fuse_lora(self, *args, **kwargs)

    def enable_layerwise_casting(self, *args, **kwargs):
        """Raise UserError: codes cannot be cast, and scales in 8 bits would change."""
        raise UserError("layerwise casting would round the scales of quantized weights: leave it out, or dequantize()")

    def to(self, *args, **kwargs):
        """Move the model.

        Takes a dtype too, which diffusers refuses for quantized models but `from_pipe` always gives.
        """
        cast = "dtype" in kwargs or any(isinstance(argument, torch.dtype) for argument in args)
        return nn.Module.to(self, *args, **kwargs) if cast else kind.to(self, *args, **kwargs)

    methods = (save_pretrained, fuse_lora, enable_layerwise_casting, to)
    own = {method.__name__: method for method in methods if hasattr(kind, method.__name__)}
    return _SameKind(kind.__name__, (kind,), {"__module__": kind.__module__, "__qualname__": kind.__qualname__} | own)
