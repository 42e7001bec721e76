import json
import struct

import pytest
import wandb
from PIL import Image

from vqdm.config import TrackerConfig
from vqdm.tracker import MAX_IMAGES, NullTracker, _mode, start_tracker

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


def read_run(directory):
    """Run record, history rows, exit code of the only run in a directory."""
    wandb.teardown()  # its process writes the last of a run after finish() has returned
    (run_directory,) = (directory / "wandb").glob("offline-run-*")
    (file,) = run_directory.glob("*.wandb")
    found = list(records(file))
    run = next(r.run for r in found if r.WhichOneof("record_type") == "run")
    rows = [
        {"/".join(item.nested_key): json.loads(item.value_json) for item in r.history.item}
        for r in found
        if r.WhichOneof("record_type") == "history"
    ]
    codes = [r.exit.exit_code for r in found if r.WhichOneof("record_type") == "exit"]
    return run, rows, codes


@pytest.fixture
def no_network(monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.delenv("WANDB_DIR", raising=False)


def start(directory, **changes):
    config = TrackerConfig(**{"project": "tests", "group": "a group"} | changes)
    return start_tracker(config, name="row", run_id="0123abcd", settings={"bits": 3}, directory=directory)


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
    for name, value in (("WANDB_API_KEY", key), ("WANDB_MODE", variable)):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    assert _mode(TrackerConfig(mode=wanted)) == mode
