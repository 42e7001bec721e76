"""The stage that trains a world, and its identity."""

from pathlib import Path

from vqdm.config.options import TinyTrainConfig
from vqdm.config.ranges import settings_of
from vqdm.models.location import check_pipeline_directory
from vqdm.models.shipped import check_parts
from vqdm.runs.identity import files_identity
from vqdm.runs.stage import Stage
from vqdm.stages.graph.versions import new_stage


def tiny_train_stage(config: TinyTrainConfig, *, cache: Path) -> Stage:
    settings = settings_of(config)
    start, parts = settings.pop("init_from"), settings.pop("parts")
    upstream = {} if start is None else {"init_from": files_identity(check_pipeline_directory(Path(start)), cache)}
    if parts is not None:
        upstream["parts"] = files_identity(check_parts(Path(parts), world=config.world), cache)
    return new_stage("tiny_train", f"{config.world}-seed{config.seed}", settings, **upstream)
