"""The GPU's kernels, run on a CPU by Triton's interpreter, against the CPU's: bit for bit but for the sign of zero."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from operator_calls import operator_call
from random_weights import random_weight, trellis_weight

import vqdm.weights
from vqdm.seeds import torch_generator
from vqdm.weights import additive, ops, scalar, trellis_op
from vqdm.weights.additive import AdditiveScheme
from vqdm.weights.layers import quantized_layers
from vqdm.weights.scalar import ScalarScheme
from vqdm.weights.trellis_codes import locate
from vqdm.weights.trellis_format import BYTE, WIDE

pytest.importorskip("triton", reason="triton is for Linux")

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
ON_GPU = {"trellis": trellis_op._on_gpu, "additive": additive._on_gpu, "scalar": scalar._on_gpu}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
RATES = [0, *range(4, 25)]  # all that the format has
EVEN = [0, *range(4, 25, 2)]


@pytest.fixture(scope="module", autouse=True)
def interpreted():
    """A copy of the kernels' module for the interpreter, in the place of the module."""
    name, path = "vqdm.weights.triton_kernels", Path(vqdm.weights.__file__).parent / "triton_kernels.py"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, name, module)
        patch.setattr(vqdm.weights, "triton_kernels", module, raising=False)
        spec.loader.exec_module(module)
        assert module.INTERPRETED
        yield module


@torch.no_grad()
def by_kernel(weight):
    """What the GPU's implementation of the operator makes of the arguments of the CPU's."""
    _, arguments = operator_call(weight)
    if weight.scheme.kind == "trellis":
        codes, _, _, *others = arguments
        arguments = codes, *locate(codes, weight.shape, weight.scheme.side), *others
    return ON_GPU[weight.scheme.kind](*arguments)


def check(weight):
    expected, found = weight().detach(), by_kernel(weight)
    assert found.dtype == expected.dtype and found.is_contiguous()
    assert torch.equal(found, expected)


TRELLIS = {
    "every rate, the fewest outputs": (16, RATES, WIDE),
    "odd outputs": (17, [9, 0, 4, 24], WIDE),
    "two columns": (63, [12, 4], WIDE),
    "only the first column is kept": (37, [5, 0, 0], WIDE),
    "just one sequence": (320, [12, 7, 13], WIDE),
    "two sequences, one shorter": (321, [4, 24, 0, 13], WIDE),
    "three sequences, more than a tile": (700, [*RATES, *[11] * 46], WIDE),
    "more than two tiles": (40, [12, 10, 14] * 43 + [0], WIDE),
    "byte columns, every rate": (33, EVEN, BYTE),
    "byte columns, finer scales": (16, EVEN, BYTE),
    "byte columns, more than a tile": (256, EVEN * 6, BYTE),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", TRELLIS)
def test_trellis_codes(kind, dtype):
    out, rates, side = TRELLIS[kind]
    for spare in range(4):  # bytes at the end that are no word
        if spare == 0 or out < 64:
            check(trellis_weight(out, rates, spare=spare, side=side, dtype=dtype, seed=spare))


@pytest.mark.parametrize("seed", range(6))
def test_trellis_codes_of_random_shapes(seed):
    draw = torch_generator(seed, "shape")
    out, inputs = (int(torch.randint(1, most, (), generator=draw)) for most in (400, 80))
    rates = torch.tensor(RATES)[torch.randint(0, len(RATES), (inputs,), generator=draw)].tolist()
    if sum(rates) < 4 * 15 * inputs:  # the format ends at 16 bits
        check(trellis_weight(16 + out, [8, *rates], spare=seed % 3, dtype=DTYPES[seed % 3], seed=seed))


SCALED = {"input_scales": True}
ADDITIVE = {
    "3x8g8": (AdditiveScheme(num_codebooks=3), (9, 72)),
    "more than a tile": (AdditiveScheme(num_codebooks=3), (5, 264)),
    "2x5g5o3+c": (AdditiveScheme(num_codebooks=2, codebook_bits=5, group_size=5, out_group_size=3, **SCALED), (9, 35)),
    "1x16g1": (AdditiveScheme(num_codebooks=1, codebook_bits=16, group_size=1), (9, 35)),
    "4x12g20": (AdditiveScheme(num_codebooks=4, codebook_bits=12, group_size=20), (5, 60)),
    "2x4g8-shared": (AdditiveScheme(num_codebooks=2, codebook_bits=4, shared="codebooks"), (4, 16)),
    "1x1g3": (AdditiveScheme(num_codebooks=1, codebook_bits=1, group_size=3), (1, 3)),
    "groups that are not unrolled": (AdditiveScheme(num_codebooks=1, codebook_bits=2, group_size=130), (2, 130)),
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ADDITIVE)
def test_additive_codes(kind, dtype):
    scheme, shape = ADDITIVE[kind]
    check(random_weight(scheme, shape, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", range(1, 9))
def test_scalar_codes(bits, dtype):
    for fields, shape in (
        ({"group_size": 16}, (5, 80)),
        ({"group_size": 5}, (7, 35)),
        ({"group_size": 12}, (3, 24)),
        ({"split": 7}, (5, 13)),
        ({"split": 8}, (5, 24)),
        ({}, (5, 523)),
        ({}, (1, 1)),
    ):
        check(random_weight(ScalarScheme(bits=bits, **fields), shape, dtype=dtype))


@pytest.mark.parametrize("kind", sorted(folder.name for folder in GOLDEN.iterdir()))
def test_golden_checkpoints(kind):
    for layer in quantized_layers(UNet2DConditionModel.from_pretrained(GOLDEN / kind)).values():
        check(layer.weight.base if kind == "low_rank" else layer.weight)  # torch adds the branch


def test_parameters_of_two_dtypes_give_the_wider():
    weight = trellis_weight(20, [8, 12, 9], dtype=torch.float16)
    weight.shared[0].float()
    check(weight)
    assert by_kernel(weight).dtype == torch.float32


def test_codes_may_begin_anywhere_in_memory():
    weight = trellis_weight(40, [12, 7, 24], spare=3)
    expected = weight().detach()
    weight.codes = torch.cat([weight.codes.new_zeros(1), weight.codes])[1:]
    assert weight.codes.data_ptr() % 4
    assert torch.equal(by_kernel(weight), expected)


def test_damaged_codes_read_nothing_beyond_their_end():
    weight = trellis_weight(40, [12, 7, 24])
    _, (codes, _, _, table, scales, *others) = operator_call(weight)
    starts, rates = locate(codes, weight.shape, WIDE)
    beyond = torch.full_like(starts, 2**31 - 64)
    found = trellis_op._on_gpu(codes, beyond, rates.fill_(31), table.detach(), scales.detach(), *others)
    expected = table[0] * scales[40:] * scales[:40, None]  # all states are 0
    assert torch.allclose(found, expected)


def test_what_is_too_large_for_32_bits_goes_through_torch(interpreted, monkeypatch):
    weight = trellis_weight(20, [8, 12, 9])
    monkeypatch.setattr(ops, "MOST", 100)
    monkeypatch.setattr(interpreted, "decode_trellis", None)
    check(weight)
