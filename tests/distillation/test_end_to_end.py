"""End-to-end distillation of a few layers of the tiny model: what it learns, and that nothing interrupts it."""

import copy
import dataclasses
import itertools
import math

import pytest
import torch
from safetensors.torch import load_file
from tiny_students import config, pipeline, student, teacher, trajectories
from torch.utils._pytree import tree_map

from vqdm.config.options import FinetuneConfig, TrainedConfig
from vqdm.distillation import end_to_end
from vqdm.distillation.end_to_end import Distillation, samples_of
from vqdm.errors import UserError
from vqdm.runs.items import item_names
from vqdm.weights.layers import quantized_layers

GUIDANCE = 3.0


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    return trajectories(tmp_path_factory.mktemp("train"))


@pytest.fixture(scope="module")
def validation(tmp_path_factory):
    return trajectories(tmp_path_factory.mktemp("validation"), texts=("a blue circle", "a small red triangle"))


@pytest.fixture
def distil(samples, validation):
    """A training of a model, by default a new student: the state it ends in."""

    def run(directory, own=None, *, report=lambda values: None, teacher=None, **changes):
        return Distillation(
            own or student(), lambda step: samples, validation, config(**changes), guidance=GUIDANCE,
            scheduler=pipeline().scheduler, teacher=teacher, report=report,
        ).run(directory)  # fmt: skip

    return run


