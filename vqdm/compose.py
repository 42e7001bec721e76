"""The Hydra side: schemas, and the step from a composed configuration to plain dataclasses."""

import re

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vqdm import config as schema
from vqdm.errors import UserError

GROUPS = {
    "model": schema.ModelConfig,
    "calibration": schema.CalibrationConfig,
    "quantize": schema.QuantizeConfig,
    "finetune": schema.FinetuneConfig,
    "evaluate": schema.EvaluateConfig,
    "tracker": schema.TrackerConfig,
    "tiny_train": schema.TinyTrainConfig,
}


def register_schemas() -> None:
    """Every group's YAML starts from `base_<group>`, so an unknown key fails while composing."""
    store = ConfigStore.instance()
    store.store(name="base_config", node=schema.Config)
    for group, node in GROUPS.items():
        store.store(group=group, name=f"base_{group}", node=node)


def to_config(composed: DictConfig) -> schema.Config:
    """Checked dataclasses; values that fit no option are a UserError of one line."""
    try:
        config = OmegaConf.to_object(composed)
    except OmegaConfBaseException as error:
        raise UserError(str(error).splitlines()[0]) from error
    schema.check(config)
    return config


def overrides_for_rows(task_overrides: list[str]) -> list[str]:
    """The user's overrides that hold for every row of a table: all but the choice of experiment, table and row."""
    return [o for o in task_overrides if not re.match(r"\+*(experiment|table|row|name|method)=", o)]
