import logging

import pytest
import torch

from vqdm.codecs import gptq, rtn
from vqdm.codecs.feedback import feedback_of
from vqdm.codecs.gptq import encode
from vqdm.errors import UserError
from vqdm.seeds import torch_generator


def matrix(out=12, inputs=48, seed=0):
    return torch.randn(out, inputs, generator=torch_generator(seed, "test")) * 0.05


def moments(inputs=48, tokens=400, seed=3):
    """Second moments of correlated inputs of uneven size and with a mean."""
    generator = torch_generator(seed, "moments")
    mix = torch.randn(inputs, inputs, generator=generator) / torch.arange(1, inputs + 1)
    tokens = torch.randn(tokens, inputs, generator=generator) @ mix.T + 0.5 * torch.randn(inputs, generator=generator)
    return tokens.T @ tokens / len(tokens)


def decoded(quantized):
    return quantized.float()().detach()


def output_error(quantized, weight, hessian):
    difference = (decoded(quantized) - weight).double()
    return float(((difference @ hessian.double()) * difference).sum())


def inverses(hessian, order, damping):
    """Of the damped Hessian of the columns from j on, for every j: what optimal brain surgery needs, in float64."""
    damped = hessian.double().clone()
    damped.diagonal()[damped.diagonal() == 0] = 1
    damped = damped + damping * hessian.double().diagonal().mean() * torch.eye(len(damped))
    damped = damped[order][:, order]
    return [torch.linalg.inv(damped[j:, j:]) for j in range(len(damped))]


