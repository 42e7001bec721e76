"""Block-wise distillation of a few layers of the tiny model: never worse, in order, and to be interrupted."""

import copy

import pytest
import torch
from tiny_students import FEW, TEXTS, recorded, student, teacher
from torch.utils._pytree import tree_leaves

from vqdm.calibration.blocks import block_loss, record_block, relative_squared_error
from vqdm.config.options import FinetuneConfig, TrainedConfig
from vqdm.distillation.blockwise import tune_blocks
from vqdm.distillation.moving_codes import DriftingWeight
from vqdm.weights.layers import quantized_layers

QUICK = {"block_steps": 12, "block_rate": 1e-2, "block_batch_size": 8, "block_samples": 24, "warmup": 0, "train": FEW}
IN_ORDER = [
    f"{place}.{unit}"
    for place in ("down_blocks.1", "mid_block", "up_blocks.1")
    for unit in ("resnets.0", "attentions.0.transformer_blocks.0")
]


def specs_of(model):
    return [layer.spec for layer in quantized_layers(model).values()]


def tune(own, *, stored=lambda block: None, stop_after=None, **changes):
    """Reports by block, and what changed in each."""
    reports, changed = {}, {}
    blocks = tune_blocks(
        own, teacher(), specs_of(own), lambda: iter(recorded(3)), config=FinetuneConfig(**(QUICK | changes)),
        stored=stored,
    )  # fmt: skip
    for block, tensors, report in blocks:
        reports[block.name] = report
        changed[block.name] = {name: value.clone() for name, value in tensors.items()}
        if block.name == stop_after:
            break
    return reports, changed


