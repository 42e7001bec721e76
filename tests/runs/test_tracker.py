import json
import os
import signal
import struct
import subprocess
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import wandb
from PIL import Image
from tiny_world import ROOT, command, environment

from vqdm import pipeline
from vqdm.config.codecs import RtnConfig
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
from vqdm.runs.tracker import MAX_IMAGES, NullTracker, WandbTracker, _mode, start_tracker

BLOCK = 32768  # of the LevelDB log format, in which wandb writes a run


def records(path):
    """The protobuf records of a .wandb file: 7 bytes of header, then chunks of (crc, length, type) in blocks."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, parts = path.read_bytes(), 7, []
    assert data[:4] == b":W&B"
    while place < len(data):
        if BLOCK - place % BLOCK < 7:
            place += BLOCK - place % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        parts.append(data[place + 7 : place + 7 + length])
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(b"".join(parts))
            parts = []


def records_of_run(directory):
    """All records of the only run in a directory."""
    wandb.teardown()  # its process writes the last of a run after finish() has returned
    (file,) = (directory / "wandb").glob("offline-run-*/*.wandb")
    return list(records(file))


def read_run(directory):
    """Run record, history rows, exit code of the only run in a directory."""
    found = records_of_run(directory)
    run = next(r.run for r in found if r.WhichOneof("record_type") == "run")
    rows = [
        {"/".join(item.nested_key): json.loads(item.value_json) for item in r.history.item}
        for r in found
        if r.WhichOneof("record_type") == "history"
    ]
    codes = [r.exit.exit_code for r in found if r.WhichOneof("record_type") == "exit"]
    return run, rows, codes


def read_artifacts(directory, kind):
    return [
        r.artifact
        for r in records_of_run(directory)
        if r.WhichOneof("record_type") == "artifact" and r.artifact.type == kind
    ]


def read_table(directory, name):
    (file,) = (directory / "wandb").glob(f"offline-run-*/files/media/table/{name}_*.table.json")
    return json.loads(file.read_text())


@pytest.fixture
def no_network(monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.delenv("WANDB_DIR", raising=False)
    monkeypatch.delenv("WANDB_RUN_GROUP", raising=False)


def start(directory, **changes):
    config = TrackerConfig(**{"project": "tests", "group": "a group"} | changes)
    return start_tracker(**asdict(config), name="row", run_id="0123abcd", settings={"bits": 3}, directory=directory)


def test_an_offline_run_holds_what_was_logged(no_network, tmp_path):
    directory = tmp_path / "not" / "there yet"
    tracker = start(directory)
    pictures = []
    for i in range(MAX_IMAGES + 3):
        pictures.append(tmp_path / f"{i}.png")
        Image.new("RGB", (4, 4), (i, 0, 0)).save(pictures[-1])
    tracker.log({"metrics/fid": 1.5, "metrics/kid": 0.25})
    tracker.table("layers", [{"name": "conv_in", "bits": 3}, {"name": "conv_out", "bits": 16}])
    tracker.table("nothing", [])
    tracker.images("samples", pictures, [f"caption {i}" for i in range(len(pictures))])
    tracker.finish(failed=False)

    run, rows, codes = read_run(directory)
    assert tracker.id == run.run_id == "0123abcd"
    assert (run.project, run.run_group, run.display_name) == ("tests", "a group", "row")
    assert {"bits": "3"}.items() <= {item.key: item.value_json for item in run.config.update}.items()
    assert codes == [0]
    logged = {key: value for row in rows for key, value in row.items()}
    assert (logged["metrics/fid"], logged["metrics/kid"]) == (1.5, 0.25)
    assert not any(key.startswith("nothing") for key in logged)
    assert logged["layers/nrows"] == 2
    assert logged["samples/count"] == MAX_IMAGES
    assert logged["samples/captions"] == [f"caption {i}" for i in range(MAX_IMAGES)]


def test_a_tables_numbers_stay_numbers_and_a_missing_key_is_an_empty_cell(no_network, tmp_path):
    tracker = start(tmp_path)
    tracker.table(
        "evaluate/metrics",
        [
            {"metric": "fid", "value": 1.5, "se": None, "protocol": {"n": 16}},
            {"metric": "kid", "value": 2, "se": 0.25, "note": "small n"},
        ],
    )
    tracker.finish(failed=False)
    wandb.teardown()
    table = read_table(tmp_path, "evaluate/metrics")
    assert table["columns"] == ["metric", "value", "se", "protocol", "note"]
    assert table["data"] == [["fid", 1.5, None, '{"n": 16}', None], ["kid", 2, 0.25, None, "small n"]]


def test_figures_that_exist_are_logged(no_network, tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "pareto.png")
    tracker = start(tmp_path)
    tracker.figures([tmp_path / "pareto.png", tmp_path / "not drawn.png"])
    tracker.figures([tmp_path / "not drawn.png"])
    tracker.finish(failed=False)
    _, rows, _ = read_run(tmp_path)
    assert [key for row in rows for key in row if key.endswith("/path")] == ["figures/pareto/path"]


def test_a_denoiser_is_a_reference_to_its_files(no_network, tmp_path):
    stage = tmp_path / "tiny-3x8,b=3 +x-0123abcd"
    (stage / "denoiser").mkdir(parents=True)
    for file in ("manifest.json", "denoiser/config.json", "denoiser/model.safetensors", "other.bin"):
        (stage / file).write_text(file)
    tracker = start(tmp_path / "runs")
    tracker.denoiser(f"quantize-{stage.name}", stage, {"bits_per_weight": 3.7, "upstream": {"calibrate": "tiny-4"}})
    tracker.finish(failed=False)
    (artifact,) = read_artifacts(tmp_path / "runs", "denoiser")
    assert artifact.name == "quantize-tiny-3x8_b_3__x-0123abcd"
    assert json.loads(artifact.metadata) == {"bits_per_weight": 3.7, "upstream": {"calibrate": "tiny-4"}}
    assert {entry.path for entry in artifact.manifest.contents} == {
        "manifest.json", "denoiser/config.json", "denoiser/model.safetensors",
    }  # fmt: skip
    assert all(entry.ref.startswith("file://") and not entry.local_path for entry in artifact.manifest.contents)


def test_weights_and_tables_go_along_as_files_when_asked_for(no_network, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    stage = tmp_path / "tiny-3x8-0123abcd"
    (stage / "denoiser").mkdir(parents=True)
    for file in ("manifest.json", "denoiser/model.safetensors"):
        (stage / file).write_text(file)
    (tmp_path / "demo.csv").write_text("method,bits\n")
    tracker = start(tmp_path / "runs", artifacts="upload")
    tracker.denoiser("quantize-tiny", stage, {}, ("calibrate-tiny",))  # offline W&B takes no inputs
    tracker.table_files("demo", [tmp_path / "demo.csv", tmp_path / "demo.md"])
    tracker.finish(failed=False)
    (weights,) = read_artifacts(tmp_path / "runs", "denoiser")
    assert {entry.path for entry in weights.manifest.contents} == {"manifest.json", "denoiser/model.safetensors"}
    assert all(Path(entry.local_path).is_file() and not entry.ref for entry in weights.manifest.contents)
    (table,) = read_artifacts(tmp_path / "runs", "table")
    assert table.name == "table-demo" and [entry.path for entry in table.manifest.contents] == ["demo.csv"]


def test_online_a_denoiser_names_what_it_was_made_from(tmp_path):
    """A stand-in for the client's run, which without a server cannot be had online."""
    used, logged = [], []
    run = SimpleNamespace(id="x", offline=False, use_artifact=used.append, log_artifact=logged.append)
    (tmp_path / "denoiser").mkdir()
    (tmp_path / "manifest.json").write_text("{}")
    tracker = WandbTracker(run, logged=tmp_path / "logged.json", uploads=False)
    tracker.denoiser("finetune-tiny+vq3", tmp_path, {}, ("quantize-tiny+vq3",))
    assert used == ["quantize-tiny_vq3:latest"] and [artifact.name for artifact in logged] == ["finetune-tiny_vq3"]