def same(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class Cut(Exception):
    """Stands for what ends a process."""


def cut_at(step):
    def report(values):
        if values.get("step") == step:
            raise Cut

    return report


def history(state):
    return state.step, state.losses, state.validations


def test_the_loss_falls_and_only_what_trains_changes(distil, tmp_path):
    own = student()
    before = copy.deepcopy(own)
    told = []
    state = distil(tmp_path, own, report=told.append, steps=16, check_every=8, learning_rate=1e-2)
    losses = [found["loss"] for found in state.validations]
    assert [found["step"] for found in state.validations] == [0, 8, 16]
    assert losses[2] < losses[1] < losses[0] and losses[2] < 0.8 * losses[0]
    changed = {name for name, value in before.state_dict().items() if not torch.equal(value, own.state_dict()[name])}
    allowed = {f"{name}.weight.{part}" for name in quantized_layers(own) for part in ("scales", "codebooks")}
    assert changed and changed <= allowed | {"shared.trellis_table.table"}
    assert len([name for name in changed if name.endswith(".scales")]) == 12
    assert not any(p.requires_grad or p.grad is not None for p in own.parameters())
    assert [values["loss"] for values in told if "loss" in values] == state.losses and len(state.losses) == 16
    assert [values["validation/loss"] for values in told if "validation/loss" in values] == losses


def test_every_epoch_is_a_permutation():
    own = FinetuneConfig(batch_size=4, seed=3)
    drawn = list(itertools.chain.from_iterable(samples_of(step, 10, own) for step in range(10)))
    epochs = [drawn[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs) and len({tuple(e) for e in epochs}) == 4
    assert list(samples_of(7, 10, own)) == drawn[28:32], "a step's samples need no step before it"
    assert list(samples_of(0, 10, FinetuneConfig(batch_size=4, seed=4))) != drawn[:4]
    assert sorted(samples_of(0, 3, FinetuneConfig(batch_size=6))) == [0, 0, 1, 1, 2, 2]


def gradients(samples, validation, *, own=None, rank=0, count=1, monkeypatch=None, teacher=None, **changes):
    """Of one step, by name, and its loss."""
    own = own or student()
    if monkeypatch is not None:
        monkeypatch.setattr(end_to_end.processes, "rank_and_count", lambda: (rank, count))
    trained = [p.requires_grad_(True) for name, p in own.named_parameters() if name.endswith(("scales", "codebooks"))]
    own_config = config(**changes)
    step = Distillation(
        own, lambda s: samples, validation, own_config, guidance=GUIDANCE, scheduler=pipeline().scheduler,
        teacher=teacher,
    )  # fmt: skip
    loss = step._gradients(own, 0)
    assert trained
    return loss, {name: p.grad for name, p in own.named_parameters() if p.grad is not None}


def near(one, other, tolerance):
    assert one.keys() == other.keys() and len(one) >= 18
    return all(float((one[name] - other[name]).norm()) <= tolerance * float(one[name].norm()) for name in one)


class InDouble:
    """Samples in fp64, in which a forward does not depend on its batch's size."""

    def __init__(self, samples):
        self.samples = samples

    def __len__(self):
        return len(self.samples)

    def batch(self, indices, *, device):
        found = self.samples.batch(indices, device=device)
        arguments = tree_map(lambda leaf: leaf.double() if leaf.is_floating_point() else leaf, found.arguments)
        return dataclasses.replace(found, arguments=arguments)


@pytest.mark.parametrize("along", [0.0, 0.5])
def test_micro_batches_add_up(samples, validation, along):
    original = copy.deepcopy(teacher()).double() if along else None
    options = {"batch_size": 6, "feature_weight": along, "teacher": original}
    whole_loss, whole = gradients(InDouble(samples), validation, own=student().double(), **options)
    for size in (4, 1):
        options["micro_batch_size"] = size
        loss, parts = gradients(InDouble(samples), validation, own=student().double(), **options)
        assert loss == pytest.approx(whole_loss, rel=1e-6) and near(whole, parts, 1e-6)


def test_processes_share_a_step(samples, validation, monkeypatch):
    """The mean of their gradients, which DistributedDataParallel takes, is that of one process."""
    doubled = InDouble(samples)
    loss, whole = gradients(doubled, validation, own=student().double(), batch_size=6)
    each = [
        gradients(
            doubled, validation, own=student().double(), batch_size=6, rank=rank, count=3, monkeypatch=monkeypatch
        )
        for rank in range(3)
    ]
    mean = {name: sum(found[name] for _, found in each) / 3 for name in whole}
    assert near(whole, mean, 1e-6)
    assert sum(found for found, _ in each) == pytest.approx(loss, rel=1e-6)  # each gives its part of the sum


def test_checkpointing_and_bfloat16_compute_the_same_step(samples, validation):
    loss, plain = gradients(samples, validation)
    own = student()
    own.enable_gradient_checkpointing()
    again, checkpointed = gradients(samples, validation, own=own)
    assert again == pytest.approx(loss, rel=1e-6) and near(plain, checkpointed, 1e-5)
    rough, coarse = gradients(samples, validation, precision="bfloat16")
    assert rough == pytest.approx(loss, rel=0.1) and rough != loss and near(plain, coarse, 0.5)


@pytest.mark.parametrize("kind", ["guided", "halves"])
@pytest.mark.parametrize("weighting", ["uniform", "min_snr"])
def test_a_step_is_the_mean_over_its_samples(kind, weighting, samples, validation):
    """Of each sample's own error, by hand: of the prediction that guided sampling goes by, or of both halves."""
    levels, single = pipeline().scheduler.alphas_cumprod.double(), []
    for number in samples_of(0, len(samples), config()):
        batch = samples.batch([number], device="cpu")
        ratio = float(levels[int(batch.timesteps)] / (1 - levels[int(batch.timesteps)]))
        with torch.no_grad():
            without, with_text = student()(**batch.arguments, return_dict=False)[0]
        halves = [without - batch.target[0], with_text - batch.target[1]]
        guided = [without + 3 * (with_text - without) - batch.target[0] - 3 * (batch.target[1] - batch.target[0])]
        wrong = torch.stack(guided if kind == "guided" else halves).square().mean()
        single.append(float(wrong) * (min(ratio, 0.5) / ratio if weighting == "min_snr" else 1))
    loss, _ = gradients(samples, validation, weighting=weighting, min_snr=0.5, loss=kind)
    assert loss == pytest.approx(sum(single) / len(single), rel=1e-4)


@pytest.fixture(scope="module")
def whole(samples, validation, tmp_path_factory):
    """An uninterrupted training of 7 steps, with codes that move and without: directory, student, state."""
    found = {}
    for codes in (False, True):
        own, directory = student(), tmp_path_factory.mktemp("whole")
        settings = config(steps=7, tune_codes=codes, **CODES)
        distillation = Distillation(
            own, lambda step: samples, validation, settings, guidance=GUIDANCE, scheduler=pipeline().scheduler
        )
        found[codes] = directory, own, distillation.run(directory)
    return found


CODES = {"code_every": 3, "code_rate": 20.0}


@pytest.mark.parametrize("codes", [False, True])
@pytest.mark.parametrize("step", [1, 2, 5])
def test_a_run_cut_off_goes_on_to_the_same_weights(step, codes, whole, distil, tmp_path):
    with pytest.raises(Cut):
        distil(tmp_path, report=cut_at(step), steps=7, tune_codes=codes, **CODES)
    own = student()
    state = distil(tmp_path, own, steps=7, tune_codes=codes, **CODES)
    _, expected, reference = whole[codes]
    assert same(own, expected) and history(state) == history(reference)
    assert type(own) is type(expected) and own.state_dict().keys() == student().state_dict().keys()


@pytest.mark.parametrize("damage", ["removed", "torn", "flipped", "no record", "best"])
def test_a_damaged_checkpoint_is_passed_over(damage, whole, distil, tmp_path):
    with pytest.raises(Cut):
        distil(tmp_path, report=cut_at(6), steps=7, **CODES)
    names = item_names(tmp_path, "step-")
    assert names[-1] == "step-000004"
    name = names[0] if damage == "best" else names[-1]
    file = tmp_path / "checkpoints" / f"{name}.safetensors"
    content = file.read_bytes()
    if damage in ("removed", "best"):
        file.unlink()
    elif damage == "torn":
        file.write_bytes(content[:-1])
    elif damage == "flipped":
        file.write_bytes(content[:5000] + bytes([content[5000] ^ 1]) + content[5001:])
    else:
        (tmp_path / "items" / f"{name}.json").unlink()
    own = student()
    state = distil(tmp_path, own, steps=7, **CODES)
    _, expected, reference = whole[False]
    assert same(own, expected) and history(state) == history(reference)


def test_a_finished_run_has_nothing_left_to_do(whole, distil):
    directory, expected, reference = whole[False]
    own, told = student(), []
    state = distil(directory, own, report=told.append, steps=7, **CODES)
    assert not told and same(own, expected) and history(state) == history(reference)


def test_codes_that_move(whole):
    _, fixed, _ = whole[False]
    _, moved, state = whole[True]
    start = student().state_dict()
    codes = [name for name in start if name.endswith(".codes")]
    assert len(codes) == 12 and all(torch.equal(fixed.state_dict()[name], start[name]) for name in codes)
    assert state.best["step"] > 0, "the best weights are not the first"
    assert any(not torch.equal(moved.state_dict()[name], start[name]) for name in codes)


def test_the_best_weights_come_back(distil, tmp_path):
    """A rate that is too high for the later steps: those weights are not the ones that are kept."""
    kept = {}
    own = student()

    def report(values):
        if "validation/loss" in values:
            kept[values["validation/step"]] = copy.deepcopy(own.state_dict())

    state = distil(tmp_path, own, report=report, steps=8, learning_rate=0.03)
    losses = {found["step"]: found["loss"] for found in state.validations}
    best = state.best["step"]
    assert losses[best] == min(losses.values()) and best < 8, losses
    assert all(torch.equal(value, kept[best][name]) for name, value in own.state_dict().items())
    assert set(item_names(tmp_path, "step-")) == {f"step-{best:06d}", "step-000008"}
    assert {p.stem for p in (tmp_path / "checkpoints").iterdir()} == {f"step-{best:06d}", "step-000008"}


def test_a_run_that_diverges_ends_in_one_line(distil, tmp_path):
    with pytest.raises(UserError, match=r"in 2 steps: lower finetune\.learning_rate") as caught:
        distil(tmp_path, steps=8, learning_rate=3.0)
    assert "\n" not in str(caught.value)
    assert item_names(tmp_path, "step-") == ["step-000000"]
    kept = load_file(tmp_path / "checkpoints" / "step-000000.safetensors")
    start = student().state_dict()
    trained = {name.removeprefix("trained."): v for name, v in kept.items() if name.startswith("trained.")}
    assert len(trained) >= 18 and all(torch.equal(value, start[name]) for name, value in trained.items())


def test_a_loss_that_is_no_number_ends_in_one_line(distil, tmp_path):
    own = student()

    def poison(values):
        if values.get("step") == 3:
            next(p for n, p in own.named_parameters() if n.endswith("scales")).data[0] = math.nan

    with pytest.raises(UserError, match=r"the loss is nan at step 3.*of step [02],") as caught:
        distil(tmp_path, own, report=poison, steps=8, check_every=2, learning_rate=1e-3)
    assert "\n" not in str(caught.value) and "step-000002" in item_names(tmp_path, "step-")


def test_features_train_too(distil, tmp_path):
    state = distil(tmp_path, teacher=teacher(), steps=6, feature_weight=0.1, learning_rate=1e-2)
    assert state.best["step"] > 0
    assert not any(module._forward_hooks for module in teacher().modules())
    assert not any(p.requires_grad for p in teacher().parameters())


def test_a_16_bit_teacher_computes_in_16_bit(distil, tmp_path):
    half = copy.deepcopy(teacher())
    torch.nn.Module.to(half, dtype=torch.bfloat16)
    losses = [distil(tmp_path / name, teacher=own, steps=1, feature_weight=0.1).losses[0]
              for name, own in (("fp32", teacher()), ("half", half))]  # fmt: skip
    assert losses[1] == pytest.approx(losses[0], rel=0.02) and losses[1] != losses[0]


def test_plain_adam_of_the_paper(distil, tmp_path):
    own = student()
    before = {n: p.detach().clone() for n, p in own.named_parameters() if n.endswith("scales")}
    distil(tmp_path, own, steps=1, check_every=1, relative_rate=False, learning_rate=1e-6)
    steps = [(own.get_parameter(name) - value).abs().max() for name, value in before.items()]
    assert max(map(float, steps)) == pytest.approx(1e-6, rel=0.1) or max(map(float, steps)) == 0


def test_nothing_to_train_is_refused(distil, tmp_path):
    nothing = TrainedConfig(codebooks=False, scales=False, biases=False, norms=False, rest=False)
    with pytest.raises(UserError, match="nothing to train"):
        distil(tmp_path, steps=2, train=nothing)


def test_the_rate_of_its_own_is_small_for_a_student_that_is_near(distil, tmp_path):
    rates = []
    state = distil(tmp_path, report=lambda v: rates.append(v.get("learning_rate")), steps=1, learning_rate=None)
    (rate,) = [rate for rate in rates if rate is not None]
    assert rate == pytest.approx(0.01 * math.sqrt(state.validations[0]["loss"]))
