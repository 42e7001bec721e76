"""Where weights of metrics are looked for, how they are fetched, and what is refused."""

import functools
import hashlib
import http.server
import logging
import pickle
import threading

import pytest
import torch
from safetensors.torch import save_file

from vqdm.errors import UserError
from vqdm.metrics import sources
from vqdm.metrics.families import FAMILIES, Weights
from vqdm.metrics.sources import fetch, find, identity, load_tensors, missing

CONTENT = b"weights of a metric"
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(autouse=True)
def nothing_remembered():
    fetch.cache_clear()


@pytest.fixture
def server(tmp_path):
    """A publisher on this machine: (address, folder that it serves)."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    folder = tmp_path / "published"
    folder.mkdir()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder)) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{serving.server_port}", folder
        serving.shutdown()


@pytest.fixture
def online(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)


def test_a_file_in_the_folder_is_found_first(tmp_path):
    weights = Weights("metric.pth", url="http://nowhere.invalid/metric.pth")
    assert find(weights, tmp_path) is None
    (tmp_path / "metric.pth").write_bytes(CONTENT)
    assert find(weights, tmp_path) == fetch(weights, tmp_path) == tmp_path / "metric.pth"


def test_a_directory_counts_by_its_marker(tmp_path):
    weights = Weights("model", hub="owner/model", marker="model.safetensors")
    (tmp_path / "model").mkdir()
    assert find(weights, tmp_path) is None
    (tmp_path / "model" / "model.safetensors").write_bytes(CONTENT)
    assert find(weights, tmp_path) == tmp_path / "model"


@pytest.mark.parametrize(
    ("weights", "file"),
    [
        (Weights("model.bin", hub="owner/model:weights.bin"), "weights.bin"),
        (Weights("model", hub="owner/model", marker="model.safetensors"), "model.safetensors"),
    ],
)
def test_the_hubs_cache_serves(tmp_path, monkeypatch, weights, file):
    """As the hub's library lays its cache out."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--owner--model"
    snapshot = repository / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    assert find(weights, tmp_path) is None
    (snapshot / file).write_bytes(CONTENT)
    assert find(weights, tmp_path) == (snapshot if weights.marker else snapshot / file)


def test_what_is_missing_is_said_with_where_it_goes_and_where_it_is_from(tmp_path):
    for family in FAMILIES.values():
        for weights in family.weights:
            said = missing(weights, tmp_path)
            assert weights.name in said and str(tmp_path) in said and "\n" not in said
            assert (weights.hub or weights.url).partition(":")[0] in said


def test_fetched_by_address(tmp_path, server, online):
    address, folder = server
    (folder / "metric.pth").write_bytes(CONTENT)
    weights = Weights("metric.pth", url=f"{address}/metric.pth", sha256=SHA256[:8])
    found = fetch(weights, tmp_path / "new" / "folder")
    assert found == tmp_path / "new" / "folder" / "metric.pth" and found.read_bytes() == CONTENT
    assert identity(weights, found, cache=tmp_path / "cache.json") == SHA256


@pytest.mark.parametrize(("published", "said"), [(b"other weights", "invalid hash"), (None, "404")])
def test_what_is_not_as_published_is_not_kept(tmp_path, server, online, caplog, published, said):
    address, folder = server
    if published is not None:
        (folder / "metric.pth").write_bytes(published)
    weights = Weights("metric.pth", url=f"{address}/metric.pth", sha256=SHA256[:8])
    with caplog.at_level(logging.WARNING, "vqdm"):
        assert fetch(weights, tmp_path / "folder") is None
    (line,) = caplog.messages
    assert "metric.pth cannot be fetched" in line and said in line and "\n" not in line
    assert not list((tmp_path / "folder").iterdir())


def test_offline_nothing_is_asked_for(tmp_path, server, monkeypatch, caplog):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    address, folder = server
    (folder / "metric.pth").write_bytes(CONTENT)
    assert fetch(Weights("metric.pth", url=f"{address}/metric.pth"), tmp_path) is None
    assert "HF_HUB_OFFLINE" in caplog.text


