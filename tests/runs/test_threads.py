"""How many threads are worth having, and how long they spin: set before torch, and only where the user has not."""

import math
from pathlib import Path

import pytest
import torch

from vqdm.runs import threads


@pytest.fixture
def spare_environment(monkeypatch):
    for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.fixture
def four_threads(spare_environment):
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    spare_environment.setattr(threads, "usable_cores", lambda: 4)
    threads.set_threads(None)
    yield spare_environment
    torch.set_num_threads(before)


def test_spinning_is_bounded_unless_the_user_has_said_how_threads_wait(spare_environment):
    threads.bound_spinning()
    assert threads.os.environ["GOMP_SPINCOUNT"] == "10000"
    spare_environment.setenv("GOMP_SPINCOUNT", "7")
    threads.bound_spinning()
    assert threads.os.environ["GOMP_SPINCOUNT"] == "7"
    spare_environment.delenv("GOMP_SPINCOUNT")
    spare_environment.setenv("OMP_WAIT_POLICY", "active")
    threads.bound_spinning()
    assert "GOMP_SPINCOUNT" not in threads.os.environ


@pytest.mark.parametrize(("free", "expected"), [(4.0, 4), (3.7, 4), (3.5, 3), (1.3, 1), (0.4, 1), (9.0, 4), (None, 4)])
def test_threads_follow_what_is_free_and_come_back(four_threads, free, expected):
    four_threads.setattr(threads.FreeCores, "count", lambda self: free)
    with threads.threads_that_are_free() as adjust:
        adjust()
        assert torch.get_num_threads() == expected
    assert torch.get_num_threads() == 4


@pytest.mark.parametrize("by", ["option", "environment"])
def test_threads_that_the_user_has_chosen_stay(four_threads, by):
    four_threads.setattr(threads.FreeCores, "count", lambda self: 1.0)
    if by == "environment":
        four_threads.setenv("OMP_NUM_THREADS", "4")
    assert threads.set_threads(4 if by == "option" else None) == 4
    with threads.threads_that_are_free() as adjust:
        adjust()
        assert torch.get_num_threads() == 4


def test_free_cores_are_those_we_use_and_those_that_idle(monkeypatch):
    """Ten seconds on two cores: we had 4 s of them, others 10 s, 6 s were idle: one core is free to us."""
    looks = iter([(0.0, 100.0, 1.0), (10.0, 106.0, 5.0), (10.1, 106.1, 5.1)])
    monkeypatch.setattr(threads.FreeCores, "_look", staticmethod(lambda: next(looks)))
    cores = threads.FreeCores()
    assert cores.count() == pytest.approx(1.0)
    assert cores.count() == pytest.approx(1.0)  # too soon to look again


def test_a_container_with_less_time_than_cores_gets_fewer_threads(monkeypatch):
    monkeypatch.setattr(threads, "_affinity", lambda: set(range(16)))
    for quota, cores in ((2.5, 3), (0.5, 1), (math.inf, 16), (40.0, 16)):
        monkeypatch.setattr(threads, "_quota", lambda quota=quota: quota)
        assert threads.usable_cores() == cores
    monkeypatch.undo()
    assert threads._quota() > 0
    assert threads._idle_seconds() is None or threads._idle_seconds() > 0


@pytest.mark.parametrize(
    ("text", "idle"),
    [
        ("cpu 9 0 9 900 90 0\ncpu0 4 0 4 100 10 0\ncpu1 4 0 4 200 20 0\ncpu2 1 0 1 600 60 0\n\nintr 5\n", 330),
        ("cpu 0 0 0 0 0 0\ncpu0 0 0 0 0 0 0\ncpu1 0 0 0 0 0 0\n", None),  # a sandbox that shows nothing
        ("cpu 4 0 4 100 10 0\ncpu0 4 0 4 100 10 0\n", None),  # one that shows other cores
    ],
)
def test_idle_time_is_that_of_our_cores_or_unknown(monkeypatch, text, idle):
    monkeypatch.setattr(threads, "_affinity", lambda: {0, 1})
    monkeypatch.setattr(threads.os, "sysconf", lambda name: 1)
    monkeypatch.setattr(Path, "read_text", lambda self: text)
    assert threads._idle_seconds() == idle


def test_layers_are_encoded_on_the_cores_that_are_this_processs_share(four_threads):
    assert threads.workers() == 4
    four_threads.setattr(threads, "usable_cores", lambda: 64)
    four_threads.setenv("OMP_NUM_THREADS", "1")  # torchrun sets both
    four_threads.setenv("LOCAL_WORLD_SIZE", "8")
    torch.set_num_threads(1)
    threads.set_threads(None)
    assert (threads.workers(), torch.get_num_threads()) == (8, 1)
    threads.set_threads(2)
    assert threads.workers() == 2
    four_threads.setattr(threads, "usable_cores", lambda: 4)
    threads.set_threads(None)
    assert threads.workers() == 2, "no core is left over: torch's own threads stay"
