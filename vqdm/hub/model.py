"""The class of a diffusers model with quantized layers: its own, with what saving, casting and LoRA need added."""

import copyreg
import functools
import inspect
import sys
from pathlib import Path

import torch
from torch import nn

from vqdm.errors import UserError
from vqdm.hub.card import CARD_FILE, model_card
from vqdm.runs.files import atomic_write
from vqdm.weights.base import NOT_MERGED
from vqdm.weights.layers import NOT_CAST, quantized_layers

NO_DORA = "DoRA needs the weights themselves, which are codes here: take a plain LoRA (use_dora=False), or dequantize()"
_COPIERS = ("from_unet", "from_unet2d", "from_transformer")  # of ControlNets and motion models of diffusers


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


def _lora_methods(kind: type) -> list:
    """The methods by which adapters come and go: a LoRA beside the codes is welcome, what changes weights is not."""

    def fuse_lora(self, *args, **kwargs):
        """Raise UserError before anything is fused or scaled; a LoRA on other layers only can be fused."""
        if any(name.endswith(".base_layer") for name in quantized_layers(self)):
            raise UserError(NOT_MERGED)
        kind.fuse_lora(self, *args, **kwargs)

    def add_adapter(self, adapter_config, *args, **kwargs):
        """Add an adapter of peft. UserError for DoRA, which needs the weights themselves."""
        if getattr(adapter_config, "use_dora", False):
            raise UserError(NO_DORA)
        kind.add_adapter(self, adapter_config, *args, **kwargs)

    def load_lora_adapter(self, *args, **kwargs):
        """Load a LoRA. UserError for DoRA, which peft finds to be one by its tensors only when it meets a weight."""
        try:
            return kind.load_lora_adapter(self, *args, **kwargs)
        except TypeError as error:
            if "nn.Parameter" in str(error):
                raise UserError(NO_DORA) from error
            raise

    return [fuse_lora, add_adapter, load_lora_adapter]


def _watched_members(kind: type) -> dict:
    """Members by which a mistake shows early: `config`, and `forward` of U-Nets (transformers cast what they get)."""

    @functools.wraps(kind.forward)
    def forward(self, sample, timestep, encoder_hidden_states, *args, **kwargs):
        """Run the model. UserError for captions in another dtype, which would fail in a matrix product deep inside."""
        texts, own = getattr(encoder_hidden_states, "dtype", self.dtype), self.dtype
        if texts != own and not torch.is_autocast_enabled(sample.device.type):
            raise UserError(
                f"the captions come in {texts} and the {kind.__name__} computes in {own}: load the whole pipeline with "
                f"dtype={own}, or cast the text encoders (pipeline.text_encoder.to({own}))"
            )
        return kind.forward(self, sample, timestep, encoder_hidden_states, *args, **kwargs)

    @property
    def config(self):
        """The options of the model. UserError for those who go by them to copy weights into another model."""
        if torch.compiler.is_compiling():  # it cannot trace what looks at frames
            return self._internal_dict
        if (caller := sys._getframe(1).f_code.co_name) in _COPIERS:
            raise UserError(
                f"{caller} copies weights as they are, and these are codes: give it copy.deepcopy(model).dequantize()"
            )
        return self._internal_dict

    reads_captions = "encoder_hidden_states" in inspect.signature(kind.forward).parameters
    return {"config": config} | ({"forward": forward} if "UNet" in kind.__name__ and reads_captions else {})


def _write_card(model: nn.Module, directory) -> None:
    metrics, base = model.hf_quantizer.quantization_config.metrics, model.config.get("_name_or_path") or None
    atomic_write(Path(directory) / CARD_FILE, model_card(model, metrics=metrics, base=base).encode())


@functools.cache
def _quantized_class(kind: type) -> type:
    """A subclass of a diffusers model class, with its name, that also saves a card and refuses what codes cannot bear.

    Attributes of the instance would tie it into a reference cycle that holds its memory until the next collection.
    """

    @functools.wraps(kind.save_pretrained)
    def save_pretrained(self, save_directory, is_main_process=True, *args, **kwargs):
        kind.save_pretrained(self, save_directory, is_main_process, *args, **kwargs)
        if is_main_process:
            _write_card(self, save_directory)

    def _upload_folder(self, working_dir, *args, **kwargs):
        """Upload what `push_to_hub` has saved, with our card in the place of the empty one of diffusers."""
        _write_card(self, working_dir)
        return kind._upload_folder(self, working_dir, *args, **kwargs)

    def enable_layerwise_casting(self, *args, **kwargs):
        """Raise UserError: codes cannot be cast, and scales in 8 bits would change."""
        raise UserError(NOT_CAST)

    def to(self, *args, **kwargs):
        """Move the model.

        Takes a dtype too, which diffusers refuses for quantized models but `from_pipe` always gives.
        """
        dtype = next((value for value in (*args, kwargs.get("dtype")) if isinstance(value, torch.dtype)), None)
        if dtype is not None and dtype.itemsize < 2:
            raise UserError(NOT_CAST)
        cast = "dtype" in kwargs or dtype is not None
        return nn.Module.to(self, *args, **kwargs) if cast else kind.to(self, *args, **kwargs)

    methods = (save_pretrained, _upload_folder, enable_layerwise_casting, to, *_lora_methods(kind))
    own = {method.__name__: method for method in methods if hasattr(kind, method.__name__)} | _watched_members(kind)
    return _SameKind(kind.__name__, (kind,), {"__module__": kind.__module__, "__qualname__": kind.__qualname__} | own)
