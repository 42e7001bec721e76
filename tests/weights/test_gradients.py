"""Gradients through decoding against autograd of the plain formulas in fp64, and what is kept for them."""

import copy

import pytest
import torch
from random_weights import by_formula, parameters_of, random_weight, trellis_weight
from torch.autograd import grad, gradcheck
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from vqdm.seeds import torch_generator
from vqdm.weights import kernels, trellis_op
from vqdm.weights.additive import AdditiveScheme
from vqdm.weights.scalar import ScalarScheme
from vqdm.weights.trellis_codes import locate
from vqdm.weights.trellis_format import BYTE

RATES = [0, 8, 4, 24, 13, 9, 0]


def additive(shape, **fields):
    return lambda **options: random_weight(AdditiveScheme(**fields), shape, **options)


WEIGHTS = {
    "trellis": lambda **options: trellis_weight(37, RATES, spare=3, **options),
    "trellis of byte columns": lambda **options: trellis_weight(37, [0, 8, 4, 24, 14, 10, 0], side=BYTE, **options),
    "trellis of whole tiles": lambda **options: trellis_weight(64, [12, 7] * 16, **options),
    "trellis of several sequences": lambda **options: trellis_weight(701, [*RATES * 3, 5], **options),
    "3x8g8": additive((6, 32), num_codebooks=3),
    "2x6g6o2+c": additive(
        (10, 30), num_codebooks=2, codebook_bits=6, group_size=6, out_group_size=2, input_scales=True
    ),
    "1x3g20": additive((300, 60), num_codebooks=1, codebook_bits=3, group_size=20),
    "4x11g1": additive((7, 13), num_codebooks=4, codebook_bits=11, group_size=1),
    "1x16g3o3": additive((9, 21), num_codebooks=1, codebook_bits=16, group_size=3, out_group_size=3),
    "2x8g8+c-shared": additive((6, 32), num_codebooks=2, input_scales=True, shared="codebooks"),
    "scalar": lambda **options: random_weight(ScalarScheme(bits=3, group_size=8), (5, 24), **options),
    "scalar of two parts": lambda **options: random_weight(ScalarScheme(bits=3, split=7), (5, 24), **options),
}
SMALL = ("trellis", "2x6g6o2+c", "2x8g8+c-shared", "scalar", "scalar of two parts")


def in_double(weight):
    copied = copy.deepcopy(weight)
    for module in (copied, *copied.shared):
        module.double()
    return copied


def randn(*shape):
    return torch.randn(shape, generator=torch_generator(0, "incoming"))


