"""Quantized inputs against written-out formulas; no image depends on its neighbours; saved models read the same."""

import contextlib
import copy
import json

import pytest
import torch
from diffusers import UNet2DConditionModel
from quantized import quantized_unet
from test_structure import compose
from torch import nn
from unets import output, small_unet

from vqdm.acceleration.activations import (
    DynamicQuantizer,
    InputRanges,
    StaticQuantizer,
    add_quantizers,
    column_factors,
    grouped,
    input_quantizers,
    layers_with_inputs,
    settings_in,
)
from vqdm.acceleration.products import Float8Product, IntegerProduct, add_products, check_device, float8_product
from vqdm.config.options import PAPER_PATTERN
from vqdm.errors import UserError
from vqdm.hub.config import VQDMConfig
from vqdm.hub.pipelines import load_denoiser, save_denoiser
from vqdm.models.specs import layer_specs
from vqdm.stages.accelerate import check_acceleration
from vqdm.weights.layers import quantized_layers

DYNAMIC = {"kind": "dynamic", "bits": 8, "per": "token", "block": 16, "groups": 8, "column_scales": False}
STATIC = DYNAMIC | {"kind": "static", "per": "groups", "groups": 3}


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def names_in(unet):
    return layers_with_inputs(unet, pattern=PAPER_PATTERN, min_size=16, keep=None)


@pytest.mark.parametrize("block", [None, 4, 5])
def test_a_token_is_rounded_by_its_own_range(block):
    inputs, found = drawn(2, 3, 10), []
    for token in inputs.reshape(-1, 10).tolist():
        row = []
        for start in range(0, 10, block or 10):
            part = token[start : start + (block or 10)]
            filled = part + [0.0] * ((block or 10) - len(part))  # the last block is filled up with zeros
            step = (max(filled) - min(filled)) / 15
            row += [min(filled) + step * round((value - min(filled)) / step) for value in part]
        found.append(row)
    quantizer = DynamicQuantizer(nn.Linear(10, 4), bits=4, block=block)
    assert torch.allclose(quantizer(inputs), torch.tensor(found).view(2, 3, 10), atol=1e-6)


def test_a_convolution_reads_positions():
    conv, inputs = DynamicQuantizer(nn.Conv2d(6, 4, 3), bits=4, block=None), drawn(2, 6, 5, 5)
    linear = DynamicQuantizer(nn.Linear(6, 4), bits=4, block=None)
    assert torch.equal(conv(inputs), linear(inputs.movedim(1, -1)).movedim(-1, 1))


@pytest.mark.parametrize("settings", [DYNAMIC, DYNAMIC | {"per": "block", "bits": 4}, STATIC])
def test_an_image_does_not_depend_on_its_batch(settings):
    unet, generator = small_unet(), torch.Generator().manual_seed(0)
    add_quantizers(unet, names_in(unet), settings)
    for quantizer in input_quantizers(unet).values():
        if settings["kind"] == "static":
            quantizer.fit(-torch.rand(quantizer.channels, generator=generator), torch.ones(quantizer.channels))
        images = drawn(3, quantizer.channels, 2, 2) if quantizer.conv else drawn(3, 4, quantizer.channels)
        together = quantizer(torch.cat([images, 50 * images]))[:3]
        assert torch.equal(together, torch.cat([quantizer(image[None]) for image in images]))


def test_groups_hold_channels_of_like_ranges_and_many_are_one_per_channel():
    least, most = torch.tensor([-1.0, -9.0, -1.1, -9.2, -1.0]), torch.tensor([1.0, 9.0, 1.0, 9.0, 1.2])
    group = grouped(torch.stack([least, most], 1), 2)
    assert group[0] == group[2] == group[4] != group[1] == group[3]
    assert torch.equal(grouped(torch.stack([least, most], 1), 8), torch.arange(5))
    quantizer = StaticQuantizer(nn.Linear(5, 2), bits=6, groups=8)
    quantizer.fit(least, most)
    inputs = torch.stack([least, most, 0.37 * most + 0.63 * least])
    for channel in range(5):
        step = (most[channel] - least[channel]) / 63
        expected = ((inputs[:, channel] - least[channel]) / step).round() * step + least[channel]
        assert torch.allclose(quantizer(inputs)[:, channel], expected, atol=5e-3 * step.item() * 63)
    assert quantizer(100 * torch.ones(1, 5)).max() < 10  # beyond its range it is clipped


