"""The compiled decoders against the torch arithmetic, bit for bit, and when each of the two is taken."""

import functools
import subprocess
import sys

import accelerate
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_weights import by_formula, random_weight, trellis_weight
from torch import nn

from vqdm.errors import UserError
from vqdm.weights import kernels, ops
from vqdm.weights.additive import AdditiveScheme
from vqdm.weights.base import QuantizedWeight
from vqdm.weights.bitpack import pack
from vqdm.weights.scalar import ScalarScheme
from vqdm.weights.trellis_format import BYTE, RATE_BITS

DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
RATES = st.sampled_from([0, *range(4, 25)])
few = settings(max_examples=40, deadline=None)  # of which the first may compile


def check_bits(weight: QuantizedWeight, dtype: torch.dtype) -> None:
    """Signs of zeros included. That a kernel decodes holds a test below."""
    by_torch = by_formula(weight).detach()
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    for compiled in (weight().detach(), torch.no_grad()(weight)()):
        assert compiled.dtype == by_torch.dtype == dtype and compiled.shape == weight.shape
        assert torch.equal(compiled.view(bits), by_torch.view(bits))


@few
@given(
    out=st.sampled_from([16, 17, 63, 320, 321, 700]) | st.integers(16, 400),
    rates=st.lists(RATES, min_size=8, max_size=40).filter(any),
    spare=st.integers(1, 9),
    dtype=DTYPES,
    seed=st.integers(0, 99),
)
def test_trellis_codes(out, rates, spare, dtype, seed):
    check_bits(trellis_weight(out, rates, spare=spare, dtype=dtype, seed=seed), dtype)


@few
@given(
    out=st.sampled_from([16, 17, 63, 256, 321]) | st.integers(16, 256),
    rates=st.lists(st.sampled_from([0, *range(4, 25, 2)]), min_size=8, max_size=40).filter(any),
    dtype=DTYPES,
    seed=st.integers(0, 99),
)
def test_trellis_codes_of_byte_columns(out, rates, dtype, seed):
    check_bits(trellis_weight(out, rates, spare=1, side=BYTE, dtype=dtype, seed=seed), dtype)


@few
@given(
    scheme=st.builds(
        AdditiveScheme,
        num_codebooks=st.integers(1, 4),
        codebook_bits=st.integers(1, 12) | st.just(16),
        group_size=st.integers(1, 20),
        out_group_size=st.integers(1, 3),
        input_scales=st.booleans(),
        shared=st.sampled_from([None, "codebooks"]),
    ),
    groups=st.tuples(st.integers(1, 7), st.integers(1, 9)),
    dtype=DTYPES,
)
def test_additive_codes(scheme, groups, dtype):
    shape = groups[0] * scheme.out_group_size, groups[1] * scheme.group_size
    check_bits(random_weight(scheme, shape, dtype=dtype), dtype)


@few
@given(bits=st.integers(1, 8), out=st.integers(1, 9), groups=st.integers(1, 5), size=st.integers(1, 21), dtype=DTYPES)
def test_scalar_codes(bits, out, groups, size, dtype):
    scheme = ScalarScheme(bits=bits, group_size=size if groups > 1 else None)
    check_bits(random_weight(scheme, (out, groups * size), dtype=dtype), dtype)


@few
@given(bits=st.integers(1, 8), out=st.integers(1, 9), first=st.integers(1, 40), rest=st.integers(1, 40), dtype=DTYPES)
def test_scalar_codes_of_two_parts(bits, out, first, rest, dtype):
    check_bits(random_weight(ScalarScheme(bits=bits, split=first), (out, first + rest), dtype=dtype), dtype)


def test_16_bits_are_rounded_once():
    for dtype in (torch.float16, torch.bfloat16):
        weight = random_weight(AdditiveScheme(num_codebooks=3, input_scales=True), (32, 64), dtype=dtype)
        rounded = weight().detach()
        assert torch.equal(rounded, weight.float()().detach().to(dtype))


