"""Train the whole tiny world: VAE, text encoders, denoiser, few-step student, evaluators, reference features.

Every part is kept when it is done; a killed run goes on from its last checkpoint. The result is laid out as the
package ships it: tiny/, tiny_turbo/ (diffusers pipelines) and tiny_evaluators/.
"""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import save as to_bytes
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from vqdm.config import TinyTrainConfig
from vqdm.metrics.attributes import AttributeNet
from vqdm.metrics.tiny_clip import CLIP_CONFIG, CLIP_NAME
from vqdm.store import atomic_write, write_json
from vqdm.tiny.data import SceneSet
from vqdm.tiny.evaluators import train_attribute_net, train_clip
from vqdm.tiny.text import train_text_encoders
from vqdm.tiny.turbo import distil_turbo
from vqdm.tiny.unet import SCHEDULE, LatentSet, train_unet
from vqdm.tiny.vae import train_vae

log = logging.getLogger("vqdm")
EVALUATOR_SEED = 1  # of the evaluators' scenes: none of them is drawn like the denoiser's


def _part(path: Path, train: Callable, load: Callable):
    """Load a finished part, or train and keep it (written beside, then renamed)."""
    if not path.exists():
        made = train()
        partial = path.with_name(path.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        made.save_pretrained(partial)
        partial.replace(path)
    return load(path)


def train_tiny(config: TinyTrainConfig, directory: Path) -> dict:
    """Fill a stage directory; returns the step counts and scores for the manifest."""
    work = directory / "training"
    work.mkdir(parents=True, exist_ok=True)
    seed = config.seed

    def scenes(count: int) -> SceneSet:
        return SceneSet(seed=seed, split="train", n=count)

    vae = _part(
        work / "vae",
        lambda: train_vae(
            scenes(config.vae_scenes),
            directory=work,
            steps=config.vae_steps,
            batch_size=config.vae_batch_size,
            seed=seed,
        ),
        AutoencoderKL.from_pretrained,
    )
    tokenizer, text_encoder, text_encoder_2 = _text_encoders(work, config, scenes)
    _train_evaluators(directory, work, tokenizer, config=config)
    latents = LatentSet(
        scenes(config.scenes), vae, tokenizer, text_encoder, text_encoder_2, path=work / "latents.safetensors"
    )
    init_from = None if config.init_from is None else Path(config.init_from) / "unet"
    unet = _part(
        work / "unet",
        lambda: train_unet(
            latents,
            directory=work,
            steps=config.unet_steps,
            batch_size=config.batch_size,
            seed=seed,
            init_from=init_from,
        ),
        UNet2DConditionModel.from_pretrained,
    )
    turbo = _part(
        work / "turbo",
        lambda: distil_turbo(
            unet, latents, directory=work, steps=config.turbo_steps, batch_size=config.batch_size, seed=seed,
            guidance=config.turbo_guidance,
        ),
        UNet2DConditionModel.from_pretrained,
    )  # fmt: skip
    shared = {"vae": vae, "tokenizer": tokenizer, "text_encoder": text_encoder, "text_encoder_2": text_encoder_2}
    save_pipeline(
        directory / "tiny",
        unet,
        DDIMScheduler(**SCHEDULE, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        **shared,
    )
    save_pipeline(
        directory / "tiny_turbo",
        turbo,
        EulerAncestralDiscreteScheduler(**SCHEDULE, timestep_spacing="trailing"),
        **shared,
    )
    for leftover in ("latents.safetensors", "unet.safetensors", "turbo.safetensors", "vae.safetensors"):
        (work / leftover).unlink(missing_ok=True)
    return {"steps": {name: value for name, value in vars(config).items() if name.endswith("_steps")}}


def _text_encoders(work: Path, config: TinyTrainConfig, scenes):
    if not (work / "text_encoder_2").exists():
        parts = train_text_encoders(
            scenes(config.text_scenes), directory=work, steps=config.text_steps, batch_size=config.batch_size,
            seed=config.seed,
        )  # fmt: skip
        for name, part in zip(("tokenizer", "text_encoder", "text_encoder_2"), parts, strict=True):
            _part(work / name, lambda part=part: part, lambda path: path)
    return (
        CLIPTokenizer.from_pretrained(work / "tokenizer"),
        CLIPTextModel.from_pretrained(work / "text_encoder"),
        CLIPTextModelWithProjection.from_pretrained(work / "text_encoder_2"),
    )


def evaluator_scenes(count: int) -> SceneSet:
    """Scenes of the evaluators' own seed, a fifth of them with the pairs that the denoiser never sees."""
    seen = SceneSet(seed=EVALUATOR_SEED, split="train", n=count)
    unseen = SceneSet(seed=EVALUATOR_SEED, split="unseen_pairs", n=max(1, count // 4))
    seen.scenes += unseen.scenes
    seen.captions += unseen.captions
    seen.pixels = np.concatenate([seen.pixels, unseen.pixels])
    return seen


def _train_evaluators(directory: Path, work: Path, tokenizer, *, config: TinyTrainConfig) -> None:
    folder = directory / "tiny_evaluators"
    if (folder / "attribute_net.safetensors").exists():  # written last
        return
    scenes = evaluator_scenes(config.evaluator_scenes)
    settings = {"directory": work, "batch_size": config.batch_size, "seed": config.seed}
    net = train_attribute_net(scenes, steps=config.attribute_steps, **settings)
    clip = train_clip(scenes, tokenizer, steps=config.clip_steps, **settings)
    save_evaluators(folder, net, clip, tokenizer, reference_scenes=config.reference_scenes)


def _half(module: torch.nn.Module) -> bytes:
    return to_bytes({name: tensor.half().contiguous() for name, tensor in module.state_dict().items()})


@torch.no_grad()
def save_evaluators(folder: Path, net: AttributeNet, clip, tokenizer, *, reference_scenes: int) -> None:
    """fp16 weights, and the features of real renders that FID and KID compare with."""
    (folder / "open_clip").mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder / "tokenizer")
    write_json(folder / "open_clip" / f"{CLIP_NAME}.json", CLIP_CONFIG)
    atomic_write(folder / "open_clip" / f"{CLIP_NAME}.safetensors", _half(clip))
    net.load_state_dict({name: tensor.half().float() for name, tensor in net.state_dict().items()})  # as shipped
    scenes = SceneSet(seed=0, split="reference", n=reference_scenes)
    features = torch.cat([net(scenes.images(rows)) for rows in torch.arange(len(scenes)).split(256)])
    atomic_write(folder / "reference.safetensors", to_bytes({"features": features.half()}))
    about = {"split": "reference", "seed": 0, "scenes": reference_scenes, "features": "AttributeNet, 64, fp16"}
    write_json(folder / "reference.json", about)
    atomic_write(folder / "attribute_net.safetensors", _half(net))


def save_pipeline(directory: Path, unet, scheduler, *, vae, tokenizer, text_encoder, text_encoder_2) -> None:
    """A StableDiffusionXLPipeline in fp16 safetensors."""
    pipeline = StableDiffusionXLPipeline(
        vae=vae, text_encoder=text_encoder, text_encoder_2=text_encoder_2, tokenizer=tokenizer, tokenizer_2=tokenizer,
        unet=unet, scheduler=scheduler, force_zeros_for_empty_prompt=True, add_watermarker=False,
    )  # fmt: skip
    parts = (unet, vae, text_encoder, text_encoder_2)
    for part in parts:
        torch.nn.Module.to(part, torch.float16)
    shutil.rmtree(directory, ignore_errors=True)
    pipeline.save_pretrained(directory)
    for part in parts:
        torch.nn.Module.to(part, torch.float32)
