"""Directories that are either whole or as they were."""

import pytest

from vqdm.runs.files import whole_directory


def names(place):
    return sorted(str(path.relative_to(place)) for path in place.rglob("*") if path.is_file())


def test_a_directory_is_replaced_whole(tmp_path):
    place = tmp_path / "above" / "model"
    for name in ("first", "second"):
        with whole_directory(place) as new:
            (new / name).touch()
    assert names(tmp_path) == ["above/model/second"]


def test_what_was_there_stays_if_the_work_fails_and_the_next_begins_anew(tmp_path):
    place = tmp_path / "model"
    with whole_directory(place) as new:
        (new / "first").touch()
    with pytest.raises(RuntimeError), whole_directory(place) as new:
        (new / "half").touch()
        raise RuntimeError
    assert names(place) == ["first"]
    with whole_directory(place) as new:
        assert names(new) == []
        (new / "second").touch()
    assert names(tmp_path) == ["model/second"]
