"""Options that came after results enter an identity only where they change something."""

import dataclasses

import pytest

from vqdm.config.ranges import check_fields, later, number, settings_of
from vqdm.errors import UserError


@dataclasses.dataclass
class Options:
    bits: int = number(4, least=1)
    rows: int | None = later(number(None, least=1))
    split: bool = later(False)


def test_later_options_count_once_they_are_set():
    assert settings_of(Options()) == {"bits": 4}
    assert settings_of(Options(rows=2, split=True)) == {"bits": 4, "rows": 2, "split": True}
    assert settings_of(Options(rows=2, split=True), "bits", "split") == {"bits": 4, "split": True}
    assert settings_of(Options(), "rows") == {}


def test_their_ranges_are_checked_like_others():
    with pytest.raises(UserError, match=r"quantize\.rows=0 must be at least 1"):
        check_fields(Options(rows=0), "quantize")
