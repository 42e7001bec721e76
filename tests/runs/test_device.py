"""The device is decided once, with a reason; what is not there is refused."""

import threading

import pytest
import torch

from vqdm.errors import UserError
from vqdm.runs.device import (
    Device,
    MemoryGate,
    encoding_room,
    exact_tf32,
    full_float32,
    one_order_of_sums,
    resolve_device,
)


@pytest.fixture(autouse=True)
def precision_is_taken_back():
    """Torch's settings of TF32, which are the process's, are what they are by default again."""
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = True, False


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


def test_on_a_gpu_float32_is_float32_and_the_protocol_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    resolve_device("cpu", threads=None)
    assert torch.backends.cudnn.conv.fp32_precision == "tf32" and Device("cpu", "", 1).environment() == {
        "device": "cpu"
    }
    device = resolve_device("cuda", threads=None)
    assert torch.backends.cudnn.conv.fp32_precision != "tf32"
    assert "TF32 only in Hessians" in device.environment()["float32"]


@pytest.mark.parametrize("newer", [False, True])
def test_full_float32_works_beside_the_old_and_the_newer_names(newer):
    """Once anybody has set `fp32_precision` of a kind of op, torch refuses to read `allow_tf32`."""
    conv = torch.backends.cudnn.conv
    if newer:
        conv.fp32_precision, torch.backends.cudnn.rnn.fp32_precision = "ieee", "tf32"
        with pytest.raises(RuntimeError, match="TF32"):
            _ = torch.backends.cudnn.allow_tf32
    before = conv.fp32_precision
    with full_float32():
        assert conv.fp32_precision in ("ieee", "none")
    assert conv.fp32_precision == before


def test_tf32_holds_every_16_bit_number_and_is_allowed_for_them_alone():
    bits = torch.arange(1 << 16).to(torch.uint16).view(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        lost = bits.view(dtype).float().view(torch.int32) & (1 << 13) - 1  # TF32 keeps 10 of float32's 23 bits
        assert int(lost[~bits.view(dtype).isnan()].abs().sum()) == 0
    matmul = torch.backends.cuda.matmul
    for dtype, allowed in ((torch.float16, True), (torch.bfloat16, True), (torch.float32, False)):
        with exact_tf32(dtype):
            assert matmul.allow_tf32 == allowed
        assert not matmul.allow_tf32


def test_sums_have_one_order_on_a_gpu_alone():
    for name, wanted in (("cpu", False), ("cuda", True)):
        with one_order_of_sums(torch.device(name)):
            assert torch.are_deterministic_algorithms_enabled() == wanted
        assert not torch.are_deterministic_algorithms_enabled()
