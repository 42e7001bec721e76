"""The `quantization_config` in a quantized model's config.json."""

import enum
import importlib
import inspect
import json
import sys
from collections.abc import Sequence

from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import nn

from vqdm.acceleration.activations import checked_settings, settings_in
from vqdm.acceleration.operators import listed, removed_operators
from vqdm.acceleration.stored_cache import CACHE_NAME, Schedule, StoredCache
from vqdm.config.codecs import parse_scheme
from vqdm.errors import UserError
from vqdm.hub.checkpoint import LayerGroup, check_version, layer_groups, needed_version
from vqdm.runs.files import canonical_json
from vqdm.weights.base import LARGEST_COUNT
from vqdm.weights.layers import check_decode

METHOD = "vqdm"


class _Method(enum.StrEnum):
    VQDM = METHOD


class VQDMConfig(QuantizationConfigMixin):
    """Description of how a denoiser is, or is to be, quantized.

    scheme: for data-free quantization while loading, such as `trellis3`, `rtn4`, `3x8g8`. layers: a regular expression
    for the layers to quantize; None takes those that go with the model's class.
    groups: the quantized layers of a saved checkpoint. decode: `per_call` or `cached`, for all layers.
    options: those the model was built with when it was quantized; config.json says them too, but unprotected.
    metrics: known scores of the model, for its card. removed, activations, cache: of a saved checkpoint,
    the operators that are gone, how layers' inputs are quantized, and the cache of `vqdm.enable_cache`.
    """

    def __init__(
        self,
        scheme: str | None = None,
        *,
        groups: Sequence[dict] | None = None,
        version: int | None = None,
        layers: str | None = None,
        decode: str = "per_call",
        options: dict | None = None,
        metrics: dict[str, float] | None = None,
        removed: Sequence[str] = (),
        activations: dict | None = None,
        cache: dict | None = None,
        **others: object,
    ):
        if version is not None:
            check_version("quantization_config", version)
        if (scheme is None) == (groups is None):
            raise UserError("VQDMConfig takes a scheme, such as VQDMConfig('trellis3'), or the groups of a checkpoint")
        if scheme is not None:
            parse_scheme(scheme)
            if strange := sorted(set(others) - {"quant_method"}):  # a checkpoint of a later vqdm may have more
                raise UserError(f"VQDMConfig knows no {strange[0]}: it takes scheme, layers and decode")
        check_decode(decode)
        for name, value in (("metrics", metrics), ("options", options), ("cache", cache)):
            if value is not None and not isinstance(value, dict):
                raise UserError(f"{name} of a quantization_config are values by name, not {str(value)[:80]!r}")
        self.quant_method = _Method.VQDM
        described = () if groups is None else _groups(groups)
        self.cache = None if cache is None else dict(cache)
        self.removed = listed(removed)
        self.activations = None if activations is None else checked_settings(activations)
        needed = needed_version(described, self._beside(), self.removed or self.activations)
        if version is not None and version < needed:
            raise UserError(f"quantization_config is of version {version}, its groups of {needed}: it is damaged")
        self.version = needed if version is None else version
        self.scheme = scheme
        self.groups = None if groups is None else [group.to_dict() for group in described]
        self.layers = layers
        self.decode = decode
        self.options = dict(options or {})
        self.metrics = dict(metrics or {})

    def _beside(self) -> list[str]:
        """Names of tensors that a checkpoint has beside its layers'."""
        stored = self.stored_cache()
        return [] if stored is None else [f"{CACHE_NAME}.{name}" for name in stored.state_dict()]

    def stored_cache(self) -> StoredCache | None:
        """The checkpoint's cache, with empty corrections to load into; UserError if it is none."""
        if self.cache is None:
            return None
        channels = self.cache.get("channels", 0)
        if type(channels) is not int or not 0 <= channels <= LARGEST_COUNT:
            raise UserError(f"the cache of a quantization_config has {str(channels)[:40]} channels: it is damaged")
        return StoredCache(Schedule.from_dict(self.cache), channels)

    def layer_groups(self) -> tuple[LayerGroup, ...]:
        return tuple(LayerGroup.from_dict(group) for group in self.groups or ())

    def to_dict(self) -> dict:
        """The config as config.json holds it, without `decode`, which is up to whoever loads."""
        fields = {"quant_method": METHOD, "version": self.version, "options": self.options}
        fields |= {"metrics": self.metrics} if self.metrics else {}
        fields |= {"removed": self.removed} if self.removed else {}
        fields |= {"activations": self.activations} if self.activations else {}
        fields |= {"cache": self.cache} if self.cache else {}
        return fields | ({"scheme": self.scheme} if self.groups is None else {"groups": self.groups})

    def to_diff_dict(self) -> dict:
        """The config as the base class prints it."""
        return self.to_dict()

    def __repr__(self) -> str:
        return f"VQDMConfig({self.scheme or f'{sum(len(group.layers) for group in self.layer_groups())} layers'})"


def _groups(found: Sequence[dict]) -> list[LayerGroup]:
    """Read groups of quantized layers from JSON values; UserError if they are none, or if a layer is in two."""
    if not isinstance(found, list | tuple):
        raise UserError(f"groups of a quantization_config are a list, not {str(found)[:80]!r}: config.json is damaged")
    groups = [LayerGroup.from_dict(group) for group in found]
    names = [name for group in groups for name in group.layers]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"layer {twice} is in two groups of a quantization_config: config.json is damaged")
    return groups


def options_of(model: nn.Module) -> dict:
    """The options with which a diffusers model was built, as plain JSON."""
    names = inspect.signature(type(model).__init__).parameters
    return json.loads(canonical_json({name: model.config[name] for name in names if name in model.config}))


def check_options(model: nn.Module, saved: dict) -> None:
    """Raise UserError, naming it, for an option that has changed; one that only another diffusers has is ignored."""
    for name, value in options_of(model).items():
        if name in saved and saved[name] != value:
            raise UserError(
                f"the config.json of this {type(model).__name__} says {name}={str(value)[:80]}, and that it was "
                f"quantized with {name}={str(saved[name])[:80]}: it is damaged or of another model"
            )


def config_of(model: nn.Module, *, decode: str, metrics: dict[str, float] | None = None) -> VQDMConfig:
    """The config that describes a model with quantized layers."""
    groups = [group.to_dict() for group in layer_groups(model)]
    stored = model._modules.get(CACHE_NAME)
    cache = None if stored is None else stored.to_dict()
    beside = {"removed": removed_operators(model), "activations": settings_in(model), "cache": cache}
    return VQDMConfig(groups=groups, options=options_of(model), decode=decode, metrics=metrics, **beside)


for _table, _ours in (
    ("diffusers.quantizers.auto", "quantizer"),
    ("transformers.quantizers.auto", "transformers_table"),
):
    if _table in sys.modules:  # read on the way here, when there was no VQDMConfig yet
        importlib.import_module(f"vqdm.hub.{_ours}")
