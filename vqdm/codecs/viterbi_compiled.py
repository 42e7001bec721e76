"""The search of `viterbi`, compiled by numba. Constants stand in this file, the only one that numba's cache watches."""

import numpy as np

from vqdm.runs.compiling import njit

SEAM = 32  # values on either side of the seam that decide its state; a sequence of at most so many is short


SHORT_TURNS = 4  # full searches of a short sequence


LAYOUTS = 4  # number of the table's layouts: shifts below this read it transposed


UNROLLED = 8  # predecessors compared at once for shifts from LAYOUTS on; divides 2^(LAYOUTS − 1)


def choose_states_numpy(
    targets: np.ndarray, weights: np.ndarray, layouts: np.ndarray, *, quarter_rate: int, sequence_length: int
) -> np.ndarray:
    """Choose states on contiguous float32 arrays, with `layouts` from `prepare`: int32 [out]. Releases the GIL.

    Compiled at the first call for a pair of shifts (half a second to two), then cached on disk.
    """
    constants = check_window(shortest_sequence(len(targets), sequence_length), quarter_rate, layouts.shape[1])
    states = np.empty(len(targets), np.int32)
    _search_column(targets, weights, layouts, quarter_rate, sequence_length, -1, states, *constants)
    return states


def prepare(table: np.ndarray) -> np.ndarray:
    """The table in the orders of the search, float32 [LAYOUTS, 2^L]: row K has state (j << K) | n at [n, j]."""
    return np.stack([table.reshape(-1, 1 << shift).T.ravel() for shift in range(LAYOUTS)]).astype(np.float32)


def turn_start(turn: int, length: int) -> int:
    """The value from which a full search starts: 0 in turn 1, then spread over the circle."""
    return (turn - 1) * 5 * length // 8 % length


def shortest_sequence(out: int, sequence_length: int) -> int:
    return min(out, out % sequence_length or sequence_length)


def check_window(length: int, quarter_rate: int, size: int) -> tuple[tuple[int, ...], ...]:
    """Tuples as long as the lower shift, the higher shift and L, which numba compiles in as constants."""
    window = size.bit_length() - 1
    low, high = quarter_rate // 4, -(-quarter_rate // 4)
    if quarter_rate * length // 4 < window:
        raise ValueError(f"{length} values of {quarter_rate}/4 bits do not fill a window of {window} bits")
    if not 1 <= low <= high <= window // 2:
        raise ValueError(f"{quarter_rate}/4 bits per value do not suit a window of {window} bits")
    return (0,) * low, (0,) * high, (0,) * window


_compiled = njit(nogil=True, cache=True, error_model="numpy")


_turn_start = _compiled(turn_start)


@_compiled
def _search_column(targets, weights, layouts, rate, length, given, states, low, high, window):
    """Search each sequence of a column from `given`, the state of its value 0, or from the seam's best if negative.

    low, high, window: tuples whose lengths are the rate's two shifts and L.
    """
    size = layouts.shape[1]
    costs = np.empty((max(min(length, len(targets)), 2 * SEAM), size >> len(low)), np.float32)  # m_t for every value t
    spare = np.empty(size >> len(low), np.float32)
    for start in range(0, len(targets), length):
        x, w, found = targets[start : start + length], weights[start : start + length], states[start : start + length]
        found[0] = given
        turns = 1 if given >= 0 or len(x) > SEAM else SHORT_TURNS
        for turn in range(given >= 0, turns + 1):  # turn 0 is the search at the seam
            first, count = (_turn_start(turn, len(x)), len(x)) if turn else (-SEAM, 2 * SEAM)
            reachable = size >> _shift(rate, first + count - 1, len(x))
            costs[count - 1, :reachable] = np.inf if turn else 0
            costs[count - 1, found[first % len(x)] & (reachable - 1)] = 0
            # forward, from the last value to the first:
            # m_{t−1}[s mod 2^(L−K_{t−1})] = min over the top K_{t−1} bits of s of m_t[s >> K_t] + w_t (x_t − table[s])²
            for i in range(count - 1, 0, -1):
                t = (first + i) % len(x)
                more, next_more = _shift(rate, t, len(x)) > len(low), _shift(rate, t - 1, len(x)) > len(low)
                if len(low) == len(high) or not (more or next_more):
                    _add_value(costs[i], x[t], w[t], layouts, costs[i - 1], spare, low, low, window)
                elif not more:
                    _add_value(costs[i], x[t], w[t], layouts, costs[i - 1], spare, low, high, window)
                elif not next_more:
                    _add_value(costs[i], x[t], w[t], layouts, costs[i - 1], spare, high, low, window)
                else:
                    _add_value(costs[i], x[t], w[t], layouts, costs[i - 1], spare, high, high, window)
            # back, from the first value to the last: s_{t+1} is the state s with low bits s_t >> K_t and the least
            # m_{t+1}[s >> K_{t+1}] + w_{t+1} (x_{t+1} − table[s])²
            shift = _shift(rate, first, len(x))
            state = found[first] if turn else np.argmin(costs[0, : size >> shift]) << shift
            for i in range(count - 1 if turn else SEAM):
                found[(first + i) % len(x)] = state
                state = _step_back(state, x, w, layouts, rate, (first + i) % len(x), costs[i + 1])
            found[(first + count - 1 if turn else 0) % len(x)] = state


@_compiled
def _shift(rate, t, length):
    """The shift K_t = b_{t+1} − b_t, circularly, with b_t = ⌊q t / 4⌋."""
    t %= length
    return rate * (t + 1) // 4 - rate * t // 4


@_compiled
def _add_value(before, x, w, layouts, after, spare, shift, following, window):
    """Make one step from m_t to m_{t−1}.

    State bits from the top: a (`following` of them), u, n (the `shift` new ones).
    """
    # after[u, n] = min over a of (before[a, u] + w (x − table[a, u, n])²)
    n_count, a_count = 1 << len(shift), 1 << len(following)
    u_count = (1 << len(window)) // (n_count * a_count)
    if len(shift) < LAYOUTS:  # few values of n: vectors run along u, and the result is transposed
        table = layouts[len(shift)]
        for n in range(n_count):
            for u in range(u_count):
                best = np.float32(np.inf)
                for a in range(a_count):
                    error = x - table[(n * a_count + a) * u_count + u]
                    cost = before[a * u_count + u] + w * (error * error)
                    best = cost if cost < best else best
                spare[n * u_count + u] = best
        for u in range(u_count):
            for n in range(n_count):
                after[u * n_count + n] = spare[n * u_count + u]
        return
    table = layouts[0]
    for u in range(u_count):
        for n in range(n_count):
            after[u * n_count + n] = np.inf
        for part in range(a_count // UNROLLED):
            for n in range(n_count):
                best = after[u * n_count + n]
                for i in range(UNROLLED):
                    j = (part * UNROLLED + i) * u_count + u
                    error = x - table[j * n_count + n]
                    cost = before[j] + w * (error * error)
                    best = cost if cost < best else best
                after[u * n_count + n] = best


@_compiled
def _step_back(state, x, w, layouts, rate, t, costs):
    """The state of value t + 1 on the best path through `state` at value t; costs: m_{t+1}."""
    states, shift, after = layouts.shape[1], _shift(rate, t, len(x)), (t + 1) % len(x)
    lowest, chosen = np.float32(np.inf), state >> shift
    for candidate in range(state >> shift, states, states >> shift):
        error = x[after] - layouts[0, candidate]
        cost = costs[candidate >> _shift(rate, after, len(x))] + w[after] * (error * error)
        if cost < lowest:
            lowest, chosen = cost, candidate
    return chosen
