import copy
import itertools
import math

import pytest
import torch

from vqdm.codecs import trellis
from vqdm.codecs.feedback import feedback_of
from vqdm.codecs.trellis import encode, output_error, water_filling
from vqdm.codecs.trellis_table import load_table
from vqdm.errors import UserError
from vqdm.seeds import torch_generator
from vqdm.weights.trellis import TrellisScheme, TrellisTable
from vqdm.weights.trellis_codes import ByteScales
from vqdm.weights.trellis_format import HIGHEST_RATE, LOWEST_RATE, column_bits, stream_bytes

RATES = (0, *range(LOWEST_RATE, HIGHEST_RATE + 1))


@pytest.fixture(scope="module")
def table():
    return TrellisTable.from_values(load_table())


def gaussian(*shape, seed=0):
    return torch.randn(shape, generator=torch_generator(seed, "test"))


def correlated(size, *, steepness=1.0, seed=1):
    """A Hessian with a power-law spectrum."""
    basis = torch.linalg.qr(gaussian(size, size, seed=seed))[0]
    return (basis * torch.arange(1, size + 1).float() ** -steepness) @ basis.T


def relative(weight, quantized, hessian):
    return output_error(weight, quantized().detach().float(), hessian) / output_error(weight, 0 * weight, hessian)


def stored_bits(quantized):
    return 8 * sum(t.numel() * t.element_size() for t in quantized.state_dict().values()) / math.prod(quantized.shape)


def test_gaussian_error_is_near_the_rate_distortion_bound(table):
    """Three code bits: within 0.85 dB of 2^(−2R) even on a small matrix (sequences of 288)."""
    weight, eye = gaussian(288, 128), torch.eye(128)
    side = 8 * (2 * 288 + 2 * 128 + 80) / weight.numel()
    error = relative(weight, encode(weight, eye, bits=3 + side, table=table), eye)
    assert 0 < 10 * math.log10(error / 2**-6) < 0.85


@pytest.mark.parametrize("bits", [2.3, 3.0, 3.71])
def test_bits_are_kept_to_a_step_of_one_column(bits, table):
    weight = gaussian(112, 96)
    quantized = encode(weight, correlated(96), bits=bits, table=table)
    assert stored_bits(quantized) <= bits
    spent = int(column_bits(112, quantized.unpacked_rates()).sum())
    assert 0 <= 8 * stream_bytes((112, 96), bits) - spent < 112 / 2 + 1


def _best_by_exhaustion(power, out, budget):
    cost = [column_bits(out, rate) for rate in RATES]
    return min(
        sum(p * 2 ** (-rate / 2) for p, rate in zip(power, rates, strict=True))
        for rates in itertools.product(RATES, repeat=len(power))
        if sum(cost[RATES.index(rate)] for rate in rates) <= budget
    )


@pytest.mark.parametrize("mean", [0.4, 1.0, 2.2, 3.6])
def test_water_filling_is_near_the_best_of_all_allocations(mean):
    power = torch.tensor([9.0, 1.0, 0.05])
    budget = int(mean * 3 * 64)
    rates = water_filling(power, 64, budget)
    assert int(column_bits(64, rates).sum()) <= budget
    got = float((power * torch.pow(2.0, -rates / 2)).sum())
    # greedy steps are optimal but for the last one, whose place a column of another size may take
    assert got <= 1.12 * _best_by_exhaustion(power.tolist(), 64, budget)


def test_water_filling_gives_equal_columns_equal_rates_and_dead_ones_none():
    rates = water_filling(torch.tensor([1.0] * 8 + [0.0] * 2), 64, 8 * 64 * 3)
    assert rates.tolist() == [12] * 8 + [0] * 2
    assert water_filling(torch.ones(4), 64, 10**6).tolist() == [HIGHEST_RATE] * 4
    assert water_filling(torch.ones(4), 64, 0).tolist() == [0] * 4