def same(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def losses(own, calls):
    """Of every block on all samples, for what the student feeds it, against the teacher's own."""
    found = {}
    for name in IN_ORDER:
        target = record_block(teacher(), name, calls).output
        inputs = record_block(own, name, calls)
        found[name] = block_loss(own.get_submodule(name), inputs, target, loss=relative_squared_error(target))
    return found


@pytest.fixture(scope="module")
def tuned():
    own = student()
    return own, *tune(own)


def test_blocks_get_better_in_the_order_of_execution(tuned):
    own, reports, _ = tuned
    assert list(reports) == IN_ORDER
    assert all(report.after < report.before for report in reports.values() if report.kept)
    assert sum(report.kept for report in reports.values()) >= 4
    before, after = losses(student(), recorded(3)), losses(own, recorded(3))
    assert sum(after.values()) < 0.9 * sum(before.values())


def test_reports_are_of_samples_that_were_not_trained_on(tuned):
    """The first block's loss before: on an eighth of the rows, with the student as it came."""
    _, reports, _ = tuned
    name, calls = IN_ORDER[0], recorded(3)
    whole = losses(student(), calls)[name]
    assert reports[name].before == pytest.approx(whole, rel=0.8) and reports[name].before != whole
    assert reports[name].codes_moved == 0


def test_only_scales_and_codebooks_of_the_blocks_change(tuned):
    own, _, changed = tuned
    start = student().state_dict()
    moved = {name for name, value in own.state_dict().items() if not torch.equal(value, start[name])}
    parts = {f"{name}.weight.{part}" for name in quantized_layers(own) for part in ("scales", "codebooks")}
    assert moved and moved <= parts, "what the whole model shares stays"
    assert moved <= {name for tensors in changed.values() for name in tensors}
    assert all(torch.equal(own.state_dict()[n], v) for tensors in changed.values() for n, v in tensors.items())
    assert not any(p.requires_grad or p.grad is not None for p in own.parameters())


def test_a_block_that_gets_no_better_stays_as_it_was():
    own = student()
    reports, _ = tune(own, block_rate=30.0)
    worse = [name for name, report in reports.items() if not report.kept]
    assert worse
    start = student()
    for name in worse:
        assert not reports[name].after < reports[name].before
        assert same(own.get_submodule(name), start.get_submodule(name))
    for switched_off in ({"block_rate": 1e-30}, {"train": TrainedConfig(*[False] * 5)}):
        own = student()
        reports, _ = tune(own, **switched_off)
        assert same(own, start) and not any(report.kept for report in reports.values())


def test_later_blocks_see_what_earlier_ones_became(tuned):
    """With the first block as it was, the second one starts from another error and ends elsewhere."""
    own, reports, changed = tuned
    kept = {name: value for name, value in student().state_dict().items()}
    untouched = {name: kept[name] for name in changed[IN_ORDER[0]]}
    other = student()
    others, _ = tune(other, stored=lambda block: untouched if block.name == IN_ORDER[0] else None)
    assert others[IN_ORDER[0]] is None
    assert others[IN_ORDER[1]].before != reports[IN_ORDER[1]].before
    assert reports[IN_ORDER[0]].kept and not same(other.get_submodule(IN_ORDER[1]), own.get_submodule(IN_ORDER[1]))


@pytest.mark.parametrize("codes", [False, True])
def test_a_run_cut_off_goes_on_to_the_same_weights(codes, tuned):
    options = {"tune_codes": codes, "code_rate": 5.0, "code_every": 3}
    whole, cut = student(), student()
    reports, changed = (tuned[1], tuned[2]) if not codes else tune(whole, **options)
    whole = whole if codes else tuned[0]
    _, stored = tune(cut, stop_after=IN_ORDER[2], **options)
    own = student()
    again, others = tune(own, stored=lambda block: stored.get(block.name), **options)
    assert [name for name, report in again.items() if report is None] == IN_ORDER[:3]
    assert same(own, whole)
    assert all(torch.equal(others[b][n], value) for b in changed for n, value in changed[b].items())
    assert all(again[name].after == reports[name].after for name in IN_ORDER[3:])


def test_codes_that_move():
    own = student()
    start = copy.deepcopy(own.state_dict())
    reports, changed = tune(own, tune_codes=True, code_rate=5.0, code_every=3, stop_after=IN_ORDER[1])
    for name in IN_ORDER[:2]:
        codes = [n for n in changed[name] if n.endswith("weight.codes")]
        assert len(codes) == len([n for n in quantized_layers(own) if n.startswith(name)])
        differ = any(not torch.equal(own.state_dict()[n], start[n]) for n in codes)
        assert differ == (reports[name].kept and reports[name].codes_moved > 0)
    assert any(reports[name].kept and reports[name].codes_moved for name in IN_ORDER[:2])
    assert not any(isinstance(module, DriftingWeight) for module in own.modules())
    assert own.state_dict().keys() == start.keys()


def test_a_part_of_the_data_is_those_rows():
    data = record_block(teacher(), IN_ORDER[1], recorded(3))
    rows = torch.tensor([20, 3, 3, 11])
    part = data.part(rows)
    assert len(part) == 4 and torch.equal(part.output, data.output[rows])
    for one, other in ((slice(1, 3), rows[1:3]), (torch.tensor([3, 0]), rows[[3, 0]])):
        leaves = [tree_leaves(found.take(at, device="cpu")) for found, at in ((part, one), (data, other))]
        assert len(leaves[0]) == len(leaves[1]) > 1
        assert all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(*leaves, strict=True))


def test_a_single_row_is_nothing_to_learn_from():
    own, calls = student(), recorded(1, TEXTS[:1], guidance=0.0)
    config = FinetuneConfig(**QUICK)
    found = list(tune_blocks(own, teacher(), specs_of(own), lambda: iter(calls), config=config))
    assert len(found) == 6 and not any(report.kept for _, _, report in found) and same(own, student())


def test_fewer_rows_are_whole_calls():
    from vqdm.distillation import blockwise

    calls = recorded(3)
    for rows, expected in ((24, [0, 1, 2]), (8, [1]), (1, [1]), (16, [0, 2]), (1000, [0, 1, 2])):
        chosen = blockwise._calls_for(lambda: iter(calls), rows)
        assert [next(i for i, c in enumerate(calls) if c is call) for call in chosen()] == expected, rows
        assert len(list(chosen())) == len(expected), "they can be gone through again"
