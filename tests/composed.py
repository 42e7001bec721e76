"""Configurations as a command line composes them. Hydra composes a choice of groups once, in a fifth of a second."""

import copy
import functools
from pathlib import Path

import hydra
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig

from vqdm.config.compose import register_schemas, to_config
from vqdm.config.options import Config

CONF = Path(__file__).resolve().parent.parent / "conf"


def composed_by_hydra(*overrides: str) -> DictConfig:
    register_schemas()
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        return hydra.compose("config", list(overrides))


_kept = functools.cache(composed_by_hydra)


def compose(*overrides: str) -> Config:
    """Compose and check; values are set in a copy of the composed groups, by the function that Hydra sets them with."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    groups = [o for o in parsed if (CONF / o.key_or_group).is_dir() or o.key_or_group.startswith("hydra.")]
    values = [override for override in parsed if override not in groups]
    composed = copy.deepcopy(_kept(*(group.input_line for group in groups)))
    ConfigLoaderImpl._apply_overrides_to_config(values, composed)
    return to_config(composed)
