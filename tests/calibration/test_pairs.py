"""Moments over what a layer reads in two denoisers, and the targets that follow from them."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vqdm.calibration.pairs import DAMPING, PairedInputs, corrected_target, pair_moments, same_inputs
from vqdm.models.specs import spec_of, weight_to_matrix


class Small(nn.Module):
    """A convolution, then two linear layers of one input, then one of another."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.one, self.other, self.last = nn.Linear(4, 5), nn.Linear(4, 5), nn.Linear(5, 2)

    def forward(self, sample, return_dict=True):
        tokens = self.conv(sample.tanh()).flatten(2).transpose(1, 2)
        return (self.last(torch.relu(self.one(tokens)) * self.other(tokens)),)


NAMES = ("conv", "one", "other", "last")


@pytest.fixture
def made():
    """(teacher, student, specs by name, calls): the student's convolution is another."""
    torch.manual_seed(0)
    teacher = Small().eval()
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        student.conv.weight.add_(0.3 * torch.randn_like(student.conv.weight))
    specs = {name: spec_of(name, teacher.get_submodule(name)) for name in NAMES}
    return teacher, student, specs, [{"sample": torch.randn(2, 3, 4, 4)} for _ in range(3)]


def moments_of(teacher, student, spec, calls, *, held=0, **options):
    with PairedInputs(teacher, student, lambda: calls, [spec], held=held) as inputs:
        return pair_moments([spec], inputs.of(spec), **options)[spec.name]


def test_layers_of_one_input_are_together(made):
    teacher, _, specs, calls = made
    found = same_inputs(teacher, list(specs.values()), calls[0])
    assert [[spec.name for spec in part] for part in found] == [["conv"], ["one", "other"], ["last"]]


@torch.no_grad()
@pytest.mark.parametrize("name", ["conv", "last"])
def test_moments_say_how_far_two_layers_on_two_inputs_are_apart(made, name):
    """E‖W x − T x̃‖² by the moments is that of the outputs themselves, for any T."""
    teacher, student, specs, calls = made
    if name == "conv":  # which reads the same in both: let them read different things
        student.register_forward_pre_hook(lambda _, args, kwargs: (args, {**kwargs, "sample": kwargs["sample"] + 0.5}),
                                          with_kwargs=True)  # fmt: skip
    moment, cross = moments_of(teacher, student, specs[name], calls)
    clean, _ = moments_of(teacher, copy.deepcopy(teacher), specs[name], calls)
    layer = copy.deepcopy(teacher.get_submodule(name))
    other = copy.deepcopy(layer)
    nn.init.normal_(other.weight)
    one, two = weight_to_matrix(layer.weight), weight_to_matrix(other.weight)
    expected = []
    for call in calls:
        read = [inputs_of(model, name, call) for model in (teacher, student)]
        apart = (layer(read[0]) - other(read[1])).movedim(1, -1) if name == "conv" else layer(read[0]) - other(read[1])
        bias = layer.bias - other.bias
        expected.append((apart - bias).square().sum(-1).mean())
    found = ((one @ clean) * one).sum() - 2 * ((one @ cross) * two).sum() + ((two @ moment) * two).sum()
    assert torch.allclose(found, torch.stack(expected).mean(), rtol=1e-4)


def inputs_of(model, name, call):
    seen = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(**call)
    hook.remove()
    return seen[0]


def test_drawn_tokens_are_the_same_in_both(made):
    teacher, _, specs, calls = made
    moment, cross = moments_of(teacher, copy.deepcopy(teacher), specs["one"], calls, tokens_per_call=3)
    assert torch.equal(moment, cross)
    again, _ = moments_of(teacher, copy.deepcopy(teacher), specs["one"], calls, tokens_per_call=3, seed=1)
    assert not torch.equal(moment, again)


def test_the_target_is_the_ridge_regression_of_the_originals_outputs():
    torch.manual_seed(1)
    x, read, matrix = torch.randn(40, 6), torch.randn(40, 6), torch.randn(3, 6)
    moment, cross = read.T @ read / 40, x.T @ read / 40
    ridge = DAMPING * moment.diagonal().mean()
    rows = torch.cat([read / 40**0.5, ridge.sqrt() * torch.eye(6)])
    wanted = torch.cat([x @ matrix.T / 40**0.5, ridge.sqrt() * matrix.T])
    expected = torch.linalg.lstsq(rows.double(), wanted.double()).solution.T.float()
    assert F.mse_loss(corrected_target(matrix, moment, cross), expected) < 1e-10
    assert torch.allclose(corrected_target(matrix, moment, moment), matrix)
