import json
import logging
import os
import resource
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from vqdm.errors import UserError
from vqdm.runs.files import atomic_write, read_sealed
from vqdm.runs.identity import files_identity
from vqdm.runs.items import read_item, write_item
from vqdm.runs.locks import locked
from vqdm.runs.stage import Stage
from vqdm.runs.store import Store

# Two configs whose fingerprints share the first eight hex digits (found by trying).
COLLIDING = [Stage("quantize", 1, "vq", {"n": n}) for n in (7956, 24542)]

# What the subprocesses share: the stage, and a make of three items that leaves a mark in `calls` for each.
CHILD = """
import os, resource, sys, time
from pathlib import Path
from vqdm.errors import UserError
from vqdm.runs.items import read_item, write_item
from vqdm.runs.stage import Stage
from vqdm.runs.store import Store

root, calls = Path(sys.argv[1]), Path(sys.argv[2])
stage = Stage("quantize", 1, "vq", {"bits": 3})

def make(directory, pause=0.0):
    for name in "abc":
        if read_item(directory, name) is None:
            with calls.open("a") as file:
                file.write(name)
            write_item(directory, name, {f"layers/{name}.bin": name.encode() * 5000}, {"name": name})
        print(name, flush=True)
        time.sleep(pause)
"""


def start(code, *arguments):
    program = CHILD + textwrap.dedent(code)
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


class Maker:
    """A make of items a, b, c and one plain file; remembers which items each call had to make."""

    def __init__(self):
        self.made = []

    def __call__(self, directory):
        made = []
        for name in "abc":
            if read_item(directory, name) is None:
                made.append(name)
                write_item(directory, name, {f"layers/{name}.bin": name.encode() * 5000}, {"name": name})
        atomic_write(directory / "plain.txt", b"plain")
        self.made.append("".join(made))
        return {"layers": 3}


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "results")


@pytest.fixture
def stage():
    return Stage("quantize", 1, "vq", {"bits": 3})


@pytest.fixture
def messages(caplog):
    """The lines that were logged so far."""
    caplog.set_level(logging.INFO, logger="vqdm")
    return lambda: [record.getMessage() for record in caplog.records]


def ensure(store, stage, make):
    return store.ensure(stage, make, environment={"device": "cpu"})


