"""Calls that wait between layers read there what calls made anew would read, also behind layers that were replaced."""

import copy
import threading

import pytest
import torch
from torch import nn

from vqdm.calibration.lockstep import Lockstep, waiting_bytes
from vqdm.calibration.pairs import PairedInputs
from vqdm.models.specs import spec_of

NAMES = ("first", "inner.second", "inner.third")


class Chain(nn.Module):
    """Three layers, the last of which reads the first one's output too, by a skip connection."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.inner = nn.ModuleDict({"second": nn.Linear(4, 4), "third": nn.Linear(8, 2)})

    def forward(self, sample, return_dict=True):
        hidden = self.first(sample)
        return (self.inner["third"](torch.cat([hidden, self.inner["second"](hidden.tanh())], -1)),)


@pytest.fixture(autouse=True)
def no_thread_is_left():
    before = threading.active_count()  # of pytest-xdist
    yield
    assert threading.active_count() == before


@pytest.fixture
def denoiser():
    torch.manual_seed(0)
    return Chain().eval()


@pytest.fixture
def calls():
    return [{"sample": torch.randn(5, 3, generator=torch.Generator().manual_seed(seed))} for seed in range(4)]


def read_anew(denoiser, name, call):
    seen = []
    hook = denoiser.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        denoiser(**call)
    hook.remove()
    return seen[0]


def other(layer: nn.Linear) -> nn.Linear:
    return nn.Linear(layer.in_features, layer.out_features)


def test_every_layer_reads_what_a_new_call_reads_behind_those_replaced(denoiser, calls):
    plain = copy.deepcopy(denoiser)
    with Lockstep(denoiser, calls, NAMES) as waiting:
        for name in NAMES:
            read = list(waiting.inputs_at(name))
            assert all(torch.equal(one, read_anew(plain, name, call)) for one, call in zip(read, calls, strict=True))
            new = other(denoiser.get_submodule(name))
            denoiser.set_submodule(name, new)
            plain.set_submodule(name, new)


def test_a_call_from_outside_waits_nowhere(denoiser, calls):
    expected = copy.deepcopy(denoiser)(**calls[0])[0]
    with Lockstep(denoiser, calls, NAMES) as waiting:
        next(waiting.inputs_at("inner.second"))
        assert torch.equal(denoiser(**calls[0])[0], expected)
    assert torch.equal(denoiser(**calls[0])[0], expected)


def test_layers_may_be_left_out_but_not_asked_for_again(denoiser, calls):
    with Lockstep(denoiser, calls, NAMES) as waiting:
        assert len(list(waiting.inputs_at("inner.third"))) == len(calls)
        with pytest.raises(ValueError, match="does not run layer first"):
            next(waiting.inputs_at("first"))


def test_what_fails_in_a_call_is_raised_where_it_is_waited_for(denoiser, calls):
    broken = [{"sample": torch.zeros(5, 7)}]
    with Lockstep(denoiser, broken, NAMES) as waiting, pytest.raises(RuntimeError, match="shapes"):
        next(waiting.inputs_at("inner.second"))
    assert "forward" not in vars(denoiser.first)


@pytest.mark.parametrize("held", [0, 1, 3, 4, 9])
def test_it_makes_no_difference_how_many_calls_wait(denoiser, calls, held):
    student = copy.deepcopy(denoiser)
    student.first = other(student.first)
    specs = [spec_of(name, denoiser.get_submodule(name)) for name in NAMES]
    with PairedInputs(denoiser, student, lambda: calls, specs, held=held) as inputs:
        for spec in specs:
            read = list(inputs.of(spec))
            assert len(read) == len(calls)
            for (clean, own), call in zip(read, calls, strict=True):
                assert torch.equal(clean, read_anew(denoiser, spec.name, call))
                assert torch.equal(own, read_anew(student, spec.name, call))
            student.set_submodule(spec.name, other(student.get_submodule(spec.name)))


def test_bytes_of_a_call_are_those_of_its_tensors(denoiser, calls):
    """At most: the first layer's output, its tanh, the second layer's output and both joined, [5, 4 + 4 + 4 + 8]."""
    joined = 4 * 5 * (4 + 4 + 8)  # the tanh is free by then
    assert joined <= waiting_bytes(denoiser, calls[0]) <= joined + 4 * 5 * 4
