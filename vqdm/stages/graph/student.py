"""The stages that make a few-step student, which is then the model of all others. Imports no torch.

With `few_step=none` there are none, and no fingerprint changes.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from vqdm.config.options import Config, ModelConfig, PromptsConfig
from vqdm.config.ranges import settings_of
from vqdm.errors import UserError
from vqdm.models.foreign import json_object
from vqdm.models.location import check_pipeline_directory, configs_directory, model_identity
from vqdm.models.samplers import is_flow_matching
from vqdm.models.shipped import builtin_directory
from vqdm.prompts import PromptList
from vqdm.runs.identity import files_identity
from vqdm.runs.stage import Stage
from vqdm.stages.graph.samplers import teacher_sampler
from vqdm.stages.graph.versions import VERSIONS, new_stage

STUDENT = "pipeline"  # in the few_step stage: the directory that diffusers loads
ADAPTER = "adapter"  # beside it: the file of a LoRA that makes the student of its teacher
_TRAINING = (
    "kind", "steps", "batch_size", "learning_rate", "warmup", "decay_from", "average", "precision", "seed",
    "check_every", "validated_steps", "keep", "validation",
)  # fmt: skip
_MATCHING = ("divergence", "critic_steps", "critic_rate", "teacher_guidance")
_OF_KIND = {
    "lcm": ("teacher_guidance", "learned_steps", "solver_steps", "aim"),
    "dmd": (*_MATCHING, "critic_first"),
    "fdistill": (*_MATCHING, "critic_first", "adversarial_weight"),
    "hipa": ("rank", "frequency_weight"),
}
_MATCHED = (  # of finetune, where it matches distributions
    "loss", "steps", "batch_size", "learning_rate", "relative_rate", "warmup", "decay_from", "precision", "check_every",
    "critic_first",
)  # fmt: skip


def model_of(config: Config, read: Callable[[PromptsConfig], PromptList], *, cache: Path) -> Stage | str:
    """The identity of the model that is calibrated, quantized and sampled: its files, or the stage that makes it."""
    files = model_identity(config.model, cache=cache)
    if config.few_step.kind == "none":
        return files
    own = config.few_step
    _check_suits(config.model, own.kind)
    settings = {"prompts": pair_prompts(config, read).sha256, "sampler": settings_of(teacher_sampler(config))}
    settings |= {"dtype": config.model.dtype, "batch_size": own.pairs_batch_size, "noise_seed": own.noise_seed}
    pairs = new_stage("pairs", f"{config.model.name}-{own.pairs}", settings, model=files)
    first = own.critic_first if own.steps else 0  # a student that is not trained has no critic
    settings = settings_of(dataclasses.replace(own, critic_first=first), *_TRAINING, *_OF_KIND.get(own.kind, ()))
    upstream = {"pairs": pairs, "model": files}
    if own.start is not None:
        upstream["start"] = files_identity(start_directory(own.start), cache)
    return new_stage("few_step", f"{config.model.name}-{own.kind}", settings, **upstream)


def matched_stage(config: Config, trained: dict, model: Stage, **upstream: Stage) -> Stage:
    """The finetune stage that trains a compressed few-step student by distribution matching with its teacher.

    trained: settings of what trains. model: the few-step stage. upstream: the student's stage and the calibration's.
    """
    settings = settings_of(config.finetune, *_MATCHED) | trained
    settings |= settings_of(config.few_step, *_MATCHING, "average", "validated_steps")
    upstream |= {"pairs": model.upstream["pairs"], "teacher": model.upstream["model"]}
    return Stage("finetune", VERSIONS["matched"], f"{upstream['student'].label}-matched", settings, upstream)


def name_of(config: Config, model: Stage | str) -> str:
    """The name of a model in labels; model: its identity."""
    return config.model.name if isinstance(model, str) else model.label


def stages_of_model(stage: Stage) -> dict[str, Stage]:
    """The stages that make the model of a stage, in order; none for a model of files."""
    student = stage.upstream.get("model")
    return {"pairs": student.upstream["pairs"], "few_step": student} if isinstance(student, Stage) else {}


def pair_prompts(config: Config, read: Callable[[PromptsConfig], PromptList]) -> PromptList:
    """The pairs' captions, from where the calibration's come; the last ones are the validation's."""
    own = config.few_step
    chosen = {"n": own.pairs + own.validation, "order": "shuffled", "seed": own.captions_seed}
    try:
        return read(dataclasses.replace(config.calibration, **chosen))
    except UserError as error:
        raise UserError(f"few_step.pairs + few_step.validation = {chosen['n']} captions: {error}") from error


def start_directory(start: str) -> Path:
    """The directory of a model, shipped or given by its path, whose denoiser a student starts from."""
    return check_pipeline_directory(Path(start)) if Path(start).is_dir() else builtin_directory(start)


def student_model(model: ModelConfig, directory: Path) -> ModelConfig:
    """The model whose files a few_step stage wrote in `directory`."""
    nothing = dict.fromkeys(("builtin", "hub_id", "revision", "variant", "configs", "random_seed"))
    return dataclasses.replace(model, path=str(directory / STUDENT), **nothing)


def teacher_model(config: Config) -> ModelConfig:
    return dataclasses.replace(config.model, sampler=teacher_sampler(config))


def _check_suits(model: ModelConfig, kind: str) -> None:
    """UserError for flow matching, a model that predicts something else than noise, or a kind that wants a U-Net."""
    try:
        directory = configs_directory(model)
    except UserError:
        return  # of the hub and not downloaded yet: asked again then
    file = directory / "scheduler" / "scheduler_config.json"
    predicts = json_object(file).get("prediction_type", "epsilon") if file.is_file() else "epsilon"
    if is_flow_matching(directory) or predicts != "epsilon":
        raise UserError(f"few_step is for models that predict noise, and {directory} does not: give few_step=none")
    if kind in ("fdistill", "hipa") and not (directory / "unet").is_dir():
        raise UserError(
            f"few_step={kind} is for U-Nets, and {directory} has none: give few_step=dmd, direct, reflow or lcm"
        )
