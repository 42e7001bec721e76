"""The device is decided once, with a reason; what is not there is refused."""

import threading

import pytest
import torch

from vqdm.errors import UserError
from vqdm.runs.device import MemoryGate, encoding_room, resolve_device


def test_auto_takes_what_torch_sees(monkeypatch):
    for there, name in ((False, "cpu"), (True, "cuda")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        device = resolve_device("auto", threads=None)
        assert device.name == name
        assert "torch sees" in device.reason
        assert resolve_device("cpu", threads=None).name == "cpu"


def test_a_gpu_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="device=cuda"):
        resolve_device("cuda", threads=None)


def test_threads_that_hold_memory_stay_within_the_room_and_one_alone_may_exceed_it():
    gate, held, most, together = MemoryGate(100), [], [], threading.Barrier(2, timeout=600)

    def work(size, meet):
        with gate.holding(size):
            held.append(size)
            most.append(sum(held))
            if meet:
                together.wait()  # only if two of them are let in at once
            held.remove(size)

    for sizes, meet in (((60, 60, 500, 60), False), ((50, 50), True)):
        threads = [threading.Thread(target=work, args=(size, meet)) for size in sizes]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
            assert not thread.is_alive()
    assert all(total <= 100 or total == 500 for total in most) and 0 < encoding_room() < 1 << 50
