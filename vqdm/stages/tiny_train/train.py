"""Train a whole world, tiny or small: VAE, text encoders, denoiser, few-step student, evaluators, reference features.

Finished parts are kept, and a killed run goes on from its last checkpoint. The result is laid out as the package
ships it, for the world tiny: tiny/, tiny_turbo/ (diffusers pipelines) and tiny_evaluators/.
"""

import copy
import functools
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

from vqdm.config.options import TinyTrainConfig
from vqdm.hub.pipelines import forget_origins, quiet_diffusers
from vqdm.models.location import check_pipeline_directory
from vqdm.models.shipped import UNET_BEGUN, finished_parts
from vqdm.runs.files import atomic_write, whole_directory, write_json
from vqdm.stages.tiny_train.evaluators import train_attribute_net, train_clip
from vqdm.stages.tiny_train.growth import Growth
from vqdm.stages.tiny_train.text import train_text_encoders
from vqdm.stages.tiny_train.turbo import distil_turbo
from vqdm.stages.tiny_train.unet import SCHEDULE, LatentSet, load_unet, train_unet
from vqdm.stages.tiny_train.vae import train_vae
from vqdm.stages.tiny_train.words import teach_words
from vqdm.tiny.attributes import AttributeNet
from vqdm.tiny.clip import CLIP_CONFIGS
from vqdm.tiny.data import SceneSet
from vqdm.tiny.evaluator import TinyWorld
from vqdm.tiny.world import World
from vqdm.tiny.worlds import WORLDS

log = logging.getLogger("vqdm")
DDIM = SCHEDULE | {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}  # as SDXL's
TRAILING = SCHEDULE | {"timestep_spacing": "trailing"}  # as SDXL-Turbo's
EVALUATOR_SEED = 1  # seed of the evaluators' scenes, none of which is drawn like the denoiser's


def _part(path: Path, train: Callable, load: Callable):
    """Load a finished part, or train it and keep it."""
    if not path.exists():
        made = train()
        with whole_directory(path) as partial:
            made.save_pretrained(partial)
    return load(path)


@quiet_diffusers()
def train_tiny(config: TinyTrainConfig, directory: Path) -> dict:
    """Fill a stage directory; returns the step counts for the manifest.

    With `init_from`, VAE and text encoders are that pipeline's, and the U-Net is trained on from there. With `parts`,
    those that lie there are taken, and a U-Net that was begun is trained on. With both, the evaluators are taken.
    """
    work = directory / "training"
    work.mkdir(parents=True, exist_ok=True)
    if config.parts is not None:
        _take_parts(config, directory, work)
    start = None if config.init_from is None else check_pipeline_directory(Path(config.init_from))
    vae = _vae(work, config, start)
    tokenizer, text_encoder, text_encoder_2 = _text_encoders(work, config, start)
    _train_evaluators(directory, work, tokenizer, config=config)
    shared = {"vae": vae, "tokenizer": tokenizer, "text_encoder": text_encoder, "text_encoder_2": text_encoder_2}
    unet, turbo = _denoisers(directory, work, config, start=start, shared=shared)
    save_pipeline(directory / config.world, unet, DDIMScheduler(**DDIM), **shared)
    save_pipeline(directory / f"{config.world}_turbo", turbo, EulerAncestralDiscreteScheduler(**TRAILING), **shared)
    for losses in (work / "checkpoints").glob("*.jsonl"):
        losses.replace(work / losses.name)
    shutil.rmtree(work / "checkpoints", ignore_errors=True)
    return {"steps": {name: value for name, value in vars(config).items() if name.endswith("_steps")}}


def _take_parts(config: TinyTrainConfig, directory: Path, work: Path) -> None:
    given = finished_parts(Path(config.parts), world=config.world)
    evaluators = f"{config.world}_evaluators"
    for name in given if config.init_from is None else given.keys() & {evaluators}:
        target = (directory if name == evaluators else work) / name
        if not target.exists():
            with whole_directory(target) as partial:
                shutil.copytree(given[name], partial, dirs_exist_ok=True)


