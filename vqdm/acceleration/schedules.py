"""Schedules of a feature cache: which calls of a sampler are full. The others reuse what the last full calls gave."""

import math
from collections.abc import Sequence

from vqdm.config.acceleration import LEAST_CALLS
from vqdm.errors import UserError


def check_calls(calls: int) -> None:
    """UserError for a sampler of fewer than `LEAST_CALLS` calls."""
    if calls < LEAST_CALLS:
        raise UserError(
            f"a cache needs at least {LEAST_CALLS} calls of the denoiser, and this sampler has {calls}: there is "
            "nothing to reuse; leave cache=none"
        )


def full_count(calls: int, interval: int) -> int:
    return math.ceil(calls / interval)


def uniform(calls: int, interval: int) -> list[int]:
    """Every `interval`-th call, from the first on (DeepCache, arXiv 2312.00858)."""
    return list(range(0, calls, interval))


def quadratic(calls: int, interval: int, *, power: float = 1.5) -> list[int]:
    """As many full calls as `uniform` has, denser at the beginning: call k is at ⌊calls · (k / count)^power⌋.

    The power falls until all are different (DeepCache's non-uniform schedule).
    """
    count = full_count(calls, interval)
    while power > 1:
        found = [int(calls * (k / count) ** power) for k in range(count)]
        if len(set(found)) == count:
            return found
        power -= 0.02
    return uniform(calls, interval)


def dynamic(costs: Sequence[Sequence[float]], interval: int) -> list[int]:
    """As many full calls as `uniform` has, at the least summed cost (CacheQuant, arXiv 2503.01323, DPS).

    costs: [start][i] is what it costs when call i reuses the feature of call `start`. A run, a full call and the calls
    that reuse it, is ⌈interval / 2⌉ to 2 · interval calls long. Of equally good schedules that whose last runs are
    shortest.
    """
    calls, count = len(costs), full_count(len(costs), interval)
    shortest, longest = math.ceil(interval / 2), 2 * interval
    best: list[dict[int, tuple[float, int]]] = [{0: (0.0, 0)}]  # by number of runs: {end: (cost, start of the last)}
    for _ in range(count):
        reached: dict[int, tuple[float, int]] = {}
        for start, (cost, _start) in best[-1].items():
            for end in range(start + shortest, min(start + longest, calls) + 1):
                total = cost + sum(costs[start][start + 1 : end])
                if end not in reached or total <= reached[end][0]:
                    reached[end] = total, start
        best.append(reached)
    starts, end = [], calls
    for reached in reversed(best[1:]):
        end = reached[end][1]
        starts.append(end)
    return starts[::-1]
