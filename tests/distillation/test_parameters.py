"""What trains, in which units, and the optimizer that steps in them."""

import copy
import dataclasses
import itertools

import pytest
import torch
from safetensors.torch import load, save
from tiny_students import student
from torch import nn

from vqdm.config.options import TrainedConfig
from vqdm.distillation.moving_codes import let_drift
from vqdm.distillation.optimizer import RelativeAdam, learning_rate, optimizer_tensors, restore_optimizer
from vqdm.distillation.parameters import trained_parameters
from vqdm.seeds import torch_generator
from vqdm.weights.additive import AdditiveWeight
from vqdm.weights.layers import QuantizedConv2d, QuantizedLinear
from vqdm.weights.scalar import ScalarWeight
from vqdm.weights.trellis import TrellisTable, TrellisWeight

SWITCHES = [field.name for field in dataclasses.fields(TrainedConfig)]
NOTHING = dict.fromkeys(SWITCHES, False)


def gaussian(*shape, seed=0):
    return torch.randn(shape, generator=torch_generator(seed, "test"))


def expected_names(model):
    """Every parameter of the tiny student by what it is, listed type by type."""
    found = {name: set() for name in [*SWITCHES, "never"]}
    for prefix, module in model.named_modules():
        own = {name for name, _ in module.named_parameters(recurse=False)}
        kinds = {
            TrellisTable: {"table": "codebooks"},
            TrellisWeight: {"scales": "scales"},
            AdditiveWeight: {"codebooks": "codebooks", "scales": "scales"},
            ScalarWeight: {"scales": "scales", "zeros": "never"},
            QuantizedLinear: {"bias": "biases"},
            QuantizedConv2d: {"bias": "biases"},
            nn.Linear: {"weight": "rest", "bias": "biases"},
            nn.Conv2d: {"weight": "rest", "bias": "biases"},
            nn.GroupNorm: {"weight": "norms", "bias": "norms"},
            nn.LayerNorm: {"weight": "norms", "bias": "norms"},
        }.get(type(module), {})
        assert own <= kinds.keys(), f"{prefix} is a {type(module).__name__} with {own}"
        for name in own:
            found[kinds[name]].add(f"{prefix}.{name}")
    return found


def test_each_switch_trains_its_own_kind():
    model = student()
    expected = expected_names(model)
    assert all(expected.values()), "the student has some of every kind"
    for switch in SWITCHES:
        found = trained_parameters(model, TrainedConfig(**(NOTHING | {switch: True})))
        assert {part.name for part in found} == expected[switch] and {part.kind for part in found} == {switch}
        assert all(model.get_parameter(part.name) is part.parameter for part in found)
    everything = [part.name for part in trained_parameters(model, TrainedConfig())]
    assert len(everything) == len(set(everything)), "what is shared trains once"
    assert set(everything) == {name for name, _ in model.named_parameters()} - expected["never"]
    assert not trained_parameters(model, TrainedConfig(**NOTHING))


def test_codes_that_move_train_whatever_is_switched_on():
    model = student()
    before = {part.name for part in trained_parameters(model, TrainedConfig())}
    weights = let_drift(model)
    (drifts, names), off = ({w.drift for w in weights.values()}, set(weights)), TrainedConfig(**NOTHING)
    found = trained_parameters(model, off, code_rate=0.25)
    assert {part.parameter for part in found} == drifts and {part.kind for part in found} == {"drift"}
    for part, weight in zip(found, weights.values(), strict=True):
        decoded = weight().detach()
        assert torch.allclose(part.unit[:, 0], 0.25 * decoded.norm(dim=1) / decoded.shape[1] ** 0.5)
    drifting = {part.name for part in trained_parameters(model, TrainedConfig())}
    assert {name.replace(".inner.", ".") for name in drifting if not name.endswith(".drift")} == before
    assert {name.removesuffix(".weight.drift") for name in drifting if name.endswith(".drift")} == names


def test_units_are_sizes():
    model = student()
    with torch.no_grad():
        model.conv_in.bias.zero_()
        scales = model.get_submodule("mid_block.resnets.0.conv2").weight.scales
        scales[0] *= -1
    units = {part.name: part.unit for part in trained_parameters(model, TrainedConfig())}
    assert torch.equal(units["mid_block.resnets.0.conv2.weight.scales"], scales.detach().abs())
    assert float(units["conv_in.bias"]) == pytest.approx(1e-3), "a bias of zeros can leave zero"
    weight = model.conv_out.weight.detach().double()
    assert float(units["conv_out.weight"]) == pytest.approx(float((weight**2).mean().sqrt()), rel=1e-5)
    table = model.get_parameter("shared.trellis_table.table").detach().double()
    assert float(units["shared.trellis_table.table"]) == pytest.approx(float((table**2).mean().sqrt()), rel=1e-5)