def slow_gptq(weight, hessian, *, bits, clip="mse", group_size=None, act_order=True, damping=0.01):
    """As GPTQ is defined: round a column, update all remaining ones through the inverse Hessian; grids by rtn's."""
    inputs = weight.shape[1]
    size = group_size or inputs
    order = torch.argsort(-hessian.diagonal(), stable=True) if act_order else torch.arange(inputs)
    inverse = inverses(hessian, order, damping)
    costs = torch.empty(inputs)
    costs[order] = torch.tensor([float(1 / matrix[0, 0]) for matrix in inverse])
    costs[hessian.diagonal() == 0] = 0

    def grid(columns, group):
        def error(difference):
            return (difference.square() * (costs[group] if clip == "hessian" else 1)).sum(1)

        return rtn.find_grid(columns[:, group].float(), bits, clip, error=error)

    groups = [slice(start, start + size) for start in range(0, inputs, size)]
    grids = [grid(weight, group) for group in groups]
    updated = weight.double()[:, order]
    codes = torch.empty(weight.shape)
    for j, place in enumerate(order.tolist()):
        if group_size and not act_order and place % size == 0:
            grids[place // size] = grid(updated, groups[place // size])
        scales, zeros = (part.double() for part in grids[place // size])
        codes[:, place] = (torch.round(updated[:, j] / scales) + zeros).clamp(0, 2**bits - 1)
        error = (updated[:, j] - (codes[:, place] - zeros) * scales) / inverse[j][0, 0]
        updated[:, j:] -= error[:, None] * inverse[j][0]
    scales, zeros = (torch.stack(parts, 1) for parts in zip(*grids, strict=True))
    return codes.int(), scales, zeros


@pytest.mark.parametrize("block", [128, 7])
@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("group_size", [None, 16, 3])
@pytest.mark.parametrize(("bits", "clip"), [(2, "mse"), (3, "mse"), (4, "mse"), (3, "minmax"), (3, "hessian")])
def test_codes_are_those_of_the_definition(bits, clip, group_size, act_order, block, monkeypatch):
    monkeypatch.setattr(gptq, "BLOCK", block)
    weight, hessian = matrix(), moments()
    hessian[:, 20] = hessian[20] = 0
    options = {"bits": bits, "clip": clip, "group_size": group_size, "act_order": act_order}
    quantized = encode(weight, hessian, **options)
    codes, scales, zeros = slow_gptq(weight, hessian, **options)
    assert torch.equal(quantized.scales, scales.half())
    assert torch.equal(quantized.zeros, zeros.half())
    assert torch.equal(quantized.unpacked_codes(), codes)


@pytest.mark.parametrize("damping", [0.001, 0.1])
def test_damping_is_the_definitions(damping):
    weight, hessian = matrix(seed=1), moments(seed=1)
    codes, *_ = slow_gptq(weight, hessian, bits=3, damping=damping)
    assert torch.equal(encode(weight, hessian, bits=3, damping=damping).unpacked_codes(), codes)
    assert not torch.equal(encode(weight, hessian, bits=3).unpacked_codes(), codes)


def test_the_factor_multiplies_back():
    hessian = moments()
    feedback, costs = feedback_of(hessian, damping=0.01)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(48)
    assert torch.allclose(feedback.T * costs @ feedback, damped, rtol=1e-4, atol=1e-5)
    assert torch.equal(feedback, feedback.tril()) and bool((feedback.diagonal() == 1).all())


@pytest.mark.parametrize("group_size", [None, 16])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_output_error_is_well_below_round_to_nearest(bits, group_size):
    weight, hessian = matrix(out=40), moments()
    plain = output_error(rtn.encode(weight, bits=bits, group_size=group_size), weight, hessian)
    for act_order in (True, False):
        found = encode(weight, hessian, bits=bits, group_size=group_size, act_order=act_order)
        assert output_error(found, weight, hessian) < 0.5 * plain


def test_options_that_should_help_do():
    weight, hessian = matrix(out=100), moments()
    worst = output_error(encode(weight, hessian, bits=3, act_order=False), weight, hessian)
    ordered = output_error(encode(weight, hessian, bits=3), weight, hessian)
    clipped = output_error(encode(weight, hessian, bits=3, clip="hessian"), weight, hessian)
    grouped = output_error(encode(weight, hessian, bits=3, clip="hessian", group_size=16), weight, hessian)
    assert grouped < clipped < ordered < worst


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("group_size", [None, 16])
@pytest.mark.parametrize("clip", ["mse", "minmax", "hessian"])
def test_white_inputs_give_round_to_nearest(clip, group_size, act_order):
    weight = matrix()
    for hessian in (torch.eye(48), torch.zeros(48, 48)):
        found = encode(weight, hessian, bits=3, clip=clip, group_size=group_size, act_order=act_order)
        by_rtn = rtn.encode(weight, hessian, bits=3, clip=clip, group_size=group_size)
        assert torch.equal(decoded(found), decoded(by_rtn))
    assert found.scheme.name == ("gptq3" if group_size is None else "gptq3g16")
    assert found.scheme.codec == "gptq"


@pytest.mark.parametrize("damping", [0.01, 1e-8, 0.0])
def test_fewer_tokens_than_inputs(damping, caplog):
    weight = matrix(out=40)
    hessian = moments(tokens=7)
    with caplog.at_level(logging.WARNING, logger="vqdm"):
        found = encode(weight, hessian, bits=3, damping=damping, layer="a.b")
    assert output_error(found, weight, hessian) < 0.2 * output_error(rtn.encode(weight, bits=3), weight, hessian)
    if damping == 0.01:
        assert not caplog.records
    if damping == 0:
        assert "the Hessian of layer a.b is nearly singular: damping" in caplog.text


def test_weights_of_dead_inputs_are_the_nearest_and_disturb_no_other():
    weight, hessian = matrix(), moments()
    dead = torch.tensor([3, 17, 40])
    hessian[:, dead] = hessian[dead] = 0
    found = encode(weight, hessian, bits=3)
    scales, zeros = found.scales[:, 0].float(), found.zeros[:, 0].float()
    nearest = rtn.round_to_grid(weight[:, dead], scales, zeros, bits=3)
    assert torch.equal(found.unpacked_codes()[:, dead].float(), nearest)
    weight[:, dead] /= 2  # the row's ends are elsewhere
    live = torch.tensor([i for i in range(48) if i not in dead])
    changed = encode(weight, hessian, bits=3, clip="minmax").unpacked_codes()[:, live]
    weight[:, dead] = 0
    assert torch.equal(encode(weight, hessian, bits=3, clip="minmax").unpacked_codes()[:, live], changed)


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("value", [0.0, 0.03, -0.03])
def test_constant_rows(value, act_order):
    weight = torch.full((3, 32), value)
    for group_size in (None, 8):
        found = encode(weight, moments(32), bits=3, act_order=act_order, group_size=group_size)
        assert torch.allclose(decoded(found), weight, rtol=0.03, atol=2e-7)


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("group_size", [None, 1])
def test_one_input(act_order, group_size):
    weight = matrix(inputs=1)
    found = encode(weight, torch.tensor([[2.5]]), bits=3, act_order=act_order, group_size=group_size)
    assert torch.equal(decoded(found), decoded(rtn.encode(weight, bits=3)))


def test_half_precision_is_encoded_in_single():
    weight, hessian = matrix().half(), moments()
    found, expected = encode(weight, hessian, bits=3), encode(weight.float(), hessian, bits=3)
    assert torch.equal(found.unpacked_codes(), expected.unpacked_codes())


def test_neither_argument_is_changed():
    weight, hessian = matrix().requires_grad_(), moments()
    copies = weight.detach().clone(), hessian.clone()
    for act_order in (True, False):
        encode(weight, hessian, bits=3, act_order=act_order, group_size=16)
    assert torch.equal(weight, copies[0]) and torch.equal(hessian, copies[1])


def test_what_cannot_be_encoded_is_refused():
    weight, hessian = matrix(), moments()
    with pytest.raises(UserError, match=r"the weight of layer a\.b has infinite or NaN"):
        encode(weight / 0, hessian, bits=3, layer="a.b")
    with pytest.raises(UserError, match=r"the activations of layer a\.b have infinite or NaN"):
        encode(weight, hessian.clone().fill_diagonal_(torch.nan), bits=3, layer="a.b")
    with pytest.raises(UserError, match=r"the Hessian of layer a\.b is not positive semidefinite"):
        encode(weight, hessian - 100 * torch.eye(48), bits=3, layer="a.b")
    with pytest.raises(UserError, match=r"group_size 7 does not divide in_features 48 of layer a\.b"):
        encode(weight, hessian, bits=3, group_size=7, layer="a.b")
    with pytest.raises(UserError, match="gptq: bits must be 1 to 8"):
        encode(weight, hessian, bits=9)
    with pytest.raises(UserError, match="gptq: clip must be hessian, mse or minmax"):
        encode(weight, hessian, bits=3, clip="best")
    with pytest.raises(ValueError, match=r"must be \[in, in\]"):
        encode(weight, hessian[:40, :40], bits=3)
