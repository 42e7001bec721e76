"""Pipelines in memory on the fake device: loaded, offloaded, with a LoRA, saved, compressed, scored; as on the CPU.

python -m pytest tests/fakedev/driven_pipelines.py    (in a process of its own)
"""

import json

import fake_device
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from diffusers.hooks import apply_group_offloading
from metrics.random_networks import (
    random_alexnet,
    random_inception,
    random_open_clip,
    random_transformers_clip,
    textures,
)
from peft import LoraConfig
from safetensors.torch import load_file

import vqdm
from vqdm.errors import UserError
from vqdm.hub.pipelines import quiet_diffusers, set_decode
from vqdm.metrics.clip import OpenClip, PickScore
from vqdm.metrics.extractors import make_extractor
from vqdm.models.shipped import builtin_directory
from vqdm.seeds import seeded_initialisation, torch_generator
from vqdm.weights.layers import dequantize_layers, quantized_layers

fake_device.register()
DEVICE = fake_device.NAME
CAPTIONS = ["a red circle above a blue square", "a big green triangle"]


def load(directory, **options):
    with quiet_diffusers():
        pipeline = DiffusionPipeline.from_pretrained(directory, dtype=torch.float32, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def latents(pipeline):
    return pipeline(
        CAPTIONS, num_inference_steps=2, guidance_scale=3.0, output_type="latent",
        generator=[torch_generator(0, "image", str(i)) for i in range(2)],
    ).images  # fmt: skip


def near(found, wanted, within=1e-5):
    return float((found.cpu() - wanted).norm() / wanted.norm()) < within


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A quantized pipeline's directory, as compressed and saved on the CPU."""
    directory = tmp_path_factory.mktemp("quantized")
    pipeline = load(builtin_directory("tiny"))
    vqdm.compress(pipeline, "rtn4", CAPTIONS, steps=2, recorded_steps=2).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def expected(saved):
    return latents(load(saved))


@pytest.mark.parametrize("decode", ["per_call", "cached", "dequantized"])
def test_a_pipeline_that_is_moved(saved, expected, decode):
    pipeline = load(saved).to(DEVICE)
    if decode == "dequantized":
        dequantize_layers(pipeline.unet)
    else:
        set_decode(pipeline.unet, decode)
    found = latents(pipeline)
    assert found.device.type == DEVICE and near(found, expected)


def test_a_pipeline_that_is_loaded_there(saved, expected):
    unet = UNet2DConditionModel.from_pretrained(saved / "unet", device_map={"": DEVICE})
    assert {layer.weight.device.type for layer in quantized_layers(unet).values()} == {DEVICE}
    pipeline = load(saved)
    pipeline.register_modules(unet=unet)
    assert near(latents(pipeline.to(DEVICE)), expected)


@pytest.mark.parametrize("offload", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_offloading(saved, expected, offload):
    pipeline = load(saved)
    getattr(pipeline, offload)(device=DEVICE)
    for _ in range(2):
        assert near(latents(pipeline), expected)


def test_a_lora_beside_quantized_weights(saved):
    found = []
    for device in ("cpu", DEVICE):
        pipeline = load(saved)
        with seeded_initialisation(0, "lora"):
            pipeline.unet.add_adapter(LoraConfig(r=4, init_lora_weights=False, target_modules=["to_q", "to_k"]))
        found.append(latents(pipeline.to(device)))
    assert near(found[1], found[0])


def test_what_is_saved_there_is_what_was_loaded(saved, tmp_path):
    load(saved).to(DEVICE).save_pretrained(tmp_path)
    name = "unet/diffusion_pytorch_model.safetensors"
    own, there = load_file(saved / name), load_file(tmp_path / name)
    assert own.keys() == there.keys() and all(torch.equal(own[key], there[key]) for key in own)
    configs = [json.loads((folder / "unet/config.json").read_text()) for folder in (saved, tmp_path)]
    assert configs[0] == configs[1] | {"_name_or_path": configs[0]["_name_or_path"]}


@pytest.mark.parametrize("place", ["there", "enable_model_cpu_offload"])
def test_compress_in_memory(place, saved, expected):
    """rtn4 needs no data: the same codes, wherever the pipeline is while they are made."""
    pipeline = load(builtin_directory("tiny"))
    if place == "there":
        pipeline.to(DEVICE)
    else:
        getattr(pipeline, place)(device=DEVICE)
    vqdm.compress(pipeline, "rtn4", CAPTIONS, steps=2, recorded_steps=2)
    assert near(latents(pipeline), expected)
    if place != "there":
        assert all(parameter.device.type == "cpu" for parameter in pipeline.unet.parameters())


def test_compress_under_offloading_with_data():
    pipeline = load(builtin_directory("tiny"))
    pipeline.enable_model_cpu_offload(device=DEVICE)
    vqdm.compress(pipeline, "trellis5", CAPTIONS, steps=2, recorded_steps=2, layers=r"mid_block.*conv1$")
    original = latents(load(builtin_directory("tiny")))
    assert near(latents(pipeline), original, within=0.1)


@pytest.mark.parametrize("offload", ["sequential", "group"])
def test_compress_says_that_offloading_is_on(offload):
    pipeline = load(builtin_directory("tiny"))
    if offload == "group":
        apply_group_offloading(pipeline.unet, onload_device=torch.device("cpu"), offload_type="leaf_level")
    else:
        pipeline.enable_sequential_cpu_offload(device=DEVICE)
    with pytest.raises(UserError, match="offload"):
        vqdm.compress(pipeline, "rtn4", CAPTIONS, steps=2, recorded_steps=2)


def extractors(family, folder):
    """A function from a device to an extractor, with random weights where there are any."""
    if family == "open_clip":
        made = random_open_clip(folder)
        return lambda device: OpenClip(*made, device=device)
    if family == "pickscore":
        made = random_transformers_clip(folder)
        return lambda device: PickScore(made, device=device)
    weights = {"lpips": random_alexnet, "fid_standard": random_inception}
    files = [weights[family](folder)] if family in weights else []
    return lambda device: make_extractor(family, files, device=device)


@pytest.mark.parametrize("family", ["paired", "lpips", "fid_standard", "open_clip", "pickscore"])
def test_features_of_images(family, tmp_path):
    """Families that look at images by a network on the device; the tiny world's own looks on the CPU."""
    make = extractors(family, tmp_path)
    images, originals = textures(2, (64, 64)), textures(2, (64, 64), seed=1)
    pairs = family in ("paired", "lpips")
    looked_at = (np.stack(images), np.stack(originals)) if pairs else (images, CAPTIONS)
    own, there = (make(device).columns(*looked_at) for device in ("cpu", DEVICE))
    assert own.keys() == there.keys() and own
    assert all(there[name].device.type == "cpu" and near(there[name], own[name]) for name in own)
