import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vqdm.errors import UserError
from vqdm.seeds import torch_generator
from vqdm.weights.registry import empty_shared, empty_weight, scheme_from_dict
from vqdm.weights.trellis import TrellisScheme, TrellisTable, TrellisWeight
from vqdm.weights.trellis_codes import byte_scales, pack_states, unpack_states
from vqdm.weights.trellis_format import (
    BYTE,
    WIDE,
    WINDOW_BITS,
    byte_scale,
    column_bits,
    reason_to_skip,
    sequence_length,
    side_bits,
    side_bytes,
    stream_bytes,
)

ALL_RATES = [0, *range(4, 25)]


def table(seed=0) -> TrellisTable:
    return TrellisTable.from_values(torch.randn(1 << WINDOW_BITS, generator=torch_generator(seed, "table")))


def random_states(out, rates, seed=0):
    """The states of random bit strings, read one after the other as the format's definition says: int32 [in, out]."""
    generator, length = torch_generator(seed, "bits"), sequence_length(out)
    states = torch.zeros(len(rates), out, dtype=torch.int32)
    for j, rate in enumerate(rates):
        for start in range(0, out if rate else 0, length):
            count = min(length, out - start)
            bits = torch.randint(0, 2, (rate * count // 4,), generator=generator).tolist()
            for t in range(count):
                window = [bits[(rate * t // 4 + i) % len(bits)] for i in range(WINDOW_BITS)]
                states[j, start + t] = sum(bit << i for i, bit in enumerate(window))
    return states


def decode_in_sequence(weight: TrellisWeight) -> torch.Tensor:
    """The slow reference: one column after the other, the bits of each sequence shifted through a window; in fp32."""
    out, inputs = weight.shape
    stream = [byte >> i & 1 for byte in weight.stream.tolist() for i in range(8)]
    values, length, position = weight.shared[0].table.detach().float(), sequence_length(out), 0
    rows, columns = (factor.detach().float() for factor in weight.factors()[2:])
    decoded = torch.zeros(out, inputs)
    for j, rate in enumerate(weight.unpacked_rates().tolist()):
        for start in range(0, out, length):
            count = min(length, out - start)
            bits = stream[position : position + rate * count // 4]
            position += len(bits)
            window, ahead = bits[:WINDOW_BITS], WINDOW_BITS
            for t in range(count if rate else 0):
                value = values[sum(bit << i for i, bit in enumerate(window))]
                decoded[start + t, j] = value * columns[j] * rows[start + t]
                for _ in range(rate * (t + 1) // 4 - rate * t // 4):
                    window = [*window[1:], bits[ahead % len(bits)]]
                    ahead += 1
    return decoded.to(weight.dtype)


@pytest.mark.parametrize("out", [16, 33, 112, 353])
def test_decoded_by_arithmetic_is_decoded_in_sequence_for_every_rate(out):
    rates = torch.tensor(ALL_RATES)
    states = random_states(out, ALL_RATES)
    bits = (int(column_bits(out, rates).sum()) + 8 * side_bytes((out, len(rates)), WIDE) + 7) / (out * len(rates))
    generator = torch_generator(0, "scales")
    weight = TrellisWeight.from_parts(
        TrellisScheme(bits=bits),
        states,
        rates,
        table=table(),
        row_scales=torch.rand(out, generator=generator),
        column_scales=torch.rand(len(rates), generator=generator),
    )
    assert weight.unpacked_rates().tolist() == ALL_RATES
    assert torch.equal(unpack_states(weight.stream, rates, out)[1:], states[1:])
    with torch.no_grad():
        assert torch.equal(weight(), decode_in_sequence(weight))
    assert float(weight()[:, 0].detach().abs().max()) == 0, "a column of rate 0 is 0, whatever bits follow it"


@settings(max_examples=25, deadline=None)
@given(
    out=st.integers(16, 400),
    rates=st.lists(st.sampled_from(ALL_RATES), min_size=1, max_size=9),
    seed=st.integers(0, 2**16),
    slack=st.integers(0, 3),
)
def test_packing_and_reading_back(out, rates, seed, slack):
    states, needed = random_states(out, rates, seed), int(column_bits(out, torch.tensor(rates)).sum())
    size = (needed + 7) // 8 + slack
    codes = pack_states(states, torch.tensor(rates), size)
    assert codes.shape == (size,) and codes.dtype == torch.uint8
    used = torch.tensor(rates) > 0
    assert torch.equal(unpack_states(codes, torch.tensor(rates), out)[used], states[used])


def test_what_is_no_path_or_does_not_fit_is_refused():
    states, rates = random_states(40, [8, 12]), torch.tensor([8, 12])
    with pytest.raises(ValueError, match="do not fit"):
        pack_states(states, rates, 10)
    states[1, 7] ^= 1
    with pytest.raises(ValueError, match="no path"):
        pack_states(states, rates, 100)


@settings(deadline=None)
@given(out=st.integers(16, 3000))
def test_sequences_fill_the_window_at_every_rate(out):
    length = sequence_length(out)
    last = out % length or length
    assert length <= 320
    assert 4 * last // 4 >= WINDOW_BITS
    whole = out // length
    for rate in (4, 7, 24):
        assert column_bits(out, rate) == whole * (rate * length // 4) + rate * (out % length) // 4


@pytest.mark.parametrize("shape", [(16, 64), (112, 1008), (640, 640)])
@pytest.mark.parametrize("bits", [2.5, 3.0, 4.123])
def test_bytes_follow_from_shape_and_bits(shape, bits):
    scheme = TrellisScheme.of_layer(shape, bits)
    with torch.device("meta"):
        plan = empty_weight(scheme, shape, empty_shared(scheme))
    size = sum(t.numel() * t.element_size() for t in plan.state_dict().values())
    assert scheme.side == (BYTE if shape[0] <= 256 else WIDE)
    assert bits * shape[0] * shape[1] / 8 - 1 < size <= bits * shape[0] * shape[1] / 8 + 1e-6
    assert size == stream_bytes(shape, bits) + side_bytes(shape)
    assert scheme_from_dict(scheme.to_dict()) == scheme


@pytest.mark.parametrize(("fine", "step", "last"), [(1, 2**0.25, 0.828), (0, 2**0.5, 11.25)])
def test_scales_of_byte_columns_are_evenly_spaced_and_exact(fine, step, last):
    scales = [byte_scale(code, fine) for code in range(16)]
    assert scales[0] == 1 / 16 and scales[-1] == pytest.approx(last, rel=1e-3)
    assert all(after / before == pytest.approx(step, rel=0.02) for before, after in itertools.pairwise(scales))
    assert torch.tensor(scales).half().tolist() == scales
    packed = torch.tensor([fine, *(code << 4 for code in range(16))], dtype=torch.uint8)
    assert byte_scales(packed).tolist() == scales


def test_bytes_of_columns_that_mean_nothing_are_told():
    weight = empty_weight(TrellisScheme.of_layer((64, 32), 3.0), (64, 32), table())
    assert weight.fault() is None
    weight.codes[0] = 2
    assert weight.fault() == "the spacing of its columns' scales is 2, not 0 or 1"
    weight.codes[:2] = torch.tensor([1, 12])
    assert weight.fault() == "a column's rate is 26 quarter bits, above 24"


def test_side_information_of_a_layer_of_64_outputs_is_below_a_fifth_of_a_bit():
    assert side_bits((64, 576)) == 8 * (2 * 64 + 576 + 1) / (64 * 576) < 0.154
    assert side_bits((64, 576), WIDE) == pytest.approx(0.356, abs=1e-3)


def test_what_cannot_be_held_says_why():
    assert "15 outputs" in reason_to_skip((15, 640), 3)
    assert "take 16.07" in reason_to_skip((320, 1), 3)  # 16 for a row, 21 + 3 of padding for the column
    assert reason_to_skip((16, 64), 3) is None
    with pytest.raises(UserError, match="15 outputs"):
        empty_weight(TrellisScheme(bits=3), (15, 640), table())
    for bits in (0, 17):
        with pytest.raises(UserError, match="bits must be"):
            TrellisScheme(bits=bits)
    with pytest.raises(UserError, match="side must be"):
        TrellisScheme(bits=3, side="none")


def test_gradients_reach_scales_and_table():
    weight = TrellisWeight.from_parts(
        TrellisScheme(bits=4.5),
        random_states(64, [8] * 32),
        torch.tensor([8] * 32),
        table=table(),
        row_scales=torch.ones(64),
        column_scales=torch.ones(32),
    ).float()
    weight.shared[0].float()
    weight().square().sum().backward()
    for parameter in (weight.scales, weight.shared[0].table):
        assert float(parameter.grad.abs().sum()) > 0
