"""Decoding as one operator of torch: what torch checks of operators, traces of it, and what comes in its place."""

import copy
import logging
import subprocess
import sys

import pytest
import torch
from operator_calls import operator_call
from random_weights import random_weight, trellis_weight
from torch import Tensor

from vqdm.weights import ops
from vqdm.weights.additive import AdditiveScheme
from vqdm.weights.scalar import ScalarScheme
from vqdm.weights.trellis_format import BYTE

WEIGHTS = {
    "trellis": lambda: trellis_weight(20, [8, 12, 9], spare=2),
    "trellis of byte columns": lambda: trellis_weight(20, [8, 12, 0, 10], side=BYTE),
    "additive": lambda: random_weight(AdditiveScheme(num_codebooks=2, input_scales=True), (4, 16)),
    "shared": lambda: random_weight(AdditiveScheme(num_codebooks=2, shared="codebooks"), (4, 16)),
    "scalar": lambda: random_weight(ScalarScheme(bits=3), (4, 16)),
    "scalar of two parts": lambda: random_weight(ScalarScheme(bits=3, split=5), (4, 16)),
}


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", WEIGHTS)
def test_torch_finds_no_fault_with_the_operator(kind):
    function, arguments = operator_call(WEIGHTS[kind]())
    for trained in (False, True):
        own = [a.detach().clone().requires_grad_(trained and a.is_floating_point()) if isinstance(a, Tensor) else a
               for a in arguments]  # fmt: skip
        found = torch.library.opcheck(function, tuple(own), raise_exception=True)
        assert set(found.values()) == {"SUCCESS"}


@pytest.mark.parametrize("kind", WEIGHTS)
def test_a_compiled_weight_is_one_graph_with_one_operator(kind):
    weight, graphs = WEIGHTS[kind](), []

    def keep(graph, inputs):
        graphs.append([node.target for node in graph.graph.nodes if node.op == "call_function"])
        return graph

    with torch.no_grad():
        assert torch.equal(torch.compile(weight, backend=keep, fullgraph=True)(), weight())
    (graph,) = graphs
    assert graph == [operator_call(weight)[0]]


def on_meta(weight):
    """With its shared part, as a device whose kernels take what `located` gives."""
    moved = copy.deepcopy(torch.nn.ModuleList([weight, *weight.shared])).to("meta")
    return moved[0]


@pytest.mark.parametrize("kind", WEIGHTS)
def test_beside_a_cpu_it_is_one_launch_to_the_shape_and_dtype(kind):
    weight = on_meta(WEIGHTS[kind]().half())
    for shared in weight.shared:
        shared.half()
    weight()  # locates the columns
    function, arguments = operator_call(weight)
    assert str(function).startswith("vqdm.decode_")
    assert (tuple(weight().shape), weight().dtype) == (weight.shape, torch.float16)
    if weight.scheme.kind == "trellis":
        starts, rates = arguments[1:3]
        assert (starts.dtype, rates.dtype) == (torch.int32, torch.uint8)
        assert (len(starts), len(rates)) == (weight.shape[1] + 1, weight.shape[1])
        assert set(weight.state_dict()) == {"codes", "scales"}


@pytest.mark.parametrize("kind", ["trellis", "trellis of byte columns"])
def test_a_compiled_trellis_weight_takes_the_places_of_columns_that_were_found(kind):
    weight, graphs = on_meta(WEIGHTS[kind]()), []

    def keep(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return graph

    weight()
    with torch.no_grad():
        torch.compile(weight, backend=keep, fullgraph=True)()
    assert graphs == [["vqdm.decode_trellis.default"]]


def test_places_of_columns_follow_the_codes():
    weight = on_meta(WEIGHTS["trellis"]())
    starts, _ = weight.located()
    assert weight.located()[0] is starts
    weight.codes.add_(1)  # in place: renewed in place, as CUDA graphs hold the address
    state = weight._located_state
    assert weight.located()[0] is starts and weight._located_state != state
    weight.codes = weight.codes.clone()
    assert weight.located()[0] is starts and weight._located_codes() is weight.codes
    assert copy.deepcopy(weight)._starts is None


def test_without_triton_a_gpu_decodes_by_torch_and_one_line_says_so(monkeypatch, caplog):
    class OnGPU:
        device, dtype = torch.device("cuda"), torch.float16

    monkeypatch.setattr(ops, "HAS_TRITON", True)
    assert ops.apply_to(OnGPU())
    monkeypatch.setattr(ops, "HAS_TRITON", False)
    ops._say_that_triton_is_missing.cache_clear()
    with caplog.at_level(logging.WARNING, "vqdm"):
        assert not ops.apply_to(OnGPU(), OnGPU())
        assert not ops.apply_to(OnGPU())
    (record,) = caplog.records
    assert "decode=cached" in record.message and "slower" in record.message and "\n" not in record.message


def test_an_environment_variable_turns_the_operators_off(monkeypatch):
    monkeypatch.setenv("VQDM_KERNELS", "off")
    code = "import sys, torch, vqdm.weights.ops as ops; sys.exit(ops.apply_to(torch.ones(1)))"
    subprocess.run([sys.executable, "-c", code], check=True)
