"""Quantized layers under torch.compile and autocast, and pipelines with them in every dtype."""

import copy
import os
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from quantized import quantized_unet
from torch import nn
from unets import output

import vqdm
from vqdm.codecs import additive, rtn, trellis
from vqdm.codecs.trellis_table import load_table
from vqdm.errors import UserError
from vqdm.hub.quantizer import attach
from vqdm.models.specs import layer_specs, spec_of, weight_to_matrix
from vqdm.seeds import seeded_initialisation, torch_generator
from vqdm.weights.layers import QuantizedConv2d, QuantizedLinear, dequantize_layers, quantized_layers, swap
from vqdm.weights.trellis import TrellisTable

TINY = Path(vqdm.__file__).parent / "models" / "tiny"
KINDS = ("scalar", "additive", "trellis")
INDUCTOR = "VQDM_TEST_INDUCTOR"


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def encoded(matrix, kind):
    identity = torch.eye(matrix.shape[1])
    if kind == "scalar":
        return rtn.encode(matrix, bits=3, group_size=8)
    if kind == "trellis":
        return trellis.encode(matrix, identity, bits=6.0, table=TrellisTable.from_values(load_table()))
    generator = torch_generator(0, "encode")
    return additive.encode(matrix, identity, num_codebooks=2, codebook_bits=4, generator=generator)


def layer_and_inputs(kind, form, *, decode="per_call"):
    with seeded_initialisation(0, "layers"):
        original = nn.Linear(32, 48) if form == "linear" else nn.Conv2d(16, 24, 3, padding=1, stride=2)
    made, shape = (QuantizedLinear, (3, 32)) if form == "linear" else (QuantizedConv2d, (2, 16, 6, 5))
    weight = encoded(weight_to_matrix(original.weight.detach()), kind).float()
    layer = made(weight, original.bias, spec_of("layer", original), decode=decode)
    return layer, torch.randn(shape, generator=torch_generator(0, "inputs"))


def gradients(layer, function, inputs):
    """Of every parameter, those of a shared part included."""
    parameters = [p for module in (layer, *layer.weight.shared) for p in module.parameters()]
    assert len(parameters) > 2
    loss = function(inputs).square().sum()
    return torch.autograd.grad(loss, parameters)


def close(found, expected, tolerance=1e-5) -> bool:
    return all(torch.allclose(f, e, rtol=tolerance, atol=tolerance) for f, e in zip(found, expected, strict=True))


@pytest.mark.parametrize("form", ["linear", "conv"])
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_in_one_graph_it_computes_the_same(kind, form):
    layer, inputs = layer_and_inputs(kind, form)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert close([compiled(inputs)], [layer(inputs)])
    assert close(gradients(layer, compiled, inputs), gradients(layer, layer, inputs), 1e-4)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_with_a_cache_it_follows_changes(kind):
    layer, inputs = layer_and_inputs(kind, "linear", decode="cached")
    compiled = torch.compile(layer, backend="eager")
    for _ in range(2):
        assert close([compiled(inputs)], [layer(inputs)])
    before = layer(inputs)
    layer.weight.scales.mul_(2)
    assert close([compiled(inputs)], [layer(inputs)])
    assert not torch.allclose(layer(inputs), before)


def test_a_unet_is_one_graph():
    unet = quantized_unet(
        "rtn", block_out_channels=(16,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",)
    )
    expected = output(unet)
    unet.compile(fullgraph=True, backend="eager")
    assert torch.allclose(output(unet), expected, atol=1e-5)


@pytest.mark.skipif(INDUCTOR not in os.environ, reason=f"12 to 20 s of g++ per layer on a slow core: set {INDUCTOR}=1")
@pytest.mark.parametrize("kind", KINDS)
def test_inductor(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    layer, inputs = layer_and_inputs(kind, "linear")
    compiled = torch.compile(layer, fullgraph=True)
    with torch.no_grad():
        assert close([compiled(inputs)], [layer(inputs)])
    assert close(gradients(layer, compiled, inputs), gradients(layer, layer, inputs), 1e-4)


@pytest.mark.parametrize("decode", ["per_call", "cached"])
@pytest.mark.parametrize("kind", ["rtn", "shared"])
def test_autocast_is_that_of_the_dequantized_model(kind, decode):
    unet = quantized_unet(kind)
    for layer in quantized_layers(unet).values():
        layer.decode = decode
    plain = dequantize_layers(copy.deepcopy(unet))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = output(unet), output(plain)
    assert found.dtype == expected.dtype == torch.bfloat16
    assert torch.equal(found, expected)
    assert 0 < float((found.float() - output(unet)).abs().max()) < 0.05


def test_layerwise_casting_is_refused():
    unet = quantized_unet("rtn")
    with pytest.raises(UserError, match="would round the scales"):
        unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert unet.dtype == torch.float32
    unet.dequantize().enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def tiny_pipeline(dtype, *, upcast, bits=None):
    pipeline = DiffusionPipeline.from_pretrained(TINY, torch_dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.vae.register_to_config(force_upcast=upcast)
    if bits is not None:
        unet = pipeline.unet.requires_grad_(False)
        for spec in layer_specs(unet):
            matrix = weight_to_matrix(unet.get_submodule(spec.name).weight).float()
            swap(unet, spec, rtn.encode(matrix, bits=bits).to(dtype))
        attach(unet)
    return pipeline


def image(pipeline):
    return pipeline(
        "a large red circle", num_inference_steps=2, guidance_scale=3.0, generator=torch_generator(0, "image"),
        output_type="pt",
    ).images  # fmt: skip


@pytest.mark.parametrize("upcast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_pipeline_handles_its_vae_as_with_the_original(dtype, upcast):
    """SDXL's force_upcast: the VAE computes in float32, and whether it must is read off dtypes, the U-Net's too."""
    original, quantized = (tiny_pipeline(dtype, upcast=upcast, bits=bits) for bits in (None, 8))
    assert quantized.unet.dtype == quantized.dtype == dtype
    expected, found = image(original), image(quantized)
    assert found.dtype == expected.dtype and found.isfinite().all()
    assert quantized.vae.dtype == original.vae.dtype == dtype
    assert float((found.float() - expected.float()).abs().mean()) < 0.02
    quantized.register_modules(unet=quantized.unet.dequantize())
    assert torch.equal(image(quantized), found)
