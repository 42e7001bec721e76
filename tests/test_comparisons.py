"""The scripts that compare finished runs, on made-up scores."""

import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.stats

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
import compare_runs
import equal_bits

from vqdm.errors import UserError


def scores(seed, n=50, **columns):
    generator = np.random.default_rng(seed)
    index = pd.Index([f"p{i}" for i in range(n)], name="prompt")
    return pd.DataFrame({name: generator.normal(mean, 1, n) for name, mean in columns.items()}, index=index)


def test_paired_errors_are_those_of_a_paired_t_test():
    one, other = scores(0, psnr_to_fp=30, distance_to_fp=1), scores(1, psnr_to_fp=29, distance_to_fp=1)
    table = compare_runs.compare(one, other).set_index("metric")
    for metric, sign in (("psnr_to_fp", 1), ("distance_to_fp", -1)):
        expected = scipy.stats.ttest_rel(one[metric], other[metric])
        assert table.loc[metric, "better_by_se"] == pytest.approx(sign * expected.statistic)
    with pytest.raises(UserError, match="other captions"):
        compare_runs.compare(one, other.iloc[::-1])


def test_runs_are_found_by_name_and_model_and_seeds_are_averaged(tmp_path):
    frames = {"x": scores(0, psnr_to_fp=1), "x_seed1": scores(1, psnr_to_fp=2), "xy": scores(2, psnr_to_fp=9)}
    for name, frame in frames.items():
        (tmp_path / "stages" / name).mkdir(parents=True)
        frame.to_csv(tmp_path / "stages" / name / "images.csv")
        (tmp_path / "runs" / name).mkdir(parents=True)
        record = {"experiment": name, "model": "tiny", "stages": [], "directories": {"evaluate": f"stages/{name}"}}
        (tmp_path / "runs" / name / "0.json").write_text(json.dumps(record))
    found = compare_runs.image_scores(tmp_path, "x", "tiny")
    expected = (frames["x"] + frames["x_seed1"]) / 2
    assert found["psnr_to_fp"].to_numpy() == pytest.approx(expected["psnr_to_fp"].to_numpy())
    with pytest.raises(UserError, match="no finished run x on tiny_outlier"):
        compare_runs.image_scores(tmp_path, "x", "tiny_outlier")


def test_equal_bits_are_read_off_the_trellis_curve():
    bits = np.array([2.0, 3.0, 4.0])
    methods = ["trellis 2 bit", "trellis 3 bit", "trellis 4 bit"]
    curve = {"psnr_to_fp": 10 + 6 * bits, "distance_to_fp": 2**-bits, "fid_to_fp": 4**-bits}
    trellis = pd.DataFrame({"method": methods, "bits_quantized": bits} | curve)
    trellis = pd.concat([trellis, trellis.assign(method=trellis["method"] + " by sensitivity")])
    rival = {
        "method": "GPTQ 4 bit",
        "bits_quantized": 4.1,
        "psnr_to_fp": 25.0,
        "distance_to_fp": 2**-2.5,
        "fid_to_fp": 1.0,
    }
    rows = equal_bits.equal_bits(pd.DataFrame([rival, {"method": "full precision"}]), trellis)
    assert rows["rival"].tolist() == ["GPTQ 4 bit"] * 2
    assert rows["equal psnr_to_fp at"].tolist() == ["2.50"] * 2
    assert rows["equal distance_to_fp at"].tolist() == ["2.50"] * 2
    assert rows["equal fid_to_fp at"].tolist() == ["< 2.00"] * 2
