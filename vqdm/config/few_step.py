"""Options of a student of fewer steps, distilled from the model and taken in its place; kind=none changes nothing."""

import dataclasses

from vqdm.config.ranges import MOST, SEEDS, choice, later, number
from vqdm.errors import UserError

WITH_DISCRIMINATOR = ("fkl", "js", "sf", "sh", "jeffreys", "neyman")  # f-distill's, whose weights it estimates


@dataclasses.dataclass
class FewStepConfig:
    """Distillation into fewer steps. Captions come from where the calibration's do; model.sampler is the student's."""

    # direct: the teacher's image in one step; reflow: the same noise prediction all the way from a noise to its image
    # (InstaFlow); lcm: one image all the way from a noise, by guided steps of the teacher (latent consistency); dmd:
    # the distribution of the teacher's images (distribution matching); fdistill: the same by another divergence, with
    # a discriminator; hipa: the image in one step and its high frequencies, by a LoRA alone
    kind: str = choice("none", "direct", "reflow", "lcm", "dmd", "fdistill", "hipa")
    teacher_steps: int = number(20, least=1, most=1000)  # DDIM steps in which the teacher makes the pairs
    teacher_guidance: float = number(3.0, least=0, most=1000)  # guidance that the student learns in
    pairs: int = number(1024, least=1, most=MOST)  # number of pairs of noise and the teacher's image to learn from
    validation: int = number(64, least=1, most=MOST)  # number of further pairs, never trained on
    pairs_batch_size: int = number(64, least=1, most=65_536)  # pairs made at once
    captions_seed: int = number(2, least=0, most=SEEDS)  # seed of the shuffle that chooses the captions
    noise_seed: int = number(0, least=0, most=SEEDS)  # seed of the pairs' noise
    start: str | None = None  # model whose weights the student starts from, shipped or a directory; None = the teacher
    steps: int = number(250, least=0, most=MOST)  # training steps of the student; 0 = it is what it starts from
    batch_size: int = number(64, least=1, most=65_536)  # captions per step
    learning_rate: float = number(3e-4, least=0, most=10, above=True)  # peak rate
    warmup: int = number(20, least=0, most=MOST)  # steps
    # share of the steps after which the rate falls to 0 by half a cosine; 1 = constant
    decay_from: float = number(0.4, least=0, most=1)
    average: float = number(0.99, least=0, most=0.999999)  # decay of the average of weights, which is the student
    precision: str = choice("bfloat16", "float32")  # precision of the activations
    seed: int = number(0, least=0, most=SEEDS)  # seed of the draws of samples
    check_every: int = number(50, least=1, most=MOST)  # steps between two validations, each with a checkpoint
    validated_steps: int = number(1, least=1, most=1000)  # DDIM steps to the images that validation compares
    # best: the validated average nearest to the teacher's images; last: that of the last step
    keep: str = choice("best", "last")
    # for lcm: numbers of DDIM steps that the student is to take, on whose timesteps half of the draws lie
    learned_steps: int = number(1, least=1, most=1000)
    # for lcm: DDIM steps of the teacher from noise to image, a multiple of learned_steps
    solver_steps: int = number(20, least=1, most=1000)
    # for lcm: whose estimate one step further down is learned, that of the student's average or its own
    aim: str = choice("average", "student")
    # for fdistill: Kullback-Leibler, reverse (rkl, which is dmd's) and forward (fkl); Jensen-Shannon (js), softened
    # (sf), squared Hellinger (sh), Jeffreys, Neyman
    divergence: str = choice("rkl", *WITH_DISCRIMINATOR)
    adversarial_weight: float = number(1e-3, least=0, most=1e6)  # for fdistill: of the student's adversarial loss
    # for dmd and fdistill: steps of critic and discriminator per step of the student
    critic_steps: int = number(2, least=1, most=1000)
    # for dmd and fdistill: their steps before the student's first
    critic_first: int = later(number(0, least=0, most=MOST))
    critic_rate: float = number(1e-4, least=0, most=10, above=True)  # for dmd and fdistill: their peak rate
    rank: int = number(8, least=1, most=4096)  # for hipa: of the LoRA
    frequency_weight: float = number(1.0, least=0, most=1e6)  # for hipa: of the losses on decoded images
    # what images are compared with, if the student is not compressed: its own, or the teacher's from the same noise
    originals: str = choice("student", "teacher")

    def check(self) -> None:
        """UserError for a divergence whose weights nothing estimates, and steps that a solver's do not fall on."""
        if self.kind == "lcm" and self.solver_steps % self.learned_steps:
            fits = self.learned_steps * max(1, round(self.solver_steps / self.learned_steps))
            raise UserError(
                f"few_step.solver_steps={self.solver_steps} is no multiple of few_step.learned_steps="
                f"{self.learned_steps} (model.sampler.steps unless given): give {fits}"
            )
        if self.divergence in WITH_DISCRIMINATOR and self.kind != "fdistill":
            raise UserError(f"few_step.divergence={self.divergence} needs a discriminator: give few_step=fdistill")
