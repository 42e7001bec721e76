import pytest
import torch

from vqdm.codecs import rtn
from vqdm.codecs.rtn import encode
from vqdm.errors import UserError
from vqdm.seeds import torch_generator
from vqdm.weights.scalar import ScalarScheme, ScalarWeight


def matrix(out=12, inputs=48, seed=0, heavy=False):
    weight = torch.randn(out, inputs, generator=torch_generator(seed, "test")) * 0.05
    return weight.sign() * weight.abs() ** 2 if heavy else weight


def decoded(quantized):
    return quantized.float()().detach()


def squared_errors(quantized, weight):
    return (decoded(quantized) - weight).square().sum(1)


def half(number):
    return float(torch.tensor(number, dtype=torch.float16))


def slow_row(row, low, high, bits):
    """The codes, scale, zero and error of one row, number by number."""
    levels = 2**bits - 1
    scale = half((high - low) / levels)
    zero = min(max(round(-low / scale), 0), levels)
    codes = [min(max(round(x / scale) + zero, 0), levels) for x in row]
    return codes, scale, zero, sum(((c - zero) * scale - x) ** 2 for c, x in zip(codes, row, strict=True))


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_minmax_is_the_closed_form(bits):
    weight = matrix()
    quantized = encode(weight, bits=bits, clip="minmax")
    for i, row in enumerate(weight.tolist()):
        codes, scale, zero, _ = slow_row(row, min(*row, 0), max(*row, 0), bits)
        assert quantized.unpacked_codes()[i].tolist() == codes
        assert (quantized.scales[i].tolist(), quantized.zeros[i].tolist()) == ([scale], [zero])


def test_mse_search_is_the_slow_loop():
    weight = matrix(out=4)
    quantized = encode(weight, bits=3)
    for i, row in enumerate(weight.tolist()):
        best = (min(row), max(row))
        for scan in (
            [(f, f) for f in rtn.JOINT_FACTORS],
            [(f, 1) for f in rtn.END_FACTORS],
            [(1, f) for f in rtn.END_FACTORS],
        ):
            tried = [best] + [(best[0] * a, best[1] * b) for a, b in scan]
            best = min(tried, key=lambda ends, row=row: slow_row(row, *ends, 3)[3])
        error = squared_errors(quantized, weight)[i].item()
        assert error == pytest.approx(slow_row(row, *best, 3)[3], rel=1e-4)


@pytest.mark.parametrize("heavy", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 8])
def test_mse_clip_is_never_worse_than_minmax(bits, heavy):
    weight = matrix(out=40, inputs=256, heavy=heavy)
    by_range = squared_errors(encode(weight, bits=bits, clip="minmax"), weight)
    by_error = squared_errors(encode(weight, bits=bits, clip="mse"), weight)
    assert bool((by_error <= by_range * (1 + 1e-5)).all())
    if bits <= 4:
        assert float(by_error.sum()) < 0.9 * float(by_range.sum())


def test_gaussian_rows_reach_the_distortion_of_the_best_uniform_grid():
    weight = torch.randn(64, 2048, generator=torch_generator(0, "gauss"))
    # Best step of a grid through 0, by brute force; Max 1960 has 9.25, 14.27, 19.38 dB for grids symmetric about 0.
    for bits, decibel in ((2, 8.28), (3, 13.95), (4, 19.33)):
        error = squared_errors(encode(weight, bits=bits), weight).sum() / weight.square().sum()
        assert -10 * float(error.log10()) == pytest.approx(decibel, abs=0.15)


def test_the_error_searched_is_the_error_of_what_is_stored():
    weight = matrix() * 1e-5  # scales among fp16's subnormal numbers
    low, high = rtn._search(weight, weight.amin(1), weight.amax(1), bits=4)
    searched = rtn._squared_error(weight, low, high, bits=4)
    assert torch.allclose(squared_errors(encode(weight, bits=4), weight), searched, rtol=1e-3, atol=0)


def moments(inputs=48, tokens=400, seed=3):
    """Second moments of correlated inputs of uneven size and with a mean."""
    generator = torch_generator(seed, "moments")
    mix = torch.randn(inputs, inputs, generator=generator) / torch.arange(1, inputs + 1)
    tokens = torch.randn(tokens, inputs, generator=generator) @ mix.T + 0.5 * torch.randn(inputs, generator=generator)
    return tokens.T @ tokens / len(tokens)


