"""Pairs of the teacher, and the student distilled from them as a pipeline directory that every stage loads as a model.

Pairs are `train/<batch>.safetensors` and `validation/…`, each an item; checkpoints of the training are items too.
"""

import copy
import dataclasses
import functools
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from vqdm.calibration.recording import Recorder
from vqdm.config.few_step import FewStepConfig
from vqdm.config.options import ModelConfig, SamplerConfig
from vqdm.distillation.checkpoints import State
from vqdm.errors import UserError
from vqdm.few_step.adapters import add_adapter, decoder, save_adapter
from vqdm.few_step.pairs import pack_pairs, student_scheduler
from vqdm.few_step.train import Training
from vqdm.hub.pipelines import INDEX, forget_origins, quiet_diffusers, replace_denoiser
from vqdm.models.loader import denoiser_of, load_pipeline, sample
from vqdm.prompts import Prompt, PromptList
from vqdm.runs.files import whole_directory, write_json
from vqdm.runs.items import batches, make_missing
from vqdm.seeds import torch_generator
from vqdm.stages.graph.student import ADAPTER, STUDENT, start_directory, student_model
from vqdm.stages.trajectories import TRAIN, VALIDATION, split_prompts, trajectories_in

log = logging.getLogger("vqdm")


def make_pairs(
    directory: Path, pipeline, prompts: PromptList, *, config: FewStepConfig, sampler: SamplerConfig
) -> dict[str, int]:
    """Fill the stage's directory; existing batches are kept. Returns the number of pairs in each part.

    pipeline: the teacher's. sampler: the one that it was made with.
    """

    def pairs_of(part: str, name: str, captions: Sequence[Prompt]) -> tuple[dict[str, bytes], dict]:
        draws = [torch_generator(config.noise_seed, f"few_step/{part}", prompt.id) for prompt in captions]
        texts = [prompt.text for prompt in captions]
        with Recorder(denoiser_of(pipeline), steps={0}) as recorder:
            latents = sample(pipeline, texts, sampler=sampler, generators=draws, output="latent")
        content = pack_pairs(recorder.calls[0], latents)
        return {f"{part}/{name}.safetensors": content}, {"captions": [prompt.id for prompt in captions]}

    for part, own in zip((TRAIN, VALIDATION), split_prompts(prompts, config.validation), strict=True):
        makers = {
            f"{part}-{name}": functools.partial(pairs_of, part, name, own.prompts[rows.start : rows.stop])
            for name, rows in batches(len(own), config.pairs_batch_size)
        }
        make_missing(directory, makers, title=f"pairs for {part}")
    return {part: len(trajectories_in(directory, part)) for part in (TRAIN, VALIDATION)}


def train_student(directory: Path, pairs: Path, *, config: FewStepConfig, model: ModelConfig, device: str) -> dict:
    """Fill the stage's directory: `pipeline/`, `history.json`, for hipa `adapter/`. Returns the validation's distances.

    pairs: that stage's directory. model: the teacher's, in fp32.
    """
    pipeline = load_pipeline(model, device=device)
    teacher = denoiser_of(pipeline)
    student = first_weights(teacher, config.start, model, device=device)
    adapter, rates = config.kind == "hipa", {"seed": config.seed, "rate": config.learning_rate}
    student, history = train_on_pairs(
        directory,
        student,
        teacher,
        pairs,
        scheduler=pipeline.scheduler,
        config=config,
        optimizer=add_adapter(student, rank=config.rank, **rates) if adapter else None,
        decode=decoder(pipeline.vae) if adapter else None,
    )
    if adapter:
        save_adapter(pipeline, student, directory / ADAPTER)
    replace_denoiser(pipeline, student)
    pipeline.register_modules(scheduler=student_scheduler(pipeline.scheduler))
    save_student(pipeline, directory / STUDENT)
    kept = history.best if config.keep == "best" else history.validations[-1]
    first = history.validations[0]["distance"]
    log.info("few_step: distance %.5f, from %.5f; kept step %d", kept["distance"], first, kept["step"])
    seen = config.steps * config.batch_size
    return {"kept_step": kept["step"], "distance": kept["distance"], "distance_before": first, "samples": seen}


def train_on_pairs(
    directory: Path, student: nn.Module, teacher: nn.Module, pairs: Path, **training
) -> tuple[nn.Module, State]:
    """Train a student, go on where a killed training was, and write `history.json`.

    pairs: that stage's directory. training: further arguments of `Training`.
    """
    files = (trajectories_in(pairs, part) for part in (TRAIN, VALIDATION))
    made, history = Training(student, teacher, *files, directory=directory, **training).run()
    write_json(directory / "history.json", {"losses": history.losses, "validations": history.validations})
    return made, history


def first_weights(teacher: nn.Module, start: str | None, model: ModelConfig, *, device: str) -> nn.Module:
    """A copy of the teacher's denoiser, with the weights of `start` if given. UserError if these do not fit."""
    student = copy.deepcopy(teacher)
    if start is None:
        return student
    place = start_directory(start)
    own = student_model(model, place)
    found = denoiser_of(load_pipeline(dataclasses.replace(own, path=str(place)), device=device)).state_dict()
    shapes = {name: tensor.shape for name, tensor in student.state_dict().items()}
    if shapes != {name: tensor.shape for name, tensor in found.items()}:
        raise UserError(f"few_step.start={start} has another denoiser than {model.name}: give a few-step model of it")
    student.load_state_dict(found)
    return student


def save_student(pipeline, place: Path) -> None:
    """Write a pipeline in fp16, without the paths that its parts came from, whole or not at all."""
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            nn.Module.to(part, device="cpu", dtype=torch.float16)
    with whole_directory(place) as partial:
        with quiet_diffusers():
            pipeline.save_pretrained(partial)
        forget_origins([partial / INDEX, *partial.glob("*/config.json")])
