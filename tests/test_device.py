"""The device is decided once, with a reason; what is not there is refused."""

import pytest
import torch

from vqdm.device import resolve_device
from vqdm.errors import UserError


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
