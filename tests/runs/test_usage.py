"""What a stage used: its own peak, not that of what ran before it."""

import mmap

import pytest

from vqdm.runs import usage
from vqdm.runs.usage import Usage

SIZE = 200 << 20


@pytest.mark.skipif(not usage.RESET.exists(), reason="only Linux tells a process its peak")
def test_a_peak_is_that_since_the_beginning():
    before = Usage()
    with mmap.mmap(-1, SIZE) as held:  # the heap would give memory that this process has already
        for page in range(0, SIZE, mmap.PAGESIZE):
            held[page] = 1
    high = before.so_far()["peak_memory_bytes"]
    assert high["host"] > SIZE and high["device"] is None
    assert Usage().so_far()["peak_memory_bytes"]["host"] < high["host"] - SIZE // 2


def test_time_counts():
    found = Usage()
    sum(range(100_000))
    used = found.so_far()
    assert 0 <= used["cpu_seconds"] < 60 and used["seconds"] >= 0


def test_where_no_peak_is_told_there_is_none(monkeypatch, tmp_path):
    monkeypatch.setattr(usage, "RESET", tmp_path)  # a folder cannot be written
    assert Usage().so_far()["peak_memory_bytes"]["host"] is None
