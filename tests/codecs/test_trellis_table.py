import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from vqdm.codecs import trellis_table
from vqdm.codecs.trellis_table import TABLE_FILE, excess_db, gaussian, load_table, start_table, train_table


def test_the_shipped_table_is_small_and_finite():
    assert TABLE_FILE.stat().st_size < 9000
    stored = load_file(TABLE_FILE)
    assert {name: (value.dtype, tuple(value.shape)) for name, value in stored.items()} == {
        "table": (torch.float16, (4096,))
    }
    table = load_table()
    assert table.dtype == torch.float32
    assert torch.equal(table.half().float(), table)
    assert bool(torch.isfinite(table).all())
    assert float(table.std()) == pytest.approx(1, abs=0.05)
    assert abs(float(table.mean())) < 0.01


@pytest.mark.parametrize(("rate", "decibel"), [(4, 0.45), (8, 0.57), (12, 0.71), (16, 0.85), (24, 1.2)])
def test_the_shipped_table_reaches_its_error(rate, decibel):
    sample = gaussian(32_000, 1, "test")
    assert excess_db(load_table().numpy(), sample, rate) < decibel


def test_excess_is_that_of_the_least_squares_gain():
    values, sample = load_table().numpy(), gaussian(3200, 2, "test")
    decoded = values[trellis_table.search(sample, values, 12)]
    residual = np.linalg.lstsq(decoded[:, None], sample, rcond=None)[1][0] / (sample**2).sum()
    assert excess_db(values, sample, 12, scale=1.0) == pytest.approx(10 * np.log10(residual * 64), abs=1e-3)


@pytest.mark.parametrize("candidates", [1, 9])
def test_a_start_spreads_neighbours_over_the_distribution(candidates, monkeypatch):
    monkeypatch.setattr(trellis_table, "SCORED_RATES", (12,))
    monkeypatch.setattr(trellis_table, "SCORED_SAMPLES", 640)
    ranks = start_table(seed=3, candidates=candidates).argsort().argsort()
    assert (np.sort(ranks) == np.arange(4096)).all()
    for shift in range(1, 7):
        share = ranks >> (12 - shift)
        before, after = share.reshape(-1, 1 << shift), share.reshape(1 << shift, -1).T
        assert (np.sort(before, 1) == np.arange(1 << shift)).all()
        assert (np.sort(after, 1) == np.arange(1 << shift)).all()


def test_training_improves_its_start_and_repeats_itself(monkeypatch):
    monkeypatch.setattr(trellis_table, "SCORED_RATES", (12,))
    monkeypatch.setattr(trellis_table, "SCORED_SAMPLES", 3200)
    monkeypatch.setattr(trellis_table, "TRAINED_RATES", (12, 24))
    few = {"seed": 0, "candidates": 2}
    trained = train_table(**few, iterations=3, samples=64_000)
    assert torch.equal(trained, train_table(**few, iterations=3, samples=64_000))
    assert (trained.dtype, tuple(trained.shape)) == (torch.float32, (4096,))
    sample = gaussian(32_000, 1, "test")
    assert excess_db(trained.numpy(), sample, 24) < excess_db(start_table(**few), sample, 24) - 0.05
