"""Rows, frames and footnotes of tables, on made-up runs."""

import dataclasses
import json
import os
import statistics

import pandas as pd
import pytest
from made_up_runs import PROTOCOL, score, write_run, write_votes

from vqdm.errors import UserError
from vqdm.report.experiments import Pair, Row, Table, read_table
from vqdm.report.footnotes import notes
from vqdm.report.formats import table_content, to_cells, write_table
from vqdm.report.numbers import compared, frame
from vqdm.report.preference import preference_frame
from vqdm.report.records import check_protocols, newest_records


def write(table, rows, *, results, **options):
    return write_table(table_content(table, rows, results=results, **options), rows, results=results)


METRICS = ("psnr_to_fp", "fid")


def table(*rows: Row, metrics=METRICS, **more) -> Table:
    return Table("t", "title", "sdxl", rows, metrics, **more)


def test_a_row_of_several_seeds_shows_their_mean_and_spread(tmp_path):
    values = [25.0, 26.0, 28.0]
    of = table(Row("fp", "sdxl_fp"), Row("r", "sdxl_vq3", seeds=3), Row("never", "sdxl_vq3", method="to come"))
    for seed, value in enumerate(values):
        write_run(tmp_path, of.rows[1].names_of_runs()[seed], {"psnr_to_fp": score(value, 0.5), "fid": score(2.0)})
    write_run(tmp_path, "fp", {"fid": score(1.0)}, bits=16.0)
    data = frame(of, newest_records(of, tmp_path), tmp_path)
    assert data["psnr_to_fp"][1] == pytest.approx(statistics.fmean(values))
    assert data["psnr_to_fp_seeds"][1] == pytest.approx(statistics.stdev(values))
    assert data["calibration_seeds"].tolist() == [1, 3, 0]
    assert data["not_run"].tolist() == ["", "", "psnr_to_fp fid"]
    assert pd.isna(data["psnr_to_fp"][0]) and pd.isna(data["fid_seeds"][0])
    cells = to_cells(of, data)
    assert cells["psnr_to_fp"].tolist() == ["–", "26.33 ± 0.50 [1.53]", "not run"]
    assert cells["method"].tolist() == ["fp", "r", "to come"]
    assert data.iloc[:2].drop(columns="not_run")["fid"].tolist() == [1.0, 2.0]


def test_the_runs_of_a_row_differ_in_their_calibration_only():
    row = Row("codecs_x", "tiny_codec", method="X 3 bit", overrides=("quantize=vq3",), seeds=2)
    first, second = row.overrides_of_runs()
    assert first == ["+experiment=tiny_codec", "quantize=vq3", "method='X 3 bit'", "name=codecs_x"]
    assert second[:3] == first[:3] and second[3] == "name=codecs_x_seed1"
    changed = {override.split("=")[0] for override in second[4:]}
    seeds = {"calibration.seed", "calibration.noise_seed", "quantize.seed", "finetune.seed"}
    trajectories = {"finetune.trajectories.seed", "finetune.trajectories.noise_seed"}
    assert changed == {"calibration.order"} | seeds | trajectories


@pytest.mark.parametrize(
    ("value", "published", "tolerance", "reproduced"),
    [
        (19.29, 18.99, 0.3, True),  # 0.3000000000000007 in floating point
        (18.69, 18.99, 0.3, True),
        (19.30, 18.99, 0.3, False),
        (0.2251, 0.226, 0.001, True),
        (0.226, 0.226, 0.0, True),
        (19.0, 18.99, None, None),
        (None, 18.99, 0.3, None),
        (19.0, None, 0.3, None),
    ],
)
def test_reproduced_means_within_the_tolerance(value, published, tolerance, reproduced):
    found = compared("fid", value, published, tolerance)
    assert found["fid_reproduced"] is reproduced
    expected = None if value is None or published is None else pytest.approx(value - published)
    assert found["fid_delta"] == expected


def test_no_mark_where_it_was_not_scored_as_published(tmp_path):
    row = Row("r", "sdxl_vq3", published={"fid": 19.0})
    of = table(row, source="made up", tolerances={"fid": 0.3}, published_protocol={"n": 5000, "sampler.steps": 50})
    for n, reproduced in ((5000, True), (512, None)):
        write_run(tmp_path, "r", {"fid": score(19.1)}, protocol=PROTOCOL | {"n": n})
        data = frame(of, newest_records(of, tmp_path), tmp_path)
        assert data["fid_reproduced"].tolist() == [reproduced]
        assert data["fid_delta"][0] == pytest.approx(0.1)


def test_another_model_is_not_compared_with_what_was_published(tmp_path):
    of = table(Row("r", "sdxl_vq3", published={"fid": 19.0}), source="made up", tolerances={"fid": 0.3})
    write_run(tmp_path, "r", {"fid": score(1.0)}, model="tiny")
    rows = newest_records(of, tmp_path, model="tiny")
    text, files = write(of, rows, model="tiny", results=tmp_path)
    assert "published" not in text.lower() and "table=t model=tiny" in text
    assert [file.name for file in files] == ["t-tiny.md", "t-tiny.tex", "t-tiny.csv"]