def _scenes(config: TinyTrainConfig, count: int) -> SceneSet:
    return SceneSet(seed=config.seed, split="train", n=count, world=WORLDS[config.world])


def _vae(work: Path, config: TinyTrainConfig, start: Path | None) -> AutoencoderKL:
    def make() -> AutoencoderKL:
        if start is not None:
            return AutoencoderKL.from_pretrained(start / "vae")
        return train_vae(
            _scenes(config, config.vae_scenes),
            directory=work / "checkpoints",
            steps=config.vae_steps,
            crop_steps=config.vae_crop_steps,
            batch_size=config.vae_batch_size,
            seed=config.seed,
        )

    return _part(work / "vae", make, AutoencoderKL.from_pretrained)


TEXT_PARTS = {
    "tokenizer": CLIPTokenizer,
    "text_encoder": CLIPTextModel,
    "text_encoder_2": CLIPTextModelWithProjection,
}


def _text_encoders(work: Path, config: TinyTrainConfig, start: Path | None) -> tuple:
    """Make (tokenizer, text_encoder, text_encoder_2), trained or taken from `start`."""

    @functools.cache
    def made() -> dict:
        if start is not None:
            loaded = {name: kind.from_pretrained(start / name) for name, kind in TEXT_PARTS.items()}
            # transformers would keep the files' 16 bit
            return {name: part if name == "tokenizer" else part.float() for name, part in loaded.items()}
        scenes = _scenes(config, config.text_scenes)
        settings = {"directory": work / "checkpoints", "batch_size": config.batch_size, "seed": config.seed}
        parts = train_text_encoders(scenes, steps=config.text_steps, **settings)
        if config.word_steps:
            teach_words(*parts, scenes.captions, world=scenes.world, steps=config.word_steps, **settings)
        return dict(zip(TEXT_PARTS, parts, strict=True))

    return tuple(
        _part(work / name, lambda name=name: made()[name], kind.from_pretrained) for name, kind in TEXT_PARTS.items()
    )


def _denoisers(directory: Path, work: Path, config: TinyTrainConfig, *, start: Path | None, shared: dict) -> tuple:
    """Train and return (unet, turbo)."""
    batch_size = config.batch_size if config.unet_batch_size is None else config.unet_batch_size
    settings = {"directory": work / "checkpoints", "batch_size": batch_size, "seed": config.seed}
    load = functools.partial(load_unet, world=WORLDS[config.world])

    @functools.cache
    def latents() -> LatentSet:
        path = work / "checkpoints" / "latents.safetensors"
        return LatentSet(lambda: _scenes(config, config.scenes), **shared, path=path)

    def make_unet() -> UNet2DConditionModel:
        return train_unet(
            latents(),
            world=WORLDS[config.world],
            steps=config.unet_steps,
            init_from=_begun(config) if start is None else start / "unet",
            after_step=_growth(directory, work, config, shared),
            **settings,
        )

    unet = _part(work / "unet", make_unet, load)
    turbo = _part(
        work / "turbo",
        lambda: distil_turbo(unet, latents(), steps=config.turbo_steps, guidance=config.turbo_guidance, **settings),
        load,
    )
    return unet, turbo


def _begun(config: TinyTrainConfig) -> Path | None:
    """The U-Net among `parts` whose training was begun."""
    place = None if config.parts is None else Path(config.parts) / UNET_BEGUN
    return place if place is not None and place.is_dir() else None


def _growth(directory: Path, work: Path, config: TinyTrainConfig, shared: dict) -> Growth | None:
    if config.growth_every is None:
        return None

    def save(path: Path, unet: UNet2DConditionModel) -> None:
        save_pipeline(path, unet, DDIMScheduler(**DDIM), **shared)

    return Growth(
        work,
        every=config.growth_every,
        captions=config.growth_captions,
        evaluators=directory / f"{config.world}_evaluators",
        scheduler=DDIM,
        seed=config.seed,
        shared=shared,
        save=save,
    )


