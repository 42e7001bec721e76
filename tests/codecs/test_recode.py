import copy
import itertools

import numpy as np
import pytest
import torch
from viterbi_columns import constrained_states

from vqdm.codecs import additive, recode, rtn, trellis
from vqdm.codecs.additive import train_shared_codebooks
from vqdm.codecs.recode import recode_
from vqdm.codecs.trellis_table import load_table
from vqdm.codecs.viterbi_compiled import prepare
from vqdm.errors import UserError
from vqdm.seeds import torch_generator
from vqdm.weights.additive import AdditiveScheme, AdditiveWeight
from vqdm.weights.registry import empty_weight
from vqdm.weights.scalar import ScalarScheme
from vqdm.weights.trellis import TrellisScheme, TrellisTable, TrellisWeight
from vqdm.weights.trellis_codes import pack_states, unpack_states
from vqdm.weights.trellis_format import WIDE, WINDOW_BITS, column_bits, sequence_length, side_bytes

SMALL = {"num_codebooks": 2, "codebook_bits": 4, "group_size": 4}
OUT, INPUTS = 353, 12  # columns of two sequences, of 177 and 176


def gaussian(*shape, seed=0):
    return torch.randn(shape, generator=torch_generator(seed, "test"))


def encoded(kind, matrix):
    eye, generator = torch.eye(matrix.shape[1]), torch_generator(0, "encode")
    if kind == "scalar":
        return rtn.encode(matrix, bits=3, group_size=4)
    if kind == "split":
        return rtn.encode_split(matrix, 5, bits=3)
    if kind == "trellis":
        return trellis.encode(matrix, eye, bits=5.5, table=TrellisTable.from_values(load_table()))
    shared = None
    if kind == "shared":
        shared = train_shared_codebooks([matrix], generator=torch_generator(0, "shared"), **SMALL)
    return additive.encode(matrix, eye, generator=generator, shared=shared, input_scales=kind == "columns", **SMALL)


@pytest.fixture(scope="module", params=["scalar", "split", "additive", "columns", "shared", "trellis"])
def made(request):
    """A weight of rows and columns of very different size; one of the rows and one of the columns are zero."""
    matrix = gaussian(OUT, INPUTS) * torch.logspace(-2, 0, OUT)[:, None] * torch.logspace(0, -1, INPUTS)
    matrix[5], matrix[:, 7] = 0, 0
    return encoded(request.param, matrix)


@pytest.fixture
def weight(made):
    return copy.deepcopy(made)


def codes_of(weight):
    """By unit that a weight counts: [n], or [n, M]; 0 where there are no bits."""
    if isinstance(weight, TrellisWeight):
        rates = weight.unpacked_rates()
        return (unpack_states(weight.stream, rates, weight.shape[0]) * (rates > 0)[:, None]).T.flatten()
    codes = weight.unpacked_codes()
    return codes.flatten(0, 1) if isinstance(weight, AdditiveWeight) else codes.flatten()


def units(weight, squares):
    """Sums of squares [out, in] over what must never get worse."""
    if isinstance(weight, AdditiveWeight):
        return squares.view(-1, weight.scheme.group_size).sum(1)
    if isinstance(weight, TrellisWeight):
        return torch.cat([part.sum(0) for part in squares.split(sequence_length(len(squares)))])
    return squares


@torch.no_grad()
def errors(weight, target):
    return units(weight, (target.double() - weight().double()).square())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("distance", [1e-3, 0.1, 0.5, 30.0])
def test_nothing_gets_further_from_the_target(weight, dtype, distance):
    weight = weight.to(dtype)
    for shared in weight.shared:
        shared.to(dtype)
    decoded = weight().detach().float()
    target = decoded + distance * decoded.square().mean().sqrt() * gaussian(*weight.shape, seed=1)
    before, old = errors(weight, target), codes_of(weight)
    floats = [p.clone() for p in weight.parameters()]
    changed = recode_(weight, target)
    differing = (codes_of(weight) != old).view(len(old), -1).any(1)
    assert changed == int(differing.sum())
    assert changed > 0 or distance < 0.3
    after = errors(weight, target)
    assert bool((after <= before * (1 + 1e-6)).all())
    assert changed == 0 or float(after.sum()) < float(before.sum())
    assert all(torch.equal(p, q) for p, q in zip(weight.parameters(), floats, strict=True))


def test_the_weight_itself_as_target_changes_nothing(weight):
    recode_(weight, gaussian(*weight.shape))
    codes = weight.codes.clone()
    for model in (weight, weight.float()):
        assert recode_(model, model().detach().float()) == 0
        assert torch.equal(model.codes, codes)


def test_the_same_target_gives_the_same_bytes_and_settles_at_once(weight):
    other, target = copy.deepcopy(weight), gaussian(*weight.shape)
    assert recode_(weight, target) == recode_(other, target.T.contiguous().T) > 0  # strides do not matter
    assert torch.equal(weight.codes, other.codes)
    before = errors(weight, target)
    recode_(weight, target)
    assert bool((errors(weight, target) <= before).all())


