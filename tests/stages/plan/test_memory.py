"""Formulas of memory against what the codecs and the Hessians really allocate."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from vqdm.calibration.hessian import add_second_moment
from vqdm.codecs.allocation import assign_schemes
from vqdm.codecs.encode import encode_layer, encoder_bytes, make_shared, needs_hessians
from vqdm.config.codecs import AdditiveConfig, GptqConfig, RtnConfig, TrellisConfig
from vqdm.config.options import ModelConfig
from vqdm.metrics.paired import Pairs
from vqdm.models.live_bytes import LiveBytes
from vqdm.models.loader import load_pipeline
from vqdm.models.specs import ConvGeometry, LayerSpec
from vqdm.runs import usage
from vqdm.seeds import torch_generator
from vqdm.stages.plan.forward import LayerInput, measure
from vqdm.stages.plan.memory import (
    HESSIAN_WORKSPACE,
    LIBRARIES,
    PIXEL_BYTES,
    PROCESS,
    SSIM_BYTES,
    Model,
    decoder_upcasts,
    evaluate_memory,
    generate_memory,
    hessian_bytes,
    quantize_memory,
    used_in_files,
)

CONFIGS = {
    "trellis": TrellisConfig(bits=3),
    "gptq": GptqConfig(bits=4),
    "rtn": RtnConfig(bits=4),
    "rtn_hessian": RtnConfig(bits=4, clip="hessian"),
    "additive": AdditiveConfig(bits=3, group_size=8, codebook_bits=6),
}
MODEL = Model({"unet": 1000, "vae": 100}, 2, 10.0, 1000.0, True, image_numbers=48)


def problem(shape):
    draw = torch_generator(0, "memory")
    factor = torch.randn(shape[1], 16, generator=draw)
    return torch.randn(shape, generator=draw), factor @ factor.T + torch.eye(shape[1])


def encode_measured(shape, config) -> int:
    """Peak bytes that encoding a random layer takes beside the matrix."""
    layer = nn.ModuleDict({"layer": nn.Linear(shape[1], shape[0], bias=False)})
    ((spec, scheme),) = assign_schemes(layer, config, pattern="layer", min_size=1).quantized
    shared = None if scheme.shared_key is None else make_shared(layer, [(spec, scheme)], config=config)
    matrix, hessian = problem(shape)
    hessian = hessian if needs_hessians(config) else None
    with torch.no_grad(), LiveBytes() as live:
        encode_layer(matrix, hessian, scheme, config=config, shared=shared, layer="layer")
    return live.peak


@pytest.mark.parametrize("shape", [(640, 640), (160, 1280)])
@pytest.mark.parametrize("name", CONFIGS)
def test_what_an_encoder_holds(name, shape):
    config = CONFIGS[name]
    if name == "additive":  # what numba compiles at a first call keeps its arguments until garbage is collected
        encode_measured((64, 64), config)
    measured = encode_measured(shape, config) + 4 * shape[0] * shape[1]  # the matrix is the worker's own
    assert encoder_bytes(shape, config) == pytest.approx(measured, rel=0.15)


def test_hessians_that_layers_share_are_held_twice():
    specs = [LayerSpec(name, "linear", (8, 16)) for name in "qkv"] + [LayerSpec("o", "linear", (16, 8))]
    inputs = {name: LayerInput((2, 4, 16), 0) for name in "qkv"} | {"o": LayerInput((2, 4, 8), 1)}
    assert hessian_bytes(specs, inputs) == 4 * (2 * 16**2 + 8**2)


@pytest.mark.parametrize("limit", [None, 4096])
def test_the_workspace_of_hessians(limit):
    conv = ConvGeometry((3, 3), (1, 1), (1, 1), (1, 1), 1)
    for inputs, geometry, size in (((8, 320, 128, 128), conv, 2880), ((8, 4096, 2560), None, 2560)):
        inputs = torch.empty(inputs, dtype=torch.float16, device="meta")
        total = torch.empty(size, size, device="meta")
        chosen = None if limit is None else torch.empty(limit, dtype=torch.int64, device="meta")
        cost = measure(lambda t=total, i=inputs, g=geometry, c=chosen: add_second_moment(t, i, g, chosen=c))
        assert cost.peak_bytes <= HESSIAN_WORKSPACE


def test_a_decoder_that_computes_in_fp32():
    class Settings:
        force_upcast = True

    assert decoder_upcasts(Settings, "float16") and not decoder_upcasts(Settings, "bfloat16")
    used = generate_memory(MODEL, samples=4, images=2, device="cpu")
    assert used.device == 0
    assert used.host == 2 * 1100 + 2 * (1000 + 4 * 48) + 2 * 100 + 5 * 2 * 48 + PROCESS


def test_what_lies_in_files_is_told_apart():
    """Sampling the original: all weights; a quantized denoiser: what is beside it, and codes, not what was decoded."""
    model = dataclasses.replace(MODEL, decoder_upcast=False, in_files=True)
    original = generate_memory(model, samples=4, images=2, device="cpu")
    assert original.host - original.anonymous == 2 * 1100 + LIBRARIES
    student = generate_memory(model, samples=4, images=2, device="cpu", codes=500)
    assert student.host == original.host + 500
    assert student.host - student.anonymous == 2 * 100 + 500 + LIBRARIES
    copied = generate_memory(dataclasses.replace(model, in_files=False), samples=4, images=2, device="cpu")
    assert copied.host == original.host and copied.host - copied.anonymous == LIBRARIES
    gpu = generate_memory(model, samples=4, images=2, device="cuda")
    assert gpu.host == 2 * 1100 + PROCESS and gpu.anonymous == 5 * 2 * 48 + PROCESS - LIBRARIES


def test_decoded_weights_come_on_top_of_files_that_stay_mapped():
    specs = [LayerSpec("a", "linear", (20, 25))]
    inputs, options = {"a": LayerInput((2, 4, 25), 0)}, {"config": CONFIGS["rtn"], "samples": 2, "workers": 1}
    used = [
        quantize_memory(
            dataclasses.replace(MODEL, activations=1e6, in_files=in_files),
            *([specs], inputs), room=1 << 40, device="cpu", needs_hessians=False, **options,
        )
        for in_files in (False, True)
    ]  # fmt: skip
    assert used[1].host - used[0].host == 2 * 500
    assert used[1].host - used[1].anonymous == 2 * 1100 + LIBRARIES


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux tells what is mapped")
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_weights_are_used_in_their_file_if_it_holds_their_dtype(dtype):
    config = ModelConfig(builtin="tiny", dtype=dtype)
    pipeline = load_pipeline(config, device="cpu")
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    spans = [line[0].split("-") for line in lines if line[-1].endswith(".safetensors")]
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        places = [parameter.data_ptr() for parameter in getattr(pipeline, part).parameters()]
        inside = [any(int(low, 16) <= place < int(high, 16) for low, high in spans) for place in places]
        assert inside == [used_in_files(config)] * len(places)
    assert used_in_files(config) == (dtype == "float16")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"hub_id": "a/b", "variant": "fp16", "dtype": "float16"}, True),
        ({"hub_id": "a/b", "dtype": "float16"}, False),
        ({"path": "no/such/folder", "dtype": "float16"}, False),
        ({"path": "drawn", "configs": "sdxl", "random_seed": 0, "dtype": "bfloat16"}, True),
    ],
)
def test_files_that_are_not_here_go_by_their_variant(options, expected):
    assert used_in_files(ModelConfig(**options)) is expected


@pytest.mark.skipif(not usage.RESET.exists(), reason="only Linux tells a process its peak")
def test_a_file_of_tensors_is_written_without_a_copy(tmp_path):
    """So a denoiser's file costs no memory of its own on a CPU."""
    tensors = {str(i): torch.ones(8 << 20, dtype=torch.uint8) for i in range(8)}
    begun = usage._anonymous_now()
    used = usage.Usage()
    save_file(tensors, tmp_path / "x.safetensors")
    assert used.so_far()["peak_memory_bytes"]["anonymous"] < begun + (16 << 20)


