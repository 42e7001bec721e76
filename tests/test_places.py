"""Places that results cannot be written to: refused in one line, and what is finished is shown all the same."""

import dataclasses

import pytest

from vqdm import pipeline
from vqdm.config.options import (
    CalibrationConfig,
    Config,
    EvaluateConfig,
    ModelConfig,
    PromptsConfig,
    SamplerConfig,
    TrackerConfig,
)
from vqdm.errors import UserError
from vqdm.hub.card import card_data, licence_of
from vqdm.prompts.text_files import MAX_FILE_BYTES, read_bytes
from vqdm.report.experiments import Row, Table
from vqdm.runs.files import atomic_write, is_writable
from vqdm.runs.locks import locked


def _a_file(place):
    place.write_text("")
    return place


def _below_a_file(place):
    return _a_file(place) / "results"


def _dead_link(place):
    place.symlink_to(place.with_name("nowhere") / "at all")
    return place


def _proc(place):
    return place.__class__("/proc/vqdm")


@pytest.mark.parametrize("make", [_a_file, _below_a_file, _dead_link, _proc])
def test_a_place_that_cannot_be_is_one_line_and_ends_at_once(make, tmp_path):
    place = make(tmp_path / "place")
    with pytest.raises(UserError, match=r"cannot (write in|make)") as error, locked(place):
        pass
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="cannot write in"):
        atomic_write(place / "file.json", b"{}")


def test_what_is_writable_is_found_out_by_writing(tmp_path):
    assert is_writable(tmp_path) and is_writable(tmp_path / "not" / "there")
    assert not is_writable(_a_file(tmp_path / "file")) and not is_writable(_dead_link(tmp_path / "link"))
    assert not is_writable(_proc(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]


def test_finished_results_on_a_read_only_disk_are_shown(tmp_path, monkeypatch, capsys):
    config = Config(
        name="kept", method="a row", results_dir=str(tmp_path), threads=1, device="cpu",
        tracker=TrackerConfig(kind="none"),
        model=ModelConfig(name="tiny", builtin="tiny", sampler=SamplerConfig(steps=2)),
        calibration=CalibrationConfig(source="tiny", n=2, batch_size=2),
        evaluate=EvaluateConfig(prompts=PromptsConfig(source="tiny", n=4), metrics=["tiny"], batch_size=4, bootstrap=3),
    )  # fmt: skip
    record = pipeline.run(config)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    monkeypatch.setattr(pipeline, "is_writable", lambda place: False)
    table = Table(
        name="shown",
        title="Shown",
        model="tiny",
        metrics=("clip_score",),
        rows=(Row("a row", "kept"), Row("b row", "kept")),
    )
    pipeline.run_table(table, [[config], [config]])
    said = capsys.readouterr().out
    assert said.count("only shown") == 1 and said.count("not run") == 0
    pipeline.run_table(table, [[], [config]], row="b row")  # the options of one do not apply to the other
    said = capsys.readouterr().out
    assert said.count("only shown") == 1 and said.count("not run") == 1
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    assert pipeline.run(config)["fingerprint"] == record["fingerprint"]
    with pytest.raises(UserError, match="not finished there"):
        pipeline.run(dataclasses.replace(config, name="other"))


@pytest.mark.parametrize(
    "card",
    [
        b"---\nlicense: [unclosed\n---\n",
        b"---\nlicense: \xff\xfe\n---\n",
        b"---\n- a\n- list\n---\n",
        b"---\n\tx: y\n---\n",
        b"\0",
    ],
)
def test_a_base_models_card_that_cannot_be_read_costs_a_line(card, tmp_path):
    (tmp_path / "README.md").write_bytes(card)
    assert isinstance(card_data(str(tmp_path)), dict)
    assert licence_of(str(tmp_path)) is None


@pytest.mark.parametrize("licence", ["[mit, apache]", "{a: b}", "12", "null"])
def test_a_licence_is_a_text_or_unknown(licence, tmp_path):
    (tmp_path / "README.md").write_text(f"---\nlicense: {licence}\n---\n")
    assert licence_of(str(tmp_path)) is None


def test_a_large_file_of_nul_is_refused_without_being_read(tmp_path):
    import resource

    file = tmp_path / "prompts.txt"
    with file.open("wb") as hole:
        hole.truncate(MAX_FILE_BYTES)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match="line 1: a character that is no text"):
        read_bytes(file)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB
