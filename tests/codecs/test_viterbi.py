from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from viterbi_columns import constrained_states

from vqdm.codecs import viterbi_torch
from vqdm.codecs.viterbi import Search, choose_states
from vqdm.codecs.viterbi_compiled import choose_states_numpy, prepare, turn_start
from vqdm.seeds import numpy_generator

TABLE = numpy_generator(0, "test table").standard_normal(4096, np.float32)
TINY = numpy_generator(0, "tiny test table").standard_normal(16, np.float32)


def column(out, seed=0):
    """Targets and weights; about one weight in six is 0."""
    rng = numpy_generator(seed, "test column")
    weights = np.maximum(rng.random(out, np.float32) - np.float32(1 / 6), 0)
    return rng.standard_normal(out, np.float32), weights


def cost(states, targets, weights, table):
    return float((weights.astype(np.float64) * (targets - table[states]) ** 2).sum())


def all_sequences(length, rate, window):
    """The states of every bit string, straight from the definition: int [2^B, T]."""
    bits = rate * length // 4
    strings = np.arange(1 << bits)
    return np.stack(
        [sum((strings >> (rate * t // 4 + i) % bits & 1) << i for i in range(window)) for t in range(length)], 1
    )


def assert_cyclic(states, rate, window):
    """Each state's bits are those of the string that all states together spell."""
    length, bits = len(states), rate * len(states) // 4
    places = (np.array([rate * t // 4 for t in range(length)])[:, None] + np.arange(window)) % bits
    string = np.zeros(bits, np.int64)
    string[places] = states[:, None] >> np.arange(window) & 1
    assert ((string[places] << np.arange(window)).sum(1) == states).all()


@pytest.mark.parametrize("length", [5, 6])
@pytest.mark.parametrize("rate", [5, 6, 7, 8])
def test_from_a_given_state_the_search_is_exact(rate, length):
    targets, weights = column(length, seed=rate)
    sequences = all_sequences(length, rate, window=4)
    costs = (weights * (targets - TINY[sequences]) ** 2).sum(1)
    for state in range(16):
        found = constrained_states(targets, weights, prepare(TINY), quarter_rate=rate, first_state=state)
        assert found[0] == state
        assert (sequences == found).all(1).any()
        assert cost(found, targets, weights, TINY) == pytest.approx(costs[sequences[:, 0] == state].min(), abs=1e-5)


@pytest.mark.parametrize("rate", range(4, 25))
def test_states_are_windows_of_circular_strings(rate):
    targets, weights = column(37 + 37 + 19)
    found = choose_states_numpy(targets, weights, prepare(TABLE), quarter_rate=rate, sequence_length=37)
    for part in (found[:37], found[37:74], found[74:]):
        assert_cyclic(part, rate, window=12)


@pytest.mark.parametrize("rate", [5, 7, 8])
def test_tail_biting_comes_close_to_the_best_state_at_the_seam(rate):
    reached = best = 0
    for seed in range(20):
        targets, weights = column(40, seed)
        layouts = prepare(TINY)
        found = choose_states_numpy(targets, weights, layouts, quarter_rate=rate, sequence_length=40)
        closed = [
            cost(
                constrained_states(targets, weights, layouts, quarter_rate=rate, first_state=s), targets, weights, TINY
            )
            for s in range(16)
        ]
        assert cost(found, targets, weights, TINY) >= min(closed) - 1e-5
        reached, best = reached + cost(found, targets, weights, TINY), best + min(closed)
    assert reached < 1.02 * best


@pytest.mark.parametrize("length", [3, 4, 7, 12, 32])
def test_short_sequences(length):
    targets, weights = column(length)
    found = choose_states_numpy(targets, weights, prepare(TABLE), quarter_rate=16, sequence_length=320)
    assert_cyclic(found, 16, window=12)
    best = constrained_states(targets, weights, prepare(TABLE), quarter_rate=16, first_state=int(found[0]))
    assert cost(found, targets, weights, TABLE) <= cost(best, targets, weights, TABLE) + 1e-6


@pytest.mark.parametrize(("rate", "length"), [(4, 50), (4, 16), (7, 50), (10, 20), (13, 41), (24, 40)])
def test_torch_finds_the_same(rate, length):
    columns = [column(length, seed) for seed in range(3)]
    targets, weights = (np.stack(part) for part in zip(*columns, strict=True))
    by_torch = viterbi_torch.choose_states(*map(torch.from_numpy, (targets, weights, TABLE)), quarter_rate=rate).numpy()
    for x, w, states in zip(targets, weights, by_torch, strict=True):
        found = choose_states_numpy(x, w, prepare(TABLE), quarter_rate=rate, sequence_length=length)
        assert cost(states, x, w, TABLE) == pytest.approx(cost(found, x, w, TABLE), rel=1e-5)
        assert_cyclic(states, rate, window=12)


def test_a_column_off_the_cpu_is_cut_alike():
    targets, weights = (torch.from_numpy(part) for part in column(90))
    search = Search(torch.from_numpy(TABLE), 36)
    found = search(targets, weights, 12)
    search.layouts = None  # as on another device
    assert torch.equal(search(targets, weights, 12).states, found.states)
    assert torch.equal(found.values, torch.from_numpy(TABLE)[found.states])
    assert torch.equal(
        choose_states(targets, weights, torch.from_numpy(TABLE), quarter_rate=12, sequence_length=36), found.states
    )


def test_values_of_no_weight_do_not_matter():
    targets, weights = column(70)
    elsewhere = np.where(weights == 0, targets + 9, targets)
    found = [
        choose_states_numpy(x, weights, prepare(TABLE), quarter_rate=12, sequence_length=70)
        for x in (targets, elsewhere)
    ]
    assert (weights == 0).any()
    assert cost(found[0], targets, weights, TABLE) == cost(found[1], targets, weights, TABLE)


def test_every_run_and_thread_finds_the_same():
    targets, weights = column(640)
    search = Search(torch.from_numpy(TABLE), 320)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: search(*map(torch.from_numpy, (targets, weights)), 12).states, range(12)))
    assert all(torch.equal(states, found[0]) for states in found)


def test_columns_need_not_be_contiguous():
    matrix = torch.from_numpy(column(120)[0]).view(60, 2)
    search = Search(torch.from_numpy(TABLE), 60)
    ones = torch.ones(60)
    assert torch.equal(search(matrix[:, 1], ones, 8).states, search(matrix[:, 1].clone(), ones, 8).states)


def test_what_cannot_be_searched_is_refused():
    search = Search(torch.from_numpy(TABLE), 40)
    with pytest.raises(ValueError, match="do not fill a window of 12 bits"):
        search(torch.zeros(51), torch.ones(51), 4)  # the last sequence has 11
    for rate in (3, 25):
        with pytest.raises(ValueError, match="do not suit a window"):
            search(torch.zeros(40), torch.ones(40), rate)
    search.layouts = None
    with pytest.raises(ValueError, match="do not fill"):
        search(torch.zeros(11), torch.ones(11), 4)


def test_turns_start_from_different_values():
    assert [turn_start(turn, 16) for turn in range(1, 5)] == [0, 10, 4, 14]
