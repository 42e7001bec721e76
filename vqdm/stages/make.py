"""The stages that lead to a quantized denoiser, run through the store.

Libraries that take seconds to import are imported only when there is something to make, so that a finished run says
so at once.
"""

import dataclasses
import json
from pathlib import Path

from vqdm.config.codecs import PeerConfig
from vqdm.config.options import Config, ModelConfig
from vqdm.runs import processes
from vqdm.runs.device import Device
from vqdm.runs.stage import Stage
from vqdm.runs.store import Store
from vqdm.stages.graph.denoiser import Quantization
from vqdm.stages.graph.prompts import read_prompts
from vqdm.stages.graph.student import pair_prompts, stages_of_model, student_model, teacher_model
from vqdm.stages.layout import SCRATCH
from vqdm.stages.pipelines import Models, in_fp32


def environment_of(config: Config, device: Device) -> dict:
    """The environment of a stage, for its manifest."""
    return device.environment() | {"reason": device.reason, "threads": device.threads, "dtype": config.model.dtype}


def hessian_room(config: Config) -> int:
    """Bytes of the Hessians that a student's sampling sums in one pass."""
    return int(config.memory_budget_gb * 2**30)


def ensure_student(config: Config, store: Store, stage: Stage, *, device: Device, environment: dict) -> ModelConfig:
    """The model that `stage` is made with: the configured one or, with `few_step`, its student, made if missing."""
    stages, teacher = stages_of_model(stage), teacher_model(config)
    if not stages:
        return config.model

    def make_pairs_of(directory: Path) -> dict:
        from vqdm.models.loader import load_pipeline
        from vqdm.stages.few_step import make_pairs

        pipeline, prompts = load_pipeline(teacher, device=device.name), pair_prompts(config, read_prompts)
        return make_pairs(directory, pipeline, prompts, config=config.few_step, sampler=teacher.sampler)

    def train(directory: Path) -> dict:
        from vqdm.stages.few_step import train_student

        in_fp32 = dataclasses.replace(teacher, dtype="float32")
        return train_student(directory, pairs, config=config.few_step, model=in_fp32, device=device.name)

    pairs = store.ensure(stages["pairs"], make_pairs_of, environment=environment)
    made = store.ensure(stages["few_step"], train, environment=environment, scratch=SCRATCH["few_step"])
    return student_model(config.model, made)


def ensure_denoiser(
    config: Config, store: Store, stages: Quantization, models: Models, *, environment: dict, tracker
) -> Path | None:
    """Make all missing stages up to the last one that makes a denoiser; returns that one's directory.

    None: the denoiser is the model's own.
    """
    if stages.denoiser is None:
        return None
    made = ensure_pruned(config, store, stages, models, environment=environment)
    if stages.quantize is not None:
        made = ensure_quantized(config, store, stages, models, pruned=made, environment=environment, tracker=tracker)
    if stages.denoiser in (stages.prune, stages.quantize):
        return made
    return ensure_distilled(config, store, stages, models, quantized=made, environment=environment, tracker=tracker)


def ensure_parts(config: Config, store: Store, stages: Quantization, models: Models, *, environment: dict) -> None:
    """Make the quantized text encoders and VAE that are asked for; pipelines of `models` have them from then on."""

    def make(directory: Path) -> dict:
        from vqdm.stages.parts import quantize_parts

        return quantize_parts(
            directory,
            models.own(),
            store.directory(stages.calibrate),
            config=config.parts,
            sampler=config.model.sampler,
            noise_seed=config.calibration.noise_seed,
        )

    if stages.parts is not None:
        models.part_directory = store.ensure(stages.parts, make, environment=environment, scratch=SCRATCH["parts"])


def ensure_pruned(
    config: Config, store: Store, stages: Quantization, models: Models, *, environment: dict
) -> Path | None:
    """Make calibration and, if operators are to go, the denoiser without them; returns that one's directory."""

    def make_calibration(directory: Path) -> dict:
        from vqdm.models.finite import check_storable
        from vqdm.models.loader import denoiser_of
        from vqdm.models.specs import layer_specs
        from vqdm.stages.calibrate import calibrate

        denoiser, own = denoiser_of(models.teacher), config.model
        check_storable(denoiser, layer_specs(denoiser, pattern=own.layers, min_size=own.min_size))
        return calibrate(
            directory, models.teacher, stages.prompts, config=config.calibration, sampler=config.model.sampler
        )

    def make_scores(directory: Path) -> dict:
        from vqdm.stages.prune import score_operators

        return score_operators(
            directory,
            models.own(),
            calibration,
            config=config.prune,
            model=config.model,
            calibration_config=config.calibration,
        )

    def make_pruned(directory: Path) -> dict:
        from vqdm.stages.prune import prune

        return prune(directory, models.own(), calibration, scores, config=config.prune, device=models.device)

    calibration = store.ensure(stages.calibrate, make_calibration, environment=environment)
    if stages.prune is None:
        return None
    scores = store.ensure(stages.scores, make_scores, environment=environment, scratch=SCRATCH["scores"])
    return store.ensure(stages.prune, make_pruned, environment=environment)


