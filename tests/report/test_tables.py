import json
import statistics

import pandas as pd
import pytest

from vqdm.errors import UserError
from vqdm.report.tables import Row, Table, frame, read_table, to_markdown

METRICS = ("psnr_to_fp", "fid")


def record(results, name, method, scores, *, bits=3.0):
    """A run record as the pipeline writes it, with the metrics of its evaluate stage."""
    directory = results / "stages" / name
    directory.mkdir(parents=True)
    metrics = {metric: {"value": value, "se": 0.5} for metric, value in scores.items()}
    (directory / "metrics.json").write_text(json.dumps({"metrics": metrics, "protocol": {"n": 4}}))
    sizes = {"bits_per_weight": bits + 0.5, "bits_quantized": bits, "file_bytes": 2**20}
    return {"method": method, "directories": {"evaluate": f"stages/{name}"}, "bits": sizes}


def test_a_row_of_several_seeds_shows_their_mean_and_spread(tmp_path):
    values = [25.0, 26.0, 28.0]
    runs = [record(tmp_path, f"r{i}", "codec", {"psnr_to_fp": v, "fid": 2.0}) for i, v in enumerate(values)]
    original = [record(tmp_path, "fp", "full precision", {"fid": 1.0}, bits=16.0)]
    table = Table("t", "title", "tiny", (), METRICS)
    data = frame(table, [original, runs], tmp_path)
    assert data["psnr_to_fp"][1] == pytest.approx(statistics.fmean(values))
    assert data["psnr_to_fp_seeds"][1] == pytest.approx(statistics.stdev(values))
    assert data["calibration_seeds"].tolist() == [1, 3]
    assert pd.isna(data["psnr_to_fp"][0]) and pd.isna(data["fid_seeds"][0])
    text = to_markdown(table, data, {"n": 4}, of=2)
    assert "26.33 ± 0.50 [1.53]" in text and "1.000 ± 0.500  " in text and "standard deviation" in text
    assert "2 of 3 rows" in to_markdown(table, data, {"n": 4}, of=3)


def test_the_runs_of_a_row_differ_in_their_calibration_only():
    row = Row("codecs_x", "tiny_codec", method="X 3 bit", overrides=("quantize=vq3",), seeds=2)
    first, second = row.overrides_of_runs()
    assert first == ["+experiment=tiny_codec", "quantize=vq3", "method='X 3 bit'", "name=codecs_x"]
    assert second[: len(first)] == first
    changed = {override.split("=")[0] for override in second[len(first) :]}
    seeds = {"calibration.seed", "calibration.noise_seed", "quantize.seed", "finetune.seed"}
    trajectories = {"finetune.trajectories.seed", "finetune.trajectories.noise_seed"}
    assert changed == {"name", "calibration.order"} | seeds | trajectories


def test_what_is_no_row_is_refused(tmp_path):
    file = tmp_path / "t.yaml"
    file.write_text("title: t\nmodel: tiny\nrows: [{name: x, experimnt: y}]\nmetrics: [fid]\n")
    with pytest.raises(UserError, match="experimnt"):
        read_table(file)
    with pytest.raises(UserError, match="there is no table 'other'"):
        read_table(tmp_path / "other.yaml")
