"""The table of the trellis codec: one value per state, for N(0, 1) data, the same for every rate and every model.

It starts as Gaussian quantiles in the order of a linear map over GF(2): bit r of the rank, from the top, is a parity of
state bits. The first k rows are invertible on the k lowest and on the k highest bits of the state, for every k up to 6.
So at every rate the 2^K values that may precede a state lie one in each 2^K-th of the distribution, and so do the 2^K
that may follow (the nested form of Ungerboeck's set partitioning). Such maps differ by 0.2 dB, so many are tried.
Lloyd's iteration then alternates a search with putting each value at the centroid of the data that chose it. Every rate
counts by its relative error, with targets scaled by `target_scale`: one table serves all rates at different widths.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from vqdm.codecs.viterbi_compiled import choose_states_numpy, prepare
from vqdm.seeds import numpy_generator

TABLE_FILE = Path(__file__).resolve().parent.parent / "weights" / "trellis_table.safetensors"
WINDOW_BITS = 12
HIGHEST_SHIFT = 6
SEQUENCE = 320
SCORED_RATES = (6, 8, 10, 12, 14, 16, 20)  # rates, in quarter bits, by which maps are chosen
TRAINED_RATES = (4, 6, 8, 10, 12, 14, 16, 20, 24)
TARGET_SCALES = ((4, 8, 12, 16, 24), (1.06, 1.0, 0.94, 0.91, 0.88))  # scale by quarter bits; linear in between
SCORED_SAMPLES = 32_000
MEMORY = 10  # iterations after which the running sums of a centroid begin to forget


def load_table() -> Tensor:
    """The shipped table: fp32 [4096], values that fp16 holds exactly."""
    return load_file(TABLE_FILE)["table"].float()


def train_table(
    *,
    seed: int,
    candidates: int,
    iterations: int,
    samples: int,
    progress: Callable[[Iterable, str], Iterable] = lambda steps, name: steps,
) -> Tensor:
    """Train a table [4096], fp32; the same arguments give the same table.

    candidates: number of maps tried for the start; iterations: of Lloyd's, each on `samples` fresh values per rate.
    progress: wraps the steps of each of the two parts, given its name; tqdm will do.
    """
    values = start_table(seed=seed, candidates=candidates, progress=progress)
    sums, counts = np.zeros(len(values)), np.zeros(len(values))
    for i in progress(range(iterations), "Lloyd"):
        kept = min(i, 9 * MEMORY) / (min(i, 9 * MEMORY) + MEMORY)
        sums, counts = sums * kept, counts * kept
        for rate in TRAINED_RATES:
            targets = gaussian(samples, seed, f"trellis Lloyd {i}", rate) * np.float32(target_scale(rate))
            states = search(targets, values, rate)
            importance = 2 ** (rate / 2)
            sums += importance * np.bincount(states, targets, len(values))
            counts += importance * np.bincount(states, minlength=len(values))
        values = np.where(counts > 0, sums / np.maximum(counts, 1e-9), values).astype(np.float32)
    return torch.from_numpy(values)


def start_table(
    *, seed: int, candidates: int, progress: Callable[[Iterable, str], Iterable] = lambda steps, name: steps
) -> np.ndarray:
    """The best of `candidates` maps on one Gaussian sample: a third are drawn, the others vary the best so far."""
    rng = numpy_generator(seed, "trellis maps")
    sample = gaussian(SCORED_SAMPLES, seed, "trellis maps")
    best, best_score = None, np.inf
    for i in progress(range(candidates), "maps"):
        candidate = _draw_map(rng) if 3 * i <= candidates else _vary(best, rng)
        values = _values(candidate)
        score = np.mean([excess_db(values, sample, rate) for rate in SCORED_RATES])
        if score < best_score:
            best, best_score = candidate, score
    return _values(best)


def excess_db(values: np.ndarray, sample: np.ndarray, quarter_rate: int, scale: float | None = None) -> float:
    """Error of a sample in dB above 2^(−2R) of its power, decoded with the best gain; scale: applied before."""
    scale = target_scale(quarter_rate) if scale is None else scale
    decoded = values[search(sample * np.float32(scale), values, quarter_rate)].astype(np.float64)
    error = 1 - (decoded @ sample) ** 2 / (decoded @ decoded) / (sample.astype(np.float64) @ sample)
    return float(10 * np.log10(error * 2 ** (quarter_rate / 2)))


def target_scale(quarter_rate: int) -> float:
    """The RMS that targets should have for a search with this table at this rate."""
    return float(np.interp(quarter_rate, *TARGET_SCALES))


def gaussian(samples: int, seed: int, purpose: str, item: int = 0) -> np.ndarray:
    """Gaussian samples, float32, as many as make whole sequences."""
    count = samples // SEQUENCE * SEQUENCE
    return numpy_generator(seed, purpose, item).standard_normal(count, np.float32)


def search(targets: np.ndarray, values: np.ndarray, quarter_rate: int) -> np.ndarray:
    """The states of targets float32 [n] in sequences of SEQUENCE: int32 [n]."""
    ones = np.ones_like(targets)
    return choose_states_numpy(targets, ones, prepare(values), quarter_rate=quarter_rate, sequence_length=SEQUENCE)


def _values(parities: np.ndarray) -> np.ndarray:
    """The table of a map [rank bit from the top, state bit]: Gaussian quantiles, float32 [4096]."""
    size = 1 << WINDOW_BITS
    bits = np.arange(size)[:, None] >> np.arange(WINDOW_BITS) & 1
    ranks = (bits @ parities.T % 2) @ (1 << np.arange(WINDOW_BITS)[::-1])
    quantiles = torch.special.ndtri((torch.arange(size, dtype=torch.float64, device="cpu") + 0.5) / size)
    return quantiles.float().numpy()[ranks]


def _draw_map(rng: np.random.Generator) -> np.ndarray:
    while True:
        candidate = rng.integers(0, 2, (WINDOW_BITS, WINDOW_BITS))
        candidate[:HIGHEST_SHIFT, :HIGHEST_SHIFT] = _draw_nested(rng)
        candidate[:HIGHEST_SHIFT, HIGHEST_SHIFT:] = _draw_nested(rng)[:, ::-1]
        if _odd(candidate):
            return candidate


def _draw_nested(rng: np.random.Generator) -> np.ndarray:
    """A matrix all of whose leading blocks are invertible over GF(2): lower times upper triangular."""
    one = np.eye(HIGHEST_SHIFT, dtype=np.int64)
    lower, upper = rng.integers(0, 2, (2, HIGHEST_SHIFT, HIGHEST_SHIFT))
    return (np.tril(lower, -1) + one) @ (np.triu(upper, 1) + one) % 2


def _vary(best: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A map with one to three entries flipped, still one to one and nested."""
    while True:
        candidate = best.copy()
        for row, column in rng.integers(WINDOW_BITS, size=(rng.integers(1, 4), 2)):
            candidate[row, column] ^= 1
        nested = (
            _odd(candidate[:k, :k]) and _odd(candidate[:k, WINDOW_BITS - k :]) for k in range(1, HIGHEST_SHIFT + 1)
        )
        if _odd(candidate) and all(nested):
            return candidate


def _odd(matrix: np.ndarray) -> bool:
    """True if a matrix of 0 and 1 is invertible over GF(2): its determinant, small and so exact, is odd."""
    return bool(round(np.linalg.det(matrix)) % 2)