def test_new_codes_are_read_from_a_file_as_any(weight):
    recode_(weight, gaussian(*weight.shape))
    loaded = empty_weight(weight.scheme, weight.shape, *weight.shared)
    loaded.load_state_dict(weight.state_dict())
    assert torch.equal(loaded().detach(), weight().detach())
    if isinstance(weight, TrellisWeight):
        rates = weight.unpacked_rates()
        states = unpack_states(weight.stream, rates, OUT)
        assert torch.equal(pack_states(states, rates, len(weight.stream)), weight.stream)


def test_rows_without_scale_stay_zero(weight):
    if isinstance(weight, TrellisWeight):
        weight.row_scales.data[9] = 0
    else:
        weight.scales.data[9] = 0
    codes = codes_of(weight).view(OUT, -1)[9].clone()
    assert recode_(weight, gaussian(*weight.shape)) > 0
    assert float(weight()[9].detach().abs().max()) == 0
    if not isinstance(weight, TrellisWeight):  # there a row's states are windows of what other rows spell
        assert torch.equal(codes_of(weight).view(OUT, -1)[9], codes)


def test_scales_of_all_sizes_and_signs(weight):
    weight = weight.float()
    for name, scales in weight.named_parameters():
        if "scales" in name:
            flat = scales.data.view(-1)
            flat[::7] *= -1
            flat[1::11] = 1e-25
            flat[2::13] = 1e6
    target = weight().detach() + gaussian(*weight.shape)
    before = errors(weight, target)
    recode_(weight, target)
    assert bool((errors(weight, target) <= before * (1 + 1e-6)).all())


@torch.no_grad()
def every_sum(weight):
    """The sums of codewords of all combinations of codes: [16^M, M], [16^M, group_size]."""
    codebooks = weight.effective_codebooks().float()[:, :, 0]
    combinations = torch.tensor(list(itertools.product(range(codebooks.shape[1]), repeat=len(codebooks))))
    return combinations, sum(words[combinations[:, m]] for m, words in enumerate(codebooks))


@pytest.mark.parametrize("kind", ["additive", "columns", "shared"])
@pytest.mark.parametrize("count", [1, 2])
@torch.no_grad()
def test_a_wide_beam_finds_the_best_of_all_codes(kind, count, monkeypatch):
    monkeypatch.setitem(SMALL, "num_codebooks", count)
    weight = encoded(kind, gaussian(24, 16) * torch.logspace(0, -1, 16)).float()
    target = gaussian(24, 16, seed=1)
    _, sums = every_sum(weight)
    columns = torch.ones(16) if weight.input_scales is None else weight.input_scales
    all_weights = weight.scales[:, None, None, None] * sums * columns.view(4, 1, 4)  # [out, groups, combinations, 4]
    best = (target.view(24, 4, 1, 4) - all_weights).square().sum(3).amin(2)
    recode_(weight, target, beam_size=16)
    assert torch.allclose(errors(weight, target).view(24, 4).float(), best, rtol=1e-4)


@torch.no_grad()
def test_scalar_codes_are_the_nearest_of_all():
    weight = encoded("scalar", gaussian(24, 16)).float()
    weight.zeros += 0.3  # as training leaves them
    target = 2 * gaussian(24, 16, seed=1)
    levels = (torch.arange(8.0) - weight.zeros[..., None]) * weight.scales[..., None]
    distances = (target.view(24, 4, 4, 1) - levels[:, :, None]).abs()
    recode_(weight, target)
    assert torch.allclose((target - weight()).abs().view(24, 4, 4), distances.amin(3), atol=1e-6)


