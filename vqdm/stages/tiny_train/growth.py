"""What a denoiser can do while it trains: its images of validation captions, read by the attribute network.

A point every so many steps goes to `growth.jsonl`, the images of the last one to `growth.png`, and the pipeline with
the averaged weights to `snapshot/`, so that it can be used before the end. No point takes part in the training.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torchvision.utils import make_grid, save_image

from vqdm.seeds import torch_generator
from vqdm.stages.tiny_train.text import token_ids
from vqdm.stages.tiny_train.unet import build_unet, encode_text, guided_noise
from vqdm.tiny.attributes import fidelity
from vqdm.tiny.attributes import look as look_at
from vqdm.tiny.captions import requested
from vqdm.tiny.data import SceneSet
from vqdm.tiny.evaluator import TinyWorld
from vqdm.tiny.scenes import WORLD_SEED

STEPS, GUIDANCE = 20, 3.0
COLUMNS, SHOWN = 8, 32  # of the picture, and images in it


@torch.no_grad()
def sample(
    unet: UNet2DConditionModel, scheduler: DDIMScheduler, latents: torch.Tensor, *, text, pooled
) -> torch.Tensor:
    """Clean latents from noise, by DDIM under guidance."""
    scheduler.set_timesteps(STEPS)
    for timestep in scheduler.timesteps:
        noise = guided_noise(unet, latents, timestep.repeat(len(text)), text, pooled, guidance=GUIDANCE)
        latents = scheduler.step(noise, timestep, latents).prev_sample
    return latents


class Growth:
    """Looks at a U-Net's images every so many steps; given to `fit` as its `after_step`.

    evaluators: the directory of the world's evaluators. shared: the pipeline's other parts by name. save: writes a
    pipeline with this U-Net into a directory.
    """

    def __init__(
        self,
        work: Path,
        *,
        every: int,
        captions: int,
        evaluators: Path,
        scheduler: dict,
        seed: int,
        shared: dict,
        save: Callable,
    ):
        self.work, self.every, self.save = work, every, save
        self.net, self.world = (found := TinyWorld(evaluators)).net, found.world
        self.scheduler, self.vae = DDIMScheduler(**scheduler), shared["vae"]
        self.captions = SceneSet(seed=WORLD_SEED, split="validation", n=captions, world=self.world).captions
        ids = token_ids(shared["tokenizer"], self.captions)
        self.text, self.pooled = encode_text(shared["text_encoder"], shared["text_encoder_2"], ids)
        self.unet = build_unet(self.world).eval().requires_grad_(False)
        shape = (1, self.unet.config.in_channels, *[self.unet.config.sample_size] * 2)
        draws = (torch_generator(seed, "growth", i) for i in range(captions))
        self.noise = torch.cat([torch.randn(shape, generator=draw, device="cpu") for draw in draws])
        self.began = time.process_time() - 3600 * self._hours_before()

    def _points(self) -> list[dict]:
        path = self.work / "growth.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def _hours_before(self) -> float:
        """CPU-hours up to the last point of a training that was killed."""
        points = self._points()
        return points[-1]["cpu_hours"] if points else 0.0

    def __call__(self, step: int, average: dict[str, torch.Tensor]) -> None:
        if step % self.every:
            return
        self.unet.load_state_dict(average)
        images = self._images()
        requests = [requested(caption, world=self.world) for caption in self.captions]
        seen = look_at(self.net, self.net(images), world=self.world)
        tallies = [fidelity(r, s, world=self.world).values() for r, s in zip(requests, seen, strict=True)]
        found, asked = (np.array([sum(pair[i] for pair in tally) for tally in tallies]) for i in (0, 1))
        point = {
            "step": step,
            "fidelity": round(float(found.sum() / asked.sum()), 4),
            "all_right": round(float((found == asked).mean()), 4),
            "cpu_hours": round((time.process_time() - self.began) / 3600, 3),
        }
        with (self.work / "growth.jsonl").open("a") as file:
            file.write(json.dumps(point) + "\n")
        self._show(images)
        self.save(self.work / "snapshot", self.unet)

    @torch.no_grad()
    def _images(self) -> torch.Tensor:
        images = []
        for noise, text, pooled in zip(self.noise.split(32), self.text.split(32), self.pooled.split(32), strict=True):
            latents = sample(self.unet, self.scheduler, noise, text=text, pooled=pooled)
            images.append(self.vae.decode(latents).sample.clamp(-1, 1))
        return torch.cat(images)

    def _show(self, images: torch.Tensor) -> None:
        grid = make_grid((images[:SHOWN] + 1) / 2, nrow=COLUMNS, padding=0)
        save_image(grid, self.work / "growth.png")
