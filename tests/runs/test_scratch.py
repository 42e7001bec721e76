"""Files that serve only to go on after a stop are gone once a stage is done, whenever it was killed on its way."""

from contextlib import contextmanager
from pathlib import Path

import pytest

from vqdm.runs import store as store_module
from vqdm.runs.files import atomic_write, file_fault, read_sealed
from vqdm.runs.items import read_item, write_item
from vqdm.runs.stage import Stage
from vqdm.runs.store import Store

SCRATCH = ("items/*", "layers/*", "shared_*.bin")
STAGE = Stage("quantize", 1, "vq", {"bits": 3})
LEFT = ["config.json", "manifest.json", "plain.bin"]


class Killed(BaseException):
    pass


def make(directory: Path, made: list[str]) -> None:
    for name, file in (("shared", "shared_a.bin"), ("a", "layers/a.bin"), ("b", "layers/b.bin")):
        if read_item(directory, name) is None:
            made.append(name)
            write_item(directory, name, {file: name.encode() * 500}, {"name": name})
    atomic_write(directory / "plain.bin", b"".join(p.read_bytes() for p in sorted(directory.glob("layers/*"))))


def ensure(results: Path, made: list[str], scratch=SCRATCH) -> Path:
    return Store(results).ensure(STAGE, lambda directory: make(directory, made), environment={}, scratch=scratch)


def files(directory: Path) -> list[str]:
    found = (path for path in directory.rglob("*") if path.name != ".lock")
    return sorted(path.relative_to(directory).as_posix() for path in found)


def killing(function, after: int):
    """`function`, but the call number `after`, from 0 on, kills instead."""
    calls = iter(range(10**6))

    def call(*arguments, **options):
        if next(calls) == after:
            raise Killed
        return function(*arguments, **options)

    return call


@pytest.mark.parametrize("step", range(12))
def test_a_kill_at_any_write_or_removal_costs_one_item_at_most(tmp_path, monkeypatch, step):
    """Writes: config, three items of two files each, the payload, the manifest; then a removal for each file."""
    made: list[str] = []
    for module, name in ((store_module, "write_manifest"), (Path, "replace"), (Path, "unlink")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, killing(getattr(module, name), step))
            try:
                directory = ensure(tmp_path / name, made)
            except Killed:
                directory = Store(tmp_path / name).directory(STAGE)
        whole = [item for item in ("shared", "a", "b") if (directory / "items" / f"{item}.json").exists()]
        done, again = Store(tmp_path / name).status(STAGE) == "done", []
        assert ensure(tmp_path / name, again) == directory
        assert again == ([] if done else [item for item in ("shared", "a", "b") if item not in whole])
        assert files(directory) == LEFT
        assert (directory / "plain.bin").read_bytes() == b"a" * 500 + b"b" * 500
        assert sorted(read_sealed(directory / "manifest.json")["files"]) == ["config.json", "plain.bin"]


def test_a_stage_that_lists_its_layers_is_done_and_keeps_them(tmp_path):
    made: list[str] = []
    directory = ensure(tmp_path, made, scratch=())  # as a manifest was before
    before = files(directory)
    assert "layers/a.bin" in before
    ensure(tmp_path, made)
    assert files(directory) == before and made == ["shared", "a", "b"] and Store(tmp_path).status(STAGE) == "done"


def test_what_is_damaged_later_is_made_from_the_start(tmp_path):
    directory = ensure(tmp_path, [])
    (directory / "plain.bin").write_bytes(b"c" * 1000)
    made: list[str] = []
    ensure(tmp_path, made)
    assert made == ["shared", "a", "b"] and files(directory) == LEFT


def test_another_process_may_begin_anew_and_be_killed_just_before_scratch_is_removed(tmp_path, monkeypatch):
    directory = ensure(tmp_path, [])
    (directory / "layers").mkdir()
    (directory / "layers" / "a.bin").write_bytes(b"left by a kill")
    locked = store_module.locked

    @contextmanager
    def waits(place: Path):
        (place / "manifest.json").unlink()
        (place / "plain.bin").unlink()
        with locked(place):
            yield

    monkeypatch.setattr(store_module, "locked", waits)
    made: list[str] = []
    assert ensure(tmp_path, made) == directory
    assert made == ["shared", "a", "b"] and files(directory) == LEFT and Store(tmp_path).status(STAGE) == "done"


def test_a_file_that_goes_while_it_is_checked_is_missing(tmp_path, monkeypatch):
    def gone(path: Path):
        raise FileNotFoundError(2, "No such file", path)

    (tmp_path / "a").write_bytes(b"12")
    monkeypatch.setattr("vqdm.runs.files.sha256_file", gone)
    assert file_fault(tmp_path / "a", {"size": 2, "sha256": "0"}) == "is missing"
