"""The compiled searches against exhaustive ones and against plain torch."""

import itertools

import pytest
import torch
from additive_problems import generator, hessian, loss_of, matrix, random_parts

from vqdm.codecs import additive_kernels as kernels
from vqdm.codecs.additive_fast import codeword_metrics, feedback_coupling, search
from vqdm.codecs.additive_paper import search_rows
from vqdm.codecs.additive_steps import (
    Parts,
    codeword_tables,
    decode,
    decode_transposed,
    group_blocks,
    invert,
    padded_words,
)

EVERY = 64  # a beam that never drops a hypothesis of random_parts()


def with_code(parts, row, group, codes):
    changed = parts.codes.clone()
    changed[row, group] = torch.tensor(codes, dtype=torch.int32)
    return Parts(parts.codebooks, changed, parts.scales)


def problem(parts, seed=0):
    out, groups = parts.codes.shape[:2]
    inputs = groups * parts.codebooks.shape[2]
    return matrix(out, inputs, seed=seed) * 2, hessian(inputs, seed=seed)


def test_decode_is_the_slow_loop_and_its_transpose_the_gradient():
    parts = random_parts(count=3)
    slow = torch.zeros(12, 16)
    for o, j, m in itertools.product(range(12), range(4), range(3)):
        slow[o, 4 * j : 4 * j + 4] += parts.codebooks[m, int(parts.codes[o, j, m])]
    assert torch.allclose(parts.normalised(), slow, atol=1e-6)
    gradient = torch.randn(12, 16, generator=generator())
    leaf = parts.codebooks.clone().requires_grad_()
    picked = torch.stack([leaf[m][parts.codes[..., m].long()] for m in range(3)]).sum(0)
    (picked.reshape(12, 16) * gradient).sum().backward()
    assert torch.allclose(decode_transposed(gradient, parts.codes, 8), leaf.grad, atol=1e-5)


@pytest.mark.parametrize("group_size", [1, 3, 4, 8, 12])
def test_one_group_is_searched_exhaustively_by_the_widest_beam(group_size):
    parts = random_parts(out=5, groups=1, group_size=group_size)
    weight, moment = problem(parts)
    search(weight, moment, parts, beam_size=EVERY)
    for row in range(5):
        losses = [
            loss_of(weight[row], with_code(parts, row, 0, codes).decoded()[row], moment)
            for codes in itertools.product(range(8), repeat=2)
        ]
        found = loss_of(weight[row], parts.decoded()[row], moment)
        assert found == pytest.approx(min(losses), rel=1e-4, abs=1e-5)


def test_groups_are_searched_one_after_the_other_given_the_rest(monkeypatch):
    """A sweep is the slow loop in which each group takes its best codes with all others as they are."""
    parts = random_parts(out=3, groups=5)
    weight, moment = problem(parts)
    slow = Parts(parts.codebooks, parts.codes.clone(), parts.scales)
    for row, group in itertools.product(range(3), range(5)):
        trials = [with_code(slow, row, group, codes) for codes in itertools.product(range(8), repeat=2)]
        losses = [loss_of(weight[row], trial.decoded()[row], moment) for trial in trials]
        slow = trials[losses.index(min(losses))]
    for width in (4, 8, 128):  # where the running product is formed anew makes no difference
        fast = Parts(parts.codebooks, parts.codes.clone(), parts.scales)
        monkeypatch.setattr("vqdm.codecs.additive_fast.BLOCK", width)
        search(weight, moment, fast, beam_size=EVERY)
        assert torch.equal(fast.codes, slow.codes)


