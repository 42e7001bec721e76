"""The search's kernel on one sequence whose first state is given: what the choice of a seam is compared with."""

import numpy as np

from vqdm.codecs.viterbi_compiled import _search_column, check_window


def constrained_states(
    targets: np.ndarray, weights: np.ndarray, layouts: np.ndarray, *, quarter_rate: int, first_state: int
) -> np.ndarray:
    """Best states, int32 [T], of one sequence whose value 0 has the given state; arrays as in `choose_states_numpy`."""
    constants = check_window(len(targets), quarter_rate, layouts.shape[1])
    states = np.empty(len(targets), np.int32)
    _search_column(targets, weights, layouts, quarter_rate, len(targets), first_state, states, *constants)
    return states
