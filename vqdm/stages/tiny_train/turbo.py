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

from vqdm.stages.tiny_train.loop import fit
from vqdm.stages.tiny_train.unet import SCHEDULE, LatentSet, conditions, guided_noise

GRID = 20  # teacher steps from pure noise to a clean latent


def _levels() -> tuple[torch.Tensor, torch.Tensor]:
    """Trailing timesteps [GRID] from 999 down, and cumulative alphas at each of them and after the last (1.0)."""
    timesteps = torch.arange(1000, 0, -1000 / GRID, device="cpu").round().long() - 1
    alphas = DDIMScheduler(**SCHEDULE).alphas_cumprod[timesteps]
    return timesteps, torch.cat([alphas, torch.ones(1, device="cpu")])


def _clean(noisy: torch.Tensor, noise: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
    return (noisy - (1 - level).sqrt() * noise) / level.sqrt()


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
    timesteps, levels = _levels()
    levels = levels.view(-1, 1, 1, 1)

    @torch.no_grad()
    def teacher_step(noisy, index, text, pooled):
        """Take a guided DDIM step from grid point `index` to the next."""
        noise = guided_noise(teacher, noisy, timesteps[index], text, pooled, guidance=guidance)
        clean, after = _clean(noisy, noise, levels[index]), levels[index + 1]
        return after.sqrt() * clean + (1 - after).sqrt() * noise

    @torch.no_grad()
    def estimate_further_down(noisy, index, text, pooled):
        """The student's own clean estimate, without gradient; at the end of the grid the latent is already clean."""
        last = (index == GRID).view(-1, 1, 1, 1)
        inside = index.clamp(max=GRID - 1)
        noise = student(noisy, timesteps[inside], text, added_cond_kwargs=conditions(student, pooled)).sample.float()
        return torch.where(last, noisy, _clean(noisy, noise, levels[inside]))

    def loss_of(generator: torch.Generator) -> torch.Tensor:
        clean, text, pooled = latents.batch(batch_size, generator)
        index = torch.randint(GRID, (batch_size,), generator=generator, device="cpu")
        coarse = torch.rand(batch_size, generator=generator, device="cpu") < 0.5
        index = torch.where(coarse, index // 5 * 5, index)  # half of the draws lie on the 4-step grid
        noise = torch.randn(clean.shape, generator=generator, device="cpu")
        noisy = levels[index].sqrt() * clean + (1 - levels[index]).sqrt() * noise
        with torch.autocast("cpu", torch.bfloat16):
            further = teacher_step(noisy, index, text, pooled)
            aim = estimate_further_down(further, index + 1, text, pooled)
        with torch.autocast("cpu", torch.bfloat16):  # anew: weights cast under no_grad stay cached without gradient
            predicted = student(noisy, timesteps[index], text, added_cond_kwargs=conditions(student, pooled)).sample
        error = _clean(noisy, predicted.float(), levels[index]) - aim
        return ((error.square() + 0.01).sqrt() - 0.1).mean()  # pseudo-Huber loss, as in the method's paper

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