def output_errors(quantized, weight, hessian):
    """Δ H Δᵀ of every row."""
    difference = (decoded(quantized) - weight).double()
    return ((difference @ hessian.double()) * difference).sum(1)


def slow_hessian_row(row, hessian, bits, size):
    """The least Δ H Δᵀ that the scans find, group after group: float64, one candidate at a time."""

    def error(end, known, ends):
        codes, scale, zero, _ = slow_row(row[end - size : end], *ends, bits)
        tried = known + [(c - zero) * scale - x for c, x in zip(codes, row[end - size : end], strict=True)]
        difference = torch.tensor(tried, dtype=torch.float64)
        return float(difference @ hessian[:end, :end].double() @ difference), tried

    known = []
    for end in range(size, len(row) + 1, size):
        best = (min(*row[end - size : end], 0), max(*row[end - size : end], 0))
        for scan in (
            [(f, f) for f in rtn.JOINT_FACTORS],
            [(f, 1) for f in rtn.END_FACTORS],
            [(1, f) for f in rtn.END_FACTORS],
        ):
            tried = [best] + [(best[0] * a, best[1] * b) for a, b in scan]
            best = min(tried, key=lambda ends, end=end, known=known: error(end, known, ends)[0])
        total, known = error(end, known, best)
    return total


@pytest.mark.parametrize("size", [48, 16])
def test_hessian_search_is_the_slow_loop(size, monkeypatch):
    monkeypatch.setattr(rtn, "CHUNK", 100)
    weight, hessian = matrix(out=5), moments()
    quantized = encode(weight, hessian, bits=3, clip="hessian", group_size=None if size == 48 else size)
    for row, error in zip(weight.tolist(), output_errors(quantized, weight, hessian).tolist(), strict=True):
        assert error == pytest.approx(slow_hessian_row(row, hessian, 3, size), rel=1e-4)


@pytest.mark.parametrize(("size", "gain"), [(None, 0.9), (16, 0.75)])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_hessian_clip_lowers_the_output_error(bits, size, gain):
    weight, hessian, others = matrix(out=40), moments(), moments(seed=4)
    errors = {}
    for clip in ("minmax", "mse", "hessian"):
        quantized = encode(weight, hessian, bits=bits, clip=clip, group_size=size)
        errors[clip] = output_errors(quantized, weight, hessian)
    assert float(errors["hessian"].sum()) < gain * min(float(errors["mse"].sum()), float(errors["minmax"].sum()))
    if size is None:
        assert bool((errors["hessian"] <= errors["minmax"] * (1 + 1e-4)).all())
    plain = encode(weight, bits=bits, group_size=size)
    foreign = encode(weight, others, bits=bits, clip="hessian", group_size=size)
    assert not torch.equal(decoded(foreign), decoded(plain))


@pytest.mark.parametrize("size", [None, 16])
def test_for_white_inputs_the_hessian_changes_nothing(size):
    weight = matrix()
    white = encode(weight, torch.eye(48), bits=3, clip="hessian", group_size=size)
    assert torch.equal(decoded(white), decoded(encode(weight, bits=3, group_size=size)))


@pytest.mark.parametrize("clip", ["mse", "minmax"])
def test_the_other_clips_read_no_hessian(clip):
    weight = matrix()
    assert torch.equal(
        decoded(encode(weight, moments(), bits=3, clip=clip)), decoded(encode(weight, bits=3, clip=clip))
    )


def test_inputs_that_are_always_zero_do_not_hinder():
    weight, hessian = matrix(), moments()
    hessian[:, 10:20] = hessian[10:20] = 0
    live = torch.cat([torch.arange(10), torch.arange(20, 48)])
    clipped = output_errors(encode(weight, hessian, bits=3, clip="hessian"), weight, hessian)
    assert float(clipped.sum()) < float(output_errors(encode(weight, bits=3), weight, hessian).sum())
    weight[:, live] = 0
    assert float(output_errors(encode(weight, hessian, bits=3, clip="hessian"), weight, hessian).sum()) == 0
    nothing = encode(weight, torch.zeros(48, 48), bits=3, clip="hessian")
    assert torch.equal(decoded(nothing), decoded(encode(weight, bits=3, clip="minmax")))


