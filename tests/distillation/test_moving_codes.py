import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vqdm.codecs import additive, rtn, trellis
from vqdm.codecs.trellis_table import load_table
from vqdm.distillation.moving_codes import DriftingWeight, let_drift, stop_drifting
from vqdm.errors import UserError
from vqdm.models.specs import spec_of, weight_to_matrix
from vqdm.seeds import torch_generator
from vqdm.weights.layers import QuantizedConv2d, quantized_layers, swap
from vqdm.weights.trellis import TrellisTable
from vqdm.weights.trellis_format import side_bits

KINDS = ("scalar", "additive", "shared", "trellis")
SMALL = {"num_codebooks": 2, "codebook_bits": 4, "group_size": 4}  # 2 bits per weight


def gaussian(*shape, seed=0):
    return torch.randn(shape, generator=torch_generator(seed, "test"))


def encoded(kind, matrices):
    """2 bits and little else: the weight of every matrix, blind to what comes in."""
    part = None
    if kind == "shared":
        part = additive.train_shared_codebooks(matrices, generator=torch_generator(0, "shared"), **SMALL)
    if kind == "trellis":
        part = TrellisTable.from_values(load_table())
    for i, matrix in enumerate(matrices):
        eye = torch.eye(matrix.shape[1])
        if kind == "scalar":
            yield rtn.encode(matrix, bits=2)
        elif kind == "trellis":
            yield trellis.encode(matrix, eye, bits=2 + side_bits(matrix.shape), table=part)
        else:
            yield additive.encode(matrix, eye, generator=torch_generator(0, "encode", i), shared=part, **SMALL)


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(16, 24, 3, padding=1)
        self.head = nn.Sequential(nn.Linear(24, 16, bias=False))

    def forward(self, pictures):
        return self.head(self.conv(pictures).mean((2, 3)))


@pytest.fixture(scope="module", params=KINDS)
def made(request):
    denoiser = Pair()
    with torch.no_grad():
        denoiser.conv.weight.copy_(gaussian(24, 16, 3, 3))
        denoiser.conv.bias.copy_(gaussian(24, seed=1))
        denoiser.head[0].weight.copy_(gaussian(16, 24, seed=2))
    layers = {name: denoiser.get_submodule(name) for name in ("conv", "head.0")}
    matrices = [weight_to_matrix(layer.weight.detach()) for layer in layers.values()]
    for (name, layer), weight in zip(layers.items(), encoded(request.param, matrices), strict=True):
        swap(denoiser, spec_of(name, layer), weight)
    return denoiser


@pytest.fixture
def denoiser(made):
    return copy.deepcopy(made)


def pictures():
    return gaussian(2, 16, 6, 5, seed=3)


