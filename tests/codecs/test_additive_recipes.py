"""The steps of both recipes for additive codes, each against its closed form or a slow reference."""

import itertools

import pytest
import torch
from additive_problems import generator, hessian, loss_of, matrix, random_parts

from vqdm.codecs import additive_fast, additive_paper
from vqdm.codecs.additive_fast import encode_fast, fit_codebooks, fit_scales, round_parts, search
from vqdm.codecs.additive_paper import encode_paper, initial_parts, set_gradients
from vqdm.codecs.additive_steps import Parts, decode

SIZES = {"num_codebooks": 2, "codebook_size": 16, "group_size": 8}


def fast(weight, moment, **options):
    return encode_fast(
        weight, moment, **({"generator": generator(), "beam_size": 8, "damping": 0.01} | SIZES | options)
    )


def paper(weight, moment, **options):
    return encode_paper(weight, moment, **({"generator": generator(), "beam_size": 2} | SIZES | options))


def problem(parts):
    out, groups = parts.codes.shape[:2]
    inputs = groups * parts.codebooks.shape[2]
    return 3 * matrix(out, inputs), hessian(inputs)


def test_codebooks_approach_the_least_squares_solution():
    parts = random_parts(out=30)
    weight, moment = problem(parts)
    root = torch.linalg.cholesky(moment.double() + 1e-12 * torch.eye(16))
    columns = []  # the decoded weight is linear in the codebooks
    for i in range(parts.codebooks.numel()):
        unit = torch.zeros(parts.codebooks.numel())
        unit[i] = 1
        decoded = parts.scales[:, None] * decode(unit.view_as(parts.codebooks), parts.codes)
        columns.append((decoded.double() @ root).flatten())
    design, target = torch.stack(columns, 1), (weight.double() @ root).flatten()
    best = design @ torch.linalg.lstsq(design, target, driver="gelsd").solution
    least = float((best - target).square().sum())
    losses = [loss_of(weight, parts.decoded(), moment)]
    for steps in (1, 2, 4, 8, 100):
        found = Parts(fit_codebooks(weight, moment, parts, steps=steps), parts.codes, parts.scales)
        losses.append(loss_of(weight, found.decoded(), moment))
    assert all(after <= before * (1 + 1e-5) for before, after in itertools.pairwise(losses))
    assert losses[-1] == pytest.approx(least, rel=1e-3)


def test_codewords_without_groups_stay():
    parts = random_parts(size=64)
    weight, moment = problem(parts)
    found = fit_codebooks(weight, moment, parts, steps=8)
    unused = torch.ones(2, 64, dtype=torch.bool)
    for m in range(2):
        unused[m, parts.codes[..., m].unique().long()] = False
    assert bool(unused.any()) and torch.equal(found[unused], parts.codebooks[unused])


def test_scales_are_the_best_of_a_grid():
    parts = random_parts()
    weight, moment = problem(parts)
    scales = fit_scales(weight, moment, parts)
    for row in range(3):
        grid = scales[row] * torch.linspace(0.9, 1.1, 201)
        error = weight[row] - grid[:, None] * parts.normalised()[row]
        losses = ((error.double() @ moment.double()) * error).sum(1)
        assert int(losses.argmin()) == pytest.approx(100, abs=1)


def test_no_step_of_the_fast_recipe_raises_the_loss(monkeypatch):
    """Recorded around every step of a whole run; feedback passes may, rounding costs next to nothing."""
    weight, moment = matrix(), hessian()
    steps = []

    def recording(name, step):
        def recorded(weight, matrix, parts, **options):
            before = loss_of(weight, parts.decoded(), moment[order][:, order])
            result = step(weight, matrix, parts, **options)
            after = result if isinstance(result, Parts) else parts
            feedback = name == "search" and not torch.equal(matrix, matrix.T)
            loss = loss_of(weight, after.decoded(), moment[order][:, order])
            steps.append(("feedback" if feedback else name, before, loss))
            return result

        return recorded

    energy = moment.diagonal().view(-1, 8).sum(1)
    order = (energy.argsort(descending=True)[:, None] * 8 + torch.arange(8)).flatten()
    for name in ("search", "fit", "round_parts"):
        monkeypatch.setattr(additive_fast, name, recording(name, getattr(additive_fast, name)))
    parts = fast(weight, moment)
    names = [name for name, _, _ in steps]
    assert names[0] == "feedback" and {"search", "fit", "round_parts"} <= set(names)
    for name, before, after in steps:
        if name in ("search", "fit"):
            assert after <= before * (1 + 1e-5), name
        elif name == "round_parts":
            assert after <= before * (1 + 1e-3)
    assert loss_of(weight, parts.decoded(), moment) < 0.95 * steps[0][2]  # where the first feedback pass ended