@pytest.mark.skipif(not usage.RESET.exists(), reason="only Linux tells a process its peak")
def test_a_convolutions_weight_is_copied_on_a_cpu():
    weight, inputs = torch.ones(1024, 1024, 3, 3), torch.ones(1, 1024, 4, 4)
    nn.functional.conv2d(inputs, weight, padding=1)  # what the library keeps
    begun, used = usage._anonymous_now(), usage.Usage()
    for _ in range(8):  # each is short, and a thread looks now and then
        nn.functional.conv2d(inputs, weight, padding=1)
    more = used.so_far()["peak_memory_bytes"]["anonymous"] - begun
    assert more < 1.5 * weight.nbytes
    model = dataclasses.replace(MODEL, packed=weight.nbytes)
    assert model.forward(2, "cpu") == 20 + weight.nbytes and model.forward(2, "cuda") == 20


def test_a_gpu_keeps_hessians_and_the_host_the_encoders():
    specs = [LayerSpec("a", "linear", (64, 4096)), LayerSpec("b", "linear", (64, 64))]
    inputs = {"a": LayerInput((2, 4, 4096), 0), "b": LayerInput((2, 4, 64), 1)}
    options = {"config": CONFIGS["gptq"], "samples": 2, "needs_hessians": True}
    cpu = quantize_memory(MODEL, [specs], inputs, workers=1, room=1 << 40, device="cpu", **options)
    gpu = quantize_memory(MODEL, [specs], inputs, workers=1, room=1 << 40, device="cuda", **options)
    square = 4 * 4096**2
    assert cpu.device == 0
    assert cpu.host > 4 * square  # the Hessian, and three copies while it is put in order
    assert gpu.device > square and gpu.host > 4 * square
    two = quantize_memory(MODEL, [specs], inputs, workers=2, room=1 << 40, device="cuda", **options)
    assert two.device == gpu.device and two.host > gpu.host


def test_what_comparing_images_holds():
    images = np.zeros((2, 64, 64, 3), np.uint8)
    with LiveBytes() as live:
        Pairs(device="cpu").columns(images, images)
    assert 0.75 * SSIM_BYTES < live.peak / images.size < SSIM_BYTES
    numbers = 3 * 1024**2
    few, many = (evaluate_memory(numbers, count, device="cpu").host for count in (8, 64))
    assert many - few == PIXEL_BYTES * 56 * numbers  # compared are two at a time
    large = evaluate_memory(3 * 4096**2, 1, device="cuda")
    assert large.device > SSIM_BYTES * 3 * 4096**2 > large.host > PROCESS