def ensure_quantized(
    config: Config,
    store: Store,
    stages: Quantization,
    models: Models,
    *,
    pruned: Path | None,
    environment: dict,
    tracker,
) -> Path:
    """Quantize the model, or what pruning left of it; returns the quantized denoiser's directory."""
    calibration = store.directory(stages.calibrate)

    def make_sensitivity(directory: Path) -> dict:
        from vqdm.stages.sensitivity import sensitivity

        pipeline = models.teacher if pruned is None else models.pruned(pruned)
        return sensitivity(
            directory, pipeline, calibration, config=config.quantize, model=config.model, device=models.device
        )

    def make_quantized(directory: Path) -> dict:
        from vqdm.stages.quantize import quantize

        return quantize(
            directory,
            models.own() if pruned is None else models.pruned(pruned),
            calibration,
            config=config.quantize,
            model=config.model,
            calibration_config=config.calibration,
            device=models.device,
            harm=harm,
            show_layers=config.show_layers,
            hessian_room=hessian_room(config),
        )

    def make_as_peer(directory: Path) -> dict:
        from vqdm.models.loader import denoiser_of
        from vqdm.stages.peer import quantize_as_peer

        denoiser = denoiser_of(models.own())
        return quantize_as_peer(directory, denoiser, calibration, config=config.quantize, device=models.device)

    if isinstance(config.quantize, PeerConfig):
        return store.ensure(stages.quantize, make_as_peer, environment=environment)
    harm = None
    if stages.sensitivity is not None:
        harm = store.ensure(stages.sensitivity, make_sensitivity, environment=environment)
    models.release()
    quantized = store.ensure(stages.quantize, make_quantized, environment=environment, scratch=SCRATCH["quantize"])
    layers = json.loads((quantized / "layers.json").read_text())["quantized"]
    tracker.table("quantize/layers", layers)
    return quantized


def ensure_distilled(
    config: Config,
    store: Store,
    stages: Quantization,
    models: Models,
    *,
    quantized: Path,
    environment: dict,
    tracker,
) -> Path:
    """Tune blocks and finetune, as far as `stages` has these; returns the directory of the resulting denoiser."""
    calibration = store.directory(stages.calibrate)

    def make_tuned(directory: Path) -> dict:
        from vqdm.stages.tune_blocks import tune_all_blocks

        pipeline, teacher = models.student_and_teacher(quantized, **in_fp32())
        return tune_all_blocks(directory, pipeline, teacher, calibration, config=config.finetune, device=models.device)

    tuned = quantized
    if stages.tune_blocks is not None:
        models.release()
        scratch = SCRATCH["tune_blocks"]
        tuned = store.ensure(stages.tune_blocks, make_tuned, environment=environment, scratch=scratch)
    if stages.finetune is None:
        return tuned
    if stages.trajectories is None:
        return ensure_matched(config, store, stages, models, student=tuned, environment=environment)
    return ensure_finetuned(config, store, stages, models, student=tuned, environment=environment, tracker=tracker)


def ensure_finetuned(
    config: Config, store: Store, stages: Quantization, models: Models, *, student: Path, environment: dict, tracker
) -> Path:
    """Train the denoiser of `student` on recorded predictions; returns the directory of the result."""
    calibration = store.directory(stages.calibrate)

    def make_trajectories(directory: Path) -> dict:
        from vqdm.stages.trajectories import record_trajectories

        return record_trajectories(
            directory,
            models.teacher,
            stages.finetune_prompts,
            config=config.finetune.trajectories,
            sampler=config.model.sampler,
        )

    def make_finetuned(directory: Path) -> dict:
        from vqdm.stages.finetune import finetune, teacher_runs_along

        if teacher_runs_along(config.finetune):
            pipeline, teacher = models.student_and_teacher(student, **in_fp32())
        else:
            pipeline, teacher = models.student(student, **in_fp32()), None
        return finetune(
            directory,
            pipeline,
            teacher,
            trajectories,
            stages.finetune_prompts,
            calibration,
            config=config.finetune,
            model=config.model,
            device=models.device,
            tracker=tracker,
        )

    trajectories = store.ensure(stages.trajectories, make_trajectories, environment=environment)
    models.release()
    return processes.together(store, stages.finetune, make_finetuned, environment=environment)


def ensure_matched(
    config: Config, store: Store, stages: Quantization, models: Models, *, student: Path, environment: dict
) -> Path:
    """Train the denoiser of `student` by distribution matching; returns the directory of the result."""

    def make_matched(directory: Path) -> dict:
        from vqdm.models.loader import denoiser_of, load_pipeline
        from vqdm.stages.matched import match

        own = dataclasses.replace(teacher_model(config), dtype="float32")
        return match(
            directory,
            models.student(student, **in_fp32()),
            denoiser_of(load_pipeline(own, device=models.device)),
            store.directory(stages.finetune.upstream["pairs"]),
            store.directory(stages.calibrate),
            config=config,
            device=models.device,
        )

    return store.ensure(stages.finetune, make_matched, environment=environment, scratch=SCRATCH["few_step"])