def test_a_run_that_fails_is_finished_with_exit_code_1(no_network, tmp_path):
    tracker = start(tmp_path, mode="offline")
    tracker.finish(failed=True)
    _, _, codes = read_run(tmp_path)
    assert codes == [1]


def test_no_tracker_takes_everything_and_writes_nothing(tmp_path):
    tracker = start(tmp_path / "runs", kind="none")
    assert type(tracker) is NullTracker
    assert tracker.id is None
    tracker.log({"fid": 1.0})
    tracker.table("layers", [{"a": 1}])
    tracker.images("samples", [tmp_path / "missing.png"], ["caption"])
    tracker.finish(failed=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("wanted", "key", "variable", "mode"),
    [
        ("auto", None, None, "offline"),
        ("auto", "", None, "offline"),
        ("auto", "secret", None, "online"),
        ("auto", "secret", "online", "online"),
        ("auto", "secret", "offline", "offline"),
        ("auto", "secret", "disabled", "disabled"),
        ("auto", None, "disabled", "disabled"),
        ("auto", None, "online", "offline"),
        ("offline", "secret", "online", "offline"),
        ("online", None, "offline", "online"),
    ],
)
def test_key_decides_mode_unless_told(wanted, key, variable, mode, monkeypatch):
    monkeypatch.setenv("NETRC", os.devnull)
    for name, value in (("WANDB_API_KEY", key), ("WANDB_MODE", variable)):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    assert _mode(wanted) == mode


@pytest.mark.parametrize(("machine", "mode"), [("api.wandb.ai", "online"), ("elsewhere.example", "offline")])
def test_wandb_login_is_a_key_too(machine, mode, monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert _mode("auto") == "offline"
    (tmp_path / "netrc").write_text(f"machine {machine}\n  login user\n  password 0123456789abcdef\n")
    assert _mode("auto") == mode
    (tmp_path / "settings").write_text("[default]\nbase_url = https://elsewhere.example\n")
    assert _mode("auto") == ("online" if mode == "offline" else "offline")
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "settings").write_text("[default]\nmode = offline\n")
    assert _mode("auto") == "offline"


