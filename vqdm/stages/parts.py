"""Quantize a pipeline's text encoders, calibrated on captions, and its VAE, calibrated on latents and their images.

Every layer is an item, made once; a killed stage goes on from there. Each part ends as a directory of its own, as its
library saves it.
"""

import functools
import inspect
import logging
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from vqdm.calibration.collect import Drive, collect, teacher_groups
from vqdm.calibration.hessian import HessianRecorder
from vqdm.codecs.allocation import assign_part
from vqdm.codecs.cards import CODECS
from vqdm.config.codecs import QuantizeConfig, RtnConfig
from vqdm.config.options import SamplerConfig
from vqdm.config.parts import PartsConfig
from vqdm.hub.parts import save_part, text_encoders_of
from vqdm.models.loader import sample
from vqdm.prompts import PromptList
from vqdm.runs import progress, threads
from vqdm.runs.device import one_thread_each
from vqdm.runs.items import read_item
from vqdm.seeds import torch_generator
from vqdm.stages.quantize import Encoder, LayerProgress, shared_parts
from vqdm.weights.bits import count_bits
from vqdm.weights.layers import swap

log = logging.getLogger("vqdm")
CAPTIONS = 32  # captions encoded at once


def quantize_parts(
    directory: Path,
    pipeline,
    calibration: Path,
    *,
    config: PartsConfig,
    sampler: SamplerConfig,
    noise_seed: int,
) -> dict:
    """Fill the stage's directory with a folder for each part; returns {part: bits and bytes}, and the bytes of all.

    pipeline: full precision; its parts are quantized in place. calibration: that stage's directory, for its captions.
    """
    prompts = PromptList.read_jsonl(calibration / "prompts.jsonl")
    texts, codecs, found = [prompt.text for prompt in prompts.prompts], config.codecs(), {}
    modules = text_encoders_of(pipeline) if "text_encoders" in codecs else {}
    if "vae" in codecs:  # while the text encoders are whole
        drive = functools.partial(_drive_vae, pipeline, texts[: config.images], sampler, noise_seed)
        found["vae"] = _quantize_part(directory, "vae", pipeline.vae, drive, codec=codecs["vae"], embeddings=8)
    for name, module in modules.items():
        drive = functools.partial(_drive_text_encoders, pipeline, texts)
        codec = codecs["text_encoders"]
        found[name] = _quantize_part(directory, name, module, drive, codec=codec, embeddings=config.embeddings)
    return {"parts": found, "file_bytes": sum(part["file_bytes"] for part in found.values())}


def _quantize_part(
    directory: Path, name: str, module: nn.Module, drive: Drive, *, codec: QuantizeConfig, embeddings: int
) -> dict:
    """Quantize one part and write its folder; returns its bits and bytes."""
    place, assignment = directory / "layers" / name, assign_part(module, codec, embeddings=embeddings)
    coded = [(spec, scheme) for spec, scheme in assignment.quantized if spec.kind != "embedding"]
    tables = [(spec, scheme) for spec, scheme in assignment.quantized if spec.kind == "embedding"]
    with one_thread_each():
        shared = shared_parts(place, module, coded, config=codec)
    weights, count = sum(spec.size for spec in assignment.specs), len(assignment.specs)
    with progress.bar(f"quantize {name}", weights, count=count, unit="layer") as bar:
        layers = LayerProgress(bar)
        for problems, options in ((coded, codec), (tables, RtnConfig(bits=embeddings))):
            encoder = Encoder(place, module, options, shared)
            _encode(encoder, problems, drive, layers=layers)
            for spec, _ in problems:
                swap(module, spec, encoder.stored(spec), decode="per_call")
    bits = count_bits(module)
    size = save_part(module, directory / name)
    log.info("quantized %s: %.3f bits per weight, %.2f MiB", name, bits.bits_per_weight, size / 2**20)
    return {"bits_per_weight": bits.bits_per_weight, "file_bytes": size}


def _encode(encoder: Encoder, problems: list, drive: Drive, *, layers: LayerProgress) -> None:
    """Make the layers that are missing, as many Hessians at a time as memory allows."""
    schemes = {spec.name: scheme for spec, scheme in problems}
    for group in filter(None, teacher_groups([[spec for spec, _ in problems]])):
        missing = [spec for spec in group if read_item(encoder.directory, spec.name) is None]
        layers.skip([spec for spec in group if spec not in missing])
        hessians: dict[str, torch.Tensor] = {}
        if missing and CODECS[encoder.config.kind].needs_hessian(encoder.config):
            hessians = collect(encoder.denoiser, group, drive, config=encoder.config)
        made = [(spec, schemes[spec.name]) for spec in missing]
        encoder.encode_all(made, hessians, workers=threads.workers(), layers=layers)


@torch.no_grad()
def _drive_text_encoders(pipeline, texts: list[str], recorder: HessianRecorder) -> None:
    """Encode all captions as the pipeline does, and once the empty one."""
    encode: Callable = pipeline.encode_prompt
    known = inspect.signature(encode).parameters
    given = {"device": pipeline.device, "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    given = {name: value for name, value in given.items() if name in known}
    for start in range(0, len(texts), CAPTIONS):
        encode(prompt=texts[start : start + CAPTIONS], **given)
    encode(prompt=[""], **given)


@torch.no_grad()
def _drive_vae(pipeline, texts: list[str], sampler: SamplerConfig, seed: int, recorder: HessianRecorder) -> None:
    """Decode the latents of sampled captions, and encode the images that come of them, one at a time."""
    recorder.enabled = False
    vae, dtype = pipeline.vae, pipeline.vae.dtype
    if getattr(vae.config, "force_upcast", False):  # SDXL's overflows in fp16
        vae.float()
    for number, text in enumerate(texts):
        generator = torch_generator(seed, "vae", number)
        latents = sample(pipeline, [text], sampler=sampler, generators=[generator], output="latent")
        shift = getattr(vae.config, "shift_factor", None) or 0
        recorder.enabled = True
        images = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor + shift, return_dict=False)[0]
        vae.encode(images)
        recorder.enabled = False
    vae.to(dtype)