def flip_byte(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def temporaries(directory):
    return list(directory.rglob("*.tmp"))


def test_fingerprint_covers_what_changes_the_output_and_not_the_label():
    up = Stage("calibrate", 1, "c", {"n": 4})
    base = Stage("quantize", 1, "vq", {"bits": 3, "shape": (1, 2)}, {"calibrate": up, "model": "sha"})
    same = Stage("quantize", 1, "other", {"shape": [1, 2], "bits": 3}, {"model": "sha", "calibrate": up})
    others = [
        Stage("finetune", 1, "vq", base.config, base.upstream),
        Stage("quantize", 2, "vq", base.config, base.upstream),
        Stage("quantize", 1, "vq", base.config | {"bits": 4}, base.upstream),
        Stage("quantize", 1, "vq", base.config, base.upstream | {"model": "other"}),
        Stage("quantize", 1, "vq", base.config, base.upstream | {"calibrate": Stage("calibrate", 1, "c", {"n": 5})}),
    ]
    assert same.fingerprint == base.fingerprint
    assert len({base.fingerprint, *(other.fingerprint for other in others)}) == 6
    assert base.directory_name == f"vq-{base.fingerprint[:8]}"


def test_a_label_that_leaves_its_directory_is_refused():
    with pytest.raises(ValueError, match=r"\.\./x"):
        Stage("quantize", 1, "../x", {})


def test_done_stage_is_not_made_again(store, stage, messages):
    make = Maker()
    assert store.status(stage) == "missing"
    directory = ensure(store, stage, make)
    assert ensure(store, stage, make) == directory == store.directory(stage)
    assert make.made == ["abc"]
    assert store.status(stage) == "done"
    assert messages() == []
    manifest = read_sealed(directory / "manifest.json")
    assert manifest["summary"] == {"layers": 3}
    assert manifest["environment"] == {"device": "cpu"}
    assert set(manifest["files"]) == {"config.json", "plain.txt"} | {
        path for name in "abc" for path in (f"items/{name}.json", f"layers/{name}.bin")
    }
    assert {"git_sha", "dirty", "versions", "processor", "seconds", "created"} <= set(manifest)
    assert json.loads((directory / "config.json").read_text())["config"] == {"bits": 3}


def test_flipped_byte_in_an_item_remakes_that_item_only(store, stage, messages):
    make = Maker()
    directory = ensure(store, stage, make)
    flip_byte(directory / "layers/b.bin")
    assert store.status(stage) == "done"  # sizes only
    ensure(store, stage, make)
    assert make.made == ["abc", "b"]
    assert "layers/b.bin does not match its checksum" in messages()[0]
    assert str(directory) in messages()[0]
    ensure(store, stage, make)
    assert len(make.made) == 2


@pytest.mark.parametrize("name", ["plain.txt", "config.json", "items/a.json", "manifest.json"])
def test_a_flipped_byte_anywhere_is_noticed(store, stage, messages, name):
    make = Maker()
    directory = ensure(store, stage, make)
    flip_byte(directory / name)
    ensure(store, stage, make)
    assert make.made == ["abc", "a" if name.startswith("items") else ""]
    assert len(messages()) == 1
    assert name in messages()[0]
    assert store.status(stage) == "done"


@pytest.mark.parametrize("kept", [0, 40])
def test_truncated_manifest_is_redone_from_the_items(store, stage, messages, kept):
    make = Maker()
    directory = ensure(store, stage, make)
    manifest = directory / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:kept])
    assert store.status(stage) == "partial"
    ensure(store, stage, make)
    assert make.made == ["abc", ""]
    assert "manifest.json is not readable as JSON; redone" in messages()[0]


def test_missing_and_short_files_show_in_the_status(store, stage):
    make = Maker()
    directory = ensure(store, stage, make)
    (directory / "plain.txt").unlink()
    assert store.status(stage) == "partial"
    ensure(store, stage, make)
    (directory / "layers/a.bin").write_bytes(b"short")
    assert store.status(stage) == "partial"
    ensure(store, stage, make)
    assert make.made == ["abc", "", "a"]


def test_half_written_stage_goes_on(store, stage, messages):
    def fail(directory):
        write_item(directory, "a", {"layers/a.bin": b"a" * 5000}, {"name": "a"})
        (directory / "layers/b.bin.tmp").write_bytes(b"half")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        ensure(store, stage, fail)
    assert store.status(stage) == "partial"
    assert messages() == []
    make = Maker()
    directory = ensure(store, stage, make)
    assert make.made == ["bc"]
    assert "half-written; going on" in messages()[0]
    assert temporaries(directory) == []


def test_kill_9_in_the_middle_then_the_same_call_completes(store, stage, tmp_path):
    child = start("Store(root).ensure(stage, lambda d: make(d, 60), environment={})", store.root, tmp_path / "calls")
    try:
        assert child.stdout.readline() == "a\n"
    finally:
        os.kill(child.pid, signal.SIGKILL)
        child.communicate()
    assert store.status(stage) == "partial"
    make = Maker()
    ensure(store, stage, make)
    assert make.made == ["bc"]
    assert store.status(stage) == "done"


def test_two_processes_make_a_stage_once(store, stage, tmp_path):
    code = """
        import logging
        logging.basicConfig(level=logging.INFO)
        Store(root).ensure(stage, lambda d: make(d, 0.2), environment={})
    """
    children = [start(code, store.root, tmp_path / "calls") for _ in range(2)]
    errors = [child.communicate(timeout=600)[1] for child in children]
    assert [child.returncode for child in children] == [0, 0], errors
    assert (tmp_path / "calls").read_text() == "abc"
    assert store.status(stage) == "done"


