"""The archive with the statistics for FID, from a server on this machine: nobody has published its hash."""

import hashlib
import io
import json
import tarfile

import download_coco as coco
import fid_reference
import numpy as np
import pytest
import torch
from fid_reference import MEMBER, download_reference
from test_download import one_line, server  # noqa: F401  (a fixture)

from vqdm.config.options import EvaluateConfig
from vqdm.errors import UserError
from vqdm.metrics.available import find_scoring
from vqdm.metrics.distribution import FrechetDistance, Gaussian
from vqdm.metrics.reference import find_reference

SIZE = 2048
PATH = "/invertible-cd/fid-files.tar.gz"
MU, VARIANCE = 0.5, 4.0


def npz(size: int = SIZE) -> bytes:
    content = io.BytesIO()
    np.savez_compressed(content, mu=np.full(size, MU), sigma=VARIANCE * np.eye(size, dtype=np.float32))
    return content.getvalue()


def packed(**members: bytes) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as tar:
        for name, body in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))
    return content.getvalue()


WHOLE = packed(**{"stats/inception.pt": hashlib.shake_256(b"weights").digest(300_000), f"stats/{MEMBER}": npz()})


@pytest.fixture
def fetched(server, tmp_path, monkeypatch):  # noqa: F811
    """Run the command as a user does; what it says line by line."""
    monkeypatch.setattr(coco, "URL", server.at(PATH))
    server.files[PATH] = WHOLE

    def run(*arguments: str) -> list[str]:
        said = []
        code = coco.main(["--what", "fid_reference", "--to", str(tmp_path), *arguments], say=said.append)
        return [*said, str(code)]

    return run


def test_it_comes_goes_on_where_it_broke_off_and_comes_once(fetched, server, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr("downloads.time.sleep", lambda _: None)
    server.drop_after = [150_000]
    said = fetched()
    assert said[-1] == "0" and MEMBER in said[0] and "beside it lay stats/inception.pt" in said[0]
    (resumed,) = [asked for asked in server.asked if asked is not None]
    assert 0 < int(resumed.removeprefix("bytes=").removesuffix("-")) <= 150_000
    receipt = json.loads((tmp_path / coco.RECEIPTS / "fid_reference.json").read_text())
    assert receipt["sha256"] in said[0] and receipt["files"] == {MEMBER: len(npz())}
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file() and path.suffix == ".npz") == [MEMBER]
    before = len(server.asked)
    assert "was already there" in fetched()[0] and len(server.asked) == before


def test_another_archive_than_the_first_is_refused(fetched, server, tmp_path, capsys):  # noqa: F811
    assert fetched()[-1] == "0"
    (tmp_path / MEMBER).unlink()
    server.files[PATH] = packed(**{MEMBER: npz(), "more": b"x"})
    assert fetched()[-1] == "1"
    said = capsys.readouterr().err
    assert "has sha256" in said and "instead of" in said and len(said.splitlines()) == 1
    assert not (tmp_path / MEMBER).exists()


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (packed(**{"stats/other.npz": b"x", "README": b"y"}), f"holds no {MEMBER}, but stats/other.npz, README"),
        (packed(), "but no file"),
        (b"no archive at all", "is a damaged archive"),
        (WHOLE[:-300], "is a damaged archive"),
        (packed(**{MEMBER: npz(64)}), "mu is [64]"),
        (packed(**{MEMBER: b"no numbers"}), "is no .npz of plain arrays"),
    ],
    ids=[
        "other members",
        "empty",
        "no archive",
        "cut off",
        "other shapes",
        "no numbers",
    ],  # archives have times in them
)
def test_what_holds_no_statistics_is_one_line(body, said, server, tmp_path):  # noqa: F811
    server.files[PATH] = body
    with pytest.raises(UserError) as error:
        download_reference(tmp_path, tmp_path / "receipt.json", None, url=server.at(PATH))
    assert said in one_line(error)
    assert not (tmp_path / "receipt.json").exists()


def test_no_network_is_one_line_with_a_way_out(tmp_path):
    with pytest.raises(UserError) as error:
        download_reference(tmp_path, tmp_path / "receipt.json", None, url="http://127.0.0.1:9/fid-files.tar.gz")
    assert f"put the file at {tmp_path}/fid-files.tar.gz yourself" in one_line(error)


@pytest.mark.slow
def test_fid_is_computed_from_it(fetched, tmp_path):
    """Against N(½, 4·I), rows around the same mean that span few directions: |Δμ|² + tr Σ + tr C - 2·2·Σ √λ(C)."""
    assert fetched()[-1] == "0"
    known = find_reference(str(tmp_path / MEMBER), cache=tmp_path / "hashes").load("fid_paper")
    spread = torch.zeros(4, SIZE, dtype=torch.float64)
    spread[0, 0], spread[1, 0], spread[2, 1], spread[3, 1] = 3, -3, 6, -6
    found = FrechetDistance(Gaussian(known["mean"].double(), known["covariance"].double()))(spread + 0.5)
    powers = torch.tensor([18 / 3, 72 / 3], dtype=torch.float64)
    expected = SIZE * VARIANCE + powers.sum() - 4 * powers.sqrt().sum()
    assert found == pytest.approx(float(expected), rel=1e-9)


def test_a_published_reference_is_used_as_soon_as_it_is_there(fetched, tmp_path):
    config = EvaluateConfig(metrics=["paired"], published_reference=str(tmp_path / MEMBER))
    assert find_scoring(config, originals=True, cache=tmp_path / "hashes").reference is None
    assert fetched()[-1] == "0"
    assert find_scoring(config, originals=True, cache=tmp_path / "hashes").reference.path.name == MEMBER


def test_the_address_is_that_of_its_publisher():
    assert fid_reference.URL.startswith("https://storage.yandexcloud.net/yandex-research/invertible-cd/")