def test_the_running_product_and_error_are_what_recomputing_gives():
    parts = random_parts(groups=6)
    weight, moment = problem(parts)
    error = weight - parts.decoded()
    product, codes = error @ moment, parts.codes.clone()
    images, norms = codeword_tables(parts.codebooks, group_blocks(moment, 4))
    tables = (invert(parts.scales), parts.scales, parts.codebooks, padded_words(parts.codebooks), images, norms)
    before = codes.clone()
    kernels.search_groups(
        product.numpy(), moment.numpy(), *(t.numpy() for t in tables), codes.numpy(), error.numpy(), 4
    )
    assert not torch.equal(codes, before)
    again = weight - Parts(parts.codebooks, codes, parts.scales).decoded()
    assert torch.allclose(error, again, atol=1e-5)
    # The last group's columns have heard of every change but its own.
    heard = again.clone()
    heard[:, 20:] = (weight - parts.decoded())[:, 20:]
    assert torch.allclose(product[:, 20:], (heard @ moment)[:, 20:], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("beam_size", [1, 2, 8])
def test_no_sweep_raises_the_loss(beam_size):
    parts = random_parts(out=40, groups=8, count=3, size=16)
    weight, moment = problem(parts)
    losses = [loss_of(weight, parts.decoded(), moment)]
    for _ in range(4):
        search(weight, moment, parts, beam_size=beam_size)
        losses.append(loss_of(weight, parts.decoded(), moment))
    assert losses[1] < 0.8 * losses[0]
    assert all(after <= before * (1 + 1e-5) for before, after in itertools.pairwise(losses))


def test_a_beam_of_one_is_the_greedy_choice():
    parts = random_parts(out=20, groups=1, count=3)
    weight = problem(parts)[0]
    greedy = torch.zeros(20, 1, 3, dtype=torch.int32)
    residual = weight / parts.scales[:, None]
    for m, words in enumerate(parts.codebooks):
        greedy[:, 0, m] = torch.cdist(residual, words).argmin(1)
        residual = residual - words[greedy[:, 0, m].long()]
    start = loss_of(weight, parts.decoded(), torch.eye(4))
    found = Parts(parts.codebooks, parts.codes.clone(), parts.scales)
    search(weight, torch.eye(4), found, beam_size=1)
    better = (weight - Parts(parts.codebooks, greedy, parts.scales).decoded()).square().sum(1) < (
        weight - parts.decoded()
    ).square().sum(1)
    expected = torch.where(better[:, None, None], greedy, parts.codes)  # the present codes stay unless beaten
    assert torch.equal(found.codes, expected) and bool(better.any())
    assert loss_of(weight, found.decoded(), torch.eye(4)) < start


def test_feedback_coupling_factors_the_loss():
    moment = hessian(24)
    coupling = feedback_coupling(moment, 4, 0.01)
    damped = moment + 0.01 * moment.diagonal().mean() * torch.eye(24)
    error = torch.randn(5, 24, generator=generator())
    total = torch.zeros(5)
    for j in range(6):  # ‖δ_j + feedback‖² in the metric of the diagonal block
        here = slice(4 * j, 4 * j + 4)
        metric = coupling[here, here]
        fed_back = error[:, : here.start] @ coupling[: here.start, here]
        target = error[:, here] + torch.linalg.solve(metric, fed_back, left=False)
        total += ((target @ metric) * target).sum(1)
    assert torch.allclose(total, ((error @ damped) * error).sum(1), rtol=1e-3)
    blocks = coupling.view(6, 4, 6, 4).abs().sum((1, 3))
    assert float(blocks.tril(-1).max()) == 0


def test_feedback_is_the_slow_loop():
    parts = random_parts(out=4, groups=5)
    weight, moment = problem(parts)
    coupling = feedback_coupling(moment, 4, 0.01)
    codes = torch.zeros(4, 5, 2, dtype=torch.int32)
    fast = Parts(parts.codebooks, codes.clone(), parts.scales)
    search(weight, coupling, fast, beam_size=EVERY)
    slow = Parts(parts.codebooks, codes, parts.scales)
    for j in range(5):
        here, error = slice(4 * j, 4 * j + 4), weight - slow.decoded()
        metric = coupling[here, here]
        fed_back = error[:, : here.start] @ coupling[: here.start, here]
        target = weight[:, here] + torch.linalg.solve(metric, fed_back, left=False)
        words = (parts.codebooks[0][:, None] + parts.codebooks[1]).view(-1, 4)
        for row in range(4):
            misses = target[row] - parts.scales[row] * words
            best = int(((misses @ metric) * misses).sum(1).argmin())
            slow.codes[row, j] = torch.tensor([best // 8, best % 8], dtype=torch.int32)
    assert torch.equal(fast.codes, slow.codes)


def test_codeword_metrics_are_the_blocks_of_the_normal_equations():
    parts = random_parts()
    moment = hessian(16)
    for m, k, d in ((0, 3, 0), (1, 5, 2)):
        unit = torch.zeros_like(parts.codebooks)
        unit[m, k, d] = 1
        image = decode_transposed(
            parts.scales[:, None].square() * (decode(unit, parts.codes) @ _block_diagonal(moment, 4)), parts.codes, 8
        )
        assert torch.allclose(codeword_metrics(moment, parts)[m, k, d], image[m, k], rtol=1e-4)


def _block_diagonal(moment, group_size):
    return torch.block_diag(*group_blocks(moment, group_size))


def test_whole_rows_are_searched_exhaustively_by_the_widest_beam():
    parts = random_parts(out=3, groups=2, count=2, size=4, group_size=4)
    weight, moment = problem(parts)
    search_rows(weight, moment, parts, generator=generator(), beam_size=4**4)
    every = torch.tensor(list(itertools.product(range(4), repeat=4)), dtype=torch.int32).view(-1, 2, 2)
    for row in range(3):
        trials = decode(parts.codebooks, every) * parts.scales[row] - weight[row]
        best = ((trials @ moment) * trials).sum(1).argmin()
        assert torch.equal(parts.codes[row], every[best])


def test_whole_rows_by_a_narrow_beam_never_raise_the_loss_and_a_wide_one_wins():
    weight, moment = problem(random_parts(out=30, groups=8, count=2, group_size=5))
    losses = {}
    for beam_size in (1, 16):
        parts = random_parts(out=30, groups=8, count=2, group_size=5)
        losses[beam_size] = [loss_of(weight, parts.decoded(), moment)]
        for _ in range(4):
            search_rows(weight, moment, parts, generator=generator(), beam_size=beam_size)
            losses[beam_size].append(loss_of(weight, parts.decoded(), moment))
        assert all(b <= a * (1 + 1e-5) for a, b in itertools.pairwise(losses[beam_size]))
    assert losses[16][-1] < losses[1][-1] < 0.8 * losses[1][0]


def test_a_beam_of_one_over_rows_is_coordinate_search():
    parts = random_parts(out=4, groups=3, count=2)
    weight, moment = problem(parts)
    slow = Parts(parts.codebooks, parts.codes.clone(), parts.scales)
    draws = generator(5)
    order = torch.randperm(3, generator=draws).tolist()
    turns = [torch.randperm(2, generator=draws).tolist() for _ in range(3)]
    for group, turn in zip(order, turns, strict=True):
        for m, row in itertools.product(turn, range(4)):
            losses = []
            for k in range(8):
                slow.codes[row, group, m] = k
                losses.append(loss_of(weight[row], slow.decoded()[row], moment))
            slow.codes[row, group, m] = losses.index(min(losses))
    search_rows(weight, moment, parts, generator=generator(5), beam_size=1)
    assert torch.equal(parts.codes, slow.codes)
