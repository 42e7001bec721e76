"""How often the stages of distillation run a denoiser, in closed form."""

from dataclasses import dataclass

from vqdm.config.options import Config
from vqdm.stages.finetune import SHOWN
from vqdm.stages.own_trajectories import captions_of_a_round, sampled_steps

BACKWARD = 2  # forwards that a backward pass costs


@dataclass(frozen=True)
class TrajectoryCounts:
    """Work of recording trajectories."""

    prompts: int  # that are sampled, the validation's included
    rows: int  # of all forwards
    samples: int  # kept for training and validation
    captions: int  # whose text embeddings are kept, once for every number of steps
    encoded: int  # images that the VAE encodes


def trajectory_counts(config: Config, *, prompts: int, guided: int) -> TrajectoryCounts:
    """Count the work. prompts: those to train on and the validation's. guided: rows of an image, two under guidance."""
    own = config.finetune.trajectories
    steps, kept = sampled_steps(config.finetune.trajectories, config.model.sampler)
    validation = min(own.validation, prompts)
    train = 0 if own.along == "student" else prompts - validation
    noised = train if own.along == "data" else 0
    sampled = train + validation
    return TrajectoryCounts(
        prompts=sampled,
        rows=(sampled * sum(steps) + noised * kept) * guided,
        samples=sampled * kept,
        captions=sampled * len(steps),
        encoded=noised * len(steps),
    )


@dataclass(frozen=True)
class TrainingCounts:
    """Work of fine-tuning: `rows` pass forward and backward, all other rows only forward."""

    steps: int
    samples: int
    rows: int
    parts: int  # micro-batches
    validations: int
    validation_rows: int
    shown_rows: int  # of the images that validations show
    shown_images: int
    own_rows: int  # of the student's own sampling (along=student)
    teacher_rows: int

    def forwards(self, *, checkpointing: bool) -> int:
        """All the work, in forwards of one row."""
        passes = 1 + BACKWARD + checkpointing
        others = self.validation_rows + self.shown_rows + self.own_rows + self.teacher_rows
        return passes * self.rows + others


def training_counts(config: Config, *, prompts: int, guided: int) -> TrainingCounts:
    """Count the work; arguments as in `trajectory_counts`."""
    own = config.finetune
    steps, kept = sampled_steps(config.finetune.trajectories, config.model.sampler)
    validation = min(own.trajectories.validation, prompts)
    samples = own.steps * own.batch_size
    validations = own.steps // own.check_every + 1 + (own.steps % own.check_every > 0)
    captions = own_captions(config, train=prompts - validation) if own.trajectories.along == "student" else 0
    shown = validations * min(SHOWN, validation)
    return TrainingCounts(
        steps=own.steps,
        samples=samples,
        rows=samples * guided,
        parts=own.steps * -(-own.batch_size // micro_batch(config)),
        validations=validations,
        validation_rows=validations * min(own.validation_samples, validation * kept) * guided,
        shown_rows=shown * config.model.sampler.steps * guided,
        shown_images=shown,
        own_rows=captions * sum(steps) * guided,
        teacher_rows=(captions * kept + samples * (own.feature_weight > 0)) * guided,
    )


def own_captions(config: Config, *, train: int) -> int:
    """Captions that the student samples in all rounds."""
    own = config.finetune
    return -(-own.steps // own.refresh) * captions_of_a_round(own, config.model.sampler, train=train)


def micro_batch(config: Config) -> int:
    own = config.finetune
    return min(own.micro_batch_size or own.batch_size, own.batch_size)