def test_feedback_and_rates_pay_on_correlated_inputs(table):
    weight, hessian = gaussian(112, 96), correlated(96, steepness=1.5)
    blind = relative(weight, encode(weight, torch.eye(96), bits=3, table=table), hessian)
    assert relative(weight, encode(weight, hessian, bits=3, table=table), hessian) < 0.5 * blind


def test_row_scales_are_those_of_least_output_error(table):
    weight, hessian = gaussian(48, 64) * torch.logspace(-2, 0, 48)[:, None], correlated(64)
    quantized = encode(weight, hessian, bits=3.5, table=copy.deepcopy(table)).float()  # all tests share the table
    quantized.shared[0].float()
    decoded = quantized().detach()
    best = output_error(weight, decoded, hessian)
    for factor in (0.995, 1.005):
        assert output_error(weight, factor * decoded, hessian) > best


def test_rows_are_weighted_as_their_error_counts(table):
    """With the exponent 0 small rows get a smaller relative error than with 1, and the sum gets worse."""
    weight, hessian = gaussian(64, 96) * torch.logspace(-2, 0, 64)[:, None], correlated(96)
    true, flat = (encode(weight, hessian, bits=3, table=table, row_exponent=e) for e in (1.0, 0.0))
    small = slice(0, 20)
    assert relative(weight[small], _part(flat, small), hessian) < relative(weight[small], _part(true, small), hessian)
    assert relative(weight, true, hessian) < relative(weight, flat, hessian)


def _part(quantized, rows):
    return lambda: quantized()[rows]


def problem(weight, hessian, *, bits):
    """What the encoder chooses rates by."""
    return weight, feedback_of(hessian, damping=0.01)[1], TrellisScheme.of_layer(tuple(weight.shape), bits)


def test_smaller_layers_never_lose_to_uniform_rates(table, monkeypatch):
    weight, hessian = gaussian(32, 40), correlated(40)
    both = relative(weight, encode(weight, hessian, bits=3.5, table=table), hessian)
    alone = []
    for keep in (0, 1):
        rows, candidates = trellis._rows_and_rates(*problem(weight, hessian, bits=3.5), row_exponent=1.0, reach=4.0)
        with monkeypatch.context() as patch:
            patch.setattr(trellis, "_rows_and_rates", lambda *a, r=rows, c=candidates[keep], **k: (r, [c]))
            alone.append(relative(weight, encode(weight, hessian, bits=3.5, table=table), hessian))
    assert both == pytest.approx(min(alone), rel=1e-6)


