"""Texts from outside lead nowhere: as names of files, in CSV, in Markdown, in LaTeX's comments."""

import csv
import io

import pandas as pd
import pytest

from vqdm.config.checks import check
from vqdm.config.options import Config, ModelConfig
from vqdm.errors import UserError
from vqdm.report.formats import to_latex, to_markdown
from vqdm.runs.stage import Stage
from vqdm.runs.store import Store
from vqdm.runs.texts import file_name_of, in_csv, is_file_name

OUTSIDE = ["", ".", "..", "../x", "/x", "a/../b", ".hidden", "a\nb", "a\0b", "a\\b", "x" * 300, "é" * 100, "a/", " a"]
INSIDE = ["tiny_vq3", "my run (2)", "Ünï", "a,b=c+d@e", "x" * 120]


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_name_that_leads_out_is_refused_before_anything_is_written(name, tmp_path):
    with pytest.raises(UserError, match="name=") as error:
        check(Config(name=name, model=ModelConfig(builtin="tiny")))
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"model\.name="):
        check(Config(name="x", model=ModelConfig(name=name, builtin="tiny")))
    with pytest.raises(UserError):
        Store(tmp_path / "results").record_run(name, {"fingerprint": "0" * 64, "stages": []})
    with pytest.raises(ValueError, match="directory"):
        Stage("quantize", 1, name, {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [*INSIDE, "folder/inside"])
def test_a_plain_name_is_taken_and_slashes_make_folders(name, tmp_path):
    check(Config(name=name, model=ModelConfig(builtin="tiny")))
    file = Store(tmp_path).record_run(name, {"fingerprint": "0" * 64, "stages": []})
    assert file == tmp_path / "runs" / name / "00000000.json"
    assert file.is_file()


@pytest.mark.parametrize("text", OUTSIDE + INSIDE)
def test_a_name_that_is_made_is_one(text):
    assert is_file_name(file_name_of(text))


def test_no_spreadsheet_computes_a_text():
    frame = pd.DataFrame(
        {"method": ["=cmd|' /C calc'!A0", "+1", "-2+3", "@SUM(A1)", "plain"], "fid": [-1.5, 2, 3, 4, 5]}
    )
    rows = list(csv.reader(io.StringIO(frame.map(in_csv).to_csv(index=False))))
    assert [row[0][0] for row in rows[1:]] == ["'", "'", "'", "'", "p"]
    assert float(rows[1][1]) == -1.5


def test_a_text_breaks_no_table_opens_no_tag_and_ends_no_comment():
    cells = pd.DataFrame({"method": ["a|b\n<script>alert(1)</script>"], "fid": ["1.0 < 2"]})
    parts = ("title\n# other", cells, ["below\n\\input{evil}"], ["note\u2028\\input{evil}\r\\input{evil}"])
    lines = to_markdown(*parts).splitlines()
    row = next(line for line in lines if "alert" in line)
    assert row.replace(r"\|", "").count("|") == 3
    assert "<script" not in row and "</script" not in row and "1.0 < 2" in row
    assert lines[0] == "# title # other"
    outside = [line for line in to_latex(*parts, label="x").splitlines() if not line.startswith("%")]
    assert not any("input" in line for line in outside)