def windows(bits, out, rate):
    """The states that a circular string of bits spells, from the format's definition: [out]."""
    return [sum(bits[(rate * t // 4 + i) % len(bits)] << i for i in range(WINDOW_BITS)) for t in range(out)]


def planted(out, rates, *, seed=0, table=None):
    """A trellis weight of random paths, one sequence a column; scales are random but for three of 0."""
    generator, states = torch_generator(seed, "paths"), torch.zeros(len(rates), out, dtype=torch.int32)
    for j, rate in enumerate(rates):
        if rate:
            bits = torch.randint(0, 2, (rate * out // 4,), generator=generator).tolist()
            states[j] = torch.tensor(windows(bits, out, rate))
    needed = int(column_bits(out, torch.tensor(rates)).sum()) + 8 * side_bytes((out, len(rates)), WIDE) + 8
    scales = torch_generator(0, "scales")  # of every seed
    rows, columns = (torch.rand(n, generator=scales) + 0.3 for n in (out, len(rates)))
    rows[3], columns[1] = 0, 0
    return TrellisWeight.from_parts(
        TrellisScheme(bits=needed / (out * len(rates))), states, torch.tensor(rates),
        table=table or TrellisTable.from_values(load_table()), row_scales=rows, column_scales=columns,
    )  # fmt: skip


def test_a_path_of_the_trellis_is_found_and_dead_columns_are_left():
    rates = [8, 8, 0, 4, 7, 13, 24, 8, 0]
    weight = planted(200, rates)
    there = planted(200, rates, seed=1, table=weight.shared[0])
    target = there().detach().float()
    target[3], target[:, 1], target[:, 2], target[:, 8] = 1.0, 1.0, 1.0, 1.0  # where nothing can follow
    old = unpack_states(weight.stream, torch.tensor(rates), 200)
    changed = recode_(weight, target)
    new, wanted = (unpack_states(w.stream, torch.tensor(rates), 200) for w in (weight, there))
    assert changed == int((new != old)[torch.tensor(rates) > 0].sum()) > 0
    assert torch.equal(new[1], old[1]), "a column of scale 0"
    for j in (0, 3, 4, 5, 6, 7):
        assert torch.equal(weight()[:, j], there()[:, j])
        assert torch.equal(new[j, 20:], wanted[j, 20:])  # row 3, of scale 0, leaves some bits open
    assert float(weight()[:, [1, 2, 8]].detach().abs().max()) == 0


@torch.no_grad()
def test_trellis_codes_are_all_but_the_best():
    """The best path of a sequence is the cheapest of those from each of the 4096 states that it may start in."""
    rates = [4, 8, 10, 12, 8]
    weight = planted(64, rates).float()
    table = weight.shared[0].float().table
    target, layouts = gaussian(64, len(rates), seed=2) * 0.7, prepare(table.numpy())
    assert recode_(weight, target) > 0
    found = errors(weight, target)
    optima = torch.full_like(found, torch.nan)  # of no column of scale 0
    for j, rate in enumerate(rates):
        if weight.factors()[3][j] == 0:
            continue
        scales = weight.row_scales * weight.factors()[3][j]
        x, w = (torch.where(scales != 0, target[:, j] / scales, 0).numpy(), scales.square().numpy())
        paths = np.stack([
            constrained_states(x, w, layouts, quarter_rate=rate, first_state=state) for state in range(len(table))
        ])  # fmt: skip
        optima[j] = (target[:, j] - scales * table[torch.from_numpy(paths)]).double().square().sum(1).min()
    excess = (found / optima - 1)[optima > 0]
    assert len(excess) == 4 and float(excess.min()) > -1e-4
    assert float(excess.max()) < 0.1 and float(excess.min()) < 1e-4, "where the seam's state is missed, some is lost"


def test_columns_off_the_cpu_are_searched_alike(monkeypatch):
    class InTorch(recode.Search):
        def __init__(self, table, sequence_length):
            super().__init__(table, sequence_length)
            self.layouts = None  # as on another device

    weight = encoded("trellis", gaussian(OUT, INPUTS))
    other, target = copy.deepcopy(weight), gaussian(INPUTS, OUT, seed=1).T
    monkeypatch.setattr(recode, "CHUNK", 2 * OUT)
    changed = recode_(weight, target)
    monkeypatch.setattr(recode, "Search", InTorch)
    assert recode_(other, target) == changed > 0
    assert torch.equal(other.codes, weight.codes)


def test_what_a_search_makes_worse_is_not_taken(monkeypatch):
    class Astray(recode.Search):
        def __call__(self, targets, weights, quarter_rate):
            return super().__call__(targets, weights, quarter_rate)._replace(states=torch.zeros(len(targets)).int())

    def astray(weight, coupling, parts, *, beam_size):
        parts.codes.zero_()

    monkeypatch.setattr(recode, "Search", Astray)
    monkeypatch.setattr(recode, "search", astray)
    for kind in ("trellis", "additive"):
        weight = encoded(kind, gaussian(64, 16))
        target, old = weight().detach().float() + 0.01, codes_of(weight)
        before = errors(weight, target)
        changed = recode_(weight, target)
        assert changed < 0.01 * len(old)
        assert bool((errors(weight, target) <= before).all())


def test_what_cannot_be_followed_is_refused(weight):
    codes = weight.codes.clone()
    target = gaussian(*weight.shape)
    with pytest.raises(ValueError, match=r"must be \[353, 12\], not \[12, 353\]"):
        recode_(weight, target.T)
    target[3, 3] = torch.nan
    with pytest.raises(UserError, match="lower the learning rate"):
        recode_(weight, target)
    assert torch.equal(weight.codes, codes)


def test_weights_of_other_kinds_are_refused():
    blocks = empty_weight(AdditiveScheme(num_codebooks=1, codebook_bits=2, group_size=4, out_group_size=2), (8, 8))
    with pytest.raises(ValueError, match="several outputs"):
        recode_(blocks, torch.zeros(8, 8))
    whole = empty_weight(ScalarScheme(bits=2), (8, 8))
    assert recode_(whole, torch.ones(8, 8)) == 0  # scales of 0: no code is nearer than another