def bits_of(tensor):
    return tensor.detach().view(torch.int16 if tensor.dtype == torch.float16 else torch.int32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_it_decodes_to_the_same_bits(denoiser, dtype):
    inner = denoiser.to(dtype).conv.weight
    if hasattr(inner, "input_scales"):
        inner.scales.data[:3] *= -1  # and zeros of either sign
        inner.scales.data[3:6] = -0.0
    weight = let_drift(denoiser)["conv"]
    weight.drift.data.copy_(1e3 * gaussian(*weight.shape))
    for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with context():
            assert torch.equal(bits_of(weight()), bits_of(inner()))
    assert (weight.dtype, weight.device, weight.shape) == (dtype, inner.device, inner.shape)
    assert weight.drift.dtype == torch.float32


def test_gradients_reach_the_drift_and_all_else_as_before(denoiser):
    plain = copy.deepcopy(denoiser.float())
    weights = let_drift(denoiser)
    assert torch.equal(denoiser(pictures()), plain(pictures()))
    for model in (denoiser, plain):
        model(pictures()).square().sum().backward()
    for name, parameter in plain.named_parameters():
        where = name.replace("weight.", "weight.inner.") if ".weight." in name else name
        assert torch.equal(denoiser.get_parameter(where).grad, parameter.grad), name

    filters = plain.conv.dequantized().requires_grad_(True)
    hidden = filters(pictures()).mean((2, 3))
    F.linear(hidden, plain.head[0].weight()).square().sum().backward()
    assert torch.allclose(weights["conv"].drift.grad, weight_to_matrix(filters.weight.grad), rtol=1e-4, atol=1e-6)


def test_gradients_of_a_stored_weight_reach_an_fp32_drift(denoiser):
    weight = let_drift(denoiser)["conv"]
    (weight().float() * 2.0).sum().backward()
    assert weight.drift.grad.dtype == torch.float32 and bool((weight.drift.grad == 2).all())


def test_settling_follows_the_drift_and_keeps_the_rest(denoiser):
    for weight in let_drift(denoiser.float()).values():
        before = weight().detach()
        weight.drift.data.copy_(0.5 * gaussian(*weight.shape))
        target = before + weight.drift.detach()
        assert weight.settle() > 0
        after = weight().detach()
        assert float((target - after).norm()) < float((target - before).norm())
        assert torch.allclose(after + weight.drift.detach(), target, atol=1e-5)
        left = weight.drift.detach().clone()
        while weight.settle():  # each time nearer: it ends
            assert float(weight.drift.norm()) < float(left.norm())
            left = weight.drift.detach().clone()
        assert torch.equal(weight.drift.detach(), left)


def test_small_moves_add_up(denoiser):
    weight = let_drift(denoiser.float())["conv"]
    direction = 0.02 * gaussian(*weight.shape, seed=5)
    changed = []
    for _ in range(50):
        weight.drift.data += direction
        changed.append(weight.settle())
    assert changed[0] < 0.1 * max(changed)
    assert float((weight.drift.detach() - 50 * direction).norm()) > 0.5 * float((50 * direction).norm())


def test_a_weight_without_drift_stays(denoiser):
    weight = let_drift(denoiser)["conv"]
    codes = weight.inner.codes.clone()
    assert weight.settle() == 0
    assert torch.equal(weight.inner.codes, codes) and float(weight.drift.detach().abs().max()) == 0
    weight.drift.data[0, 0] = torch.inf
    with pytest.raises(UserError, match="lower the learning rate"):
        weight.settle()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_cached_layer_notices_new_codes(denoiser, mode):
    weight = let_drift(denoiser.float())["conv"]
    denoiser.conv.decode = "cached"
    with mode():
        before = denoiser(pictures())
        assert denoiser.conv.decoded(torch.float32) is denoiser.conv.decoded(torch.float32)
        weight.drift.copy_(gaussian(*weight.shape))
        assert weight.settle() > 0
        after = denoiser(pictures())
        denoiser.conv.decode = "per_call"
        assert torch.equal(denoiser(pictures()), after) and not torch.equal(after, before)
    denoiser.conv.decode = "cached"
    denoiser(pictures()).sum().backward()
    assert bool(weight.drift.grad.abs().sum() > 0)


def test_drifting_and_back(denoiser):
    names, expected = set(denoiser.state_dict()), denoiser(pictures().half())
    inner = {name: layer.weight for name, layer in quantized_layers(denoiser).items()}
    weights = let_drift(denoiser, ["head.0"])
    assert list(weights) == ["head.0"] and denoiser.conv.weight is inner["conv"]
    weights |= let_drift(denoiser)
    assert list(let_drift(denoiser)) == ["conv", "head.0"]
    assert all(let_drift(denoiser)[name] is weight for name, weight in weights.items())
    for name, weight in weights.items():
        assert isinstance(weight, DriftingWeight) and weight.training == denoiser.training
        assert weight.size() == inner[name].size() and weight.scheme == inner[name].scheme
        assert weight.shared == inner[name].shared
    assert isinstance(denoiser.conv, QuantizedConv2d) and denoiser.conv.original_shape == (24, 16, 3, 3)
    assert torch.equal(denoiser(pictures().half()), expected)

    copied = copy.deepcopy(denoiser)
    stop_drifting(denoiser)
    assert all(layer.weight is inner[name] for name, layer in quantized_layers(denoiser).items())
    assert set(denoiser.state_dict()) == names
    assert torch.equal(denoiser(pictures().half()), expected)
    stop_drifting(copied)
    if inner["conv"].shared:
        assert copied.conv.weight.shared[0] is next(iter(copied.shared.values()))


def test_what_is_no_quantized_layer_cannot_drift(denoiser):
    with pytest.raises(ValueError, match=r"head\.1 is no quantized layer"):
        let_drift(denoiser, ["conv", "head.1"])
    assert not any(isinstance(module, DriftingWeight) for module in denoiser.modules())


def least_squares(kind, *, drift):
    """Relative error of one layer, quantized blind to its inputs, after training on them, with or without drift."""
    inputs = gaussian(512, 64) @ (gaussian(64, 64, seed=1) * torch.logspace(0, -1.5, 64)[:, None])
    linear = nn.Linear(64, 64, bias=False)
    linear.weight.data.copy_(gaussian(64, 64, seed=2))
    targets, denoiser = linear(inputs).detach(), nn.Sequential(linear)
    swap(denoiser, spec_of("0", linear), next(encoded(kind, [linear.weight.detach()])))
    groups = [{"params": list(denoiser.float()[0].parameters()), "lr": 3e-3}]  # a trellis' table is the whole model's
    weight = let_drift(denoiser)["0"] if drift else None
    if drift:
        groups.append({"params": [weight.drift], "lr": 2e-3})
    optimizer = torch.optim.Adam(groups)

    def loss():
        return F.mse_loss(denoiser[0](inputs), targets) / targets.var()

    for step in range(200):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        if drift and step % 2 == 1:
            weight.settle()
    stop_drifting(denoiser)
    return float(loss().detach())


@pytest.mark.parametrize("kind", ["additive", "trellis"])
def test_moving_codes_reach_a_lower_loss(kind):
    assert least_squares(kind, drift=True) < 0.9 * least_squares(kind, drift=False)