@pytest.mark.parametrize(("bits", "outliers", "limit"), [(6, 3, 1.15), (4, 12, 1.25), (3, 12, 1.25), (2, 12, 1.25)])
def test_rows_with_a_large_weight_cost_little(bits, outliers, limit, table):
    """One weight of 16 RMS in some rows, against the same layer without; coded by RMS alone 4.1, 1.9, 1.3 and 1.1."""
    plain, eye = gaussian(384, 384, seed=0), torch.eye(384)
    spiked = plain.clone()
    for i in range(outliers):
        spiked[(i + 1) * 384 // (outliers + 1), (37 * i + 11) % 384] = 16
    errors = [output_error(w, encode(w, eye, bits=bits, table=table)().detach().float(), eye) for w in (spiked, plain)]
    assert errors[0] <= limit * errors[1]


def test_a_column_of_zeros_stays_zero(table):
    for shape in ((64, 80), (272, 80)):
        weight = gaussian(*shape)
        weight[:, 7] = 0
        hessian = torch.diag(1 + gaussian(80).square())  # nothing is fed back into it
        assert not encode(weight, hessian, bits=4, table=table)()[:, 7].any()


@pytest.mark.parametrize("spread", [0.3, 1.5])
def test_columns_of_any_spread_are_coded_as_well_with_a_byte_as_with_wide_scales(spread, table, monkeypatch):
    """At equal bits per weight, of a layer that is coded both ways; the byte leaves 0.2 bits more for codes."""
    weight, hessian = gaussian(64, 96) * torch.exp(spread * gaussian(96, seed=3)), correlated(96)
    byte = relative(weight, encode(weight, hessian, bits=3, table=table), hessian)
    monkeypatch.setattr("vqdm.weights.trellis_format.MOST_BYTE_OUTPUTS", 16)
    wide = relative(weight, encode(weight, hessian, bits=3, table=table), hessian)
    assert byte < 0.9 * wide


ALIVE = (torch.arange(48) % 3 > 0).float()
HARD = {
    "rank-deficient Hessian": lambda: (gaussian(32, 48), gaussian(48, 5) @ gaussian(48, 5).T),
    "dead inputs": lambda: (gaussian(32, 48), correlated(48) * torch.outer(ALIVE, ALIVE)),
    "no input at all": lambda: (gaussian(32, 48), torch.zeros(48, 48)),
    "constant rows": lambda: (torch.ones(32, 48) * torch.arange(32)[:, None], correlated(48)),
    "rows of zeros": lambda: (gaussian(32, 48) * (torch.arange(32) % 2)[:, None], correlated(48)),
    "only zeros": lambda: (torch.zeros(32, 48), correlated(48)),
    "tiny and huge rows": lambda: (gaussian(32, 48) * torch.logspace(-7, 3, 32)[:, None], correlated(48)),
}  # fmt: skip


@pytest.mark.parametrize("case", HARD)
def test_hard_layers(case, table):
    weight, hessian = HARD[case]()
    quantized = encode(weight, hessian, bits=4, table=table)
    decoded = quantized().detach().float()
    assert bool(torch.isfinite(decoded).all())
    power = output_error(weight, 0 * weight, hessian)
    assert output_error(weight, decoded, hessian) <= 0.06 * power
    zero_rows = weight.abs().sum(1) == 0
    assert float(decoded[zero_rows].abs().sum()) == 0


def test_what_cannot_be_encoded_is_refused_by_name(table):
    bad = gaussian(32, 48)
    bad[3, 5] = torch.nan
    with pytest.raises(UserError, match=r"layer down\.0"):
        encode(bad, correlated(48), bits=4, table=table, layer="down.0")
    hessian = correlated(48)
    hessian[0, 0] = torch.inf
    with pytest.raises(UserError, match=r"activations of layer down\.0"):
        encode(gaussian(32, 48), hessian, bits=4, table=table, layer="down.0")
    with pytest.raises(UserError, match=r"layer down\.0 cannot be coded by trellis3: .* 16\.\d+ of 3"):
        encode(gaussian(320, 1), torch.eye(1), bits=3, table=table, layer="down.0")
    with pytest.raises(UserError, match="8 outputs are too few"):
        encode(gaussian(8, 640), torch.eye(640), bits=3, table=table, layer="down.0")


def test_the_same_input_gives_the_same_bytes(table):
    weight, hessian = gaussian(64, 48), correlated(48)
    one, two = (encode(weight, hessian, bits=3.3, table=table).state_dict() for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("shape", [(33, 40), (353, 27), (64, 9 * 16)])
@pytest.mark.parametrize("bits", [3.7, 5.5])
def test_what_is_stored_decodes_to_what_the_encoder_chose(shape, bits, table, monkeypatch):
    """Bit for bit: the states of its search through the same decoding, odd sizes and a convolution's matrix."""
    chosen = {}

    def keep(scheme, states, rates, **parts):
        weight = original(scheme, states, rates, **parts)
        rows, columns = parts["row_scales"].half().float(), parts["column_scales"]  # as they are stored
        columns = columns.values() if isinstance(columns, ByteScales) else columns.half().float()
        values = table.table.detach().float()[states.long()] * (columns * (rates > 0))[:, None]
        chosen[id(weight)] = (values.T * rows[:, None]).half()
        return weight

    original = trellis.TrellisWeight.from_parts
    monkeypatch.setattr(trellis.TrellisWeight, "from_parts", keep)
    quantized = encode(gaussian(*shape), correlated(shape[1]), bits=bits, table=table)
    assert torch.equal(quantized().detach(), chosen[id(quantized)])
