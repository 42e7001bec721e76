"""Tables through run.py, row by row, and published: real runs of the shipped tiny model on a few prompts."""

import json

import pandas as pd
import publish_table
import pytest
from tiny_world import FEW, run

from vqdm import pipeline
from vqdm.errors import UserError
from vqdm.report.records import read_record
from vqdm.runs.stage import Stage
from vqdm.runs.store import Store


def test_rows_are_run_one_by_one_and_the_table_shows_what_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr("vqdm.report.report.figures_of", lambda *about: [])  # two fifths of the time: test_figures.py
    small = (*FEW, f"results_dir={tmp_path}")
    done = run("table=bits_sweep_tiny", "row=bits_sweep_tiny_fp", *small)
    assert done.returncode == 0, done.stderr
    data = pd.read_csv(tmp_path / "tables" / "bits_sweep_tiny.csv", index_col="method")
    assert len(data) == 14 and data["fid"].notna().sum() == 1
    records, away = tmp_path / "runs" / "bits_sweep_tiny_fp", tmp_path / "away"
    records.rename(away)
    run_one = pipeline._run

    def run_while_another_row_ends(*about):
        made = run_one(*about)
        away.rename(records)
        return made

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "_run", run_while_another_row_ends)
        done = run("+table=bits_sweep_tiny", "row=bits_sweep_tiny_rtn4", *small)
    assert done.returncode == 0, done.stderr
    file = tmp_path / "tables" / "bits_sweep_tiny.csv"
    data = pd.read_csv(file, index_col="method")
    assert data.index[data["fid"].notna()].tolist() == ["full precision", "RTN 4 bit"]
    assert data["not_run"].isna().tolist() == [True, True, *[False] * 12]
    assert pd.isna(data.loc["full precision", "psnr_to_fp"]) and data.loc["RTN 4 bit", "psnr_to_fp"] > 15
    done = run("table=bits_sweep_tiny", "row=bits_sweep_tiny_rtn4", *small, "evaluate.prompts.n=8")
    assert done.returncode == 0, done.stderr
    assert pd.read_csv(file)["fid"].notna().sum() == 1, "the other row was run on other captions"


def test_options_that_other_rows_lack_do_not_keep_one_row_from_its_run(tmp_path):
    options = ("table=bits_sweep_tiny", "quantize.damping=0.02", "plan=true", *FEW, f"results_dir={tmp_path}")
    done = run(*options, "row=bits_sweep_tiny_gptq4")
    assert done.returncode == 0, done.stderr
    assert "GPTQ" in done.stdout and "do not apply: bits_sweep_tiny_fp" in done.stderr
    for refused in (["row=bits_sweep_tiny_fp"], []):
        done = run(*options, *refused)
        assert done.returncode == 1 and "quantize.damping is an option of" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["table=table1_sdxl"], "stabilityai/stable-diffusion-xl-base-1.0"),
        (["table=human_preference", "row=human_preference_fp"], "parti128.csv"),
        (["table=table1_tiny", "row=nonsense"], "no row 'nonsense'"),
        (["row=table1_tiny_fp"], "give table=NAME"),
    ],
)
def test_what_cannot_run_is_one_line(arguments, said, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    done = run(*arguments, "tracker=none", f"results_dir={tmp_path}")
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert done.returncode != 0 and len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ") and said in lines[0]


def test_a_table_is_published_with_its_own_figures_and_its_command(tmp_path):
    for name in ("turbo", "turbo_tiny"):
        for folder, ends in {"tables": ("md", "tex", "csv"), "figures": ("png", "svg")}.items():
            (tmp_path / folder).mkdir(exist_ok=True)
            for end in ends:
                (tmp_path / folder / f"{name}.{end}").write_text(f"{name}.{end}")
    (tmp_path / "tables" / "turbo.md").write_text(
        "a table\n\n1 of 2 rows were run; `python run.py table=turbo` goes on with the others.\n"
        "To make it: `python run.py table=turbo`.\n"
    )
    (tmp_path / "figures" / "turbo-pareto.svg").write_text("pareto")
    (tmp_path / "figures" / "turbo_tiny-pareto.svg").write_text("another's")
    published = publish_table.publish("turbo", tmp_path, command="python run.py table=turbo threads=1")
    names = {file.name for file in published.iterdir()}
    assert names == {"turbo.md", "turbo.tex", "turbo.csv", "turbo.png", "turbo.svg", "turbo-pareto.svg", "turbo.json"}
    about = json.loads((published / "turbo.json").read_text())
    assert about["command"] == "python run.py table=turbo threads=1"
    assert (published / "turbo.md").read_text() == (
        "a table\n\n1 of 2 rows were run; `python run.py table=turbo threads=1` goes on with the others.\n"
        "To make it: `python run.py table=turbo threads=1`.\n"
    )
    assert about["git_sha"] and "turbo.tex" in about["files"]
    (tmp_path / "tables" / "turbo.tex").unlink()
    with pytest.raises(UserError, match=r"turbo\.tex is not there"):
        publish_table.publish("turbo", tmp_path, command="python run.py table=turbo")


def test_a_damaged_run_record_is_no_record(tmp_path):
    store, last = Store(tmp_path), Stage("evaluate", 1, "a", {})
    assert read_record(store, "a", last) is None
    file = store.record_run("a", {"fingerprint": last.fingerprint, "stages": []})
    assert read_record(store, "a", last)["experiment"] == "a"
    file.write_bytes(b'{"finger')
    assert read_record(store, "a", last) is None
