import copy

import pytest
import torch
from torch import nn
from unets import output, small_unet

from vqdm.codecs import additive, rtn
from vqdm.errors import UserError
from vqdm.models.specs import layer_specs, matrix_to_weight, spec_of, weight_to_matrix
from vqdm.seeds import torch_generator
from vqdm.weights.additive import AdditiveScheme, SharedCodebooks
from vqdm.weights.base import SHARED_NAME
from vqdm.weights.layers import QuantizedConv2d, QuantizedLinear, replace_layer, share, swap, swap_empty
from vqdm.weights.registry import empty_weight
from vqdm.weights.scalar import ScalarScheme, ScalarWeight

PADDINGS = [1, (0, 2), "same", "valid"]


def scalar(layer, bits=3, **options):
    return rtn.encode(weight_to_matrix(layer.weight), bits=bits, **options)


def vectors(layer, shared=None):
    matrix = weight_to_matrix(layer.weight)
    return additive.encode(
        matrix,
        torch.eye(matrix.shape[1]),
        num_codebooks=2,
        codebook_bits=4,
        generator=torch_generator(0, "test"),
        shared=shared,
    )


class Pair(nn.Module):
    """The smallest denoiser: a convolution and a Linear."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(16, 24, 3, padding=1)
        self.head = nn.Sequential(nn.Linear(24, 16, bias=False))

    def forward(self, pictures):
        return self.head(self.conv(pictures).mean((2, 3)))


@pytest.fixture
def pair():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Pair()


def quantized_pair(denoiser, *, kind="vectors", decode="per_call"):
    shared = None
    if kind == "shared":
        matrices = [weight_to_matrix(denoiser.conv.weight), denoiser.head[0].weight]
        shared = additive.train_shared_codebooks(
            matrices, num_codebooks=2, codebook_bits=4, generator=torch_generator(0, "shared")
        )
    for name in ("conv", "head.0"):
        layer = denoiser.get_submodule(name)
        weight = scalar(layer, group_size=8) if kind == "scalar" else vectors(layer, shared)
        swap(denoiser, spec_of(name, layer), weight, decode=decode)
    return denoiser.float()


def pictures():
    return torch.randn(2, 16, 6, 5, generator=torch_generator(0, "pictures"))


@pytest.mark.parametrize("decode", ["per_call", "cached"])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_is_the_dequantized_one(bias, decode):
    linear = nn.Linear(24, 16, bias=bias)
    quantized = QuantizedLinear(scalar(linear).float(), linear.bias, spec_of("l", linear), decode=decode)
    linear.weight.data.copy_(quantized.weight())
    inputs = torch.randn(2, 5, 24)
    with torch.no_grad():
        assert torch.equal(quantized(inputs), linear(inputs))
        assert torch.equal(quantized(inputs), linear(inputs))
    assert (quantized.in_features, quantized.out_features) == (24, 16)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("decode", ["per_call", "cached"])
def test_convolution_is_the_dequantized_one(padding, decode):
    stride = 1 if padding == "same" else (2, 1)
    conv = nn.Conv2d(16, 24, (3, 2), stride=stride, padding=padding, dilation=(1, 2))
    spec = spec_of("c", conv)
    quantized = QuantizedConv2d(vectors(conv).float(), conv.bias, spec, decode=decode)
    conv.weight.data.copy_(matrix_to_weight(quantized.weight(), spec))
    with torch.no_grad():
        assert torch.equal(quantized(pictures()), conv(pictures()))
    assert (quantized.in_channels, quantized.out_channels) == (16, 24)


@pytest.mark.parametrize("options", [{"groups": 4}, {"padding": 1, "padding_mode": "circular"}])
def test_other_convolutions_are_refused_by_name(options):
    conv = nn.Conv2d(16, 24, 3, **options)
    with pytest.raises(UserError, match=r"layer down\.conv is a convolution with"):
        QuantizedConv2d(scalar(conv), conv.bias, spec_of("down.conv", conv))


@pytest.mark.parametrize("padding", PADDINGS)
def test_dequantized_layers_are_plain_and_compute_the_same(padding):
    stride = 1 if padding == "same" else (2, 1)
    conv = nn.Conv2d(16, 24, (3, 2), stride=stride, padding=padding, dilation=(1, 2), bias=False).eval()
    quantized = QuantizedConv2d(vectors(conv).float(), None, spec_of("c", conv)).eval()
    linear = QuantizedLinear(
        scalar(nn.Linear(24, 16)).float(), nn.Parameter(torch.ones(16)), spec_of("l", nn.Linear(24, 16))
    )
    for layer, inputs in ((quantized, pictures()), (linear, torch.randn(3, 24, generator=torch_generator(0, "rows")))):
        plain = layer.dequantized()
        assert type(plain) in (nn.Linear, nn.Conv2d) and plain.training == layer.training
        assert plain.weight.shape == layer.original_shape == layer.weight.size()
        assert plain.weight.dim() == layer.weight.dim() and not plain.weight.requires_grad
        with torch.no_grad():
            assert torch.equal(plain(inputs), layer(inputs))


def test_they_are_layers_of_torch_with_its_attributes():
    """peft and accelerate ask for the class and read these."""
    conv = nn.Conv2d(16, 24, (3, 2), stride=(2, 1), padding="valid", dilation=(1, 2))
    linear = nn.Linear(24, 16)
    for plain, kind in ((conv, QuantizedConv2d), (linear, QuantizedLinear)):
        quantized = kind(scalar(plain), plain.bias, spec_of("layer", plain))
        assert isinstance(quantized, type(plain))
        for name in type(plain).__constants__:
            assert getattr(quantized, name) == getattr(plain, name), name


def test_a_convolution_of_other_arguments_is_a_plain_one():
    """peft makes the two convolutions of a LoRA with the class of the layer it adapts."""
    made = QuantizedConv2d(16, 4, (3, 3), (1, 1), (1, 1), bias=False)
    assert type(made) is nn.Conv2d and made.weight.shape == (4, 16, 3, 3) and made.bias is None
    conv = nn.Conv2d(16, 24, 3)
    copied = copy.deepcopy(QuantizedConv2d(scalar(conv), conv.bias, spec_of("c", conv)))
    assert type(copied) is QuantizedConv2d


@pytest.mark.parametrize("change", [lambda m: m.to(torch.bfloat16), nn.Module.half, nn.Module.double, nn.Module.float])
@pytest.mark.parametrize("kind", ["scalar", "shared"])
@torch.no_grad()
def test_a_change_of_dtype_is_one_of_the_floats(pair, kind, change):
    denoiser = quantized_pair(pair, kind=kind, decode="cached")
    expected = denoiser(pictures())
    codes = {name: buffer.clone() for name, buffer in denoiser.named_buffers()}
    change(denoiser)
    dtype = denoiser.conv.weight.dtype
    assert {parameter.dtype for parameter in denoiser.parameters()} == {dtype} == {denoiser.conv.weight().dtype}
    assert all(torch.equal(buffer, codes[name]) for name, buffer in denoiser.named_buffers())
    assert torch.allclose(denoiser(pictures().to(dtype)).float(), expected, atol=0.05)


def test_a_weight_has_no_data_to_read_or_write():
    weight = scalar(nn.Linear(24, 16))
    with pytest.raises(UserError, match="merge neither"):
        weight.data.clone()
    with pytest.raises(UserError, match="merge neither"):
        weight.data = torch.zeros(16, 24)


def test_computes_in_the_dtype_of_its_inputs():
    linear = nn.Linear(24, 16)
    quantized = QuantizedLinear(scalar(linear), linear.bias, spec_of("l", linear))
    assert quantized.weight.dtype == torch.float16 and quantized.weight.device == torch.device("cpu")
    for dtype in (torch.float32, torch.bfloat16):
        assert quantized(torch.randn(3, 24, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("kind", ["scalar", "vectors", "shared"])
@pytest.mark.parametrize("decode", ["per_call", "cached"])
def test_gradients_reach_every_float_parameter(pair, kind, decode):
    denoiser = quantized_pair(pair, kind=kind, decode=decode)
    denoiser(pictures()).square().sum().backward()
    for name, parameter in denoiser.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.abs().sum() > 0), name
    # And they are those of the decoded weight: compare with a finite difference on one scale.
    scales = denoiser.head[0].weight.scales
    index, step = (0,) * scales.ndim, 1e-2
    with torch.no_grad():
        at = []
        for offset in (step, -2 * step):
            scales[index] += offset
            at.append(float(denoiser(pictures()).square().sum()))
    assert float(scales.grad[index]) == pytest.approx((at[0] - at[1]) / (2 * step), rel=2e-2)


@pytest.mark.parametrize("kind", ["scalar", "vectors", "shared"])
def test_state_dict_round_trip_from_empty(pair, kind):
    empty = copy.deepcopy(pair)
    denoiser = quantized_pair(pair, kind=kind)
    schemes = [(spec, denoiser.get_submodule(spec.name).weight.scheme) for spec in layer_specs(empty, pattern=".")]
    swap_empty(empty, schemes).load_state_dict(denoiser.half().state_dict(), strict=True)
    assert torch.equal(empty.float()(pictures()), denoiser.float()(pictures()))
    names = set(denoiser.state_dict())
    assert (f"{SHARED_NAME}.codebooks.codebooks" in names) == (kind == "shared")
    assert ("conv.weight.codebooks" in names) == (kind == "vectors")
    assert {"conv.weight.codes", "conv.weight.scales", "conv.bias"} <= names


def test_meta_layers_load_by_assignment(pair):
    with torch.device("meta"):
        empty = Pair()
    denoiser = quantized_pair(pair, kind="shared").half()
    swap_empty(empty, [(s, denoiser.get_submodule(s.name).weight.scheme) for s in layer_specs(empty, pattern=".")])
    assert all(tensor.is_meta for tensor in empty.state_dict().values())
    empty.load_state_dict(denoiser.state_dict(), assign=True)
    assert torch.equal(empty.float()(pictures()), denoiser.float()(pictures()))


@pytest.mark.parametrize(
    ("scheme", "size"),
    [
        (ScalarScheme(bits=3), 24 * 48 * 3 // 8 + 24 * 2 * 2),
        (ScalarScheme(bits=4, group_size=16), 24 * 48 // 2 + 24 * 3 * 2 * 2),
        (AdditiveScheme(num_codebooks=3, codebook_bits=5), 24 * 6 * 3 * 5 // 8 + 3 * 32 * 8 * 2 + 24 * 2),
    ],
)
def test_empty_weights_have_the_real_bytes_on_meta(scheme, size):
    with torch.device("meta"):
        plan = empty_weight(scheme, (24, 48))
    real = empty_weight(scheme, (24, 48))
    for weight in (plan, real):
        assert sum(t.numel() * t.element_size() for t in weight.state_dict().values()) == size
    assert plan.device.type == "meta" and real().shape == (24, 48)


def test_deepcopy_of_a_denoiser_refers_to_the_copied_codebooks(pair):
    denoiser = quantized_pair(pair, kind="shared")
    copied = copy.deepcopy(denoiser)
    assert copied.conv.weight.shared[0] is copied.shared.codebooks is copied.head[0].weight.shared[0]
    assert copied.shared.codebooks is not denoiser.shared.codebooks
    before = denoiser(pictures())
    copied.shared.codebooks.codebooks.data.zero_()
    assert torch.equal(denoiser(pictures()), before)
    assert float(copied.conv.weight().detach().abs().max()) == 0


def test_moving_a_denoiser_moves_shared_codebooks(pair):
    denoiser = quantized_pair(pair, kind="shared").to(torch.float64)
    assert denoiser.conv.weight().dtype == torch.float64
    assert denoiser(pictures().double()).dtype == torch.float64


def test_two_codebook_sets_do_not_fit_into_one_denoiser(pair):
    denoiser = quantized_pair(pair, kind="shared")
    with pytest.raises(ValueError, match="another shared part codebooks"):
        share(
            denoiser, "codebooks", SharedCodebooks(AdditiveScheme(num_codebooks=2, codebook_bits=4, shared="codebooks"))
        )


@torch.no_grad()
@pytest.mark.parametrize("change", ["load", "to", "step", "codes", "shared"])
def test_cached_weight_follows_every_change(pair, change):
    denoiser = quantized_pair(pair, kind="shared" if change == "shared" else "scalar", decode="cached")
    before = denoiser(pictures())
    layer = denoiser.head[0]
    assert layer.decoded(torch.float32) is layer.decoded(torch.float32)
    if change == "load":
        doubled = {n: 2 * t if t.is_floating_point() else t for n, t in layer.weight.state_dict().items()}
        layer.weight.load_state_dict(doubled)
    elif change == "to":
        denoiser.to(torch.float64)
    elif change == "step":
        layer.weight.scales *= 2
    elif change == "codes":
        layer.weight.set_codes(7 - layer.weight.unpacked_codes())
    else:
        denoiser.shared.codebooks.codebooks.mul_(2)
    plain = copy.deepcopy(denoiser)
    plain.conv.decode = plain.head[0].decode = "per_call"
    inputs = pictures().double() if change == "to" else pictures()
    assert torch.equal(denoiser(inputs), plain(inputs))
    assert change == "to" or not torch.allclose(denoiser(inputs), before)


def test_cache_filled_in_inference_mode_is_not_used_outside(pair):
    denoiser = quantized_pair(pair, decode="cached").requires_grad_(False)
    with torch.inference_mode():
        expected = denoiser(pictures())
    inputs = pictures().requires_grad_()
    outputs = denoiser(inputs)
    outputs.sum().backward()
    assert torch.equal(outputs, expected) and bool(inputs.grad.abs().sum() > 0)


@torch.no_grad()
def test_cache_is_neither_saved_nor_copied_and_modes_drop_it(pair):
    denoiser = quantized_pair(pair, decode="cached")
    names = set(denoiser.state_dict())
    denoiser(pictures())
    assert set(denoiser.state_dict()) == names
    assert denoiser.conv._cache is not None and copy.deepcopy(denoiser).conv._cache is None
    denoiser.eval()
    assert denoiser.conv._cache is None


def test_swap_and_replace_refuse_what_does_not_fit(pair):
    spec = spec_of("conv", pair.conv)
    with pytest.raises(ValueError, match="layer conv is"):
        swap(pair, spec, scalar(pair.head[0]))
    with pytest.raises(UserError, match="per_call, cached"):
        swap(pair, spec, scalar(pair.conv), decode="never")
    with pytest.raises(AttributeError):
        replace_layer(pair, "head.7", nn.Identity())
    with pytest.raises(UserError, match=r"layer head\.0: group_size 7"):
        swap_empty(pair, [(spec_of("head.0", pair.head[0]), ScalarScheme(bits=4, group_size=7))])


def test_weights_check_their_parts():
    with pytest.raises(TypeError, match="ScalarScheme"):
        ScalarWeight(AdditiveScheme(num_codebooks=2), (8, 8))
    with pytest.raises(ValueError, match="if and only if"):
        empty_weight(AdditiveScheme(num_codebooks=2, shared="codebooks"), (8, 8))
    with pytest.raises(ValueError, match="codes must be"):
        empty_weight(ScalarScheme(bits=2), (8, 8)).set_codes(torch.zeros(8, 4, dtype=torch.int64))


@pytest.mark.parametrize("linear_projection", [True, False])
def test_a_quantized_unet_runs_as_its_dequantized_copy(linear_projection):
    unet = small_unet(use_linear_projection=linear_projection)
    plain, original = copy.deepcopy(unet), output(unet)
    for spec in layer_specs(unet):
        weight = scalar(unet.get_submodule(spec.name), bits=8).float()
        plain.get_submodule(spec.name).weight.copy_(matrix_to_weight(weight().detach(), spec))
        swap(unet, spec, weight, decode="cached")
    assert torch.equal(output(unet), output(plain))
    assert torch.equal(output(unet), output(plain))
    assert float((output(unet) - original).norm() / original.norm()) < 0.05
    assert unet.dtype == torch.float32
