"""Whole tables, byte for byte, from made-up runs; and the tables of experiments/ where nothing was run.

A table that changes on purpose: VQDM_WRITE_GOLDEN=1 python -m pytest tests/report/test_tables_golden.py; read the diff.
"""

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from made_up_runs import score, write_made_up, write_run, write_votes

from vqdm.report.experiments import read_table
from vqdm.report.formats import table_content, write_table
from vqdm.report.records import newest_records

ROOT = Path(__file__).resolve().parent.parent.parent
GOLDEN = Path(__file__).parent / "golden"
TWINS = {
    "table1_sdxl": "table1_tiny", "bits_sweep": "bits_sweep_tiny", "ablations": "ablations_tiny",
    "turbo_sdxl": "turbo_tiny", "human_preference": "human_preference_tiny",
}  # fmt: skip


@pytest.fixture
def results(tmp_path) -> Path:
    write_made_up(tmp_path)
    write_votes(
        tmp_path, "study", ("made_near", "made_fp", 46.5, 42.0, 51.0), ("made_far", "made_near", 30.0, 25.0, 35.0)
    )
    return tmp_path


@pytest.mark.parametrize("name", ["made_up", "made_up_votes"])
def test_made_up_runs_give_the_golden_table(name, results):
    table = read_table(GOLDEN / f"{name}.yaml")
    rows = newest_records(table, results)
    text, files = write_table(table_content(table, rows, model="sdxl", results=results), rows, results=results)
    assert [file.suffix for file in files] == [".md", ".tex", ".csv"] and files[0].read_text() == text
    for file in files:
        if os.environ.get("VQDM_WRITE_GOLDEN"):
            (GOLDEN / file.name).write_bytes(file.read_bytes())
        assert file.read_bytes() == (GOLDEN / file.name).read_bytes(), file.name


def test_the_golden_numbers_are_those_that_were_made_up():
    data = pd.read_csv(GOLDEN / "made_up.csv").set_index("method")
    assert data["fid_paper"].tolist()[:3] == [18.9, 19.6, 25.5] and data["fid_paper"].isna().tolist()[3:] == [
        True,
        True,
    ]
    assert data["fid_paper_delta"].round(6).tolist()[:3] == [-0.09, 0.3, 3.36]
    assert data["fid_paper_reproduced"].tolist()[:3] == [True, True, False]
    assert data.loc["VQ_2 far", "fid_paper_seeds"] == pytest.approx(0.5**0.5, rel=1e-5)
    assert data.loc["never run", "not_run"] == "pickscore fid_paper hpsv2 psnr_to_fp"
    assert data.loc["full precision", "not_run"] == "hpsv2"
    markdown = (GOLDEN / "made_up.md").read_text()
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines() if "|" in line]
    assert len({len(line) for line in lines}) == 1
    latex = (GOLDEN / "made_up.tex").read_text()
    body = latex.split("\\midrule\n")[1].split("\\bottomrule")[0].strip().splitlines()
    assert len(body) == len(lines) - 2
    for shown, typeset in zip(lines[2:], body, strict=True):
        cells = typeset.removesuffix(r" \\").split(" & ")
        marks = {r"$\pm$": "±", r"$\checkmark$": "✓", r"$\times$": "✗", r"\_": "_", "--": "–"}
        for mark, character in marks.items():
            cells = [cell.replace(mark, character) for cell in cells]
        assert cells == shown


def test_notes_are_comments_and_titles_are_escaped_in_latex():
    text = (GOLDEN / "made_up.tex").read_text()
    assert r"\caption{Made-up numbers \& 100 \% of the cases}" in text
    assert r"\toprule" in text and r"\midrule" in text and r"\bottomrule" in text
    after = text.split("\\end{table}\n")[1].splitlines()
    assert after and all(line.startswith("% ") for line in after)


WITHOUT_NETWORK_AND_TORCH = """
import socket, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "torchvision", "diffusers", "transformers", "open_clip", "hydra", "wandb"):
            raise AssertionError(f"{name} is imported")
sys.meta_path.insert(0, Refuse())
def refuse(*arguments, **options):
    raise AssertionError("the network is asked")
socket.socket.connect = socket.getaddrinfo = refuse
import runpy
sys.argv = ["make_tables.py", *sys.argv[1:]]
runpy.run_path(SCRIPT, run_name="__main__")
"""


def make_tables(*arguments: str) -> subprocess.CompletedProcess:
    code = WITHOUT_NETWORK_AND_TORCH.replace("SCRIPT", repr(str(ROOT / "scripts" / "make_tables.py")))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)


