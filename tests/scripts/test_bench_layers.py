"""The benchmark of layers, on tiny ones: what it measures, what it writes, what it refuses."""

import bench_layers
import pandas as pd
import pytest
import torch
from torch import nn

from vqdm.seeds import torch_generator
from vqdm.weights.layers import DECODE_MODES
from vqdm.weights.trellis import TrellisScheme
from vqdm.weights.trellis_format import LOWEST_RATE, column_bits


@pytest.fixture
def bench(monkeypatch):
    small = {
        "linear": lambda: nn.Linear(64, 48, device="meta"),
        "conv": lambda: nn.Conv2d(16, 32, 3, padding=1, device="meta"),
    }
    monkeypatch.setattr(bench_layers, "LAYERS", small)
    return bench_layers


def test_a_table_of_every_layer_scheme_mode_and_size(bench, tmp_path, capsys):
    bench.main(["--repeat=2", "--tokens", "1", "6", "--device=cpu", f"--results={tmp_path}"])
    table = pd.read_csv(tmp_path / "tables" / "bench_layers.csv")
    assert [tuple(row) for row in table[["layer", "scheme", "tokens", "decode"]].itertuples(index=False)] == [
        (layer, scheme, tokens, mode)
        for layer in ("linear", "conv")
        for scheme in ("trellis3", "3x8g8")
        for tokens in (1, 6)
        for mode in DECODE_MODES
    ]
    assert (table[["dense_ms", "quantized_ms", "ratio", "decode_ns"]] > 0).all().all()
    assert set(table["dtype"]) == {"float32"}
    said = capsys.readouterr().out
    assert said.count("\n| ") == len(table) + 1


@torch.no_grad()
@pytest.mark.parametrize("name", ["linear", "conv"])
def test_all_three_layers_compute_the_same(bench, name):
    for scheme in bench.SCHEMES:
        draw = torch_generator(0, "test")
        layers = bench.trio(name, scheme, draw, device="cpu", dtype=torch.float32)
        inputs = bench.random_input(layers["dense"], 12, draw)
        assert inputs.numel() == 12 * (64 if name == "linear" else 16)
        outputs = [layer(inputs) for layer in layers.values()]
        assert len(outputs) == 3 and all(torch.equal(output, outputs[0]) for output in outputs)
        assert float(outputs[0].abs().max()) > 0


def test_latents_are_as_square_as_their_positions_allow(bench):
    conv = nn.Conv2d(16, 16, 3)
    sides = {n: tuple(bench.random_input(conv, n, torch_generator(0, "test")).shape[2:]) for n in (1, 7, 77, 1024, 96)}
    assert sides == {1: (1, 1), 7: (1, 7), 77: (7, 11), 1024: (32, 32), 96: (8, 12)}


def test_random_rates_fill_the_stream(bench):
    shape = (320, 100)
    weight = bench.random_weight(TrellisScheme(bits=3), shape, torch_generator(0, "test"))
    rates = weight.unpacked_rates()
    spare = 8 * len(weight.stream) - int(column_bits(shape[0], rates).sum())
    assert 0 <= spare < 80, "a quarter bit of one column is 80 bits"
    assert int(rates.min()) >= LOWEST_RATE and len(rates.unique()) > 3


@pytest.mark.parametrize("arguments", [["--repeat=0"], ["--tokens", "4", "0"]])
def test_counts_below_one_are_refused(bench, arguments):
    with pytest.raises(SystemExit, match="error: --tokens and --repeat must be 1 or more"):
        bench.main(arguments)
