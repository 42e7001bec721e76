"""What a stage used: its own peak, not that of what ran before it."""

import mmap
import threading
import time

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


@pytest.mark.skipif(not usage.RESET.exists(), reason="only Linux tells a process its peak")
def test_what_was_held_meanwhile_is_seen_and_a_file_does_not_count(tmp_path):
    """A thread looks: what is freed before anybody asks counts. Pages of a file do, once they are written over."""
    used, begun = Usage(), usage._anonymous_now()
    with mmap.mmap(-1, SIZE) as held:
        for page in range(0, SIZE, mmap.PAGESIZE):
            held[page] = 1
        time.sleep(4 * usage.INTERVAL)
    assert usage._anonymous_now() < begun + SIZE // 2
    assert 0.9 * SIZE < used.so_far()["peak_memory_bytes"]["anonymous"] - begun < 1.5 * SIZE
    path = tmp_path / "file"
    path.write_bytes(bytes(SIZE))
    used = Usage()
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        assert sum(mapped[page] for page in range(0, SIZE, mmap.PAGESIZE)) == 0
        read = used.so_far()["peak_memory_bytes"]
        for page in range(0, SIZE, mmap.PAGESIZE):
            mapped[page] = 1
        written = used.so_far()["peak_memory_bytes"]
    assert read["anonymous"] < begun + SIZE // 2 and read["host"] > read["anonymous"] + SIZE // 2
    assert written["anonymous"] >= read["anonymous"] + 0.9 * SIZE


def test_nobody_looks_any_more_when_the_object_is_gone():
    watching = sum(thread.name == usage.WATCHER for thread in threading.enumerate())
    used = Usage()
    del used
    deadline = time.monotonic() + 10
    while sum(thread.name == usage.WATCHER for thread in threading.enumerate()) > watching:
        assert time.monotonic() < deadline
        time.sleep(usage.INTERVAL)


def test_time_counts():
    found = Usage()
    sum(range(100_000))
    used = found.so_far()
    assert 0 <= used["cpu_seconds"] < 60 and used["seconds"] >= 0


def test_where_no_peak_is_told_there_is_none(monkeypatch, tmp_path):
    monkeypatch.setattr(usage, "RESET", tmp_path)  # a folder cannot be written
    assert Usage().so_far()["peak_memory_bytes"]["host"] is None
    monkeypatch.setattr(usage, "STATUS", tmp_path / "none")
    assert Usage().so_far()["peak_memory_bytes"] == {"host": None, "anonymous": None, "device": None}
