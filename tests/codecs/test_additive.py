from itertools import pairwise

import pytest
import torch

from vqdm.codecs import additive
from vqdm.codecs.additive import choose_codes, encode, train_shared_codebooks
from vqdm.errors import UserError
from vqdm.seeds import torch_generator
from vqdm.weights.additive import AdditiveScheme, SharedCodebooks
from vqdm.weights.registry import scheme_from_dict


def matrix(out=64, inputs=64, seed=0):
    """Rows of very different size."""
    generator = torch_generator(seed, "test")
    return torch.randn(out, inputs, generator=generator) * torch.logspace(-3, 0, out)[:, None]


def generator(seed=0):
    return torch_generator(seed, "encode")


def small(weight, num_codebooks=2, **options):
    return encode(weight, num_codebooks=num_codebooks, **({"codebook_bits": 4, "generator": generator()} | options))


def error(quantized, weight):
    """Mean over rows of the relative squared error."""
    decoded = quantized.float()().detach()
    return float(((decoded - weight).square().sum(1) / weight.square().sum(1)).mean())


def test_decodes_as_the_slow_loop():
    quantized = small(matrix(out=3, inputs=24), num_codebooks=3).float()
    codes, decoded = quantized.unpacked_codes(), quantized()
    for o in range(3):
        for i in range(24):
            words = [quantized.codebooks[m, codes[o, i // 8, m], 0, i % 8] for m in range(3)]
            assert decoded[o, i].item() == pytest.approx((quantized.scales[o] * sum(words)).item(), rel=1e-5, abs=1e-8)


def test_shapes_types_and_scheme():
    quantized = small(matrix(), num_codebooks=3)
    assert quantized.shape == (64, 64)
    assert quantized.codes_shape == (64, 8, 3)
    assert quantized.codes.shape == (64 * 8 * 3 * 4 // 8,) and quantized.codes.dtype == torch.uint8
    assert quantized.codebooks.shape == (3, 16, 1, 8)
    assert quantized.scales.shape == (64,)
    assert quantized.dtype == quantized().dtype == torch.float16
    assert quantized.scheme.name == "3x4g8"
    assert scheme_from_dict(quantized.scheme.to_dict()) == quantized.scheme


def test_error_falls_with_the_number_of_codebooks():
    errors = [error(small(matrix(), num_codebooks=m), matrix()) for m in (1, 2, 3, 4)]
    assert all(later < 0.75 * earlier for earlier, later in pairwise(errors))


def test_wider_beam_is_better_than_greedy_and_widest_is_exhaustive():
    groups = torch.randn(300, 4, generator=generator())
    codebooks = torch.randn(3, 8, 1, 4, generator=generator(1))

    def errors(beam_size):
        codes = choose_codes(groups, codebooks, beam_size=beam_size)
        return (groups - additive.sum_codewords(codes[:, None], codebooks)).square().sum(1)

    greedy, beam, widest = (errors(size) for size in (1, 4, 64))
    assert float(beam.sum()) < 0.97 * float(greedy.sum())
    every = codebooks[0, :, 0, None, None] + codebooks[1, :, 0, None] + codebooks[2, :, 0]
    best = torch.cdist(groups, every.reshape(-1, 4)).square().amin(1)
    assert torch.allclose(widest, best, rtol=1e-3, atol=1e-5)
    assert bool((widest <= greedy + 1e-5).all())


def test_refinement_lowers_the_error():
    plain, refined = (error(small(matrix(), num_codebooks=3, refinements=n), matrix()) for n in (0, 10))
    assert refined < 0.97 * plain


def test_joint_least_squares_is_the_optimum():
    points, codebooks = torch.randn(200, 4, generator=generator()), torch.randn(2, 8, 4, generator=generator(1))
    codes = torch.randint(8, (200, 2), generator=generator(2))
    design = torch.cat([torch.nn.functional.one_hot(codes[:, m], 8) for m in range(2)], dim=1).double()
    best = design @ torch.linalg.lstsq(design, points.double(), driver="gelsd").solution
    found = additive._sum_words(additive._least_squares(points, codebooks, codes), codes)
    assert float((found - best).square().sum()) < 1e-4 * float((points - best).square().sum())


def test_codes_are_chosen_for_the_codebooks_that_are_stored():
    weight = matrix()
    quantized = small(weight)
    _, groups = additive.normalised_groups(weight, 8)
    again = choose_codes(groups, quantized.codebooks.detach().float(), beam_size=8)
    assert torch.equal(again.view(64, 8, 2), quantized.unpacked_codes().long())


def test_scales_are_the_closed_form_of_what_is_stored():
    weight, quantized = matrix(), small(matrix()).float()
    normalised = quantized() / quantized.scales[:, None]
    for factor in (0.99, 1.01):
        worse = (normalised * quantized.scales[:, None] * factor - weight).square().sum(1)
        assert bool(((quantized() - weight).square().sum(1) < worse).all())


def test_same_generator_same_weight_whatever_the_chunks(monkeypatch):
    first, second = small(matrix()), small(matrix(), generator=generator(1))
    monkeypatch.setattr(additive, "CHUNK", 5000)
    again = small(matrix())
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True))
    assert not torch.equal(first.codebooks, second.codebooks)


def test_subsample_learns_less_but_well():
    whole, part = error(small(matrix()), matrix()), error(small(matrix(), samples=256), matrix())
    assert whole < part < 1.3 * whole


def test_shared_codebooks_serve_layers_of_any_width_and_scale():
    weights = [matrix(), matrix(48, 128, seed=1) * 20, matrix(96, 32, seed=2)]
    shared = train_shared_codebooks(iter(weights), num_codebooks=2, codebook_bits=4, generator=generator())
    assert isinstance(shared, SharedCodebooks) and shared.codebooks.shape == (2, 16, 1, 8)
    for weight in weights:
        quantized = small(weight, shared=shared)
        assert quantized.scheme.name == "2x4g8-shared"
        assert set(quantized.state_dict()) == {"codes", "scales"}
        assert error(quantized, weight) < 1.25 * error(small(weight), weight)


def test_fewer_groups_than_codewords_are_exact():
    weight = matrix(out=2, inputs=16)
    assert error(small(weight, num_codebooks=1), weight) < 1e-5


def test_zero_and_tiny_rows():
    weight = matrix(out=4)
    weight[1] = 0
    weight[2] = 1e-9
    decoded = small(weight).float()().detach()
    assert float(decoded[1:3].abs().max()) == 0
    assert bool(torch.isfinite(decoded).all())
    assert float(small(torch.zeros(4, 16))().detach().abs().max()) == 0


def test_what_cannot_be_encoded_is_refused():
    with pytest.raises(UserError, match=r"group_size 8 does not divide in_features 60 of layer a\.b"):
        small(torch.randn(4, 60), layer="a.b")
    with pytest.raises(UserError, match=r"of layer a\.b has infinite or NaN"):
        small(torch.full((4, 16), torch.inf), layer="a.b")
    with pytest.raises(UserError, match="selects none"):
        train_shared_codebooks([], num_codebooks=2, generator=generator())
    with pytest.raises(ValueError, match="cannot use codebooks"):
        small(matrix(), shared=SharedCodebooks(AdditiveScheme(num_codebooks=3, codebook_bits=4, shared="codebooks")))
    with pytest.raises(UserError, match="1 or more codebooks"):
        AdditiveScheme(num_codebooks=0)
    with pytest.raises(UserError, match="not a weight scheme"):
        scheme_from_dict({"kind": "additive", "surprise": 1})
