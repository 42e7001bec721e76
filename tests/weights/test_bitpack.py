import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vqdm.weights.bitpack import pack, packed_bytes, unpack


def slow_pack(codes: list[int], width: int) -> list[int]:
    stream = sum(code << (k * width) for k, code in enumerate(codes))
    return list(stream.to_bytes((len(codes) * width + 7) // 8, "little"))


@st.composite
def width_and_codes(draw):
    width = draw(st.integers(1, 16))
    return width, draw(st.lists(st.integers(0, 2**width - 1), max_size=40))


@given(width_and_codes())
def test_agrees_with_one_big_integer_and_comes_back(case):
    width, codes = case
    packed = pack(torch.tensor(codes, dtype=torch.int64), width)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == slow_pack(codes, width)
    assert len(packed) == packed_bytes(len(codes), width)
    assert unpack(packed, width, len(codes)).tolist() == codes


@given(width_and_codes(), st.data())
def test_the_order_of_codes_is_row_major_whatever_their_strides(case, data):
    width, codes = case
    columns = data.draw(st.sampled_from([n for n in range(1, len(codes) + 1) if len(codes) % n == 0] or [1]))
    matrix = torch.tensor(codes, dtype=torch.int64).view(-1, columns)
    transposed = matrix.T.contiguous().T
    strided = torch.stack([matrix, matrix.flip(0)], dim=2)[..., 0]
    for same in (matrix, transposed, strided):
        assert pack(same, width).tolist() == slow_pack(codes, width)


@given(width_and_codes(), width_and_codes())
def test_streams_join_where_the_first_ends_with_a_byte(case, other):
    width, first = case
    first = first[: len(first) // 8 * 8]
    second = [code % 2**width for code in other[1]]
    joined = torch.cat([pack(torch.tensor(part, dtype=torch.int64), width) for part in (first, second)])
    assert joined.tolist() == slow_pack(first + second, width)
    assert unpack(joined, width, len(first + second)).tolist() == first + second


@given(width_and_codes(), st.data())
def test_any_part_of_a_stream_that_begins_with_a_byte_unpacks_alone(case, data):
    width, codes = case
    packed = pack(torch.tensor(codes, dtype=torch.int64), width)
    start = 8 * data.draw(st.integers(0, len(codes) // 8))
    count = data.draw(st.integers(0, len(codes) - start))
    part = packed[start * width // 8 :][: packed_bytes(count, width)]
    assert unpack(part, width, count).tolist() == codes[start : start + count]
    spread = torch.stack([packed, ~packed], dim=1)[:, 0]  # every second byte of a larger tensor
    assert unpack(spread, width, len(codes)).tolist() == codes


@given(width_and_codes(), st.data())
def test_a_code_changes_its_own_bits_only_and_no_bit_is_left_over(case, data):
    width, codes = case
    packed = pack(torch.tensor(codes, dtype=torch.int64), width)
    k = data.draw(st.integers(0, max(0, len(codes) - 1)))
    changed = [code ^ (2**width - 1) if i == k else code for i, code in enumerate(codes)]
    flipped = int.from_bytes(bytes((packed ^ pack(torch.tensor(changed, dtype=torch.int64), width)).tolist()), "little")
    assert flipped == ((2**width - 1) << (k * width) if codes else 0)
    assert int.from_bytes(bytes(packed.tolist()), "little") >> (len(codes) * width) == 0


@given(st.integers(1, 16), st.integers(0, 100), st.data())
def test_any_bytes_are_codes_and_pack_to_themselves(width, count, data):
    size = packed_bytes(count, width)
    stream = data.draw(st.binary(min_size=size, max_size=size))
    codes = unpack(torch.tensor(list(stream), dtype=torch.uint8), width, count)
    assert codes.dtype == torch.int32 and codes.shape == (count,)
    kept = int.from_bytes(stream, "little") & ((1 << count * width) - 1)
    assert bytes(pack(codes, width).tolist()) == kept.to_bytes(size, "little")


@pytest.mark.parametrize("width", range(1, 17))
def test_largest_codes_of_every_width(width):
    codes = torch.full((3, 7), 2**width - 1)
    assert torch.equal(unpack(pack(codes, width), width, 21), codes.flatten().int())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_any_integer_type_packs_alike(dtype):
    codes = torch.arange(8).to(dtype)
    assert torch.equal(pack(codes, 3), pack(codes.long(), 3))


@pytest.mark.parametrize("codes", [[8], [-1], [0, 7, 9]])
def test_codes_out_of_range_are_refused(codes):
    with pytest.raises(ValueError, match="do not fit into 3 bits"):
        pack(torch.tensor(codes), 3)


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="1 to 16 bits"):
        packed_bytes(8, 17)
    with pytest.raises(ValueError, match="must be integers"):
        pack(torch.ones(4), 3)
    with pytest.raises(ValueError, match="uint8"):
        unpack(torch.zeros(4, dtype=torch.uint8), 3, 8)


def test_packed_owns_its_bytes_only():
    assert pack(torch.ones(9, dtype=torch.int64), 3).untyped_storage().nbytes() == 4
