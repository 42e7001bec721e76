"""vqdm as a quantization method of diffusers, which makes `from_pretrained` and `save_pretrained` work.

`register()` adds it to diffusers' tables; `import vqdm` sees to that. A checkpoint's config.json gives scheme and
shape of every quantized layer under `quantization_config`; its safetensors files repeat them and add checksums.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from torch import Tensor, nn

from vqdm.acceleration.activations import add_quantizers, remove_quantizers
from vqdm.acceleration.operators import remove
from vqdm.acceleration.stored_cache import CACHE_NAME, store_cache
from vqdm.config.codecs import parse_scheme
from vqdm.errors import UserError
from vqdm.hub.checkpoint import Contents, LayerGroup, is_plain, read_contents, round_to_stored_, stored_with_metadata
from vqdm.hub.config import METHOD, VQDMConfig, check_options, config_of
from vqdm.hub.model import become_plain, become_quantized
from vqdm.models.specs import layer_specs
from vqdm.weights.layers import dequantize_layers, quantized_layers, swap_empty

_OWN_OPTIONS = ("quantization_config", "_pre_quantization_dtype")  # diffusers keeps these in a quantized model's config


class VQDMQuantizer(DiffusersQuantizer):
    """The answers that diffusers needs while it loads or saves a quantized model.

    plain: the model's config says that it is quantized, and its weights are not: it is loaded as what it is.
    """

    plain = False
    required_packages = None

    def __init__(self, quantization_config: VQDMConfig, **kwargs):
        super().__init__(quantization_config, **kwargs)
        self.pre_quantized = quantization_config.groups is not None  # from_single_file does not say
        self._contents: Contents | None = None

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype:
        """The model's dtype, by default float32 as in diffusers.

        None would leave scales in fp16 beside a float32 model.
        """
        return torch.float32 if torch_dtype is None else torch_dtype

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        files = [Path(file) for file in checkpoint_files]
        if self.pre_quantized and is_plain(files):  # saved from the config of a quantized model, as EMA copies are
            self.pre_quantized, self.plain = False, True
        if not self.pre_quantized:
            return loaded_keys
        self._contents = read_contents(files)
        self._contents.check_groups(self.quantization_config.layer_groups(), self.quantization_config.removed)
        return list(self._contents.names)

    def _process_model_before_weight_loading(self, model: nn.Module, **_) -> None:
        if not self.pre_quantized:
            return
        config = self.quantization_config
        check_options(model, config.options)
        remove(model, config.removed)
        empty_layers(model, config.layer_groups(), decode=config.decode)
        if config.activations is not None:
            add_quantizers(model, config.activations["layers"], config.activations)
        if (stored := config.stored_cache()) is not None:
            store_cache(model, stored)
        state = model.state_dict()
        self._contents.check_names(state)
        self._contents.check_shapes(state)

    def maybe_update_state_dict(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.pre_quantized and self._contents is None:
            raise UserError("a model that vqdm has saved is loaded by from_pretrained: give VQDMConfig a scheme here")
        if self.pre_quantized:
            self._contents.check_tensors(state_dict)
        return state_dict

    def _process_model_after_weight_loading(self, model: nn.Module, **_) -> nn.Module:
        if self.pre_quantized:
            check_codes(model, self._contents.where)
        self._contents = None
        if self.plain:
            _forget(model)
            return model
        if not self.pre_quantized:
            _check_complete(model)
            from vqdm.codecs.encode import quantize_without_data  # all codecs: loading what is quantized needs none

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
        if self.plain:
            return state_dict, {}
        if not safe_serialization:
            raise UserError("vqdm saves safetensors only: leave safe_serialization=True")
        adapter = next((name for name in state_dict if ".base_layer." in name), None)
        if adapter is not None:
            raise UserError(f"{adapter.partition('.base_layer.')[0]} carries a LoRA: unload it, then save")
        config = self.quantization_config
        return stored_with_metadata(state_dict, config.layer_groups(), config.removed)

    def _dequantize(self, model: nn.Module) -> nn.Module:
        if self.plain:
            return model
        if self.quantization_config.removed:
            raise UserError(
                f"{self.quantization_config.removed[0]} and other operators are gone from this model: diffusers has no "
                "plain model without them; keep it as it is"
            )
        remove_quantizers(model)
        dequantize_layers(model)
        model._modules.pop(CACHE_NAME, None)
        become_plain(model)
        _forget(model)
        return model

    @property
    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def empty_layers(model: nn.Module, groups: Sequence[LayerGroup], *, decode: str = "per_call") -> None:
    """Replace layers of a full-precision model by empty quantized ones, as `groups` say. UserError if that fails."""
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
    """Raise UserError for schemes that name the same shared part but cannot both decode with it."""
    users: dict[str, tuple] = {}
    for scheme in (group.scheme for group in groups if group.scheme.shared_key is not None):
        part = scheme.decoder.kind, getattr(scheme.decoder, "codebooks_shape", None)
        if users.setdefault(scheme.shared_key, part) != part:
            raise UserError(f"{scheme.name} cannot decode with the shared {scheme.shared_key} of other layers")


def check_codes(model: nn.Module, where: str) -> None:
    """UserError, naming the layer, for codes that would be read beyond their end; checksums can be forged."""
    for name, layer in quantized_layers(model).items():
        if not layer.weight.codes.is_meta and (fault := layer.weight.fault()) is not None:
            raise UserError(f"{where}: the codes of layer {name} are damaged: {fault}")


def _forget(model: nn.Module) -> None:
    """Take what says that a model is quantized out of its config."""
    own = {key: value for key, value in model.config.items() if key not in _OWN_OPTIONS}
    model._internal_dict = type(model.config)(own)
    model.__dict__.pop("quantization_method", None)


def _check_complete(model: nn.Module) -> None:
    """UserError, naming it, for a weight that no file held, before others are quantized."""
    if missing := [name for name, tensor in model.state_dict().items() if tensor.is_meta]:
        raise UserError(f"the file holds no {missing[0]} of this {type(model).__name__} ({len(missing)} in all)")


def attach(model: nn.Module, *, decode: str = "per_call", metrics: dict[str, float] | None = None) -> None:
    """Prepare a diffusers model with quantized layers so that diffusers' save_pretrained writes it as quantized.

    All its floats are rounded to 16 bit, as they are stored.
    """
    round_to_stored_(model)
    config = config_of(model, decode=decode, metrics=metrics)
    model.hf_quantizer = VQDMQuantizer(config, pre_quantized=True)
    model.is_quantized, model.quantization_method = True, config.quant_method
    _quantized(model, model.hf_quantizer)


def _quantized(model: nn.Module, quantizer: VQDMQuantizer) -> None:
    model.register_to_config(quantization_config=quantizer.quantization_config)
    become_quantized(model)


def register() -> None:
    """Add the method to diffusers' tables."""
    auto.AUTO_QUANTIZER_MAPPING[METHOD] = VQDMQuantizer
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = VQDMConfig


register()
