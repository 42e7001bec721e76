import math

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from vqdm.stages.tiny_train import loop
from vqdm.stages.tiny_train.loop import fast_precision, fit, learning_rate

STEPS, EVERY = 40, 7
SETTINGS = {
    "purpose": "line", "steps": STEPS, "learning_rate_peak": 0.05, "seed": 3, "warmup": 5, "weight_decay": 0.1,
    "checkpoint_every": EVERY,
}  # fmt: skip


class Killed(Exception):
    pass


class Line(nn.Module):
    """Linear, with one parameter that is frozen and one that gets no gradient; a buffer counts the calls."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.unused = nn.Parameter(torch.full((2,), 5.0))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        for i, parameter in enumerate(self.linear.parameters()):
            parameter.data = torch.linspace(-1, 1, parameter.numel()).reshape(parameter.shape) * (i + 1)

    def loss(self, generator):
        self.calls += 1
        x = torch.randn(16, 3, generator=generator)
        return (self.linear(x) * self.frozen - x[:, :2] ** 2).square().mean()


def state_of(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[k], other[k]) for k in one)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    model = Line()
    average = fit(model, model.loss, directory=tmp_path_factory.mktemp("whole"), **SETTINGS)
    return state_of(model), average


def dies_at(model, step):
    def loss_of(generator):
        if int(model.calls) == step:
            raise Killed
        return model.loss(generator)

    return loss_of


@pytest.mark.parametrize("dies", [(7,), (14,), (21,), (28,), (35,), (3,), (10, 11, 29), (39,)])
def test_killed_and_resumed_is_the_same_to_the_bit(dies, tmp_path, uninterrupted):
    for step in dies:  # at a checkpoint, before the first one, between two, several times
        model = Line()
        with pytest.raises(Killed):
            fit(model, dies_at(model, step), directory=tmp_path, **SETTINGS)
    model = Line()
    average = fit(model, model.loss, directory=tmp_path, **SETTINGS)
    assert_same(state_of(model), uninterrupted[0])
    assert_same(average, uninterrupted[1])


def test_killed_right_after_a_checkpoint(tmp_path, uninterrupted):
    def kill(step, average):
        if step == 2 * EVERY:
            raise Killed

    model = Line()
    with pytest.raises(Killed):
        fit(model, model.loss, directory=tmp_path, after_step=kill, **SETTINGS)
    model, asked = Line(), []
    fit(model, lambda g: asked.append(0) or model.loss(g), directory=tmp_path, **SETTINGS)
    assert len(asked) == STEPS - 2 * EVERY
    assert_same(state_of(model), uninterrupted[0])


def test_a_finished_run_is_loaded_and_takes_no_step(tmp_path, uninterrupted):
    model = Line()
    fit(model, model.loss, directory=tmp_path, **SETTINGS)
    again = Line()
    average = fit(again, lambda _: pytest.fail("took a step"), directory=tmp_path, **SETTINGS)
    assert_same(state_of(again), uninterrupted[0])
    assert_same(average, uninterrupted[1])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["line.jsonl", "line.safetensors"]


def test_the_global_generator_has_no_part_in_it(tmp_path, uninterrupted):
    model = Line()
    torch.manual_seed(99)
    before = torch.get_rng_state()
    fit(model, model.loss, directory=tmp_path, **SETTINGS)
    assert torch.equal(torch.get_rng_state(), before)
    assert_same(state_of(model), uninterrupted[0])


def test_frozen_and_unused_parameters_stay(uninterrupted):
    state, _ = uninterrupted
    assert torch.equal(state["frozen"], torch.ones(2))
    assert torch.equal(state["unused"], torch.full((2,), 5.0))
    assert int(state["calls"]) == STEPS


def test_average_is_that_of_a_slow_loop(tmp_path):
    model, seen = Line(), []
    slow = {k: v.double() for k, v in state_of(model).items() if v.is_floating_point()}

    def keep(step, average):
        decay = min(0.8, step / (step + 9))
        for key, value in state_of(model).items():
            if key in slow:
                slow[key] = decay * slow[key] + (1 - decay) * value.double()
        seen.append(step)
        for key, value in average.items():
            assert torch.allclose(value.double(), slow[key], rtol=1e-5, atol=1e-6)

    average = fit(
        model, model.loss, directory=tmp_path, after_step=keep, average_decay=0.8, **SETTINGS | {"checkpoint_every": 1}
    )
    assert seen == list(range(1, STEPS + 1))
    assert average.keys() == slow.keys()
    assert (average["linear.weight"] - model.linear.weight).abs().max() > 1e-4  # it lags


def test_learning_rate_is_the_closed_form():
    settings = {"steps": 1000, "peak": 0.3, "warmup": 100, "decay_from": 0.6}
    rates = [learning_rate(step, **settings) for step in range(1000)]
    assert rates[0] == pytest.approx(0.003)
    assert rates[49] == pytest.approx(0.15)
    assert rates[99:600] == pytest.approx([0.3] * 501)
    for step in range(600, 1000):
        assert rates[step] == pytest.approx(0.3 * math.cos(math.pi / 2 * (step - 600) / 400) ** 2)
    assert rates[800] == pytest.approx(0.15)
    assert 0 < rates[-1] < 1e-5
    assert learning_rate(999, steps=1000, peak=0.3, warmup=0, decay_from=1.0) == 0.3


def test_first_step_moves_every_weight_by_the_rate_of_step_0(tmp_path):
    """Adam's first step is rate · sign(gradient)."""
    model = Line()
    before = state_of(model)["linear.weight"]
    settings = SETTINGS | {"steps": 1, "weight_decay": 0.0, "warmup": 10, "decay_from": 1.0}
    fit(model, model.loss, directory=tmp_path, **settings)
    assert torch.allclose((model.linear.weight - before).abs(), torch.full((2, 3), 0.05 / 10), rtol=1e-4)


def spoiled(model, step, spoil):
    def loss_of(generator):
        loss = model.loss(generator)
        return spoil(loss, model) if int(model.calls) == step + 1 else loss

    return loss_of


@pytest.mark.parametrize(
    "spoil",
    [
        lambda loss, model: loss * float("nan"),
        lambda loss, model: loss / 0,
        lambda loss, model: loss + (model.linear.weight - model.linear.weight.detach()).abs().sum().sqrt(),
    ],
    ids=["nan", "inf", "finite loss, nan gradient"],
)
def test_a_loss_that_cannot_be_followed_stops_and_the_checkpoint_stays_good(spoil, tmp_path, uninterrupted):
    model = Line()
    settings = SETTINGS | {"checkpoint_every": 1}
    with pytest.raises(FloatingPointError, match=r"line: .* at step 20;.*line\.safetensors"):
        fit(model, spoiled(model, 20, spoil), directory=tmp_path, **settings)
    saved = load_file(tmp_path / "line.safetensors")
    assert int(saved["model.calls"]) == 20
    assert all(torch.isfinite(tensor).all() for tensor in saved.values())
    model = Line()
    fit(model, model.loss, directory=tmp_path, **settings)
    assert_same(state_of(model), uninterrupted[0])


@pytest.mark.parametrize(("has_kernels", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_bfloat16_is_computed_in_only_where_torch_does_not_emulate_it(monkeypatch, has_kernels, dtype):
    monkeypatch.setattr(loop, "computes_in_bfloat16", lambda device: has_kernels)
    with fast_precision():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype
