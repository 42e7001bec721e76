"""Scripts for a day on which a GPU is there, run dry on the tiny model, and counts on meta."""

import json
import os
import subprocess
import sys
from pathlib import Path

import bench_gpu
import count_decode
import pytest

from vqdm.models.specs import layer_specs
from vqdm.weights import ops

ROOT = Path(__file__).resolve().parent.parent.parent


def run(what, file, *arguments):
    bench_gpu.main([what, "--json", str(file), "--model", "tiny", "--device", "cpu", "--repeat", "1", *arguments])
    return json.loads(file.read_text())


def test_every_kernel_is_timed_beside_a_copy_and_has_the_cpus_bits(tmp_path):
    found = run("decode", tmp_path / "decode.json", "--shapes", "1")
    copy, *rows = found["rows"]
    assert copy["gb_s"] > 0 and "dry run" in found["device"] and found["versions"]["torch"]
    assert [row["codec"] for row in rows] == [codec for codec in ("trellis3", "3x8g8", "rtn4") for _ in range(2)]
    assert all(row["equal"] for row in rows[::2])
    assert all(row["ms"] > 0 and row["of_copy"] > 0 for row in rows)
    assert rows[1]["shape"] == "all 118 layers"


def test_steps_of_all_ways(tmp_path):
    ways = ["bf16", "per_call", "cached", "torch_path"]
    found = run("step", tmp_path / "step.json", "--size", "64", "--batches", "1", "2", "--ways", *ways)
    assert [(row["way"], row["batch"]) for row in found["rows"]] == [(way, n) for way in ways for n in (1, 2)]
    assert all(row["to_bf16"] > 0 for row in found["rows"])
    assert ops.enabled


def test_a_library_that_is_not_there_is_a_row_that_says_so(tmp_path, monkeypatch):
    from vqdm.hub import peers

    monkeypatch.setattr(peers, "installed_version", lambda name: None)
    found = run("peers", tmp_path / "peers.json", "--libraries", "sdnq", "--size", "64", "--batches", "1")
    (row,) = found["rows"]
    assert "pip install" in row["not_run"]


@pytest.mark.slow
def test_another_librarys_step(tmp_path):
    pytest.importorskip("sdnq")
    found = run("peers", tmp_path / "peers.json", "--libraries", "sdnq", "--size", "64", "--batches", "1")
    (row,) = found["rows"]
    assert row["way"] == "sdnq-uint4" and row["ms"] > 0


def test_without_a_gpu_it_says_how_to_run_dry(tmp_path, capsys):
    if bench_gpu.torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit, match="dry run"):
        bench_gpu.main(["step", "--json", str(tmp_path / "step.json")])


@pytest.mark.slow
def test_the_gpus_kernels_are_timed_by_the_interpreter(tmp_path):
    """In a process of its own, since kernels are interpreted or not as they are imported."""
    pytest.importorskip("triton")
    file = tmp_path / "decode.json"
    command = [sys.executable, "scripts/bench_gpu.py", "decode", "--json", file, "--model", "tiny", "--device", "cpu"]
    command += ["--repeat", "1", "--shapes", "1", "--no-all-layers", "--codecs", "trellis3"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    rows = json.loads(file.read_text())["rows"][1:]
    assert len(rows) == 1 and all(row["equal"] for row in rows)


@pytest.mark.parametrize("codec", ["trellis3", "rtn4"])
def test_decoding_is_one_launch_per_layer_and_one_per_permuted_convolution(codec):
    specs = layer_specs(count_decode.unet_on_meta("tiny"))
    found = count_decode.compare("tiny", codec)
    permuted = [spec for spec in specs if spec.conv is not None and spec.conv.kernel != (1, 1)]
    assert found["launches"] == len(specs) + len(permuted)
    assert found["torch_path"]["launches"] > 8 * found["launches"]
    weights, permutations = sum(spec.size for spec in specs), 4 * sum(spec.size for spec in permuted)
    least = 2 + 3 / 8 + permutations / weights  # fp16 out, codes in, and once more in and out
    assert least < found["bytes_per_weight"] < least + 1.5  # the table weighs on layers as small as these
    assert ops.enabled


@pytest.mark.slow
def test_decoding_sdxl_takes_fewer_than_a_thousand_launches(tmp_path):
    count_decode.main(["--codecs", "trellis3", "--json", str(tmp_path / "counts.json")])
    found = json.loads((tmp_path / "counts.json").read_text())["trellis3"]
    assert found["launches"] == 771 + 38 and found["bytes_per_weight"] < 4
    assert found["torch_path"]["launches"] > 90_000 and found["torch_path"]["bytes_per_weight"] > 400