def test_the_newest_finished_run_of_the_table_s_model_counts(tmp_path):
    of = table(Row("r", "sdxl_vq3"))
    for age, (fingerprint, value) in enumerate([("3" * 8, 3.0), ("1" * 8, 1.0), ("2" * 8, 2.0)]):
        write_run(tmp_path, "r", {"fid": score(value)}, fingerprint=fingerprint)
        os.utime(tmp_path / "runs" / "r" / f"{fingerprint}.json", (1000 - age, 1000 - age))
    write_run(tmp_path, "r", {"fid": score(9.0)}, model="tiny", fingerprint="9" * 8)
    assert frame(of, newest_records(of, tmp_path), tmp_path)["fid"].tolist() == [3.0]
    (tmp_path / "stages" / "evaluate" / "r-33333333" / "metrics.json").unlink()
    assert frame(of, newest_records(of, tmp_path), tmp_path)["fid"].tolist() == [1.0]
    file = tmp_path / "runs" / "r" / "11111111.json"
    unfinished = json.loads(file.read_text())
    del unfinished["bits"]
    file.write_text(json.dumps(unfinished))
    assert frame(of, newest_records(of, tmp_path), tmp_path)["fid"].tolist() == [2.0]


DIFFERENT = {
    "device": ({"device": "cpu"}, {}, "device is cuda and cpu"),
    "dtype": ({"dtype": "float32"}, {}, "dtype is float16 and float32"),
    "n": ({"n": 512}, {}, "n is 5000 and 512"),
    "part of a part": ({"sampler": {"scheduler": "ddim", "steps": 20}}, {}, "sampler.steps is 50 and 20"),
    "the metric's own": ({}, {"resize": "bilinear"}, "resize is lanczos and bilinear"),
    "missing": ({}, {"resize": "lanczos", "antialias": True}, "antialias is not stated and True"),
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_two_protocols_never_share_a_column_unless_asked_to(case, tmp_path):
    common, own, said = DIFFERENT[case]
    of = table(Row("one", "sdxl_vq3"), Row("other", "sdxl_vq3"))
    write_run(tmp_path, "one", {"fid": score(1.0, protocol={"resize": "lanczos"})})
    other = score(2.0, protocol=own or {"resize": "lanczos"})
    write_run(tmp_path, "other", {"fid": other}, protocol=PROTOCOL | common)
    rows = newest_records(of, tmp_path)
    with pytest.raises(UserError) as error:
        write(of, rows, model="sdxl", results=tmp_path)
    assert "fid of one and of other" in str(error.value) and said in str(error.value)
    assert "mixed=true" in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "tables").exists(), "refused before anything is written"
    text, _ = write(of, rows, model="sdxl", results=tmp_path, mixed=True)
    key, values = said.split(" is ")
    first, second = values.split(" and ")
    assert f"{key.split('.')[-1]}" in text and f"{first} (one), {second.replace('True', 'true')} (other)" in text
    key = said.split(" is ")[0].split(".")[0]
    assert write(dataclasses.replace(of, mixed=(key,)), rows, model="sdxl", results=tmp_path)


def test_protocols_of_metrics_that_share_no_column_may_differ(tmp_path):
    of = table(Row("one", "sdxl_vq3"), Row("other", "sdxl_vq3"))
    one = write_run(tmp_path, "one", {"fid": score(1.0, protocol={"resize": "lanczos"})})
    other = write_run(tmp_path, "other", {"psnr_to_fp": score(2.0, protocol={"resize": "none"})})
    check_protocols(of, [one, other], tmp_path)


def test_the_metric_s_own_device_does_not_hide_that_of_the_images(tmp_path):
    of = table(Row("one", "sdxl_vq3"), Row("other", "sdxl_vq3"))
    one = write_run(tmp_path, "one", {"fid": score(1.0, protocol={"device": "cpu"})})
    other = write_run(
        tmp_path, "other", {"fid": score(1.0, protocol={"device": "cpu"})}, protocol={**PROTOCOL, "device": "cpu"}
    )
    with pytest.raises(UserError, match="device is cuda and cpu"):
        check_protocols(of, [one, other], tmp_path)


def test_a_value_that_is_not_known_is_a_dash(tmp_path):
    of = table(Row("one", "sdxl_vq3"))
    write_run(tmp_path, "one", {"fid": score(None, None), "psnr_to_fp": score(30.0, None)})
    cells = to_cells(of, frame(of, newest_records(of, tmp_path), tmp_path))
    assert (cells["fid"][0], cells["psnr_to_fp"][0]) == ("–", "30.00")


