from itertools import pairwise

import pytest
import torch
from additive_problems import generator, hessian, loss_of, matrix

from vqdm.codecs.additive import encode, learn_codebooks, train_shared_codebooks
from vqdm.errors import UserError
from vqdm.weights.additive import AdditiveScheme, SharedCodebooks
from vqdm.weights.registry import scheme_from_dict

RECIPES = ("fast", "paper")


def small(weight, moment=None, num_codebooks=2, **options):
    moment = torch.eye(weight.shape[1]) if moment is None else moment
    options = {"codebook_bits": 4, "generator": generator(), "beam_size": 4} | options
    return encode(weight, moment, num_codebooks=num_codebooks, **options)


def error(quantized, weight, moment):
    """tr(ΔW H ΔWᵀ) / tr(W H Wᵀ) of the fp16 weight that the module decodes."""
    decoded = quantized().detach().float()
    return loss_of(weight, decoded, moment) / loss_of(weight, torch.zeros(()), moment)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("input_scales", [False, True])
def test_decodes_as_the_slow_loop_and_is_near_the_weight(recipe, input_scales):
    weight, moment = matrix(out=24, inputs=24), hessian(24)
    quantized = small(weight, moment, num_codebooks=3, recipe=recipe, input_scales=input_scales)
    assert error(quantized, weight, moment) < 0.05
    codes, exact = quantized.unpacked_codes(), quantized.float()
    decoded = exact().detach()
    for o in range(3):
        for i in range(24):
            words = [exact.codebooks[m, codes[o, i // 8, m], 0, i % 8] for m in range(3)]
            scale = exact.scales[o] * (exact.input_scales[i] if input_scales else 1)
            assert decoded[o, i].item() == pytest.approx((scale * sum(words)).item(), rel=1e-5, abs=1e-7)


def test_shapes_types_and_scheme():
    quantized = small(matrix(), num_codebooks=3)
    assert quantized.shape == (64, 64)
    assert quantized.codes_shape == (64, 8, 3)
    assert quantized.codes.shape == (64 * 8 * 3 * 4 // 8,) and quantized.codes.dtype == torch.uint8
    assert quantized.codebooks.shape == (3, 16, 1, 8)
    assert quantized.scales.shape == (64,)
    assert quantized.dtype == quantized().dtype == torch.float16
    assert quantized.scheme.name == "3x4g8"
    assert small(matrix(), input_scales=True).scheme.name == "2x4g8+c"
    assert scheme_from_dict(quantized.scheme.to_dict()) == quantized.scheme


@pytest.mark.parametrize("recipe", RECIPES)
def test_error_falls_with_the_number_of_codebooks(recipe):
    weight, moment = matrix(), hessian()
    errors = [error(small(weight, moment, m, recipe=recipe), weight, moment) for m in (1, 2, 4)]
    assert all(later < 0.75 * earlier for earlier, later in pairwise(errors))


def test_knowing_the_hessian_pays():
    weight, moment = matrix(), hessian()
    blind, informed = (error(small(weight, h), weight, moment) for h in (None, moment))
    assert informed < 0.5 * blind


def test_input_scales_pay_where_columns_differ():
    weight, moment = matrix() * torch.logspace(-1, 0, 64), hessian()
    plain, scaled = (error(small(weight, moment, input_scales=on), weight, moment) for on in (False, True))
    assert scaled < 0.9 * plain


def test_a_wider_beam_is_better_than_greedy():
    weight, moment = matrix(), hessian()
    greedy, wide = (error(small(weight, moment, 3, beam_size=size), weight, moment) for size in (1, 8))
    assert wide < 0.95 * greedy


@pytest.mark.parametrize("recipe", RECIPES)
def test_same_generator_same_weight_and_the_global_one_is_not_used(recipe):
    weights = []
    for seed, noise in ((0, 1), (0, 2), (1, 1)):
        with torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(noise)
            weights.append(small(matrix(), hessian(), generator=generator(seed), recipe=recipe).state_dict())
    first, again, other = weights
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["codebooks"], other["codebooks"])


def test_scaling_the_problem_scales_the_answer():
    """The Hessian's unit and a power of two on the weight change nothing else."""
    weight, moment = matrix(), hessian()
    plain, scaled = small(weight, moment), small(4 * weight, 2**-20 * moment)
    assert torch.equal(plain.codes, scaled.codes)
    assert torch.allclose(4 * plain().float(), scaled().float(), rtol=1e-3, atol=1e-4)


def test_shared_codebooks_serve_layers_of_any_width_and_scale():
    sizes = ((64, 128, 1), (48, 256, 20), (256, 64, 0.01))
    weights = [torch.randn(out, inputs, generator=generator(2)) * scale for out, inputs, scale in sizes]
    shared = train_shared_codebooks(iter(weights), num_codebooks=2, codebook_bits=4, generator=generator())
    assert isinstance(shared, SharedCodebooks) and shared.codebooks.shape == (2, 16, 1, 8)
    before = shared.codebooks.detach().clone()
    for weight in weights:
        moment = hessian(weight.shape[1])
        quantized = small(weight, moment, shared=shared, shared_key="mine")
        assert quantized.scheme.name == "2x4g8-shared" and quantized.scheme.shared_key == "mine"
        assert set(quantized.state_dict()) == {"codes", "scales"}
        blind = small(weight, shared=shared)
        assert error(quantized, weight, moment) < 0.7 * error(blind, weight, moment)
        identity = torch.eye(weight.shape[1])
        assert error(blind, weight, identity) < 1.25 * error(small(weight), weight, identity)
    assert torch.equal(shared.codebooks, before)


def test_refinement_lowers_the_error_of_shared_codebooks():
    scheme, points = AdditiveScheme(num_codebooks=3, codebook_bits=4), torch.randn(2000, 8, generator=generator())
    errors = []
    for refinements in (0, 10):
        words = learn_codebooks(points, scheme, generator=generator(), iterations=20, refinements=refinements)
        every = (words[0][:, None, None] + words[1][:, None] + words[2]).view(-1, 8)
        errors.append(float(torch.cdist(points, every).amin(1).square().mean()))
    assert errors[1] < 0.97 * errors[0]


@pytest.mark.parametrize("recipe", RECIPES)
def test_fewer_groups_than_codewords_are_exact(recipe):
    weight = matrix(out=2, inputs=16)
    assert error(small(weight, num_codebooks=1, recipe=recipe), weight, torch.eye(16)) < 1e-5


@pytest.mark.parametrize("size", [(1, 8), (1, 64), (32, 32), (3, 24)])
@pytest.mark.parametrize(
    ("recipe", "codebooks"),
    [("fast", (1, 1)), ("fast", (2, 2)), ("fast", (4, 8)), ("paper", (1, 1)), ("paper", (4, 8))],
)
def test_tiny_layers(recipe, size, codebooks):
    weight = matrix(*size)
    quantized = small(weight, hessian(size[1]), codebooks[0], codebook_bits=codebooks[1], recipe=recipe)
    assert bool(torch.isfinite(quantized()).all())
    assert error(quantized, weight, hessian(size[1])) < 1


@pytest.mark.parametrize("recipe", RECIPES)
def test_hessians_of_few_samples_and_of_dead_inputs(recipe):
    weight, few = matrix(), hessian(rank=10)
    assert error(small(weight, few, recipe=recipe), weight, few) < 0.01
    dead = hessian()
    dead[8:20], dead[:, 8:20] = 0, 0
    quantized = small(weight, dead, recipe=recipe, num_codebooks=3)
    assert error(quantized, weight, dead) < 0.03
    # Inputs that were never seen still get weights that are about right.
    missed = (quantized().detach().float() - weight)[:, 8:16].square().sum() / weight[:, 8:16].square().sum()
    assert float(missed) < 0.5
    nothing = small(weight, torch.zeros(64, 64), recipe=recipe)
    assert error(nothing, weight, torch.eye(64)) == pytest.approx(
        error(small(weight, recipe=recipe), weight, torch.eye(64)), rel=1e-5
    )


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("input_scales", [False, True])
def test_zero_tiny_and_constant_rows(recipe, input_scales):
    weight, moment = matrix(out=6), hessian()
    weight[1] = 0
    weight[2] = 1e-9
    weight[3] = 0.25
    weight[:, 5] = 0
    options = {"recipe": recipe, "input_scales": input_scales, "codebook_bits": 6}
    decoded = small(weight, moment, **options)().detach().float()
    assert float(decoded[1:3].abs().max()) < 1e-7
    assert bool(torch.isfinite(decoded).all())
    assert loss_of(weight, decoded, moment) < 0.05 * loss_of(weight, torch.zeros(()), moment)
    assert float(small(torch.zeros(4, 16), **options)().detach().abs().max()) == 0


def test_what_cannot_be_encoded_is_refused():
    with pytest.raises(UserError, match=r"group_size 8 does not divide in_features 60 of layer a\.b"):
        small(torch.randn(4, 60), layer="a.b")
    with pytest.raises(UserError, match=r"the weight of layer a\.b has infinite or NaN"):
        small(torch.full((4, 16), torch.inf), layer="a.b")
    with pytest.raises(UserError, match=r"activations of layer a\.b have infinite or NaN"):
        small(matrix(4, 16), torch.full((16, 16), torch.nan), layer="a.b")
    with pytest.raises(ValueError, match=r"Hessian must be \[in, in\]"):
        small(matrix(4, 16), torch.eye(8))
    with pytest.raises(UserError, match="recipe must be fast or paper, not 'slow'"):
        small(matrix(), recipe="slow")
    with pytest.raises(UserError, match="groups of 2 outputs"):
        small(matrix(), out_group_size=2)
    with pytest.raises(UserError, match="beam_size must be at least 1"):
        small(matrix(), beam_size=0)
    with pytest.raises(UserError, match="selects none"):
        train_shared_codebooks([], num_codebooks=2, generator=generator())
    shared = SharedCodebooks(AdditiveScheme(num_codebooks=3, codebook_bits=4, shared="codebooks"))
    with pytest.raises(ValueError, match="cannot use codebooks"):
        small(matrix(), shared=shared)
    with pytest.raises(UserError, match="every layer's own codebooks"):
        small(matrix(), num_codebooks=3, shared=shared, recipe="paper")
    with pytest.raises(UserError, match="1 or more codebooks"):
        AdditiveScheme(num_codebooks=0)
    with pytest.raises(UserError, match="not a weight scheme"):
        scheme_from_dict({"kind": "additive", "surprise": 1})
