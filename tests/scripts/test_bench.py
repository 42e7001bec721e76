"""The benchmarks of scripts/: what they record, the order of columns they read, the bound they compare with."""

import json
import math
from pathlib import Path

import bench_codecs
import codec_layers
import pytest
import torch

KEYS = {"layer", "codec", "bits", "relative_output_error", "heldout_error", "weight_mse", "cpu_seconds"}
LAYERS = '''
import torch

def make_layer(name, seed):
    """small: linear 32×32. taps: a convolution of 16 channels, columns (in, kh, kw), diagonal Hessians."""
    draw = torch.Generator().manual_seed(seed)
    size = {"small": 32, "taps": 144}[name]
    weight = torch.randn(32, size, generator=draw)
    if name == "small":
        inputs = torch.randn(256, size, generator=draw)
        return {"weight": weight, "hessian": inputs.T @ inputs, "heldout_hessian": torch.eye(size), "kind": "linear"}
    first, other = (torch.diag(torch.rand(size, generator=draw) ** 4 + 0.01) for _ in range(2))
    return {"weight": weight, "hessian": first, "heldout_hessian": other, "kind": "conv"}
'''


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.setattr(bench_codecs, "warm_trellis", lambda: None)  # tests time nothing: a minute on a fresh clone
    return bench_codecs, codec_layers


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "layers.py"
    path.write_text(LAYERS)
    return path


def records(main, file: Path, *arguments: str) -> list[dict]:
    out = file.with_name("out.json")
    main(["--layers-from", str(file), "--json", str(out), *arguments])
    return json.loads(out.read_text())


def test_a_chosen_few_are_recorded(scripts, file):
    codecs = ["rtn", "gptq", "additive", "trellis"]
    found = records(scripts[0].main, file, "--layers", "small,taps", "--bits", "3", "4", "--codec", *codecs, "--beam=2")
    assert [(row["layer"], row["codec"], row["asked_bits"]) for row in found] == [
        (layer, codec, bits) for layer in ("small", "taps") for codec in codecs for bits in (3, 4)
    ]
    for row in found:
        assert row.keys() >= KEYS
        assert all(math.isfinite(row[key]) for key in KEYS - {"layer", "codec"})
        assert row["db_over_bound"] > 0
    by_codec = {(row["layer"], row["codec"], row["asked_bits"]): row for row in found}
    assert by_codec["small", "rtn", 3]["bits"] == 3 + 32 / 32  # a 16-bit scale and a 16-bit zero per row
    assert by_codec["small", "trellis", 3]["bits"] == pytest.approx(3, abs=8 / 1024)
    for layer in ("small", "taps"):
        assert by_codec[layer, "gptq", 4]["relative_output_error"] < by_codec[layer, "gptq", 3]["relative_output_error"]


def test_code_bits_leave_side_information_on_top(scripts, file):
    (row,) = records(scripts[0].main, file, "--layers=taps", "--bits=2.5", "--codec=trellis", "--code-bits")
    assert row["code_bits"] == pytest.approx(2.5, abs=8 / 4608)
    assert row["bits"] > 2.8


def test_a_convolution_keeps_its_errors_when_its_columns_are_reordered(scripts, file):
    bench_codecs, codec_layers = scripts
    made = codec_layers.make_layer_of(file, ["taps"])("taps", 0)
    layer = codec_layers.from_dict("taps", made)
    ours = layer.weight.view(32, 3, 3, 16).permute(0, 3, 1, 2)
    assert torch.equal(ours, made["weight"].view(32, 16, 3, 3))
    settings = bench_codecs.Settings()
    decoded = bench_codecs.encode("gptq", layer.weight, layer.hessian, 3, settings, layer="taps")().detach().float()
    back = decoded.view(32, 3, 3, 16).permute(0, 3, 1, 2).reshape(32, 144)
    change, weight = (back - made["weight"]).double(), made["weight"].double()
    record = bench_codecs.measure(layer, "gptq", 3, settings)
    for key, hessian in (("relative_output_error", "hessian"), ("heldout_error", "heldout_hessian")):
        costs = made[hessian].diagonal().double()
        assert record[key] == pytest.approx(float((change**2 @ costs).sum() / (weight**2 @ costs).sum()), rel=1e-6)