def check_gradients(weight, incoming, tolerance):
    """Relative to the largest, since sums cancel."""
    reference = in_double(weight)
    expected = grad(by_formula(reference), parameters_of(reference), incoming.double())
    found = grad(weight(), parameters_of(weight), incoming)
    for f, e, parameter in zip(found, expected, parameters_of(weight), strict=True):
        assert f.dtype == parameter.dtype and f.shape == parameter.shape
        assert float((f.double() - e).abs().max()) <= tolerance * float(e.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", WEIGHTS)
def test_gradients_are_those_of_the_formula(kind, dtype):
    weight = WEIGHTS[kind](dtype=dtype)
    incoming = randn(*weight.shape).to(dtype)
    check_gradients(weight, incoming, 1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps)


@pytest.mark.parametrize("kind", [kind for kind in WEIGHTS if kind.startswith("trellis")])
def test_gradients_by_states_for_a_device_are_those_of_the_formula(kind, monkeypatch):
    """All columns at once: the operator itself reads the states, of a table whose values are their numbers."""
    weight = WEIGHTS[kind]()
    located = locate(weight.codes, weight.shape, weight.scheme.side)
    monkeypatch.setattr(type(weight), "located", lambda self: located)
    monkeypatch.setattr(trellis_op, "kernels_apply", lambda *tensors: False)
    check_gradients(weight, randn(*weight.shape), 1e-6)


@pytest.mark.parametrize("kind", SMALL)
def test_incoming_gradients_need_not_be_contiguous(kind):
    weight = WEIGHTS[kind]()
    out, inputs = weight.shape
    check_gradients(weight, randn(inputs, out).T, 1e-6)
    check_gradients(weight, randn(out, 1).expand(out, inputs), 1e-6)


@pytest.mark.parametrize("kind", SMALL)
def test_where_torch_computes_in_double_the_differences_agree(kind):
    weight = in_double(WEIGHTS[kind]())
    names, parameters = zip(*weight.named_parameters(), strict=True)
    shared = [part.requires_grad_(False) for part in weight.shared]  # by its tensor: it is not among the weight's
    assert gradcheck(
        lambda *values: functional_call(weight, dict(zip(names, values, strict=True))), parameters, fast_mode=True
    )
    for part in shared:
        (parameter,) = part.requires_grad_(True).parameters()
        incoming = randn(*weight.shape).double()
        step = torch.randn(parameter.shape, generator=torch_generator(0, "step"), dtype=torch.float64)
        (found,) = grad(weight(), [parameter], incoming)
        with torch.no_grad():
            before = weight()
            parameter += step  # the weight is linear in it
            assert torch.allclose(((weight() - before) * incoming).sum(), (found * step).sum(), rtol=1e-9)


@pytest.mark.parametrize("kind", SMALL)
def test_only_the_gradients_that_are_wanted_are_computed(kind, monkeypatch):
    weight, wishes = WEIGHTS[kind](), []

    def spy(name, wish):
        computed = getattr(kernels, name)

        def call(*arguments, **options):
            wishes.append(options[wish])
            found = computed(*arguments, **options)
            assert (found[0] is not None) == options[wish]
            return found

        monkeypatch.setattr(kernels, name, call)

    spy("trellis_gradients", "of_table")
    spy("additive_gradients", "of_codebooks")
    parameters, incoming = parameters_of(weight), randn(*weight.shape)
    everything = grad(weight(), parameters, incoming)
    for wanted, expected in zip(parameters, everything, strict=True):
        for parameter in parameters:
            parameter.requires_grad_(parameter is wanted)
            parameter.grad = None
        wishes.clear()
        weight().backward(incoming)
        assert torch.equal(wanted.grad, expected)
        assert all(parameter.grad is None for parameter in parameters if parameter is not wanted)
        values = next(weight.shared[0].parameters()) if weight.shared else getattr(weight, "codebooks", None)
        assert wishes == [wanted is values] * (weight.scheme.kind != "scalar")


@pytest.mark.parametrize("kind", WEIGHTS)
def test_kept_for_the_gradients_are_codes_and_parameters_alone(kind):
    weight, kept = WEIGHTS[kind](), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        weight()
    tensors = [*weight.buffers(), *parameters_of(weight)]
    assert sum(tensor.nbytes for tensor in kept) == sum(tensor.nbytes for tensor in tensors)
    held = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    assert {tensor.untyped_storage().data_ptr() for tensor in kept} <= held  # no copies


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", SMALL)
def test_under_checkpointing_and_autocast_the_gradients_are_the_same(kind, reentrant):
    weight = WEIGHTS[kind]()
    inputs = randn(4, weight.shape[1]).requires_grad_()

    def block(activations):
        return torch.tanh(activations @ weight().T)

    def gradients(run):
        return grad(run(inputs).square().sum(), [inputs, *parameters_of(weight)])

    def checkpointed(activations):
        return checkpoint(block, activations, use_reentrant=reentrant)

    def backward(run):
        for tensor in (inputs, *parameters_of(weight)):
            tensor.grad = None
        run(inputs).square().sum().backward()  # reentrant checkpoints know no torch.autograd.grad
        return [tensor.grad for tensor in (inputs, *parameters_of(weight))]

    assert all(map(torch.equal, backward(checkpointed), gradients(block)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = backward(checkpointed), gradients(block)
    assert all(map(torch.equal, found, expected))
    assert all(tensor.dtype == torch.float32 for tensor in found)


@pytest.mark.parametrize("kind", ["trellis", "2x8g8+c-shared"])
def test_a_shared_part_learns_from_all_its_weights_step_by_step(kind):
    """Two weights and a copy: optimizer steps in place reach the next forward pass, and only the copied part's."""
    first = WEIGHTS[kind]()
    second = copy.deepcopy(first)
    second.shared = first.shared
    model = torch.nn.ModuleList([first, second, *first.shared])
    copied, untouched = copy.deepcopy(model), copy.deepcopy(model)
    assert copied[0].shared[0] is copied[1].shared[0] is copied[2] is not first.shared[0]
    for parts, decode in ((model, lambda weight: weight()), (copied, by_formula)):
        optimizer = torch.optim.SGD(parts.parameters(), lr=1e-3)
        for _ in range(3):
            optimizer.zero_grad()
            (decode(parts[0]) - 2 * decode(parts[1])).square().mean().backward()
            optimizer.step()
    for found, expected, before in zip(*(m.parameters() for m in (model, copied, untouched)), strict=True):
        assert torch.allclose(found, expected, atol=1e-6) and not torch.equal(found, before)


@pytest.mark.parametrize("kind", SMALL)
def test_misuse_is_an_error_not_a_wrong_gradient(kind):
    weight = WEIGHTS[kind]()
    (first, *_) = grad(weight().square().sum(), parameters_of(weight), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()
    decoded = weight()
    with torch.no_grad():
        weight.scales.mul_(2)
    with pytest.raises(RuntimeError, match=r"modified .*inplace"):
        decoded.sum().backward()