def test_feedback_passes_that_raise_the_loss_are_undone(monkeypatch):
    weight, moment = matrix(), hessian()
    parts = Parts(*(getattr(fast(weight, moment), name) for name in ("codebooks", "codes", "scales")))
    monkeypatch.setattr(additive_fast, "fit", lambda weight, hessian, parts, learned: parts.scales.mul_(1.0))
    monkeypatch.setattr(additive_fast, "search", lambda *args, **options: None)
    kept = additive_fast._feedback_passes(weight, moment, moment, parts, learned=True, beam_size=1)
    assert kept is parts


def test_rounding_is_to_fp16_and_codes_make_up_for_it():
    weight, moment = matrix(), hessian()
    parts = fast(weight, moment)
    for stored in (parts.codebooks, parts.scales):
        assert torch.equal(stored, stored.half().float())
    coarse = Parts(parts.codebooks * 1.003, parts.codes, parts.scales)  # as if not yet rounded
    rounded = round_parts(weight, moment, coarse, beam_size=8)
    plain = Parts(coarse.codebooks.half().float(), coarse.codes, coarse.scales.half().float())
    assert loss_of(weight, rounded.decoded(), moment) <= loss_of(weight, plain.decoded(), moment)


def test_fixed_codebooks_are_not_touched():
    codebooks = torch.randn(2, 16, 8, generator=generator())
    parts = fast(matrix(), hessian(), codebooks=codebooks)
    assert torch.equal(parts.codebooks, codebooks.half().float())


def test_codes_come_back_in_the_order_of_the_inputs():
    """The recipe visits strong groups first; its codes belong to the inputs as they were given."""
    weight, moment = matrix(), hessian()
    moment = moment.flip(0, 1).contiguous()
    parts = fast(weight, moment)
    before = Parts(parts.codebooks, parts.codes.clone(), parts.scales)
    search(weight, moment, parts, beam_size=8)
    assert loss_of(weight, before.decoded(), moment) < 1.02 * loss_of(weight, parts.decoded(), moment)


def test_paper_starts_from_l2_norms_and_residual_kmeans():
    weight = matrix()
    parts = initial_parts(weight, 2, 16, 8, generator=generator())
    assert torch.allclose(parts.scales, weight.square().sum(1).sqrt())
    groups = (weight / parts.scales[:, None]).view(-1, 8)
    first = torch.cdist(groups, parts.codebooks[0]).argmin(1)
    second = torch.cdist(groups - parts.codebooks[0][first], parts.codebooks[1]).argmin(1)
    assert torch.equal(parts.codes.view(-1, 2).long(), torch.stack([first, second], 1))


def test_paper_gradients_are_those_of_autograd():
    parts = random_parts()
    weight, moment = problem(parts)
    loss = set_gradients(weight, moment, parts)
    codebooks, scales = (x.detach().clone().requires_grad_() for x in (parts.codebooks, parts.scales))
    picked = sum(codebooks[m][parts.codes[..., m].long()] for m in range(2)).reshape(weight.shape)
    error = scales[:, None] * picked - weight
    expected = ((error @ moment) * error).sum() / len(weight)
    expected.backward()
    assert loss == pytest.approx(float(expected.detach()), rel=1e-5)
    assert torch.allclose(parts.codebooks.grad, codebooks.grad, rtol=1e-4, atol=1e-4)
    assert torch.allclose(parts.scales.grad, scales.grad, rtol=1e-4, atol=1e-4)


def test_paper_epochs_are_100_adam_steps_and_a_search_until_one_gains_less_than_a_hundredth(monkeypatch):
    events, losses = [], []

    class Watched(torch.optim.Adam):
        def __init__(self, parameters, **settings):
            assert settings == {"lr": 1e-4, "betas": (0.0, 0.95), "amsgrad": True}
            super().__init__(parameters, **settings)

        def step(self):
            events.append("step")
            super().step()

    def searched(weight, hessian, parts, **options):
        losses.append(set_gradients(weight, hessian, parts))
        search_rows(weight, hessian, parts, **options)
        losses.append(set_gradients(weight, hessian, parts))
        events.append("search")

    search_rows = additive_paper.search_rows
    monkeypatch.setattr(torch.optim, "Adam", Watched)
    monkeypatch.setattr(additive_paper, "search_rows", searched)
    weight, moment = matrix(), hessian()
    start = set_gradients(weight, moment, initial_parts(weight, 2, 16, 8, generator=generator()))
    parts = paper(weight, moment)
    epochs = events.count("search")
    assert events == (["step"] * 100 + ["search"]) * epochs and epochs > 2
    first = [start, *losses[1::2]]  # the loss with which each epoch begins
    gains = [1 - after / before for before, after in itertools.pairwise(first)]
    assert all(gain > 0.01 for gain in gains[:-1]) and gains[-1] <= 0.01
    assert all(after <= before * (1 + 1e-5) for before, after in itertools.pairwise(losses))
    assert torch.equal(parts.scales, parts.scales.half().float())


def test_the_fast_recipe_beats_the_published_one():
    weight, moment = matrix(), hessian()
    ours, theirs = (loss_of(weight, parts.decoded(), moment) for parts in (fast(weight, moment), paper(weight, moment)))
    assert ours < theirs
