"""scripts/measured_stages.py on made-up plans and manifests: rows, shared stages, what is published."""

import json

import measured_stages
import pandas as pd
import pytest

from vqdm.errors import UserError
from vqdm.runs.files import write_json, write_sealed

GIB = 2**30


def made_up(results, name, stages):
    """A plan and a run of stages, {directory: (foretold GiB, measured GiB)}; or four, with those of no file."""
    planned = []
    for place, (foretold, _, *more) in stages.items():
        memory = {"device": 0, "host": int(foretold * GIB)} | ({"anonymous": int(more[0] * GIB)} if more else {})
        planned.append({"name": place.split("/")[1], "memory": memory})
    write_json(results / f"plans/{name}.json", {"device": "cpu", "stages": planned})
    write_json(results / f"runs/{name}/0.json", {"stages": list(stages), "directories": {}})
    for place, (_, measured, *more) in stages.items():
        peak = {"host": int(measured * GIB), "device": None} | ({"anonymous": int(more[1] * GIB)} if more else {})
        manifest = {"peak_memory_bytes": peak, "cpu_seconds": 3.2, "seconds": 4.0, "git_sha": "abc"}
        write_sealed(results / place / "manifest.json", manifest)


def test_a_stage_that_runs_share_is_one_row_and_all_is_published(tmp_path, monkeypatch, capsys):
    made_up(tmp_path, "first", {"stages/calibrate/a": (2, 1.5), "stages/quantize/b": (4, 4)})
    made_up(tmp_path, "second", {"stages/calibrate/a": (2, 1.5), "stages/quantize/c": (4, 2, 1, 1.1)})
    arguments = ["first", "second", f"--results={tmp_path}", "--publish=both"]
    monkeypatch.setattr("sys.argv", ["measured_stages.py", *arguments])
    assert measured_stages.main() == 0
    lines = capsys.readouterr().out.splitlines()[2:]
    assert lines == [
        "| first | calibrate | 2.0 | 1.5 | – | – | -25% | 3 |",  # of an older run, which told of all memory alone
        "| first | quantize | 4.0 | 4.0 | – | – | +0% | 3 |",
        "| second | quantize | 4.0 | 2.0 | 1.0 | 1.1 | +10% | 3 |",
    ]
    folder = tmp_path / "published"
    assert all(line in (folder / "both.md").read_text() for line in lines)
    assert pd.read_csv(folder / "both.csv")["measured"].tolist() == [1.5 * GIB, 4 * GIB, 2 * GIB]
    about = json.loads((folder / "both.json").read_text())
    assert about["files"] == ["both.md", "both.csv"] and about["command"].endswith("--publish=both")


def test_what_was_not_planned_or_run_is_said(tmp_path):
    with pytest.raises(UserError, match="run \\+experiment=none with plan=true"):
        measured_stages.measured("none", tmp_path)