WEIGHTS = {
    "trellis": lambda: trellis_weight(20, [8, 12, 9], spare=2),
    "trellis of byte columns": lambda: trellis_weight(20, [8, 12, 0, 10], side=BYTE),
    "additive": lambda: random_weight(AdditiveScheme(num_codebooks=2), (4, 16)),
    "shared": lambda: random_weight(AdditiveScheme(num_codebooks=2, shared="codebooks"), (4, 16)),
    "scalar": lambda: random_weight(ScalarScheme(bits=3), (4, 16)),
    "scalar of two parts": lambda: random_weight(ScalarScheme(bits=3, split=5), (4, 16)),
}


@pytest.fixture
def taken(monkeypatch):
    """The names of the kernels that were called."""
    names = []

    def spy(name, decode, *arguments, **options):
        names.append(name)
        return decode(*arguments, **options)

    for name in ("decode_trellis", "decode_additive", "decode_scalar", "trellis_gradients", "additive_gradients"):
        monkeypatch.setattr(kernels, name, functools.partial(spy, name, getattr(kernels, name)))
    return names


@pytest.mark.parametrize("kind", WEIGHTS)
def test_the_kernel_decodes_with_and_without_gradients(kind, taken):
    weight = WEIGHTS[kind]()
    used = [f"decode_{weight.scheme.kind}"]
    weight()
    assert taken == used
    with torch.inference_mode():
        weight()
    assert taken == 2 * used
    for module in (weight, *weight.shared):
        module.requires_grad_(False)
    weight()
    assert taken == 3 * used


@pytest.mark.parametrize("kind", WEIGHTS)
def test_the_kernel_gives_the_gradients(kind, taken):
    weight = WEIGHTS[kind]()
    weight().sum().backward()
    with_kernel = weight.scheme.kind != "scalar"
    assert taken[1:] == [f"{weight.scheme.kind}_gradients"] * with_kernel


@torch.no_grad()
@pytest.mark.parametrize("kind", WEIGHTS)
def test_torch_decodes_what_the_kernels_do_not_know_and_what_they_may_not(kind, taken, monkeypatch):
    weight = WEIGHTS[kind]()
    expected = weight()
    taken.clear()
    modules = (weight, *weight.shared)
    for module in modules:
        module.double()
    with torch.enable_grad():
        found = weight()
        found.sum().backward()
    assert found.dtype == torch.float64
    assert torch.allclose(found.float(), expected, rtol=1e-5)
    for module in modules:
        module.float()
    monkeypatch.setattr(ops, "enabled", False)
    assert torch.equal(weight(), expected)
    assert torch.equal(torch.compile(weight, backend="eager", fullgraph=True)(), expected)
    assert not taken


@pytest.mark.parametrize("kind", WEIGHTS)
def test_decodes_while_accelerate_keeps_its_tensors_elsewhere(kind):
    weight = WEIGHTS[kind]()
    with torch.no_grad():
        expected = weight()
    parts = nn.ModuleList([weight, *weight.shared])
    accelerate.cpu_offload(parts, execution_device=torch.device("cpu"))
    assert all(parameter.is_meta for parameter in parts.parameters())
    assert torch.equal(weight().detach(), expected)
    with torch.no_grad():
        assert torch.equal(weight(), expected)
    assert all(parameter.is_meta for parameter in parts.parameters())


@torch.no_grad()
def test_damaged_rates_are_refused_before_memory_is_read():
    weight = trellis_weight(320, [8] * 40)
    weight.columns.fill_(255)
    with pytest.raises(UserError, match="damaged"):
        weight()
    weight.columns.copy_(pack(torch.tensor([21, 18] * 20), RATE_BITS))
    with pytest.raises(UserError, match="has rates for"):
        weight()


def test_importing_weights_imports_neither_numba_nor_triton():
    code = "import sys, vqdm.weights.registry; sys.exit(bool({'numba', 'triton'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True)