def test_waiting_for_a_lock_is_said(store, stage, tmp_path):
    code = """
        import logging
        logging.basicConfig(level=logging.INFO)
        Store(root).ensure(stage, make, environment={})
    """
    with locked(store.directory(stage)):
        child = start(code, store.root, tmp_path / "calls")
        assert "another process is working in it; waiting" in child.stderr.readline()
    child.communicate(timeout=600)
    assert store.status(stage) == "done"


@pytest.mark.parametrize("limit", [100, 6000, 2000])
def test_no_space_is_a_user_error_and_nothing_counts_as_done(store, stage, tmp_path, limit):
    """A file size limit stands in for a full disk. It hits config.json, the plain file after the items, an item."""
    code = f"""
        resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, resource.RLIM_INFINITY))
        def make_big(directory):
            make(directory)
            (directory / "big.bin").write_bytes(bytes(10000))
        try:
            Store(root).ensure(stage, make_big, environment={{}})
        except UserError as error:
            print(error)
    """
    child = start(code, store.root, tmp_path / "calls")
    output, errors = child.communicate(timeout=600)
    assert child.returncode == 0, errors
    assert "no space left" in output
    assert "results_dir=" in output
    assert store.status(stage) != "done"
    assert temporaries(store.root) == []
    make = Maker()
    ensure(store, stage, make)
    assert make.made == ["" if limit == 6000 else "abc"]
    assert store.status(stage) == "done"