@pytest.mark.parametrize("marker", [None, "model.safetensors"])
def test_fetched_from_the_hub(tmp_path, monkeypatch, marker):
    import huggingface_hub

    asked = []
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda self, name, timeout: asked.append(name))

    def hub_download(name, file):
        (tmp_path / file).write_bytes(CONTENT)
        return str(tmp_path / file)

    def snapshot(name, allow_patterns):
        assert not any(pattern.endswith((".bin", ".pt", ".pth")) for pattern in allow_patterns)  # may hold pickles
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hub_download)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    weights = Weights("weights", hub="owner/model" if marker else "owner/model:file.bin", marker=marker)
    assert fetch(weights, tmp_path / "none") == (tmp_path if marker else tmp_path / "file.bin")
    assert asked == ["owner/model"]


def test_a_hub_that_is_down_costs_its_metrics_and_one_line(tmp_path, monkeypatch, caplog):
    import huggingface_hub

    def down(*_, **__):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", down)
    weights = Weights("weights", hub="owner/model:file.bin")
    assert fetch(weights, tmp_path) is None and fetch(weights, tmp_path) is None
    assert [m for m in caplog.messages if "cannot be fetched" in m] == [
        "weights cannot be fetched (ConnectionError: no route); its metrics are not run"
    ]


def test_other_weights_under_the_published_name_are_refused(tmp_path):
    path = tmp_path / "metric.pth"
    path.write_bytes(CONTENT)
    weights = Weights("metric.pth", url="…", sha256="6726825d")
    with pytest.raises(UserError, match="begins with 6726825d") as error:
        identity(weights, path, cache=tmp_path / "cache.json")
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert identity(Weights("metric.pth"), path, cache=tmp_path / "cache.json") == SHA256


def test_a_directorys_identity_is_over_its_files(tmp_path):
    (tmp_path / "model").mkdir()
    weights = Weights("model", hub="owner/model", marker="a.bin")
    hashes = []
    for name in ("a.bin", "config.json"):
        (tmp_path / "model" / name).write_bytes(CONTENT)
        hashes.append(identity(weights, tmp_path / "model", cache=tmp_path / "cache.json"))
    assert len(set(hashes)) == 2


TENSORS = {"weight": torch.arange(6.0).reshape(2, 3), "steps": torch.tensor(4)}


@pytest.mark.parametrize("wrapped", [False, True])
def test_tensors_of_a_pth_file(tmp_path, wrapped):
    torch.save({"state_dict": TENSORS, "epoch": 3} if wrapped else TENSORS, tmp_path / "w.pth")
    found = load_tensors(tmp_path / "w.pth")
    assert found.keys() == TENSORS.keys() and all(torch.equal(found[k], TENSORS[k]) for k in TENSORS)


def test_tensors_of_a_safetensors_file(tmp_path):
    save_file(TENSORS, tmp_path / "w.safetensors")
    assert torch.equal(load_tensors(tmp_path / "w.safetensors")["weight"], TENSORS["weight"])


class Harmful:
    """Would write a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("save", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
def test_what_holds_more_than_tensors_is_refused_without_running_it(tmp_path, save):
    save({"weight": TENSORS["weight"], "more": Harmful(tmp_path / "harm")}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="holds more than tensors") as error:
        load_tensors(tmp_path / "w.pth")
    assert "\n" not in str(error.value) and not (tmp_path / "harm").exists()


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
@pytest.mark.parametrize("content", [b"", b"no weights", b"PK\x03\x04 cut off"])
def test_damaged_files_are_one_line(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match="damaged") as error:
        load_tensors(tmp_path / name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [torch.zeros(3), [torch.zeros(3)], {"weight": 3}, {"state_dict": {"name": "x"}}])
def test_a_pth_file_of_something_else_is_one_line(tmp_path, content):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(UserError, match="damaged"):
        load_tensors(tmp_path / "w.pth")


def test_a_download_is_asked_for_once(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(sources, "_from_hub", lambda source: asked.append(source))
    weights = Weights("weights", hub="owner/model:file.bin")
    fetch(weights, tmp_path), fetch(weights, tmp_path)
    assert len(asked) == 1
