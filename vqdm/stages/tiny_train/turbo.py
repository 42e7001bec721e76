"""tiny_turbo, small_turbo: guidance-free students of 1–4 steps, by latent consistency distillation (Luo et al. 2023).

The student's clean-image estimate at one timestep must agree with its own estimate one teacher step further down
(without an average of the student as the target: Song & Dhariwal 2023, section 3.2). Teacher steps are guided DDIM,
so the student has the guidance built in. Timesteps are the trailing grid that EulerAncestral uses with SDXL-Turbo,
so 1, 2 and 4 steps all start on trained timesteps.
"""

import copy
from pathlib import Path

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel

from vqdm.few_step.losses import Grid, consistency
from vqdm.stages.tiny_train.loop import fast_precision, fit
from vqdm.stages.tiny_train.unet import SCHEDULE, LatentSet, conditions, guided_noise

GRID = 20  # teacher steps from pure noise to a clean latent
STEPS = 4  # the most that the student is to take: half of the draws lie where those start


def _grid() -> Grid:
    """Trailing timesteps from 999 down, and cumulative alphas at each of them and after the last (1.0)."""
    timesteps = torch.arange(1000, 0, -1000 / GRID, device="cpu").round().long() - 1
    alphas = DDIMScheduler(**SCHEDULE).alphas_cumprod[timesteps]
    levels = torch.cat([alphas, torch.ones(1, device="cpu")])
    return Grid(timesteps, levels.view(-1, 1, 1, 1), every=GRID // STEPS)


def distil_turbo(
    teacher: UNet2DConditionModel,
    latents: LatentSet,
    *,
    directory: Path,
    steps: int,
    batch_size: int,
    seed: int,
    guidance: float,
    learning_rate: float = 2e-4,
    after_step=None,
) -> UNet2DConditionModel:
    student = copy.deepcopy(teacher).train().requires_grad_(True)
    teacher = teacher.eval().requires_grad_(False)
    grid = _grid()

    def loss_of(generator: torch.Generator) -> torch.Tensor:
        clean, text, pooled = latents.batch(batch_size, generator)
        places = grid.draw(batch_size, generator)
        noise = torch.randn(clean.shape, generator=generator, device="cpu")

        def guided(noisy: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
            with fast_precision():
                return guided_noise(teacher, noisy, times, text, pooled, guidance=guidance)

        def predicted(noisy: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
            """The student's noise, each time anew: weights cast under no_grad stay cached without gradient."""
            with fast_precision():
                conditioned = conditions(student, pooled)
                return student(noisy, times, text, added_cond_kwargs=conditioned).sample.float()

        noisy = grid.noised(clean, noise, places)
        return consistency(noisy, places, grid, student=predicted, aim=predicted, teacher=guided)

    average = fit(
        student,
        loss_of,
        purpose="turbo",
        directory=directory,
        steps=steps,
        learning_rate_peak=learning_rate,
        seed=seed,
        warmup=min(100, steps),
        after_step=after_step,
    )
    student.load_state_dict(average)
    return student.eval().requires_grad_(False)
