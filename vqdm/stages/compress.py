"""Compression of a user's model: quantized through the store, then written as a pipeline that diffusers loads."""

import dataclasses
import logging
from pathlib import Path

from vqdm.config.options import Config
from vqdm.errors import UserError
from vqdm.hub.pipelines import check_place, save_pipeline
from vqdm.prompts import load_prompts
from vqdm.runs import processes, progress
from vqdm.runs.device import Device
from vqdm.runs.store import Store
from vqdm.runs.texts import in_one_line
from vqdm.seeds import torch_generator
from vqdm.stages.accelerate import ensure_acceleration, prepare_to_save
from vqdm.stages.graph.denoiser import Quantization
from vqdm.stages.graph.samplers import image_sampler
from vqdm.stages.make import ensure_denoiser, ensure_parts, ensure_student, environment_of
from vqdm.stages.pipelines import Models

PICTURE_STEPS = 20  # at most: enough to see what the model makes, little beside calibration
log = logging.getLogger("vqdm")


def output_directory(config: Config, store: Store, stages: Quantization) -> Path:
    """The compressed pipeline's directory: `output`, or a place named by its fingerprint."""
    if config.output is not None:
        return Path(config.output)
    parts = "" if stages.parts is None else f"-parts-{stages.parts.short}"
    return store.root / "compressed" / f"{stages.denoiser.directory_name}{parts}"


def compress_model(config: Config, store: Store, stages: Quantization, *, device: Device, tracker) -> dict:
    """Run calibrate → quantize → distil → the pipeline's directory. Returns the content of the run's record."""
    directory = output_directory(config, store, stages)
    check_place(directory)
    if directory.exists():
        log.info("%s: will replace the pipeline that is there", directory)
    environment = environment_of(config, device)
    model = ensure_student(config, store, stages.calibrate, device=device, environment=environment)
    models = Models(config, device.name, model=model)
    quantized = ensure_denoiser(config, store, stages, models, environment=environment, tracker=tracker)
    ensure_acceleration(config, store, stages, models, compressed=quantized, environment=environment)
    ensure_parts(config, store, stages, models, environment=environment)
    summary = store.summary(stages.denoiser)
    if processes.is_main():
        pipeline = models.student(quantized, decode="per_call")
        prepare_to_save(config, store, stages, pipeline)
        save_pipeline(pipeline, directory, base=config.model.hub_id or config.model.path or config.model.builtin)
        if config.picture:
            show_picture(pipeline, directory, config)
    processes.wait_for_all()
    log.info(
        "wrote %s: the denoiser takes %.2f MiB, %.3f bits per weight with everything counted",
        directory,
        summary["file_bytes"] / 2**20,
        summary["bits_per_weight"],
    )
    return {"bits": summary, "output": str(directory)}


def show_picture(pipeline, directory: Path, config: Config) -> None:
    """Put one image that the written pipeline samples on its card; where that fails, a line says why there is none.

    Captions of the user's own are never published: a shipped model gets one of its world, others one of vqdm's.
    """
    from vqdm.hub.card import add_picture
    from vqdm.models.loader import sample

    world = (config.model.builtin or "builtin").removesuffix("_turbo")
    caption = load_prompts(source=world, split="test", n=1).prompts[0].text
    sampler = image_sampler(config)
    sampler = dataclasses.replace(sampler, steps=min(sampler.steps, PICTURE_STEPS))
    try:
        with progress.step("picture for the card"):
            (picture,) = sample(pipeline, [caption], sampler=sampler, generators=[torch_generator(0, "card")])
    except (UserError, RuntimeError) as error:  # such as too little memory: it only decorates
        log.warning("%s: the card has no picture (%s)", directory, in_one_line(str(error))[:200])
        return
    add_picture(directory, picture, caption=caption, steps=sampler.steps)
