"""Distances of the student's predictions, and optionally of its blocks' outputs, from the teacher's."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from vqdm.calibration.blocks import RESIDUAL_UNITS
from vqdm.errors import UserError


def squared_errors(prediction: Tensor, target: Tensor, *, rows_each: int, guidance: float | None = None) -> Tensor:
    """The mean squared error of every sample: fp32 [samples].

    guidance: take the error of the guided prediction, ε_u + g (ε_c − ε_u), from a sample's two rows (Ho and Salimans
    2022, eq. 6); with None, or one row each, all rows count alike.
    """
    error = prediction.float() - target.float()
    error = error.reshape(len(error) // rows_each, rows_each, -1)
    if guidance is not None and rows_each == 2:
        error = error[:, :1] + guidance * (error[:, 1:] - error[:, :1])
    return error.square().mean((1, 2))


def timestep_weights(timesteps: Tensor, scheduler, *, weighting: str, limit: float) -> Tensor:
    """Weights of the samples' errors, fp32 [samples]: 1, or min-SNR-γ (Hang et al. 2023, eq. 8) with γ = `limit`.

    That is min(SNR, γ) / SNR for noise predictions, min(SNR, γ) / (SNR + 1) for velocities. UserError for flow
    matching.
    """
    if weighting == "uniform":
        return torch.ones(len(timesteps), device="cpu")
    if not hasattr(scheduler, "alphas_cumprod"):
        raise UserError(
            f"finetune.weighting={weighting} needs a noise schedule, and {type(scheduler).__name__} has none: "
            "use finetune.weighting=uniform"
        )
    level = scheduler.alphas_cumprod.cpu()[timesteps.long().cpu()].double()
    ratio = level / (1 - level).clamp(min=1e-12)
    bound = ratio.clamp(max=limit)
    of = {"epsilon": ratio, "v_prediction": ratio + 1, "sample": torch.ones_like(ratio)}
    return (bound / of[scheduler.config.prediction_type]).float()


class BlockOutputs:
    """The outputs of a denoiser's residual units in its last forward, by name."""

    def __init__(self, denoiser: nn.Module):
        self.latest: dict[str, Tensor] = {}
        self.hooks = [
            module.register_forward_hook(self._keeper(name))
            for name, module in denoiser.named_modules()
            if type(module).__name__ in RESIDUAL_UNITS
        ]
        if not self.hooks:
            raise UserError(
                f"finetune.feature_weight needs blocks of a kind known here ({', '.join(RESIDUAL_UNITS)}), and "
                f"{type(denoiser).__name__} has none: set it to 0"
            )

    def _keeper(self, name: str):
        def keep(_module, _inputs, output):
            if isinstance(output, Tensor):
                self.latest.setdefault(name, output)  # a checkpointed block runs again in the backward pass

        return keep

    def take(self) -> dict[str, Tensor]:
        """Return the outputs of the last forward and forget them."""
        outputs, self.latest = self.latest, {}
        return outputs

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()


@contextmanager
def block_outputs(*denoisers: nn.Module) -> Iterator[list[BlockOutputs]]:
    watched = [BlockOutputs(denoiser) for denoiser in denoisers]
    try:
        yield watched
    finally:
        for outputs in watched:
            outputs.remove()


def feature_errors(student: dict[str, Tensor], teacher: dict[str, Tensor], *, rows_each: int) -> Tensor:
    """Squared error of every sample relative to the variance in its rows, averaged over blocks: fp32 [samples].

    The variance is that of its own rows, not the batch's, so that micro-batches and processes add up to the same loss.
    """
    errors = []
    for name, target in teacher.items():
        variance = target.float().reshape(len(target) // rows_each, -1).var(1, correction=0).clamp(min=1e-12)
        errors.append(squared_errors(student[name], target, rows_each=rows_each) / variance)
    return torch.stack(errors).mean(0)
