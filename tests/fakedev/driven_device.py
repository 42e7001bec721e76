"""What the fake device is, and a quantized denoiser on it: the same numbers as on the CPU, and no wait for the device.

python -m pytest tests/fakedev/driven_device.py    (in a process of its own)
"""

import copy
import re

import fake_device
import pytest
import torch
from quantized import KINDS, quantized_unet
from random_weights import trellis_weight
from unets import small_unet

from vqdm.codecs.encode import quantize_without_data
from vqdm.config.codecs import parse_scheme
from vqdm.weights import ops
from vqdm.weights.layers import quantized_layers

fake_device.register()
DEVICE = fake_device.NAME
INPUTS = (torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.randn(2, 5, 32))


@pytest.fixture(scope="module", params=KINDS)
def pair(request):
    """A quantized U-Net on the CPU, and the same one on the device."""
    unet = quantized_unet(request.param)
    return unet, copy.deepcopy(unet).to(DEVICE)


def on_device(*tensors):
    return [tensor.to(DEVICE) for tensor in tensors]


def near(found, wanted, within=1e-5):
    return float((found.cpu().double() - wanted.double()).norm() / wanted.double().norm()) < within


def test_mixed_devices_are_refused_but_for_numbers_and_indices():
    rows = torch.ones(3, 2, device=DEVICE)
    with pytest.raises(RuntimeError, match="same device"):
        rows + torch.ones(2)
    with pytest.raises(RuntimeError, match="device type for generator"):
        torch.randn(2, device=DEVICE, generator=torch.Generator())
    with pytest.raises(TypeError, match="convert"):
        rows.numpy()
    assert rows[torch.tensor([0, 2])].shape == (2, 2) and near(rows * torch.tensor(2.0), torch.full((3, 2), 2.0))


def test_fresh_memory_is_nan_and_what_happens_is_counted():
    assert bool(torch.empty(5, device=DEVICE).isnan().all()) and type(torch.empty(5, device=DEVICE)) is torch.Tensor
    fake_device.reset()
    held = fake_device.counts()["held"]
    ones = torch.ones(1000, device=DEVICE)
    assert fake_device.counts()["syncs"] == 0 and fake_device.counts()["held"] == held + 4000
    assert float(ones.sum()) == 1000 and fake_device.syncs() == {"aten::_local_scalar_dense": 1}
    assert len(ones.cpu()) == len(ones.nonzero()) == 1000 and fake_device.counts()["syncs"] == 3
    del ones
    assert fake_device.counts()["held"] == held and fake_device.counts()["peak"] >= held + 4000


@pytest.fixture(params=["by torch", "by an operator"])
def way(request, monkeypatch):
    """Weights decode as on a GPU without Triton, or by one operator, which runs the CPU's loops."""
    if request.param == "by an operator":
        monkeypatch.setattr(ops, "devices", ops.devices | {DEVICE})
    return request.param


@pytest.mark.parametrize("decode", ["per_call", "cached"])
def test_a_denoiser_gives_the_same_and_never_waits(pair, way, decode):
    own, there = pair
    for unet in pair:
        for layer in quantized_layers(unet).values():
            layer.decode = decode
    inputs = on_device(*INPUTS)
    with torch.no_grad():
        wanted = own(*INPUTS).sample
        there(*inputs)
        fake_device.reset()
        found = there(*inputs).sample
    decoded = sum(count for name, count in fake_device.calls().items() if name.startswith("vqdm::"))
    known = [name for name in quantized_layers(there) if re.search(r"attn2\.to_[kv]$", name)]  # of this very text
    expected = len(quantized_layers(there)) - len(known)
    assert decoded == (expected if (way, decode) == ("by an operator", "per_call") else 0)
    assert fake_device.syncs() == {} and fake_device.counts()["uploads"] == 0
    assert near(found, wanted)


def test_gradients_are_the_same_and_never_wait(pair, way):
    own, there = (copy.deepcopy(unet).requires_grad_(True) for unet in pair)
    inputs = on_device(*INPUTS)
    own(*INPUTS).sample.square().mean().backward()
    there(*inputs)
    fake_device.reset()
    there(*inputs).sample.square().mean().backward()
    assert fake_device.syncs() == {}
    for (name, parameter), other in zip(own.named_parameters(), there.parameters(), strict=True):
        scale = max(1e-6, float(parameter.grad.abs().max()))
        assert float((other.grad.cpu() - parameter.grad).abs().max()) < 1e-4 * scale, name


def test_gradients_of_a_trellis_weight_take_as_many_launches_whatever_its_columns(way):
    counts = set()
    for columns in (32, 320):
        weight = trellis_weight(300, [8, 13] * (columns // 2)).to(DEVICE)
        weight.shared[0].to(DEVICE)
        decoded = weight().sum()
        fake_device.reset()
        decoded.backward()
        counts.add(fake_device.counts()["calls"])
    assert len(counts) == 1 and counts.pop() < (60 if way == "by an operator" else 400)


def test_memory_of_a_shared_part_is_marked_as_read_by_the_stream_that_reads_it(pair):
    """Else offloading by a stream of its own may give it to others while it is still read."""
    there = pair[1]
    for layer in quantized_layers(there).values():
        layer.decode = "per_call"
    fake_device.reset()
    with torch.no_grad():
        there(*on_device(*INPUTS))
    users = [layer for layer in quantized_layers(there).values() if layer.weight.shared]
    assert fake_device.calls().get("aten::record_stream", 0) == len(users)


@pytest.mark.parametrize("scheme", ["rtn4", "trellis5"])
def test_nothing_is_made_on_the_default_device_by_accident(scheme):
    made = {}
    for device in ("cpu", DEVICE):
        unet = small_unet().to(device)
        with torch.device(device):
            quantize_without_data(unet, parse_scheme(scheme), pattern="mid_block")
        made[device] = unet.state_dict()
    assert all(torch.equal(tensor, made[DEVICE][name].cpu()) for name, tensor in made["cpu"].items())