def test_the_same_run_again_logs_nothing_twice(no_network, tmp_path):
    """A second offline run of one id would take the place of the first, and of its curve, when both are uploaded."""
    tracker = start(tmp_path)
    tracker.log({"finetune/loss": 1.0})
    tracker.finish(failed=False)
    again = start(tmp_path)
    again.log({"metrics/fid": 1.0})
    again.finish(failed=False)
    assert again.id == tracker.id
    _, rows, _ = read_run(tmp_path)  # which is the only one
    assert [row["finetune/loss"] for row in rows if "finetune/loss" in row] == [1.0]
    assert not any("metrics/fid" in row for row in rows)


def test_a_run_that_failed_goes_on_in_a_second_part(no_network, tmp_path):
    start(tmp_path).finish(failed=True)
    time.sleep(1.1)  # parts are named by the second
    start(tmp_path).finish(failed=False)
    assert len(list((tmp_path / "wandb").glob("offline-run-*-0123abcd"))) == 2


def test_extras_that_fail_cost_a_line(no_network, tmp_path, caplog):
    tracker = start(tmp_path)
    (tmp_path / "no picture.png").write_bytes(b"no picture")
    tracker.figures([tmp_path / "no picture.png"])
    tracker.images("samples", [tmp_path / "missing.png"], ["caption"])
    tracker.finish(failed=False)
    assert "images left out" in caplog.text


def _config(results):
    """The smallest experiment: two-bit weights, four images against those of the original."""
    return Config(
        name="tracked", results_dir=str(results), threads=1, device="cpu",
        model=ModelConfig(name="tiny", builtin="tiny", sampler=SamplerConfig(steps=2)),
        calibration=CalibrationConfig(source="tiny", n=2, batch_size=2), quantize=RtnConfig(bits=2),
        evaluate=EvaluateConfig(prompts=PromptsConfig(source="tiny", n=4), metrics=["paired"], batch_size=4),
    )  # fmt: skip


def test_an_experiment_is_one_run_with_a_section_for_each_stage(no_network, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_RUN_GROUP", "a sweep")
    record = pipeline.run(_config(tmp_path))
    run, rows, codes = read_run(tmp_path / "tracker")
    assert codes == [0]
    assert record["fingerprint"].startswith(run.run_id)
    assert run.display_name == record["directories"]["evaluate"].rpartition("/")[2]
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert (config["quantize"]["bits"], config["model"]["sampler"]["steps"]) == (2, 2)
    logged = {key: value for row in rows for key, value in row.items()}
    sections = {key.partition("/")[0] for key in logged}
    assert {"calibrate", "quantize", "evaluate"} <= sections
    manifest = json.loads((tmp_path / record["directories"]["quantize"] / "manifest.json").read_text())
    assert {f"quantize/{key}": value for key, value in manifest["summary"].items()}.items() <= logged.items()
    (artifact,) = read_artifacts(tmp_path / "tracker", "denoiser")
    metadata = json.loads(artifact.metadata)
    assert metadata["upstream"]["calibrate"] == record["directories"]["calibrate"].rpartition("/")[2]
    assert metadata["bits_per_weight"] == record["bits"]["bits_per_weight"]
    (weights,) = [e for e in artifact.manifest.contents if e.path.endswith(".safetensors")]
    assert weights.size == (tmp_path / record["directories"]["quantize"] / weights.path).stat().st_size


def test_a_sweep_is_the_group_unless_told_otherwise(no_network, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_RUN_GROUP", "a sweep")
    for group, expected in ((None, "a sweep"), ("a table", "a table")):
        directory = tmp_path / expected
        start(directory, group=group).finish(failed=False)
        assert read_run(directory)[0].run_group == expected


def test_an_experiment_that_fails_finishes_its_run(no_network, tmp_path):
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages" / "generate").write_text("a file where the images' directory should be")
    with pytest.raises(UserError, match="cannot write"):
        pipeline.run(_config(tmp_path))
    _, rows, codes = read_run(tmp_path / "tracker")
    assert codes == [1]
    assert any("quantize/bits_per_weight" in row for row in rows), "what was done before is there"


@pytest.mark.slow
@pytest.mark.parametrize("stop", ["SIGTERM", "SIGINT to all"])
def test_an_experiment_that_is_interrupted_finishes_its_run(stop, no_network, tmp_path):
    arguments = ("+experiment=tiny_rtn4", "evaluate.prompts.n=512", "calibration.n=2", "threads=1")
    process = subprocess.Popen(
        command(*arguments, f"results_dir={tmp_path}"), cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    until = time.monotonic() + 600
    while not list(tmp_path.glob("stages/generate/*/images/*.png")) and time.monotonic() < until:
        time.sleep(0.1)
    if stop == "SIGTERM":
        process.terminate()
    else:
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    said = process.communicate(timeout=600)[1]
    assert process.returncode == (143 if stop == "SIGTERM" else 130)
    assert said.splitlines()[-1] == "stopped; the same command goes on from here", said
    _, rows, codes = read_run(tmp_path / "tracker")
    assert codes == [1]
    assert any("quantize/bits_per_weight" in row for row in rows)
