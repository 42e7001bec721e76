import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vqdm.bitpack import pack, packed_bytes, unpack


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
