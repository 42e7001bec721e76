"""A low-rank branch beside codes: the best one, counted, stored and refused where it does not go."""

import dataclasses
import itertools

import pytest
import torch
from torch import nn

from vqdm.codecs import gptq, rtn
from vqdm.codecs.allocation import assign_schemes, planned_bits
from vqdm.codecs.low_rank import _factors, _root, encode_with_branch
from vqdm.codecs.recode import recode_
from vqdm.config.codecs import AdaroundConfig, GptqConfig, RtnConfig, SvdquantConfig, TrellisConfig, parse_scheme
from vqdm.errors import UserError
from vqdm.seeds import torch_generator
from vqdm.weights.bits import tensor_bytes
from vqdm.weights.low_rank import LowRankScheme, LowRankWeight, branch_bits
from vqdm.weights.registry import scheme_from_dict
from vqdm.weights.scalar import ScalarScheme

OUT, IN = 48, 64


@pytest.fixture
def layer():
    """A weight and the second moments of inputs of low rank."""
    draw = torch_generator(0, "low rank")
    inputs = torch.randn(400, IN, generator=draw) @ torch.randn(IN, IN, generator=draw) / 8
    return torch.randn(OUT, IN, generator=draw), inputs.T @ inputs / 400


def error_of(change, hessian) -> float:
    return float(((change @ hessian) * change).sum())


def rounding(bits, hessian_too=False):
    if hessian_too:
        return lambda target, moments: gptq.encode(target, moments, bits=bits)
    return lambda target, _: rtn.encode(target, bits=bits)


def test_factors_are_the_best_of_their_rank(layer):
    """Eckart–Young: the error that is left is that of the other singular values, and no random change lowers it."""
    weight, hessian = layer
    root = _root(hessian)
    damped = root @ root.T
    left, right = (part.float() for part in _factors(weight, root, 5))
    left_over = error_of(weight - left @ right, damped)
    values = torch.linalg.eigvalsh((weight.double() @ damped.double()) @ weight.double().T)  # the squares
    assert left_over == pytest.approx(float(values[:-5].sum()), rel=1e-3)
    draw = torch_generator(1, "low rank")
    for part in (left, right):
        for _ in range(20):
            part_moved = part + 0.02 * part.std() * torch.randn(part.shape, generator=draw)
            pair = (part_moved, right) if part is left else (left, part_moved)
            assert error_of(weight - pair[0] @ pair[1], damped) > left_over
    assert left.norm(dim=0) == pytest.approx(right.norm(dim=1), rel=1e-2)


