"""One training loop for every part of the tiny world.

Step counts are fixed, every step has its generator, and checkpoints are safetensors: a killed run goes on from its
last checkpoint and ends with the same weights, bit for bit (same threads, same library).
"""

import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save as to_bytes
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from vqdm.distillation.optimizer import learning_rate, optimizer_tensors, restore_optimizer
from vqdm.runs import progress
from vqdm.runs.device import computes_in_bfloat16
from vqdm.runs.files import atomic_write
from vqdm.seeds import derive
from vqdm.tiny.world import World


def _save(path: Path, step: int, model: nn.Module, average: dict, optimizer: torch.optim.AdamW) -> None:
    tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
    tensors |= {f"average.{k}": v for k, v in average.items()}
    tensors |= optimizer_tensors(optimizer, {p: k for k, p in model.named_parameters()})
    atomic_write(path, to_bytes({k: v.contiguous() for k, v in tensors.items()}, metadata={"step": str(step)}))


def _load(path: Path, model: nn.Module, average: dict, optimizer: torch.optim.AdamW) -> int:
    with safe_open(path, "pt") as file:
        step = int(file.metadata()["step"])
        tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    model.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model.")})
    for key in average:
        average[key].copy_(tensors[f"average.{key}"])
    restore_optimizer(optimizer, {p: k for k, p in model.named_parameters()}, tensors, step=step)
    return step


def fast_precision() -> torch.autocast:
    """bf16 autocast on a CPU that computes in it, and nothing on others, where torch's bf16 is many times as slow."""
    return torch.autocast("cpu", torch.bfloat16, enabled=computes_in_bfloat16("cpu"))


def plain_attention(world: World) -> contextlib.AbstractContextManager:
    """Switch torch's fused attention off: on a CPU its backward pass took half of a step of the encoders.

    Tiny keeps the fused one, which made its weights.
    """
    return contextlib.nullcontext() if world.name == "tiny" else sdpa_kernel(SDPBackend.MATH)


def fit(
    model: nn.Module,
    loss_of: Callable[[torch.Generator], torch.Tensor],
    *,
    purpose: str,
    directory: Path,
    steps: int,
    learning_rate_peak: float,
    seed: int,
    warmup: int = 100,
    decay_from: float = 0.6,
    weight_decay: float = 0.0,
    average_decay: float = 0.999,
    betas: tuple[float, float] = (0.9, 0.99),
    checkpoint_every: int = 500,
    after_step: Callable[[int, dict], None] | None = None,
) -> dict[str, torch.Tensor]:
    """Minimise `loss_of(the step's generator)`; returns the exponential moving average of the state dict.

    Losses go to `<directory>/<purpose>.jsonl`, the last checkpoint to `<directory>/<purpose>.safetensors`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    checkpoint, log = directory / f"{purpose}.safetensors", directory / f"{purpose}.jsonl"
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=learning_rate_peak, betas=betas, weight_decay=weight_decay, eps=1e-8)
    average = {k: v.detach().clone() for k, v in model.state_dict().items() if v.is_floating_point()}
    start = _load(checkpoint, model, average, optimizer) if checkpoint.exists() else 0
    began, running, counted = time.monotonic(), 0.0, 0
    for step in progress.over(range(start, steps), purpose, unit="step", before=start):
        rate = learning_rate(step, steps=steps, peak=learning_rate_peak, warmup=warmup, decay_from=decay_from)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = loss_of(torch.Generator("cpu").manual_seed(derive(seed, purpose, step)))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        if not (torch.isfinite(loss) and torch.isfinite(norm)):  # checked before the weights are touched
            raise FloatingPointError(
                f"{purpose}: loss is {loss.item()}, norm of the gradient {norm.item()} at step {step}; "
                f"the last good state is {checkpoint}"
            )
        optimizer.step()
        decay = min(average_decay, (step + 1) / (step + 10))
        with torch.no_grad():
            state = model.state_dict()
            torch._foreach_lerp_(list(average.values()), [state[k].float() for k in average], 1 - decay)
        running, counted = running + loss.item(), counted + 1
        done = step + 1
        if done % 100 == 0 or done == steps:
            record = {"step": done, "loss": running / counted, "seconds": round(time.monotonic() - began, 1)}
            with log.open("a") as file:
                file.write(json.dumps(record) + "\n")
            running, counted = 0.0, 0
        if done % checkpoint_every == 0 or done == steps:
            _save(checkpoint, done, model, average, optimizer)
            if after_step is not None:
                after_step(done, average)
    return average