def test_groups_are_rows_of_their_own():
    weight = matrix(out=6, inputs=48)
    whole = encode(weight, bits=3, group_size=16)
    parts = encode(weight.reshape(18, 16), bits=3)
    assert whole.scales.shape == (6, 3)
    assert whole.scheme.name == "rtn3g16"
    assert torch.equal(decoded(whole).reshape(18, 16), decoded(parts))


@pytest.mark.parametrize("clip", ["mse", "minmax"])
@pytest.mark.parametrize("value", [0.0, 0.03, -0.03, 3e-6])
def test_constant_rows(clip, value):
    weight = torch.full((3, 32), value)
    assert torch.allclose(decoded(encode(weight, bits=3, clip=clip)), weight, rtol=2e-3, atol=2e-7)


def test_rows_too_small_for_fp16_become_zero_and_too_large_ones_stay_finite():
    assert float(decoded(encode(torch.full((2, 8), 1e-9), bits=2)).abs().max()) == 0
    assert bool(torch.isfinite(decoded(encode(torch.full((2, 8), 1e9), bits=2))).all())


def test_chunks_change_nothing(monkeypatch):
    weight = matrix()
    whole = decoded(encode(weight, bits=4))
    monkeypatch.setattr(rtn, "CHUNK", 100)
    assert torch.equal(whole, decoded(encode(weight, bits=4)))


def test_what_cannot_be_encoded_is_refused():
    weight = matrix()
    weight[3, 4] = torch.nan
    with pytest.raises(UserError, match=r"of layer a\.b has infinite or NaN"):
        encode(weight, bits=4, layer="a.b")
    with pytest.raises(UserError, match=r"group_size 7 does not divide in_features 48 of layer a\.b"):
        encode(matrix(), bits=4, group_size=7, layer="a.b")
    with pytest.raises(UserError, match="1 to 8"):
        encode(matrix(), bits=9)
    with pytest.raises(UserError, match="mse or minmax"):
        encode(matrix(), bits=4, clip="best")
    with pytest.raises(ValueError, match="must be a matrix"):
        encode(torch.zeros(2, 2, 3, 3), bits=4)


def test_a_hessian_that_cannot_be_used_is_refused():
    with pytest.raises(UserError, match="clip=hessian needs the second moments"):
        encode(matrix(), bits=3, clip="hessian")
    with pytest.raises(ValueError, match=r"must be \[in, in\]"):
        encode(matrix(), torch.eye(47), bits=3, clip="hessian")
    for clip in ("hessian", "mse"):
        hessian = moments()
        hessian[2, 3] = torch.inf
        with pytest.raises(UserError, match=r"activations of layer a\.b have infinite or NaN"):
            encode(matrix(), hessian, bits=3, clip=clip, layer="a.b")


@pytest.mark.parametrize("clip", ["mse", "minmax"])
def test_two_parts_of_different_ranges_have_a_grid_each(clip):
    weight = matrix(24, 60)
    weight[:, 35:] *= 10
    whole, split = encode(weight, bits=4, clip=clip), rtn.encode_split(weight, 35, bits=4, clip=clip)
    assert split.scheme.name == "rtn4s35" and split.scales.shape == split.zeros.shape == (24, 2)
    for part, columns in enumerate((slice(35), slice(35, None))):
        alone = encode(weight[:, columns], bits=4, clip=clip)
        assert torch.equal(decoded(split)[:, columns], decoded(alone))
        assert torch.equal(split.scales[:, part], alone.scales[:, 0])
    assert bool((squared_errors(split, weight) <= squared_errors(whole, weight)).all())
    first, without = ((decoded(made) - weight)[:, :35].square().sum() for made in (split, whole))
    assert first < 0.03 * without


def test_impossible_parts_are_refused():
    with pytest.raises(UserError, match="splits 48 inputs after 48"):
        ScalarWeight(ScalarScheme(bits=4, split=48), (12, 48))
    with pytest.raises(UserError, match="split=8 or group_size=8, not both"):
        ScalarScheme(bits=4, split=8, group_size=8)