@pytest.mark.parametrize("smoothing", [0.0, 0.5])
def test_what_is_decoded_is_codes_and_product(layer, smoothing):
    weight, hessian = layer
    found = encode_with_branch(weight, hessian, rank=3, code=rounding(3), codec="rtn", smoothing=smoothing).float()
    codes = found.base() * (1 if found.input_scales is None else found.input_scales)
    expected = (codes.double() + found.left.double() @ found.right.double()).detach()
    assert torch.allclose(found().detach().double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.allclose(
        found.product().detach().double(), found.left.detach().double() @ found.right.double(), atol=1e-5
    )
    assert (found.input_scales is None) == (smoothing == 0)
    with torch.no_grad():
        assert error_of(found() - weight, hessian) < error_of(rtn.encode(weight, bits=3)().float() - weight, hessian)


def test_the_more_rank_the_less_error(layer):
    weight, hessian = layer
    errors = []
    for rank in (1, 4, 12, 24):
        found = encode_with_branch(weight, hessian, rank=rank, code=rounding(3, True), codec="gptq")
        with torch.no_grad():
            errors.append(error_of(found().float() - weight, hessian))
    assert all(more < less for less, more in itertools.pairwise(errors))


def test_a_weight_of_low_rank_is_all_branch(layer):
    weight, hessian = layer
    thin = weight[:, :2] @ weight[:2]
    found = encode_with_branch(thin, hessian, rank=2, code=rounding(2), codec="rtn")
    with torch.no_grad():
        assert error_of(found().float() - thin, hessian) < 1e-4 * error_of(thin, hessian)


def test_second_moments_that_are_nearly_singular_are_no_hindrance(layer):
    weight, _ = layer
    direction = torch.ones(IN) / 8
    found = encode_with_branch(
        weight, direction[:, None] * direction, rank=1, code=rounding(3), codec="rtn", smoothing=0.5
    )
    assert torch.isfinite(found()).all()


def layers_of(*shapes) -> nn.Module:
    return nn.ModuleDict({f"layer{i}": nn.Linear(shape[1], shape[0], bias=False) for i, shape in enumerate(shapes)})


@pytest.mark.parametrize(
    "config",
    [TrellisConfig(bits=3.5, low_rank=2), GptqConfig(bits=3, low_rank=2), SvdquantConfig(bits=4, low_rank=3)],
    ids=lambda config: config.name,
)
def test_its_bits_are_counted(config):
    shape = (256, 384)
    with torch.device("meta"):
        model = layers_of(shape)
        found = planned_bits(model, config, pattern=".", min_size=1).bits_quantized
    branch = branch_bits(shape, config.low_rank, input_scales=config.smoothing > 0)
    own = 16 * config.low_rank * (256 + 384) / (256 * 384) + (config.smoothing > 0) * 16 / 256
    assert branch == pytest.approx(own)
    if config.kind == "trellis":  # whose bits are all there are
        assert 3.49 < found <= 3.5 + 1e-9
    else:
        assert found == pytest.approx(config.bits + branch + 32 / 384, abs=1e-6)


def test_a_layer_without_room_has_no_branch():
    model = layers_of((64, 64), (16, 64), (512, 512))
    schemes = [s for _, s in assign_schemes(model, TrellisConfig(low_rank=4), pattern=".", min_size=1).quantized]
    assert [getattr(scheme, "rank", 0) for scheme in schemes] == [0, 0, 4]  # 2 bits and more of 3 would be the branch's
    assert not any(
        hasattr(s, "rank") for _, s in assign_schemes(model, TrellisConfig(), pattern=".", min_size=1).quantized
    )


def test_codes_follow_a_target_beside_the_branch(layer):
    weight, hessian = layer
    found = encode_with_branch(weight, hessian, rank=2, code=rounding(3), codec="rtn", smoothing=0.5).float()
    target = weight + 0.3 * torch.randn(OUT, IN, generator=torch_generator(2, "low rank"))
    before = float((found().detach() - target).square().sum())
    assert recode_(found, target) > 0
    assert float((found().detach() - target).square().sum()) < before


def test_gradients_reach_codes_and_factors(layer):
    weight, hessian = layer
    found = encode_with_branch(weight, hessian, rank=2, code=rounding(3), codec="rtn", smoothing=0.5).double()
    found().square().sum().backward()
    gradient = 2 * found().detach()
    assert torch.allclose(found.left.grad, gradient @ found.right.detach().T)
    assert torch.allclose(found.right.grad, found.left.detach().T @ gradient)
    assert found.base.scales.grad.abs().sum() > 0


def test_names_stand_for_options_and_back():
    for name, expected in (
        ("trellis2.5r8", TrellisConfig(bits=2.5, low_rank=8)),
        ("gptq4g64r16", GptqConfig(bits=4, group_size=64, low_rank=16)),
        ("svdquant4", SvdquantConfig(bits=4)),
    ):
        assert parse_scheme(name) == expected
    assert SvdquantConfig(low_rank=1).name == "svdquant4r1"
    assert parse_scheme(TrellisConfig(bits=2, low_rank=4).name).low_rank == 4


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (AdaroundConfig(low_rank=1), "choose quantize=gptq4"),
        (TrellisConfig(low_rank=1, allocation="sensitivity"), "allocation=uniform"),
        (RtnConfig(smoothing=0.5), "quantize.low_rank=1 or more"),
        (SvdquantConfig(low_rank=0), "must be 1 to"),
    ],
)
def test_what_does_not_go_together_is_refused(config, said):
    with pytest.raises(UserError, match=said):
        config.check()


def test_options_without_a_branch_are_what_they_were():
    assert not {"low_rank", "smoothing"} & set(TrellisConfig().settings())
    assert TrellisConfig(low_rank=2).settings()["low_rank"] == 2


@pytest.mark.parametrize(
    "damage",
    [
        {"base": None},
        {"base": {"kind": "low_rank", "codec": "a", "rank": 1, "input_scales": False, "base": {}}},
        {"base": {"kind": "scalar", "bits": 99}},
        {"rank": 0},
        {"rank": 1.5},
        {"rank": 10**9},
        {"input_scales": 1},
        {"more": 1},
    ],
    ids=str,
)
def test_a_damaged_scheme_is_refused(damage):
    scheme = LowRankScheme(codec="rtn", rank=2, base=ScalarScheme(bits=4))
    assert scheme_from_dict(scheme.to_dict()) == scheme
    with pytest.raises(UserError):
        scheme_from_dict(scheme.to_dict() | damage)


def test_stored_bytes_are_those_of_codes_and_factors(layer):
    weight, hessian = layer
    found = encode_with_branch(weight, hessian, rank=3, code=rounding(4), codec="rtn")
    state = found.state_dict(keep_vars=True)
    assert set(state) == {"base.codes", "base.scales", "base.zeros", "left", "right"}
    assert tensor_bytes(state.values()) == OUT * IN // 2 + 4 * OUT + 2 * 3 * (OUT + IN)
    assert found.paper_bits() == 4 * OUT * IN + 16 * 3 * (OUT + IN)
    empty = LowRankWeight(dataclasses.replace(found.scheme), (OUT, IN))
    empty.load_state_dict(found.state_dict())
    assert torch.equal(empty(), found())
