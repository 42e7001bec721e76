"""Schedules against their definitions and, the dynamic one, against every schedule there is."""

import itertools
import math
import random

import pytest

from vqdm.acceleration.schedules import check_calls, dynamic, quadratic, uniform
from vqdm.errors import UserError


def cost_of(full, costs):
    ends = [*full[1:], len(costs)]
    return sum(sum(costs[start][start + 1 : end]) for start, end in zip(full, ends, strict=True))


@pytest.mark.parametrize(("calls", "interval"), [(8, 2), (8, 3), (9, 4), (10, 3)])
def test_dynamic_is_the_best_of_all_schedules(calls, interval):
    draw = random.Random(calls * interval)
    costs = [[draw.random() for _ in range(calls)] for _ in range(calls)]
    count = math.ceil(calls / interval)
    every = [(0, *others) for others in itertools.combinations(range(1, calls), count - 1)]
    allowed = [
        full
        for full in every
        if all(
            math.ceil(interval / 2) <= end - start <= 2 * interval for start, end in itertools.pairwise((*full, calls))
        )
    ]
    found = dynamic(costs, interval)
    assert tuple(found) in allowed
    assert cost_of(found, costs) == pytest.approx(min(cost_of(full, costs) for full in allowed))


def test_dynamic_of_even_drift_is_uniform():
    costs = [[float(abs(i - start)) for i in range(20)] for start in range(20)]
    assert dynamic(costs, 2) == uniform(20, 2) == list(range(0, 20, 2))


@pytest.mark.parametrize(("calls", "interval"), [(20, 2), (20, 3), (50, 5), (50, 10), (8, 8)])
def test_quadratic_is_denser_at_the_beginning(calls, interval):
    full = quadratic(calls, interval)
    assert len(full) == math.ceil(calls / interval) and full[0] == 0 and full == sorted(set(full))
    assert full[-1] < calls
    gaps = [b - a for a, b in itertools.pairwise([*full, calls])]
    assert sum(gaps[: len(gaps) // 2]) <= sum(gaps[len(gaps) // 2 :])


def test_fewer_than_eight_calls_are_refused():
    check_calls(8)
    with pytest.raises(UserError, match="this sampler has 7"):
        check_calls(7)