def problem(start, unit=None):
    """Parameters [4, 6] and [5]; the loss pulls them to targets of their own sizes."""
    sizes = [torch.logspace(-3, 2, 24).view(4, 6), torch.tensor(0.02)]
    values = [size * s for size, s in zip(sizes, start, strict=True)]
    parameters = [nn.Parameter(v if unit is None else v / u) for v, u in zip(values, sizes, strict=True)]

    def loss():
        whole = parameters if unit is None else [p * u for p, u in zip(parameters, sizes, strict=True)]
        return sum(((p / u - 2) ** 2).sum() * 50 for p, u in zip(whole, sizes, strict=True))

    return parameters, sizes, loss


def test_relative_adam_is_adam_on_numbers_over_their_units():
    start = [gaussian(4, 6), gaussian(5, seed=1)]
    parameters, units, loss = problem(start)
    relative = RelativeAdam(zip(parameters, units, strict=True), lr=0.05)
    quotients, _, other_loss = problem(start, unit=True)
    plain = torch.optim.Adam(quotients, lr=0.05, eps=0)
    relative.param_groups[0]["eps"] = 0  # the one thing that is not free of units
    for step in range(30):
        for optimizer, function in ((relative, loss), (plain, other_loss)):
            optimizer.param_groups[0]["lr"] = 0.05 / (1 + step)
            optimizer.zero_grad()
            function().backward()
            optimizer.step()
    for parameter, quotient, unit in zip(parameters, quotients, units, strict=True):
        assert torch.allclose(parameter / unit, quotient, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(quotient, start[0 if quotient.ndim == 2 else 1], atol=0.1)


def test_parameters_without_gradients_stay():
    parameters, units, _ = problem([gaussian(4, 6), gaussian(5, seed=1)])
    before = [parameter.detach().clone() for parameter in parameters]
    optimizer = RelativeAdam(zip(parameters, units, strict=True), lr=0.1)
    parameters[0].grad = torch.ones(4, 6)
    optimizer.step()
    assert torch.equal(parameters[1], before[1]) and not torch.equal(parameters[0], before[0])


@pytest.mark.parametrize("relative", [True, False])
def test_a_restored_optimizer_goes_on_bit_for_bit(relative):
    parameters, units, loss = problem([gaussian(4, 6), gaussian(5, seed=1)])
    idle = nn.Parameter(torch.ones(2))  # never gets a gradient

    def optimizer_of(chosen):
        if not relative:
            return torch.optim.Adam(chosen, lr=0.05)
        return RelativeAdam(zip(chosen, [*units, torch.tensor(1.0)], strict=True), lr=0.05)

    def step(optimizer):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    trained = [*parameters, idle]
    names = {parameter: f"part.{i}" for i, parameter in enumerate(trained)}
    first = optimizer_of(trained)
    for _ in range(7):
        step(first)
    kept = load(save({name: tensor.clone() for name, tensor in optimizer_tensors(first, names).items()}))
    values = copy.deepcopy([parameter.data for parameter in trained])
    for _ in range(5):
        step(first)
    expected = [parameter.detach().clone() for parameter in trained]
    for parameter, value in zip(trained, values, strict=True):
        parameter.data.copy_(value)
    second = optimizer_of(trained)
    restore_optimizer(second, names, kept, step=7)
    assert idle not in second.state
    for _ in range(5):
        step(second)
    assert all(torch.equal(a, b) for a, b in zip(trained, expected, strict=True))
    ends = optimizer_tensors(first, names), optimizer_tensors(second, names)
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_the_rate_rises_stays_and_falls():
    options = {"steps": 100, "peak": 2.0, "warmup": 10, "decay_from": 0.6}
    rates = [learning_rate(step, **options) for step in range(101)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert rates[10:60] == [2.0] * 50
    assert rates[80] == pytest.approx(1.0) and rates[100] == pytest.approx(0)
    assert all(a >= b for a, b in itertools.pairwise(rates[60:]))
    assert [learning_rate(step, **options | {"decay_from": 1.0}) for step in (10, 99)] == [2.0, 2.0]