def evaluator_scenes(count: int, *, world: World) -> SceneSet:
    """Scenes from the evaluators' own seed, a fifth of them with pairs that the denoiser never sees."""
    seen = SceneSet(seed=EVALUATOR_SEED, split="train", n=count, world=world)
    unseen = SceneSet(seed=EVALUATOR_SEED, split="unseen_pairs", n=max(1, count // 4), world=world)
    seen.scenes += unseen.scenes
    seen.captions += unseen.captions
    seen.pixels = np.concatenate([seen.pixels, unseen.pixels])
    return seen


def _train_evaluators(directory: Path, work: Path, tokenizer, *, config: TinyTrainConfig) -> None:
    folder = directory / f"{config.world}_evaluators"
    if (folder / "reference.safetensors").exists():  # written last
        return
    scenes = evaluator_scenes(config.evaluator_scenes, world=WORLDS[config.world])
    settings = {"directory": work / "checkpoints", "batch_size": config.batch_size, "seed": config.seed}
    net = train_attribute_net(scenes, steps=config.attribute_steps, **settings)
    clip = train_clip(scenes, tokenizer, steps=config.clip_steps, **settings)
    save_evaluators(folder, net, clip, tokenizer, world=scenes.world, reference_scenes=config.reference_scenes)


def _half(module: torch.nn.Module) -> bytes:
    return to_bytes({name: tensor.half().contiguous() for name, tensor in module.state_dict().items()})


@torch.no_grad()
def save_evaluators(folder: Path, net: AttributeNet, clip, tokenizer, *, world: World, reference_scenes: int) -> None:
    """Save fp16 weights, and their features of real renders, the reference of FID, KID and CMMD."""
    (folder / "open_clip").mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder / "tokenizer")
    name = f"vqdm-{world.name}"
    write_json(folder / "open_clip" / f"{name}.json", CLIP_CONFIGS[name])
    atomic_write(folder / "open_clip" / f"{name}.safetensors", _half(clip))
    atomic_write(folder / "attribute_net.safetensors", _half(net))
    write_reference(folder, scenes=reference_scenes)


def write_reference(folder: Path, *, scenes: int) -> None:
    """Write `reference.safetensors` with the folder's evaluators: features and CLIP vectors in fp16."""
    evaluators = TinyWorld(folder)
    renders = SceneSet(seed=0, split="reference", n=scenes, world=evaluators.world).pixels
    parts = [evaluators.columns(list(renders[start : start + 256])) for start in range(0, scenes, 256)]
    seen = {name: torch.cat([part[name] for part in parts]).half() for name in ("features", "image")}
    about = {"split": "reference", "seed": 0, "scenes": scenes}
    sizes = {name: tensor.shape[1] for name, tensor in seen.items()}
    about |= {"features": f"AttributeNet, {sizes['features']}, fp16"}
    about |= {"image": f"unit vectors of open_clip, {sizes['image']}, fp16"}
    write_json(folder / "reference.json", about)
    atomic_write(folder / "reference.safetensors", to_bytes(seen))


def save_pipeline(directory: Path, unet, scheduler, *, vae, tokenizer, text_encoder, text_encoder_2) -> None:
    """Save a StableDiffusionXLPipeline in fp16 safetensors; the parts given stay as they are."""
    parts = {"unet": unet, "vae": vae, "text_encoder": text_encoder, "text_encoder_2": text_encoder_2}
    pipeline = StableDiffusionXLPipeline(
        **{name: torch.nn.Module.to(copy.deepcopy(part), torch.float16) for name, part in parts.items()},
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        scheduler=scheduler,
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )
    with whole_directory(directory) as partial:
        pipeline.save_pretrained(partial)
        forget_origins(partial.glob("*/config.json"))