def test_a_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "x.json"
    atomic_write(path, b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(UserError, match=r"x\.json"):
            atomic_write(path, bytes(1000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == b"old"
    assert temporaries(tmp_path) == []


def test_a_results_directory_that_cannot_be_made_is_a_user_error(tmp_path, stage):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="results_dir="):
        ensure(Store(tmp_path / "file"), stage, Maker())


def test_hash_prefix_collision_is_refused(store):
    first, second = COLLIDING
    assert first.short == second.short
    assert first.fingerprint != second.fingerprint
    ensure(store, first, Maker())
    for call in (store.status, lambda stage: ensure(store, stage, Maker())):
        with pytest.raises(UserError, match="same hash prefix"):
            call(second)
    assert store.status(first) == "done"


def test_damaged_item_is_said_and_made_again(tmp_path, messages):
    record = {"bits": 3.0, "scores": [1, 2]}
    assert read_item(tmp_path, "a") is None
    for name in ("layers/a.bin", "items/a.json"):
        write_item(tmp_path, "a", {"layers/a.bin": b"payload"}, record)
        assert read_item(tmp_path, "a") == record
        flip_byte(tmp_path / name)
        assert read_item(tmp_path, "a") is None
        assert read_item(tmp_path, "a") is None
    assert len(messages()) == 2
    assert all("item a is damaged" in line for line in messages())


def test_open_stage_is_extended_and_never_done(store):
    stage = Stage("generate", 1, "images", {"seed": 0})
    for name in ("0", "1"):
        with store.open(stage) as directory:
            write_item(directory, name, {f"{name}.png": b"png"}, {"seed": name})
    assert store.directory(stage) == directory
    assert [read_item(directory, name) for name in ("0", "1")] == [{"seed": "0"}, {"seed": "1"}]
    assert store.status(stage) == "partial"
    assert [entry.state for entry in store.stages()] == ["open"]


def test_prune_keeps_what_runs_refer_to(store, stage, messages):
    kept, lost, busy = stage, Stage("quantize", 1, "old", {"bits": 2}), Stage("generate", 1, "busy", {})
    for each in (kept, lost, busy):
        ensure(store, each, Maker())
    store.record_run("table/row", {"fingerprint": kept.fingerprint, "stages": [store.directory(kept)]})
    (store.root / "stages/quantize/.trash-1-x").mkdir()
    by_label = {entry.label: entry for entry in store.stages()}
    assert by_label["vq"].runs == (f"table/row/{kept.short}.json",)
    assert by_label["vq"].size > 15000
    assert [entry.label for entry in store.prune(dry_run=True)] == ["busy", "old"]
    with locked(store.directory(busy)):
        assert [entry.label for entry in store.prune(dry_run=False)] == ["old"]
    assert "another process is working in it" in messages()[-1]
    assert [store.status(each) for each in (kept, lost, busy)] == ["done", "missing", "done"]
    assert sorted(path.name for path in (store.root / "stages/quantize").iterdir()) == [kept.directory_name]


def test_run_record_names_stages_relative_to_the_results(store, stage, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    relative = Store("results")
    payload = {"fingerprint": stage.fingerprint, "stages": [relative.directory(stage), store.directory(stage)]}
    path = relative.record_run("demo", payload)
    assert path.as_posix() == f"results/runs/demo/{stage.short}.json"
    [(_, found)] = store.runs()
    assert found["stages"] == [f"stages/quantize/{stage.directory_name}"] * 2
    assert found["experiment"] == "demo"


def test_a_damaged_run_record_stops_prune(store, stage):
    ensure(store, stage, Maker())
    atomic_write(store.root / "runs/demo/x.json", b'{"stages"')
    with pytest.raises(UserError, match=r"x\.json"):
        store.prune(dry_run=False)
    assert store.status(stage) == "done"


def test_stages_command_lists_and_prunes_without_torch(store, stage):
    ensure(store, stage, Maker())
    script = Path(__file__).parent.parent.parent / "scripts/stages.py"
    code = f"import runpy, sys; runpy.run_path({str(script)!r})['main'](); assert 'torch' not in sys.modules"
    command = [sys.executable, "-c", code, "--results", str(store.root)]

    def output(*arguments):
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, input="", check=True)
        return done.stdout

    assert stage.directory_name in output()
    output("--prune")  # nobody answers yes
    assert store.status(stage) == "done"
    assert "removed 1 stages" in output("--prune", "--yes")
    assert store.status(stage) == "missing"
    assert "no stages" in output()


def test_files_identity_follows_the_content(tmp_path):
    model, cache = tmp_path / "model", tmp_path / "cache.json"
    atomic_write(model / "unet/weights.bin", b"weights")
    atomic_write(model / "README.md", b"card")
    first = files_identity(model, cache)
    atomic_write(model / "README.md", b"another card")
    atomic_write(model / ".cache/lock", b"")
    assert files_identity(model, cache) == first
    atomic_write(model / "unet/weights.bin", b"weighty")
    os.utime(model / "unet/weights.bin", (time.time(), time.time() + 1))
    second = files_identity(model, cache)
    assert second != first
    cache.write_text("{")
    assert files_identity(model, cache) == second
    assert files_identity(model / "unet/weights.bin", cache) not in (first, second)
    with pytest.raises(UserError, match="no model files"):
        files_identity(tmp_path / "nowhere", cache)


def test_files_identity_hashes_a_file_once(tmp_path, monkeypatch):
    atomic_write(tmp_path / "model/weights.bin", b"weights")
    first = files_identity(tmp_path / "model", tmp_path / "cache.json")
    monkeypatch.setattr("vqdm.runs.identity.sha256_file", lambda path: pytest.fail(f"{path} hashed again"))
    assert files_identity(tmp_path / "model", tmp_path / "cache.json") == first


def test_a_stage_that_is_of_other_files_than_there_are_now_is_made_again(store, stage, caplog):
    make, now = Maker(), ["a"]

    def ensure_of_now():
        def holds(directory):
            return (directory / "of.txt").read_text() == now[0]

        def make_of_now(directory):
            atomic_write(directory / "of.txt", now[0].encode())
            return make(directory)

        return store.ensure(stage, make_of_now, environment={}, holds=holds)

    ensure_of_now()
    ensure_of_now()
    assert len(make.made) == 1
    now[0] = "b"
    directory = ensure_of_now()
    assert len(make.made) == 2 and (directory / "of.txt").read_text() == "b"
    assert [r.message for r in caplog.records] == [
        f"{directory}: manifest.json is of other files than there are now; redone"
    ]
