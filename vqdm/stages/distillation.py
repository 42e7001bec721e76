"""The stages that win back what quantization lost, run through the store."""

from pathlib import Path

from vqdm import processes
from vqdm.config import Config
from vqdm.stages.graph import Quantization
from vqdm.stages.quantization import Models
from vqdm.store import Store


def ensure_distilled(
    config: Config, store: Store, stages: Quantization, models: Models, *, quantized: Path, calibration: Path,
    environment: dict, tracker,
) -> Path:  # fmt: skip
    """The directory of the denoiser when its blocks are tuned and it is finetuned, as far as `stages` has these."""

    def make_tuned(directory: Path) -> dict:
        from vqdm.stages.tune_blocks import tune_all_blocks

        pipeline, teacher = _student_in_fp32(models, quantized)
        return tune_all_blocks(directory, pipeline, teacher, calibration, config=config.finetune, device=models.device)

    def make_trajectories(directory: Path) -> dict:
        from vqdm.stages.trajectories import record_trajectories

        return record_trajectories(
            directory, models.teacher, stages.finetune_prompts, config=config.finetune.trajectories,
            sampler=config.model.sampler,
        )  # fmt: skip

    def make_finetuned(directory: Path) -> dict:
        from vqdm.stages.finetune import finetune, teacher_runs_along

        pipeline, teacher = _student_in_fp32(models, tuned)
        if not teacher_runs_along(config.finetune):
            teacher = None  # its memory is free now
        return finetune(
            directory, pipeline, teacher, trajectories,
            stages.finetune_prompts, calibration, config=config.finetune, model=config.model, device=models.device,
            tracker=tracker,
        )  # fmt: skip

    tuned = quantized
    if stages.tune_blocks is not None:
        tuned = store.ensure(stages.tune_blocks, make_tuned, environment=environment)
    if stages.finetune is None:
        return tuned
    trajectories = store.ensure(stages.trajectories, make_trajectories, environment=environment)
    return processes.together(store, stages.finetune, make_finetuned, environment=environment)


def _student_in_fp32(models: Models, directory: Path):
    """(pipeline of the student, the original denoiser). No decoded weights are kept: a small GPU lacks the room."""
    import torch

    return models.student_and_teacher(directory, decode="per_call", dtype=torch.float32)