def test_the_bound_for_an_identity_hessian_is_the_gaussian_one(scripts):
    bench_codecs, codec_layers = scripts
    signs = torch.randint(0, 2, (32, 48), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    layer = codec_layers.Layer("signs", signs, torch.eye(48), torch.eye(48))
    for bits in (0.5, 2, 3.25):
        assert bench_codecs.reverse_water_filling(*layer.variances, bits) == pytest.approx(4**-bits)


def test_the_bound_fills_rows_and_directions(scripts):
    """Against a scan of the water level over all products of variances."""
    rows, directions = torch.tensor([0.3, 1.0, 5.0, 0.0]).double(), torch.logspace(-3, 2, 7).double()
    variances = torch.outer(rows, directions).flatten()
    for bits in (0.1, 1.0, 3.0):
        levels = torch.logspace(-12, 3, 200_001, dtype=torch.float64)[:, None]
        rates = torch.log2(torch.where(variances > levels, variances / levels, 1.0)).mean(1) / 2
        level = levels[int((rates > bits).sum())]
        expected = float(torch.minimum(variances, level).sum() / variances.sum())
        assert scripts[0].reverse_water_filling(rows, directions, bits) == pytest.approx(expected, rel=1e-3)


def test_ratios_to_recorded_results(scripts, file, monkeypatch):
    recorded = {"layer": "small", "method": "theirs-3", "bits": 3.2, "relative_output_error": 0.5, "cpu_seconds": 2.0}
    reference = file.with_name("reference.json")
    reference.write_text(json.dumps({"results": [recorded, recorded | {"alpha": 0.5, "cpu_seconds": 1e9}]}))
    monkeypatch.setattr(scripts[0], "matmul_gflops", lambda: 30.0)
    more = ["--reference", str(reference), "--reference-method", "theirs-{bits}", "--reference-gflops", "60"]
    three, four = records(scripts[0].main, file, "--layers=small", "--codec=rtn", "--bits=3,4", *more)
    assert three["error_ratio"] == pytest.approx(three["relative_output_error"] / 0.5)
    assert three["time_ratio"] == pytest.approx(three["cpu_seconds"] / 2 / 2)
    assert "error_ratio" not in four


def test_a_table_shows_what_was_left_out(scripts, tmp_path, file, capsys):
    results = tmp_path / "results"
    main = scripts[0].main
    main(["--layers-from", str(file), "--layers=small", "--codec=rtn,rtn-g64", "--bits=4", f"--results={results}"])
    assert "left out: small, rtn-g64, 4 bits: group_size 64" in capsys.readouterr().err
    assert len((results / "tables" / "bench_codecs.csv").read_text().splitlines()) == 2
    assert "| small " in (results / "tables" / "bench_codecs.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--codec", "nonsense"], "'nonsense'"),
        (["--layers", "linear3"], "'linear3'"),
        (["--model", "huge"], "huge"),
        (["--bits", "many"], "many"),
        (["--bits", "2.5"], "2.5: rtn takes whole bits"),
        (["--layers-from", "nowhere.py", "--layers", "small"], "nowhere.py"),
        (["--layers=linear640", "--reference", "nowhere.json"], "nowhere.json"),
    ],
)
def test_unknown_names_are_refused_in_one_line(scripts, arguments, said):
    with pytest.raises(SystemExit) as stopped:
        scripts[0].main(arguments)
    message = str(stopped.value)
    assert message.startswith("error: ")
    assert said in message
    assert "\n" not in message


def test_synthetic_layers_are_the_same_for_the_same_seed(scripts, monkeypatch):
    codec_layers = scripts[1]
    small = {
        "linear": lambda *rest: codec_layers.linear_layer(24, 32, *rest),
        "text": lambda *rest: codec_layers.text_layer(24, 32, *rest),
        "conv": lambda *rest: codec_layers.conv_layer(24, 16, *rest),
    }
    monkeypatch.setattr(codec_layers, "SYNTHETIC", small)
    for name in small:
        one, again, other = (codec_layers.synthetic(name, seed) for seed in (1, 1, 2))
        assert torch.equal(one.weight, again.weight)
        assert torch.equal(one.heldout_hessian, again.heldout_hessian)
        assert not torch.equal(one.weight, other.weight)
        assert not torch.equal(one.hessian, one.heldout_hessian)
        assert float(torch.linalg.eigvalsh(one.hessian.double())[0]) > 0


def test_drawn_moments_are_those_of_drawn_tokens(scripts):
    """Bartlett's draw against the population: mean and spread over draws."""
    from vqdm.seeds import numpy_generator

    factor = torch.linalg.cholesky(torch.tensor([[2.0, 0.5, 0.0], [0.5, 1.0, 0.3], [0.0, 0.3, 0.5]]))
    mean, tokens = torch.tensor([1.0, 0.0, -0.5]), 40
    draw = numpy_generator(0, "test")
    drawn = torch.stack([scripts[1].gaussian_moment(factor, mean, tokens, draw) for _ in range(4000)])
    noise = torch.randn(4000, tokens, 3, generator=torch.Generator().manual_seed(0)) @ factor.T + mean
    direct = noise.transpose(1, 2) @ noise / tokens
    population = factor @ factor.T + torch.outer(mean, mean)
    assert torch.allclose(drawn.mean(0), population, atol=0.03)
    assert torch.allclose(drawn.std(0), direct.std(0), rtol=0.08)


def test_sdxl_shapes_are_timed_once(scripts, tmp_path, monkeypatch, capsys):
    import bench_sdxl_layers

    monkeypatch.setattr(bench_sdxl_layers, "warm_trellis", lambda: None)
    table = tmp_path / "shapes.csv"
    table.write_text("type,out,in,k,count\nLinear,32,32,1,10\nConv2d,32,16,3,2\nLinear,32,144,1,1\n")
    arguments = [f"--layers={table}", f"--results={tmp_path}", "--workers=2"]
    bench_sdxl_layers.main(arguments)
    first = capsys.readouterr().out
    assert "13 layers" in first
    assert "2 workers: " in first
    monkeypatch.setattr(bench_sdxl_layers, "time_shape", None)
    bench_sdxl_layers.main(arguments)
    assert capsys.readouterr().out.splitlines() == first.splitlines()[-2:]
    rows = (tmp_path / "tables" / "bench_sdxl_layers.csv").read_text().splitlines()
    assert sorted(row.split(",")[:2] for row in rows[1:]) == [["32", "144"], ["32", "32"]]


def test_sdxl_has_its_known_shapes(scripts):
    import bench_sdxl_layers
    from unets import sdxl_unet

    from vqdm.models.specs import layer_specs

    shapes = bench_sdxl_layers.sdxl_shapes()
    assert sum(shapes.values()) == len(layer_specs(sdxl_unet()))
    assert shapes[10240, 1280] == 60
    assert shapes[1280, 23040] == 2
