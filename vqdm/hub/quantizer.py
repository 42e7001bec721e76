"""vqdm as a quantization method of diffusers: what makes `from_pretrained` and `save_pretrained` work.

`register()` adds it to diffusers' tables; `import vqdm` sees to that. A checkpoint's config.json names scheme and
shape of every quantized layer under `quantization_config`; its safetensors files say the same and hold the checksums.
"""

import copyreg
import enum
import functools
import inspect
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import Tensor, nn

from vqdm.atomic import atomic_write, canonical_json
from vqdm.config import parse_scheme
from vqdm.errors import UserError
from vqdm.hub.card import CARD_FILE, model_card
from vqdm.hub.checkpoint import (
    FORMAT_VERSION,
    Contents,
    LayerGroup,
    check_version,
    layer_groups,
    read_contents,
    round_to_stored_,
    stored_with_metadata,
)
from vqdm.layers import DECODE_MODES, dequantize_layers, quantized_layers, swap_empty
from vqdm.models.specs import layer_specs
from vqdm.weights.base import NOT_MERGED

METHOD = "vqdm"


_OWN_OPTIONS = ("quantization_config", "_pre_quantization_dtype")  # of a quantized model's config, kept by diffusers


class _Method(enum.StrEnum):
    VQDM = METHOD


class VQDMConfig(QuantizationConfigMixin):
    """How a denoiser is, or shall be, quantized.

    scheme: of data-free quantization while loading, such as `trellis3`, `rtn4`, `3x8g8`; layers: a regular expression
    of those to quantize; None: those that go with the model's class.
    groups: what a saved checkpoint says: its quantized layers. decode: `per_call` or `cached`, of all layers.
    options: those that the model was built with when it was quantized, which config.json says too, unprotected.
    metrics: what is known of the model, for its card.
    """

    def __init__(
        self,
        scheme: str | None = None,
        *,
        groups: Sequence[dict] | None = None,
        version: int = FORMAT_VERSION,
        layers: str | None = None,
        decode: str = "per_call",
        options: dict | None = None,
        metrics: dict[str, float] | None = None,
        **others: object,
    ):
        check_version("quantization_config", version)
        if (scheme is None) == (groups is None):
            raise UserError("VQDMConfig takes a scheme, such as VQDMConfig('trellis3'), or the groups of a checkpoint")
        if scheme is not None:
            parse_scheme(scheme)
            if strange := sorted(set(others) - {"quant_method"}):  # of a checkpoint, a later vqdm's may be there
                raise UserError(f"VQDMConfig knows no {strange[0]}: it takes scheme, layers and decode")
        if decode not in DECODE_MODES:
            raise UserError(f"decode must be one of {', '.join(DECODE_MODES)}, not {decode!r}")
        for name, value in (("metrics", metrics), ("options", options)):
            if value is not None and not isinstance(value, dict):
                raise UserError(f"{name} of a quantization_config are values by name, not {str(value)[:80]!r}")
        self.quant_method = _Method.VQDM
        self.version = version
        self.scheme = scheme
        self.groups = None if groups is None else [group.to_dict() for group in _groups(groups)]
        self.layers = layers
        self.decode = decode
        self.options = dict(options or {})
        self.metrics = dict(metrics or {})

    def layer_groups(self) -> tuple[LayerGroup, ...]:
        return tuple(LayerGroup.from_dict(group) for group in self.groups or ())

    def to_dict(self) -> dict:
        """As config.json has it: how the layers decode is up to who loads."""
        fields = {"quant_method": METHOD, "version": self.version, "options": self.options}
        fields |= {"metrics": self.metrics} if self.metrics else {}
        return fields | ({"scheme": self.scheme} if self.groups is None else {"groups": self.groups})

    def to_diff_dict(self) -> dict:
        """What the base class prints."""
        return self.to_dict()

    def __repr__(self) -> str:
        return f"VQDMConfig({self.scheme or f'{sum(len(group.layers) for group in self.layer_groups())} layers'})"


def _groups(found: Sequence[dict]) -> list[LayerGroup]:
    """UserError unless these are groups of quantized layers, no layer in two."""
    if not isinstance(found, list | tuple):
        raise UserError(f"groups of a quantization_config are a list, not {str(found)[:80]!r}: config.json is damaged")
    groups = [LayerGroup.from_dict(group) for group in found]
    names = [name for group in groups for name in group.layers]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"layer {twice} is in two groups of a quantization_config: config.json is damaged")
    return groups


