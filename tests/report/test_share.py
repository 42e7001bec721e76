"""A table's numbers as a file for others: whole, without places of this machine, and read with suspicion."""

from pathlib import Path

import pytest
from made_up_runs import PROTOCOL, score, write_made_up, write_run
from tiny_world import run_script

from vqdm.errors import UserError
from vqdm.report.experiments import read_table
from vqdm.report.formats import table_content
from vqdm.report.records import newest_records
from vqdm.report.share import beside, read_share, without_places, write_share
from vqdm.runs.files import write_sealed

TABLE = read_table(Path(__file__).parent / "golden" / "made_up.yaml")


def shared(results: Path) -> tuple[Path, list[list[dict]]]:
    rows = newest_records(TABLE, results)
    content = table_content(TABLE, rows, model="sdxl", results=results)
    return write_share(TABLE, content, rows, model="sdxl", results=results), rows


def test_numbers_and_protocols_are_there_and_places_are_not(tmp_path):
    write_made_up(tmp_path)
    file, _ = shared(tmp_path)
    content = read_share(file)
    rows = {row["name"]: row for row in content["rows"]}
    assert "made_never" not in rows and len(rows["made_far"]["runs"]) == 2
    run = rows["made_near"]["runs"][0]
    assert run["metrics"]["fid_paper"]["value"] == 19.6 and run["metrics"]["psnr_to_fp"]["se"] == 0.125
    assert run["metrics"]["fid_paper"]["protocol"]["reference_sha256"] == "ab12"
    assert run["protocol"] == PROTOCOL and run["not_run"] == ["hpsv2"] and run["bits"]["file_bytes"] > 0
    text = file.read_text()
    assert str(tmp_path) not in text and "metrics/" not in text and "stages/" not in text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("/home/me/data/coco.csv, captions", "coco.csv, captions"),
        ("data/coco2014_val_30k.csv, captions", "coco2014_val_30k.csv, captions"),
        (r"C:\Users\me\list.txt", "list.txt"),
        ("~/lists/mine.json", "mine.json"),
        ("ViT-L/14 of OpenAI", "ViT-L/14 of OpenAI"),
        ("100 · max(cosine, 0)", "100 · max(cosine, 0)"),
        ("images in [-1, 1]", "images in [-1, 1]"),
    ],
)
def test_paths_become_names(text, said):
    assert without_places({"a": [text]}) == {"a": [said]}


def test_theirs_stand_beside_ours_with_what_differs(tmp_path):
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    write_made_up(theirs)
    file, _ = shared(theirs)
    protocol = PROTOCOL | {"n": 1000}
    write_run(ours, "made_near", {"pickscore": score(0.226, 0.001), "fid_paper": score(None)}, protocol=protocol)
    text = beside(TABLE, newest_records(TABLE, ours), read_share(file), results=ours, name="theirs.json")
    text = text.replace("\\", "")
    (line,) = [line for line in text.splitlines() if line.startswith("| VQ_3 near")]
    assert "0.226 / 0.224 (+0.002)" in line and "– / 19.6" in line
    assert "- n: 1000 / 5000" in text and "fid_paper: resize.size" in text
    (alone,) = [line for line in text.splitlines() if line.startswith("| full precision")]
    assert "– / 0.2263" in alone


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content["rows"][0].pop("method"),
        lambda content: content["rows"][0]["runs"].clear(),
        lambda content: content["rows"][0]["runs"][0]["metrics"].update(x={"value": "<b>", "se": 0, "protocol": {}}),
        lambda content: content.update(rows=3),
        lambda content: content.update(format=2),
        lambda content: content.update(title=["no text"]),
    ],
)
def test_what_is_no_such_file_is_one_line(change, tmp_path):
    write_made_up(tmp_path)
    file, _ = shared(tmp_path)
    content = read_share(file)
    change(content)
    write_sealed(file, content)
    with pytest.raises(UserError) as error:
        read_share(file)
    assert str(file) in str(error.value) and "\n" not in str(error.value)


def test_a_damaged_file_is_one_line(tmp_path):
    write_made_up(tmp_path)
    file, _ = shared(tmp_path)
    file.write_text(file.read_text().replace("19.6", "18.6"))
    with pytest.raises(UserError, match="is no whole file of results/share"):
        read_share(file)


def test_the_command_shows_a_file_of_others(tmp_path):
    theirs = {"format": 1, "table": "demo", "title": "demo", "model": "tiny"}
    run = {"fingerprint": "ab", "bits": {}, "protocol": {"n": 512}, "not_run": [], "made": {}}
    run["metrics"] = {"psnr_to_fp": {"value": 30.0, "se": 0.3, "protocol": {}}}
    write_sealed(tmp_path / "theirs.json", theirs | {"rows": [{"name": "tiny_rtn4", "method": "RTN", "runs": [run]}]})
    arguments = ("demo", "--from", "theirs.json", "--results", "results")
    done = run_script("scripts/make_tables.py", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "– / 30" in done.stdout and (tmp_path / "results" / "tables" / "demo-beside-theirs.md").is_file()
    done = run_script("scripts/make_tables.py", "table1_tiny", *arguments[1:], cwd=tmp_path)
    assert done.returncode == 1 and "holds the table demo, not table1_tiny" in done.stderr
