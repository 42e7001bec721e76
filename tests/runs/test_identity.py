"""A model in another's place is noticed, whatever its size and times say; so is which record was written last."""

import os
import time

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


def test_the_record_written_last_is_the_newest_though_another_is_from_the_future(tmp_path):
    store = Store(tmp_path)
    old = store.record_run("run", {"fingerprint": "a" * 64, "stages": []})
    ahead = time.time() + 10**7
    os.utime(old, (ahead, ahead))
    new = store.record_run("run", {"fingerprint": "b" * 64, "stages": []})
    assert new.stat().st_mtime > old.stat().st_mtime
    store.record_run("run", {"fingerprint": "a" * 64, "stages": []})
    assert old.stat().st_mtime > new.stat().st_mtime