def test_ranges_are_those_of_every_input():
    unet = small_unet()
    names = names_in(unet)
    seen = {}

    def note(name, layer, args):
        values = args[0].movedim(1, -1) if isinstance(layer, nn.Conv2d) else args[0]
        seen.setdefault(name, []).append(values.flatten(0, -2))

    hooks = [
        unet.get_submodule(name).register_forward_pre_hook(lambda layer, args, name=name: note(name, layer, args))
        for name in names
    ]
    output(unet)
    [hook.remove() for hook in hooks]
    add_quantizers(unet, names, STATIC)
    with InputRanges(unet) as ranges:
        output(unet)
    for name, (least, most) in ranges.found.items():
        values = torch.cat(seen[name])
        assert torch.equal(least, values.amin(0)) and torch.equal(most, values.amax(0))
    assert "quantized" not in next(iter(input_quantizers(unet).values())).__dict__


@pytest.mark.parametrize("kind", ["trellis", "additive"])
def test_column_scales_smooth_and_change_nothing_but_rounding(kind):
    unet = quantized_unet(kind)
    plain, names = output(unet), [name for name in names_in(unet) if name in quantized_layers(unet)]
    layer = next(iter(quantized_layers(unet).values()))
    if kind == "additive" and layer.weight.input_scales is None:
        with pytest.raises(UserError, match="codes with scales of their inputs"):
            add_quantizers(unet, names, DYNAMIC | {"column_scales": True})
        return
    factors = column_factors(layer.weight, input_channels(layer))
    assert (factors > 0).all() and factors.std() > 0
    add_quantizers(unet, names, DYNAMIC | {"column_scales": True})
    assert 0 < (output(unet) - plain).abs().max() < 0.2 * plain.abs().max()


def input_channels(layer):
    return layer.in_channels if isinstance(layer, nn.Conv2d) else layer.in_features


def test_the_integer_product_is_the_simulated_one():
    unet = quantized_unet("rtn")
    simulated = copy.deepcopy(unet)
    chosen = add_products(unet, names_in(unet), "int8")
    add_quantizers(simulated, chosen, DYNAMIC)
    layer = unet.get_submodule(chosen[0])
    assert isinstance(layer.product, IntegerProduct) and layer.product.codes().dtype == torch.int8
    inputs = drawn(2, 7, layer.in_features)
    expected = simulated.get_submodule(chosen[0])(inputs)
    assert torch.allclose(layer(inputs), expected, atol=1e-5 * expected.abs().max())
    assert all(isinstance(unet.get_submodule(name), nn.Linear) for name in chosen)


def test_the_product_of_8_bit_floats_is_that_of_the_rounded_numbers():
    unet = quantized_unet("rtn")
    chosen = add_products(unet, names_in(unet), "fp8")
    layer = unet.get_submodule(chosen[0])
    assert isinstance(layer.product, Float8Product) and layer.product.codes().dtype == torch.float8_e4m3fn
    inputs = drawn(2, 7, layer.in_features)
    inputs[0, 0] = 0
    steps = inputs.abs().amax(-1, keepdim=True).clamp(min=1e-8) / 448
    expected = nn.functional.linear(e4m3(inputs / steps) * steps, layer.decoded(torch.float32), layer.bias)
    assert torch.allclose(layer(inputs), expected, atol=1e-5 * expected.abs().max())
    exact = nn.functional.linear(inputs, layer.decoded(torch.float32), layer.bias)
    assert 0 < (layer(inputs) - exact).norm() < 0.05 * exact.norm()


def e4m3(values):
    """Sign, 3 bits of mantissa, exponents from -6 on: to the nearest, ties to the even one."""
    step = 2.0 ** (values.abs().log2().floor().clamp(min=-6) - 3)
    return (values / step).round() * step


