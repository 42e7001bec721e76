"""A model in another's place is noticed, whatever its size and times say; so is which record was written last."""

import json
import os
import time

from vqdm.runs.files import files_below
from vqdm.runs.identity import file_identity, files_identity
from vqdm.runs.store import Store


def test_another_file_of_the_same_size_and_mtime_is_another_model(tmp_path):
    model, cache = tmp_path / "model", tmp_path / "cache.json"
    model.mkdir()
    file = model / "weights.safetensors"
    file.write_bytes(b"one")
    first, alone = files_identity(model, cache), file_identity(file, cache)
    times = file.stat()
    (tmp_path / "new").write_bytes(b"two")
    os.utime(tmp_path / "new", ns=(times.st_atime_ns, times.st_mtime_ns))
    (tmp_path / "new").replace(file)  # as rsync and `cp -p` do it
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (times.st_size, times.st_mtime_ns)
    assert files_identity(model, cache) != first
    assert file_identity(file, cache) != alone
    second = files_identity(model, cache)
    file.write_bytes(b"six")  # in place: the inode stays
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert files_identity(model, cache) not in (first, second)


def test_files_of_a_linked_folder_are_part_of_the_model(tmp_path):
    model, cache = tmp_path / "model", tmp_path / "cache.json"
    for folder in (tmp_path / "one", tmp_path / "two", model):
        folder.mkdir()
        (folder / "weights.safetensors").write_bytes(folder.name.encode())
    alone = files_identity(model, cache)
    (model / "unet").symlink_to(tmp_path / "one")
    first = files_identity(model, cache)
    (model / "unet").unlink()
    (model / "unet").symlink_to(tmp_path / "two")
    assert len({alone, first, files_identity(model, cache)}) == 3
    second = files_identity(model, cache)
    (model / "unet").unlink()
    (model / "unet").mkdir()
    (model / "unet" / "weights.safetensors").write_bytes(b"two")  # the same files, whether linked or not
    assert files_identity(model, cache) == second


def test_damaged_entries_of_the_cache_are_made_again(tmp_path):
    model, cache = tmp_path / "model.safetensors", tmp_path / "cache.json"
    model.write_bytes(b"one")
    first = files_identity(model, cache)
    ((key, entry),) = json.loads(cache.read_text()).items()
    for damaged in (
        [],
        {key: "x"},
        {key: entry | {"sha256": None}},
        {key: {k: entry[k] for k in entry if k != "sha256"}},
    ):
        cache.write_text(json.dumps(damaged))
        assert files_identity(model, cache) == first
    assert json.loads(cache.read_text()) == {key: entry}


def test_a_link_that_leads_back_up_ends_there(tmp_path):
    (tmp_path / "model" / "unet").mkdir(parents=True)
    (tmp_path / "model" / "unet" / "x").write_bytes(b"x")
    (tmp_path / "model" / "unet" / "up").symlink_to(tmp_path / "model")
    assert list(files_below(tmp_path / "model")) == [tmp_path / "model" / "unet" / "x"]


def test_the_record_written_last_is_the_newest_though_another_is_from_the_future(tmp_path):
    store = Store(tmp_path)
    old = store.record_run("run", {"fingerprint": "a" * 64, "stages": []})
    ahead = time.time() + 10**7
    os.utime(old, (ahead, ahead))
    new = store.record_run("run", {"fingerprint": "b" * 64, "stages": []})
    assert new.stat().st_mtime > old.stat().st_mtime
    store.record_run("run", {"fingerprint": "a" * 64, "stages": []})
    assert old.stat().st_mtime > new.stat().st_mtime