def options_of(model: nn.Module) -> dict:
    """The options that a diffusers model was built with, as plain JSON."""
    names = inspect.signature(type(model).__init__).parameters
    return json.loads(canonical_json({name: model.config[name] for name in names if name in model.config}))


def check_options(model: nn.Module, saved: dict) -> None:
    """UserError, naming it, if an option is not what it was; one that only another diffusers has is let be."""
    for name, value in options_of(model).items():
        if name in saved and saved[name] != value:
            raise UserError(
                f"the config.json of this {type(model).__name__} says {name}={str(value)[:80]}, and that it was "
                f"quantized with {name}={str(saved[name])[:80]}: it is damaged or of another model"
            )


class VQDMQuantizer(DiffusersQuantizer):
    """What diffusers asks while it loads or saves a quantized model."""

    required_packages = None

    def __init__(self, quantization_config: VQDMConfig, **kwargs):
        super().__init__(quantization_config, **kwargs)
        self._contents: Contents | None = None

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype:
        """float32 is diffusers' default; left at None, scales would stay in fp16 beside a model in float32."""
        return torch.float32 if torch_dtype is None else torch_dtype

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        if not self.pre_quantized:
            return loaded_keys
        self._contents = read_contents([Path(file) for file in checkpoint_files])
        self._contents.check_groups(self.quantization_config.layer_groups())
        return list(self._contents.names)

    def _process_model_before_weight_loading(self, model: nn.Module, **_) -> None:
        if not self.pre_quantized:
            return
        config = self.quantization_config
        check_options(model, config.options)
        empty_layers(model, config.layer_groups(), decode=config.decode)
        state = model.state_dict()
        self._contents.check_names(state)
        self._contents.check_shapes(state)

    def maybe_update_state_dict(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.pre_quantized:
            self._contents.check_tensors(state_dict)
        return state_dict

    def _process_model_after_weight_loading(self, model: nn.Module, **_) -> nn.Module:
        self._contents = None
        if not self.pre_quantized:
            from vqdm.encode import quantize_without_data  # all codecs: loading what is quantized needs none

            asked, dtype = self.quantization_config, model.dtype
            quantize_without_data(model, parse_scheme(asked.scheme), pattern=asked.layers, decode=asked.decode)
            round_to_stored_(model)
            nn.Module.to(model, dtype=dtype)
            self.quantization_config = config_of(model, decode=asked.decode)
            self.pre_quantized = True
        _quantized(model, self)
        return model

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Tensor], safe_serialization: bool = False
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        if not safe_serialization:
            raise UserError("vqdm saves safetensors only: leave safe_serialization=True")
        adapter = next((name for name in state_dict if ".base_layer." in name), None)
        if adapter is not None:
            raise UserError(f"{adapter.partition('.base_layer.')[0]} carries a LoRA: unload it, then save")
        return stored_with_metadata(state_dict, self.quantization_config.layer_groups())

    def _dequantize(self, model: nn.Module) -> nn.Module:
        dequantize_layers(model)
        model.__class__ = type(model).__mro__[1]
        own = {key: value for key, value in model.config.items() if key not in _OWN_OPTIONS}
        model._internal_dict = type(model.config)(own)
        model.__dict__.pop("quantization_method", None)
        return model

    @property
    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def empty_layers(model: nn.Module, groups: Sequence[LayerGroup], *, decode: str = "per_call") -> None:
    """Put empty quantized layers where a full-precision model has others, as `groups` say. UserError if it cannot."""
    specs = {spec.name: spec for spec in layer_specs(model, pattern=".", min_size=1)}
    for group in groups:
        for name in group.layers:
            if name not in specs:
                raise UserError(f"the checkpoint has a quantized layer {name}, which {type(model).__name__} lacks")
            shape = tuple(model.get_submodule(name).weight.shape)
            if shape != group.shape:
                raise UserError(f"layer {name} is {list(shape)} in the model and {list(group.shape)} in the checkpoint")
    _check_shared(groups)
    named = {name: group.scheme for group in groups for name in group.layers}
    order = [name for name, _ in model.named_modules() if name in named]
    swap_empty(model, [(specs[name], named[name]) for name in order], decode=decode)