def test_every_table_is_made_again_without_network_and_torch(tmp_path):
    done = make_tables("--results", str(tmp_path))
    assert done.returncode == 0, done.stderr
    names = {file.stem for file in (ROOT / "experiments").glob("*.yaml")}
    for end in ("md", "tex", "csv"):
        assert {file.stem for file in (tmp_path / "tables").glob(f"*.{end}")} == names
    text = (tmp_path / "tables" / "table1_sdxl.md").read_text()
    line = next(line for line in text.splitlines() if line.startswith("| VQDM 3 bit"))
    for published in ("3.15", "0.225", "0.355", "19.18"):
        assert f"| {published} " in line
    assert line.count("not run") == len(read_table(ROOT / "experiments" / "table1_sdxl.yaml").metrics)
    assert "0 of 8 rows were run" in text and "fid_paper 0.3" in text and "arXiv 2409.00492" in text
    votes = (tmp_path / "tables" / "human_preference.md").read_text()
    assert votes.count("not run") == 8
    assert all(f"| {share} " in votes for share in (52.8, 65.7, 77.5, "93.0", 44.6, 34.5, 35.3, 28.5))


def test_a_named_table_takes_in_what_was_run(tmp_path):
    scores = {"pickscore": score(0.2255, 0.0002), "clip_h14": score(0.36, 0.001), "fid_paper": score(19.0, 0.1)}
    write_run(tmp_path, "table1_vqdm3", scores, method="VQDM 3 bit")
    done = make_tables("table1_sdxl", "--results", str(tmp_path))
    assert done.returncode == 0 and "1 of 8 rows" in done.stdout, done.stderr
    line = next(o for o in (tmp_path / "tables" / "table1_sdxl.md").read_text().splitlines() if "| VQDM 3 bit" in o)
    assert "| +0.0005 ✓ " in line and "| +0.0050 ✗ " in line and "| -0.18 ✓ " in line
    write_run(tmp_path, "table1_fp", {"fid_paper": score(19.0)}, protocol={"n": 4})
    done = make_tables("table1_sdxl", "--results", str(tmp_path))
    assert done.returncode != 0 and done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1
    assert "fid_paper of table1_fp and of table1_vqdm3" in done.stderr
    done = make_tables("table1_sdxl", "--results", str(tmp_path), "--mixed")
    assert done.returncode == 0, done.stderr
    assert "n: 4 (table1_fp), 5000 (VQDM 3 bit)" in (tmp_path / "tables" / "table1_sdxl.md").read_text()
    assert make_tables("table1_tiny", "--rows").stdout.startswith("table1_tiny_fp,table1_tiny_vqdm4,")
    assert "there is no table 'table2'" in make_tables("table2").stderr


@pytest.mark.parametrize("name", TWINS)
def test_a_twin_has_the_same_rows_on_a_tiny_model(name):
    table, twin = (read_table(ROOT / "experiments" / f"{one}.yaml") for one in (name, TWINS[name]))
    assert table.model.startswith("sdxl") and twin.model.startswith("tiny")
    assert [row.method for row in table.rows] == [row.method for row in twin.rows]
    ends = [[row.name.removeprefix(f"{one}_") for row in of.rows] for one, of in ((name, table), (TWINS[name], twin))]
    assert ends[1] == ([end.removeprefix("table1_") for end in ends[0]] if name == "table1_sdxl" else ends[0])
    sides = [
        [(table.row(pair.left).method, table.row(pair.right).method) for pair in table.pairs] for table in (table, twin)
    ]
    assert sides[0] == sides[1]
    assert twin.deviations and not any(row.published for row in twin.rows)


def test_the_published_values_are_the_paper_s():
    """Against the table as it was copied by hand from the project page."""
    page = """
        full precision | 32 | 0.226 | 0.357 | 18.99
        VQDM 4 bit | 4.15 | 0.226 | 0.356 | 19.11
        VQDM 3 bit | 3.15 | 0.225 | 0.355 | 19.18
        VQDM 2 bit | 2.15 | 0.219 | 0.341 | 22.14
        Q-Diffusion 4 bit | 4 | 0.225 | 0.355 | 19.30
        PTQ4DM 4 bit | 4 | 0.224 | 0.353 | 19.78
    """
    table = read_table(ROOT / "experiments" / "table1_sdxl.yaml")
    found = {row.method: row.published for row in table.rows if row.published}
    for line in page.strip().splitlines():
        method, *values = (cell.strip() for cell in line.split("|"))
        expected = dict(zip(("bits", "pickscore", "clip_h14", "fid_paper"), map(float, values), strict=True))
        assert found.pop(method) == expected
    assert not found
