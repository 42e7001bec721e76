"""Quantized U-Nets under accelerate's and diffusers' offloading: tensors are in place only around calls."""

import copy

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_module
from diffusers.hooks import apply_group_offloading
from quantized import KINDS, quantized_unet
from torch import nn
from unets import output

from vqdm.weights.layers import quantized_layers

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=KINDS)
def made(request):
    """A quantized U-Net, to be copied, and its output."""
    unet = quantized_unet(request.param)
    return unet, output(unet)


def set_decode(unet, decode):
    for layer in quantized_layers(unet).values():
        layer.decode = decode
    return unet


@pytest.mark.parametrize("decode", ["per_call", "cached"])
@pytest.mark.parametrize("offload_buffers", [True, False])
def test_sequential_offload(made, offload_buffers, decode):
    """What enable_sequential_cpu_offload does: everything is on meta between calls."""
    unet, expected = set_decode(copy.deepcopy(made[0]), decode), made[1]
    cpu_offload(unet, execution_device=CPU, offload_buffers=offload_buffers)
    for _ in range(2):
        assert all(parameter.is_meta for parameter in unet.parameters())
        assert all(buffer.is_meta == offload_buffers for buffer in unet.buffers())
        assert torch.equal(output(unet), expected)
    remove_hook_from_module(unet, recurse=True)
    assert torch.equal(output(unet), expected)


@pytest.fixture
def filled_with_nan():
    """Memory that is not written to yet is NaN inside."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("options", [{"offload_type": "leaf_level"}, {"num_blocks_per_group": 1}])
def test_group_offload_by_way_of_the_disk(made, options, tmp_path, filled_with_nan):
    """diffusers' enable_group_offload: parameters are NaN but for the calls of the module of their group."""
    unet, expected = copy.deepcopy(made[0]), made[1]
    options = {"offload_type": "block_level"} | options
    apply_group_offloading(unet, onload_device=CPU, offload_device=CPU, offload_to_disk_path=str(tmp_path), **options)
    for _ in range(2):
        assert all(parameter.isnan().any() for parameter in unet.parameters())
        assert torch.equal(output(unet), expected)


def test_moving_changes_nothing(made):
    unet, expected = copy.deepcopy(made[0]), made[1]
    assert torch.equal(output(unet.to("cpu")), expected)
    assert all(tensor.is_meta for tensor in copy.deepcopy(unet).to("meta").state_dict().values())


def test_parameters_are_named_once(made):
    unet = copy.deepcopy(made[0])
    named = list(unet.named_parameters(remove_duplicate=False))
    assert len({name for name, _ in named}) == len({id(parameter) for _, parameter in named}) == len(named)
    unet.requires_grad_(True)
    assert all(parameter.requires_grad for _, parameter in named)
    every = [*named, *unet.named_buffers(remove_duplicate=False)]
    assert sorted(name for name, _ in every) == sorted(unet.state_dict())


def test_a_copy_decodes_with_its_own_tensors(made):
    unet, expected = made
    copied = copy.deepcopy(unet)
    assert torch.equal(output(copied), expected)
    own = {id(tensor) for tensor in (*copied.parameters(), *copied.buffers())}
    used = {id(tensor) for layer in quantized_layers(copied).values() for tensor in layer._sources()}
    assert used <= own
    nn.Module.half(copied)
    for parameter in copied.parameters():
        parameter.zero_()
    assert torch.equal(output(unet), expected)