def _check_shared(groups: Sequence[LayerGroup]) -> None:
    """UserError for schemes that cannot decode with one shared part though they name the same."""
    users: dict[str, tuple] = {}
    for scheme in (group.scheme for group in groups if group.scheme.shared_key is not None):
        part = scheme.kind, getattr(scheme, "codebooks_shape", None)
        if users.setdefault(scheme.shared_key, part) != part:
            raise UserError(f"{scheme.name} cannot decode with the shared {scheme.shared_key} of other layers")


def attach(model: nn.Module, *, decode: str = "per_call", metrics: dict[str, float] | None = None) -> None:
    """Make a diffusers model whose layers are quantized one that diffusers' save_pretrained writes as such.

    All its floats are rounded to 16 bit, as they are stored.
    """
    round_to_stored_(model)
    config = config_of(model, decode=decode, metrics=metrics)
    model.hf_quantizer = VQDMQuantizer(config, pre_quantized=True)
    model.is_quantized, model.quantization_method = True, config.quant_method
    _quantized(model, model.hf_quantizer)


def config_of(model: nn.Module, *, decode: str, metrics: dict[str, float] | None = None) -> VQDMConfig:
    """What a model with quantized layers says of itself."""
    groups = [group.to_dict() for group in layer_groups(model)]
    return VQDMConfig(groups=groups, options=options_of(model), decode=decode, metrics=metrics)


def _quantized(model: nn.Module, quantizer: VQDMQuantizer) -> None:
    model.register_to_config(quantization_config=quantizer.quantization_config)
    if not isinstance(type(model), _SameKind):
        model.__class__ = _with_card(type(model))


class _SameKind(type):
    """Of a class that passes for its base, as diffusers' `from_pipe` compares types; pickled by its base, too."""

    def __eq__(cls, other: object) -> bool:
        return cls is other or cls.__mro__[1] is other

    def __hash__(cls) -> int:
        return hash(cls.__mro__[1])


copyreg.pickle(_SameKind, lambda kind: (_with_card, (kind.__mro__[1],)))


@functools.cache
def _with_card(kind: type) -> type:
    """A model class of diffusers, under its own name, that saves a model card too and refuses what codes cannot bear.

    An attribute of the model instead would tie it into a cycle that keeps its memory until the next collection.
    """

    @functools.wraps(kind.save_pretrained)
    def save_pretrained(self, save_directory, is_main_process=True, *args, **kwargs):
        kind.save_pretrained(self, save_directory, is_main_process, *args, **kwargs)
        if is_main_process:
            metrics = self.hf_quantizer.quantization_config.metrics
            base = self.config.get("_name_or_path") or None
            atomic_write(Path(save_directory) / CARD_FILE, model_card(self, metrics=metrics, base=base).encode())

    def fuse_lora(self, *args, **kwargs):
        """UserError before anything is fused or scaled; a LoRA of other layers alone can be fused."""
        if any(name.endswith(".base_layer") for name in quantized_layers(self)):
            raise UserError(NOT_MERGED)
        kind.fuse_lora(self, *args, **kwargs)

    def enable_layerwise_casting(self, *args, **kwargs):
        """UserError: codes are not cast, and scales in 8 bits would be others."""
        raise UserError("layerwise casting would round the scales of quantized weights: leave it out, or dequantize()")

    def to(self, *args, **kwargs):
        """With a dtype too, which diffusers refuses for quantized models: `from_pipe` always gives one."""
        cast = "dtype" in kwargs or any(isinstance(argument, torch.dtype) for argument in args)
        return nn.Module.to(self, *args, **kwargs) if cast else kind.to(self, *args, **kwargs)

    methods = (save_pretrained, fuse_lora, enable_layerwise_casting, to)
    own = {method.__name__: method for method in methods if hasattr(kind, method.__name__)}
    return _SameKind(kind.__name__, (kind,), {"__module__": kind.__module__, "__qualname__": kind.__qualname__} | own)


def register() -> None:
    """Add the method to diffusers' tables."""
    auto.AUTO_QUANTIZER_MAPPING[METHOD] = VQDMQuantizer
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = VQDMConfig


register()