def test_what_may_differ_is_a_whole_key(tmp_path):
    of = table(Row("one", "sdxl_vq3"), Row("other", "sdxl_vq3"), mixed=("samp", "sampler.step"))
    one = write_run(tmp_path, "one", {"fid": score(1.0)})
    other = write_run(tmp_path, "other", {"fid": score(1.0)}, protocol=PROTOCOL | {"sampler": {"steps": 1}})
    with pytest.raises(UserError, match=r"sampler\.scheduler is ddim and not stated"):
        check_protocols(of, [one, other], tmp_path)


def test_footnotes_say_each_protocol_once_and_each_reason_with_its_methods(tmp_path):
    of = table(Row("one", "sdxl_vq3"), Row("other", "sdxl_vq3"))
    resize = {"protocol": {"resize": {"filter": "lanczos", "size": 256}, "weights": None}}
    runs = [
        write_run(tmp_path, "one", {"fid": score(1.0, bias=0.25, note="few", **resize)}),
        write_run(
            tmp_path, "other", {"fid": score(1.0, bias=0.5, note="few", **resize)}, not_run={"psnr_to_fp": "why"}
        ),
    ]
    lines = notes(of, runs, tmp_path, model="sdxl")
    assert lines[0] == "model: sdxl" and "n: 5000" in lines and "sampler: scheduler ddim, steps 50" in lines
    assert lines[-4:] == [
        "fid: resize: filter lanczos, size 256; weights: none",
        "psnr_to_fp: not run: why (other)",
        "fid: few",
        "fid: bootstrap bias 0.25 to 0.5",
    ]


def test_what_metrics_share_in_their_protocols_is_said_once(tmp_path):
    of = table(Row("one", "sdxl_vq3"), metrics=("fid", "kid", "psnr_to_fp"))
    inception = {"weights": "6726825d", "device": "cpu"}
    scores = {
        "fid": score(1.0, protocol={"is": "a distance"} | inception),
        "kid": score(1.0, protocol=inception),
        "psnr_to_fp": score(1.0, protocol={"device": "cpu", "peak": 1}),
    }
    lines = notes(of, [write_run(tmp_path, "one", scores)], tmp_path, model="sdxl")
    expected = ["every metric: device: cpu", "fid, kid: weights: 6726825d", "fid: a distance", "psnr_to_fp: peak: 1"]
    assert lines[-4:] == expected


def test_votes_count_either_way_round_and_the_newest_study(tmp_path):
    rows = (Row("a", "sdxl_fp", method="A"), Row("b", "sdxl_vq3", method="B"))
    of = table(*rows, pairs=(Pair("a", "b", 60.0), Pair("b", "a")), source="made up", tolerances={"preference": 5})
    assert preference_frame(of, tmp_path)["preference"].isna().all()
    write_votes(tmp_path, "old", ("a", "b", 10.0, 5.0, 15.0))
    os.utime(tmp_path / "votes" / "old" / "human_preference.json", (1000, 1000))
    write_votes(tmp_path, "new", ("b", "a", 37.5, 30.0, 50.0))
    data = preference_frame(of, tmp_path)
    assert data["preference"].tolist() == [62.5, 37.5] and data["low"].tolist() == [50.0, 30.0]
    assert data["preference_delta"][0] == 2.5 and data["preference_reproduced"].tolist() == [True, None]
    assert data["study"].tolist() == ["new", "new"]
    (tmp_path / "votes" / "new" / "human_preference.json").write_text('[{"left": "a"}]')
    with pytest.raises(UserError, match="no scored votes"):
        preference_frame(of, tmp_path)


BAD = {
    "no such field": ("rows: [{name: x, experimnt: y}]", "experimnt"),
    "no metrics": ("rows: [x]\nmetrics:", "must be lists"),
    "unknown key": ("rows: [x]\nmetricz: [fid]", "metricz"),
    "row is a list": ("rows: [[x]]", "is no row"),
    "published without a source": ("rows: [{name: x, experiment: y, published: {fid: 1}}]", "no source"),
    "published without a column": ("source: s\nrows: [{name: x, experiment: y, published: {fod: 1}}]", "fod"),
    "pair of a stranger": ("rows: [x]\npairs: [{left: x, right: z}]", "no row 'z'"),
    "half a pair": ("rows: [x]\npairs: [{left: x}]", "is no pair"),
    "no YAML": ("rows: [x", "is no YAML"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_table_s_file_that_makes_no_sense_is_one_line(case, tmp_path):
    content, said = BAD[case]
    head = "title: t\nmodel: tiny\n" + ("" if "metrics" in content else "metrics: [fid]\n")
    file = tmp_path / "t.yaml"
    file.write_text(head + content + "\n")
    with pytest.raises(UserError) as error:
        read_table(file)
    assert said in str(error.value) and "t.yaml" in str(error.value).replace("table t ", "t.yaml ")
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="there is no table 'other'"):
        read_table(tmp_path / "other.yaml")