def test_a_gpus_kernel_takes_the_operands(monkeypatch):
    """What CUDA's kernel asks of shapes and strides; what it computes is the same sum as on the CPU."""
    product = torch._scaled_mm

    def checked(tokens, codes, **options):
        assert tokens.shape[1] % 16 == codes.shape[1] % 16 == 0
        assert tokens.stride() == (tokens.shape[1], 1) and codes.stride() == (1, codes.shape[0])
        assert options["scale_a"].numel() == options["scale_b"].numel() == 1
        return product(tokens, codes, **options)

    monkeypatch.setattr(torch, "_scaled_mm", checked)
    tokens, codes = (drawn(n, 36, seed=n).to(torch.float8_e4m3fn) for n in (7, 20))
    found = float8_product(tokens, codes)
    assert found.dtype == torch.float32 and torch.allclose(found, tokens.float() @ codes.float().T, atol=1e-5)


@pytest.mark.parametrize(("device", "capability", "fine"), [
    ("cpu", None, True), ("cuda", (8, 9), True), ("cuda", (9, 0), True), ("cuda", (8, 6), False), ("xpu", None, False),
])  # fmt: skip
def test_devices_without_8_bit_floats_are_refused(device, capability, fine, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    with contextlib.nullcontext() if fine else pytest.raises(UserError, match="compute capability"):
        check_device("fp8", device)
    check_device("int8", device)


@pytest.mark.parametrize(("product", "bits"), [("int8", 7), ("fp8", 4)])
def test_codes_that_no_product_fits_are_refused(product, bits):
    with pytest.raises(UserError, match=f"scalar codes of up to {bits} bits"):
        add_products(quantized_unet("trellis"), names_in(small_unet()), product)


def test_codes_without_a_product_are_refused_before_any_work():
    asked = ("activations=a8", "activations.product=fp8")
    check_acceleration(compose("+experiment=tiny_codec", "quantize=gptq4", *asked))
    for other in ("quantize=trellis3", "quantize=none", "quantize=gptq4 quantize.group_size=16"):
        with pytest.raises(UserError, match="no layer has them"):
            check_acceleration(compose("+experiment=tiny_codec", *other.split(), *asked))


def test_the_layers_are_those_that_are_quantized():
    unet = small_unet()
    assert names_in(unet) == [spec.name for spec in layer_specs(unet)] == names_in(quantized_unet("rtn"))
    assert not [n for n in layers_with_inputs(unet, pattern=PAPER_PATTERN, min_size=16, keep="attn") if "attn" in n]


@pytest.mark.parametrize("settings", [DYNAMIC, STATIC])
def test_a_saved_model_reads_the_same(settings, tmp_path):
    unet = quantized_unet("rtn")
    add_quantizers(unet, names_in(unet), settings)
    if settings is STATIC:
        with InputRanges(unet) as ranges:
            output(unet)
        for name, quantizer in input_quantizers(unet).items():
            quantizer.fit(*ranges.found[name])
    save_denoiser(unet, tmp_path, metrics={})
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["version"] == 3
    loaded = load_denoiser(tmp_path, dtype=torch.float32)
    assert settings_in(loaded) == settings_in(unet) and len(input_quantizers(loaded)) == len(names_in(unet))
    assert torch.equal(output(loaded), output(unet))
    assert not torch.equal(output(loaded), output(quantized_unet("rtn")))
    plain = UNet2DConditionModel.from_pretrained(tmp_path).dequantize()
    assert not input_quantizers(plain) and settings_in(plain) is None


@pytest.mark.parametrize(
    "change", [{"bits": 9}, {"bits": "8"}, {"per": "tensor"}, {"kind": "odd"}, {"layers": ["a", "a"]}, {"block": 0}]
)
def test_damaged_settings_are_refused(change):
    with pytest.raises(UserError, match="activations"):
        VQDMConfig(groups=[], activations=DYNAMIC | {"layers": ["a"]} | change)
