"""Downloads from a real server on this machine: it knows ranges, drops connections, and lies when told to."""

import hashlib
import io
import json
import re
import signal
import subprocess
import sys
import threading
import time
import zipfile
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import download_coco as coco
import downloads
import pytest
from downloads import RemoteFile, fetch

from vqdm.errors import UserError

SCRIPTS = Path(__file__).resolve().parent.parent.parent / "scripts"
BODY = hashlib.shake_256(b"photographs").digest(1_000_000)


class Files(ThreadingHTTPServer):
    """`drop_after`: after how many bytes the next connections end; `statuses`: what the next requests get."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.files, self.asked, self.drop_after, self.statuses = {}, [], [], []
        self.ranges, self.lengths, self.delay = True, True, 0.0

    def at(self, path):
        return f"http://127.0.0.1:{self.server_port}{path}"


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        body = self.server.files.get(self.path)
        self.send_response(404 if body is None else 200)
        self.send_header("Content-Length", str(len(body or b"")))
        self.end_headers()

    def do_GET(self):
        server = self.server
        asked = self.headers.get("Range")
        server.asked.append(asked)
        body = server.files.get(self.path)
        if server.statuses or body is None:
            self.send_error(server.statuses.pop(0) if server.statuses else 404)
            return
        start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked and server.ranges else 0
        self.send_response(206 if asked and server.ranges else 200)
        if asked and server.ranges:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.send_header(*(("Content-Length", str(len(body) - start)) if server.lengths else ("Connection", "close")))
        self.end_headers()
        end = min(len(body), start + server.drop_after.pop(0)) if server.drop_after else len(body)
        for at in range(start, end, 10_000):
            self.wfile.write(body[at : min(at + 10_000, end)])
            time.sleep(server.delay)
        self.close_connection = end < len(body) or self.close_connection


@pytest.fixture
def server():
    with Files() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def served(server, body=BODY, path="/zips/val.zip"):
    server.files[path] = body
    return RemoteFile(server.at(path), len(body), hashlib.sha256(body).hexdigest())


def one_line(error):
    message = str(error.value)
    assert "\n" not in message
    return message


# one file


def test_a_file_comes_whole_and_is_not_fetched_twice(server, tmp_path):
    file = served(server)
    target = tmp_path / "deep" / "val.zip"
    assert fetch(file, target) == target
    assert fetch(file, target).read_bytes() == BODY
    assert server.asked == [None]
    assert sorted(path.name for path in target.parent.iterdir()) == ["val.zip"]


def test_dropped_connections_are_resumed_by_ranges(server, tmp_path):
    server.drop_after = [200_000, 0, 400_000]
    assert fetch(served(server), tmp_path / "val.zip", pause=0).read_bytes() == BODY
    starts = [0 if asked is None else int(asked[6:-1]) for asked in server.asked]
    assert len(starts) == 4
    assert starts == sorted(starts)
    assert 0 < starts[1] == starts[2] <= 200_000 < starts[3] <= 600_000


def test_a_part_of_an_earlier_run_is_resumed(server, tmp_path):
    (tmp_path / "val.zip.part").write_bytes(BODY[:123_456])
    assert fetch(served(server), tmp_path / "val.zip").read_bytes() == BODY
    assert server.asked == ["bytes=123456-"]


def test_a_whole_part_is_only_checked(server, tmp_path):
    (tmp_path / "val.zip.part").write_bytes(BODY)
    assert fetch(served(server), tmp_path / "val.zip").read_bytes() == BODY
    assert server.asked == []


def test_a_server_without_ranges_sends_all_again(server, tmp_path):
    server.ranges = False
    server.drop_after = [50_000]
    (tmp_path / "val.zip.part").write_bytes(b"something else")
    assert fetch(served(server), tmp_path / "val.zip", pause=0).read_bytes() == BODY
    assert len(server.asked) == 2


def test_a_busy_server_is_asked_again(server, tmp_path):
    server.statuses = [503, 429, 500]
    assert fetch(served(server), tmp_path / "val.zip", pause=0).read_bytes() == BODY


def test_a_server_that_stays_busy_ends_in_one_line_and_keeps_what_came(server, tmp_path):
    file = served(server)
    (tmp_path / "val.zip.part").write_bytes(BODY[:1000])
    server.statuses = [503] * 9
    with pytest.raises(UserError) as error:
        fetch(file, tmp_path / "val.zip", pause=0, attempts=4)
    assert "the server answers 503" in one_line(error)
    assert "1000 of 1000000 bytes are kept" in one_line(error)
    assert len(server.asked) == 4


def test_killed_and_run_again_goes_on(server, tmp_path):
    file, target = served(server), tmp_path / "val.zip"
    server.delay = 0.05
    code = (
        "import sys; from pathlib import Path; import downloads; downloads.CHUNK = 10_000;"
        "url, size, sha256, target = sys.argv[1:];"
        "downloads.fetch(downloads.RemoteFile(url, int(size), sha256), Path(target))"
    )
    command = [sys.executable, "-c", code, file.url, str(file.size), file.sha256, str(target)]
    part = tmp_path / "val.zip.part"
    with subprocess.Popen(command, cwd=SCRIPTS) as process:
        deadline = time.monotonic() + 600
        while not (part.exists() and part.stat().st_size > 20_000):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    kept = part.stat().st_size
    assert 20_000 < kept < len(BODY)
    assert not target.exists()
    server.delay = 0.0
    assert fetch(file, target).read_bytes() == BODY
    assert server.asked == [None, f"bytes={kept}-"]


def test_a_wrong_checksum_is_refused_and_removed(server, tmp_path):
    file = replace(served(server), sha256="0" * 64)
    with pytest.raises(UserError) as error:
        fetch(file, tmp_path / "val.zip")
    assert f"has sha256 {hashlib.sha256(BODY).hexdigest()} instead of {'0' * 64}" in one_line(error)
    assert list(tmp_path.iterdir()) == []


def test_another_size_is_refused_before_anything_comes(server, tmp_path):
    file = replace(served(server), size=len(BODY) + 1)
    with pytest.raises(UserError, match="is 1000000 bytes there instead of 1000001"):
        fetch(file, tmp_path / "val.zip")
    (tmp_path / "val.zip.part").write_bytes(BODY[:10])
    with pytest.raises(UserError, match="is 1000000 bytes there instead of 1000001"):
        fetch(file, tmp_path / "val.zip")
    assert (tmp_path / "val.zip.part").read_bytes() == BODY[:10]


def test_another_file_without_a_stated_length_is_refused_too(server, tmp_path):
    server.lengths = False
    with pytest.raises(UserError, match=r"what came has \d+ bytes instead of 10"):
        fetch(replace(served(server), size=10), tmp_path / "val.zip")
    assert list(tmp_path.iterdir()) == []
    assert fetch(served(server), tmp_path / "val.zip").read_bytes() == BODY


def test_a_file_put_there_by_hand_is_checked_and_never_removed(server, tmp_path):
    (tmp_path / "val.zip").write_bytes(BODY[:-1] + b"?")
    with pytest.raises(UserError, match="remove it and run the same command again"):
        fetch(served(server), tmp_path / "val.zip")
    assert (tmp_path / "val.zip").stat().st_size == len(BODY)
    assert server.asked == []


def test_no_such_file_is_not_asked_for_again(server, tmp_path):
    with pytest.raises(UserError, match="answers 404"):
        fetch(RemoteFile(server.at("/gone.zip"), 10, "0" * 64), tmp_path / "gone.zip")
    assert len(server.asked) == 1


def test_offline_is_one_line_with_a_way_out(tmp_path):
    with Files() as closed:
        url = closed.at("/zips/val.zip")
    with pytest.raises(UserError) as error:
        fetch(RemoteFile(url, 10, "0" * 64), tmp_path / "val.zip", pause=0)
    assert "no connection" in one_line(error)
    assert f"put the file at {tmp_path / 'val.zip'} yourself" in one_line(error)


def test_a_full_disk_is_said_first(server, tmp_path):
    file = replace(served(server), size=10**18)
    with pytest.raises(UserError, match=r"GB are free, but to download val.zip takes 1000000000.1 GB"):
        fetch(file, tmp_path / "not" / "yet" / "val.zip")
    assert server.asked == []
    assert list(tmp_path.iterdir()) == []


# archives


def zipped(files):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


ANNOTATIONS = {
    "annotations/captions_val2017.json": '{"images": []}',
    "annotations/captions_train2017.json": "{}",
    "annotations/instances_val2017.json": "not wanted " * 1000,
}


def item_of(server, files, *members, folder=""):
    return coco.Item(served(server, zipped(files)), "a test", members, folder=folder)


def tree(directory):
    """{path: text} of all but receipts and archives."""
    found = (path for path in directory.rglob("*") if path.is_file() and path.suffix != ".zip")
    return {p.relative_to(directory).as_posix(): p.read_text() for p in found if ".received" not in p.parts}


def test_only_what_is_needed_is_unpacked_and_a_second_run_does_nothing(server, tmp_path):
    item = item_of(server, ANNOTATIONS, "annotations/captions_")
    assert coco.download("captions", item, tmp_path)
    wanted = {name: content for name, content in ANNOTATIONS.items() if "captions_" in name}
    assert tree(tmp_path) == wanted
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert not coco.download("captions", item, tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    assert len(server.asked) == 1


def test_what_was_lost_or_cut_is_made_again(server, tmp_path):
    item = item_of(server, ANNOTATIONS, "annotations/captions_")
    coco.download("captions", item, tmp_path, keep=True)
    (tmp_path / "annotations/captions_val2017.json").write_text("{")
    (tmp_path / "annotations/captions_train2017.json").unlink()
    assert coco.download("captions", item, tmp_path)
    assert tree(tmp_path)["annotations/captions_val2017.json"] == ANNOTATIONS["annotations/captions_val2017.json"]
    assert len(server.asked) == 1  # the archive was kept, and is kept only where asked for
    (tmp_path / ".received/captions.json").write_text("[]")
    assert coco.download("captions", item, tmp_path)
    assert not (tmp_path / "val.zip").exists()


def test_members_may_go_below_a_folder(server, tmp_path):
    item = item_of(server, {"dataset_coco.json": "{}", "dataset_flickr8k.json": "{}"}, "dataset_coco.json")
    coco.download("karpathy", replace(item, folder="annotations"), tmp_path)
    assert tree(tmp_path) == {"annotations/dataset_coco.json": "{}"}


def test_a_plain_file_gets_its_own_name(server, tmp_path):
    item = coco.Item(served(server, b",captions\n0,a\n", "/eval_prompts/coco.csv"), "a list", name="list.csv")
    assert coco.download("list", item, tmp_path)
    assert not coco.download("list", item, tmp_path)
    assert tree(tmp_path) == {"list.csv": ",captions\n0,a\n"}


@pytest.mark.parametrize("name", ["../evil.txt", "val/../../evil.txt", "/evil.txt", "val\\..\\evil.txt", "C:evil.txt"])
def test_names_that_lead_elsewhere_are_refused_before_anything_is_written(server, tmp_path, name):
    item = item_of(server, {"val/1.jpg": "fine", name: "evil"}, "val/", name)
    with pytest.raises(UserError, match="leads elsewhere"):
        coco.download("val", item, tmp_path / "data")
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["val.zip"]


def test_a_damaged_member_is_refused(server, tmp_path):
    body = zipped({"val/1.jpg": "photograph " * 100})
    body = body.replace(b"photograph photograph", b"photograph photogrXph", 1)
    item = coco.Item(served(server, body), "a test", ("val/",))
    with pytest.raises(UserError, match="is a damaged zip"):
        coco.download("val", item, tmp_path)
    assert not (tmp_path / "val/1.jpg").exists()


@pytest.mark.parametrize(
    "body", [b"no zip at all", zipped({"val/1.jpg": "x" * 100})[:-30], zipped({"test/1.jpg": "x"})]
)
def test_what_is_no_such_zip_is_one_line(server, tmp_path, body):
    with pytest.raises(UserError, match=r"is a damaged zip|holds no val/") as error:
        coco.download("val", coco.Item(served(server, body), "a test", ("val/",)), tmp_path)
    one_line(error)


def test_room_for_unpacking_is_asked_for_too(server, tmp_path, monkeypatch):
    item = item_of(server, {"val/1.jpg": "x" * 1000}, "val/")
    usage = type("Usage", (), {"free": downloads.SPARE + item.file.size + 10})
    monkeypatch.setattr(downloads.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match=r"fetch and unpack val\.zip"):
        coco.download("val", item, tmp_path)
    assert server.asked == []


# the command


def test_every_item_is_pinned():
    assert set(coco.DEFAULT) <= set(coco.ITEMS)
    assert len({item.file.sha256 for item in coco.ITEMS.values()}) == len(coco.ITEMS)
    for item in coco.ITEMS.values():
        assert re.fullmatch("[0-9a-f]{64}", item.file.sha256)
        assert item.file.size > 0
        assert bool(item.members) != bool(item.name)


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("captions30k", "coco/coco2014_val_30k.csv"),
        ("parti", "prompts/PartiPrompts.tsv"),
        ("parti128", "prompts/parti128.csv"),
    ],
)
def test_the_lists_are_the_files_at_hand(name, path):
    path = SCRIPTS.parents[1] / "shared" / "data" / path
    if not path.exists():
        pytest.skip(f"{path} is not here (third-party data, never copied into the repository)")
    data = path.read_bytes()
    assert (len(data), hashlib.sha256(data).hexdigest()) == (coco.ITEMS[name].file.size, coco.ITEMS[name].file.sha256)


def test_the_command_fetches_from_a_mirror_and_says_so(server, tmp_path, monkeypatch, capsys):
    body = zipped({"val2017/1.jpg": "x"})
    server.files["/mirror/zips/val2017.zip"] = body
    pinned = RemoteFile(f"{coco.COCO}/zips/val2017.zip", len(body), hashlib.sha256(body).hexdigest())
    monkeypatch.setitem(coco.ITEMS, "val2017", coco.Item(pinned, "photographs", ("val2017/",)))
    arguments = ["--what", "val2017", "--to", str(tmp_path), "--mirror", server.at("/mirror/")]
    assert coco.main(arguments) == coco.main(arguments) == 0
    assert capsys.readouterr().out.splitlines() == [
        "to download: val2017 0.0 MB, 0.00 GB in all",
        f"val2017: photographs is now in {tmp_path}",
        f"val2017: photographs was already in {tmp_path}",
    ]
    receipt = json.loads((tmp_path / ".received/val2017.json").read_text())
    assert receipt["files"] == {"val2017/1.jpg": 1}


def test_the_command_ends_in_one_line_when_a_file_is_not_the_known_one(server, tmp_path):
    server.files["/annotations/annotations_trainval2017.zip"] = b"a page of some hotel's network"
    command = [sys.executable, str(SCRIPTS / "download_coco.py"), "--what", "captions2017"]
    command += ["--to", str(tmp_path / "data"), "--mirror", server.at("")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=SCRIPTS.parent, timeout=600)
    assert (done.returncode, done.stdout) == (1, "to download: captions2017 252.9 MB, 0.25 GB in all\n")
    assert done.stderr.count("\n") == 1
    assert "is 30 bytes there instead of 252907541" in done.stderr
