"""References: directories as the script writes them, and .npz files nobody vouches for."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from vqdm.errors import UserError
from vqdm.metrics.distribution import FrechetDistance, Gaussian
from vqdm.metrics.families import FAMILIES
from vqdm.metrics.reference import find_reference

MU, SIGMA = np.linspace(0, 1, 2048), np.eye(2048)


def write_npz(path, **arrays):
    np.savez(path, **({"mu": MU, "sigma": SIGMA} | arrays))
    return path


def write_directory(path, families=("fid_paper",), **about):
    path.mkdir()
    for family in families:
        save_file({"mean": torch.zeros(4), "features": torch.ones(5, 4)}, path / f"{family}.safetensors")
    of_families = {f: {"version": FAMILIES[f].version, "weights_sha256": ["w"], "columns": []} for f in families}
    content = {"name": "photographs", "images": 5, "images_sha256": "i", "families": of_families} | about
    (path / "reference.json").write_text(json.dumps(content))
    return path


def found(path, tmp_path):
    return find_reference(str(path), cache=tmp_path / "cache" / "hashes.json")


def test_none_is_none(tmp_path):
    assert find_reference(None, cache=tmp_path / "hashes.json") is None


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_published_statistics(tmp_path, dtype):
    reference = found(write_npz(tmp_path / "coco.npz", mu=MU.astype(dtype), sigma=SIGMA.astype(dtype)), tmp_path)
    loaded = reference.load("fid_paper")
    assert loaded["mean"].dtype == loaded["covariance"].dtype == torch.float64
    assert loaded["mean"].numpy() == pytest.approx(MU.astype(dtype)) and set(loaded) == {"mean", "covariance"}
    assert [f for f in FAMILIES if reference.serves(f)] == ["fid_paper", "fid_standard"]
    protocol = reference.protocol("fid_paper")
    assert protocol["reference"] == "coco.npz" and protocol["reference_images"] == "not stated in the file"
    assert len(protocol["reference_sha256"]) == 64
    reference.check_weights("fid_paper", ["any"])  # nothing to compare with
    distance = FrechetDistance(Gaussian(loaded["mean"], loaded["covariance"]))
    rows = torch.from_numpy(np.random.default_rng(0).standard_normal((30, 2048)))
    covariance = np.cov(rows.numpy().T)  # √(I · C) is √C, so the trace of its eigenvalues' roots
    roots = np.sqrt(np.linalg.eigvalsh(covariance).clip(min=1e-12)).sum()
    gap = np.square(rows.numpy().mean(0) - MU.astype(dtype)).sum()
    assert distance(rows) == pytest.approx(gap + 2048 + np.trace(covariance) - 2 * roots, rel=1e-5)


class Harmful:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"mu": MU[:64], "sigma": SIGMA[:64, :64]}, r"mu is \[64\] and sigma \[64, 64\]"),
        ({"sigma": SIGMA[:, :5]}, r"sigma \[2048, 5\]"),
        ({"mu": np.array(1.0)}, r"mu is \[\]"),
        ({"mu": np.full(2048, np.nan)}, "no numbers"),
        ({"mu": np.array(["a"] * 2048)}, "no .npz of plain arrays"),
    ],
)
def test_other_arrays_are_one_line(tmp_path, arrays, said):
    path = write_npz(tmp_path / "bad.npz", **arrays)
    with pytest.raises(UserError, match=said) as error:
        found(path, tmp_path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_arrays_of_objects_are_refused_without_running_them(tmp_path):
    write_npz(tmp_path / "bad.npz", mu=np.array([Harmful(tmp_path / "harm")], dtype=object))
    with pytest.raises(UserError, match="plain arrays"):
        found(tmp_path / "bad.npz", tmp_path)
    assert not (tmp_path / "harm").exists()


def test_missing_arrays_are_named(tmp_path):
    np.savez(tmp_path / "bad.npz", mu=MU, cov=SIGMA)
    with pytest.raises(UserError, match="no array sigma, but mu, cov"):
        found(tmp_path / "bad.npz", tmp_path)


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04 cut off"])
def test_damaged_files_are_one_line(tmp_path, content):
    (tmp_path / "bad.npz").write_bytes(content)
    with pytest.raises(UserError, match="plain arrays") as error:
        found(tmp_path / "bad.npz", tmp_path)
    assert "\n" not in str(error.value)


def test_a_plain_array_under_that_name_is_one_line(tmp_path):
    with (tmp_path / "bad.npz").open("wb") as file:
        np.save(file, SIGMA[:3])
    with pytest.raises(UserError, match="plain arrays"):
        found(tmp_path / "bad.npz", tmp_path)


def test_a_directory(tmp_path):
    reference = found(write_directory(tmp_path / "photographs"), tmp_path)
    assert [f for f in FAMILIES if reference.serves(f)] == ["fid_paper"]
    assert torch.equal(reference.load("fid_paper")["features"], torch.ones(5, 4))
    assert reference.protocol("fid_paper") == {
        "reference": "photographs",
        "reference_images": 5,
        "reference_images_sha256": "i",
        "reference_sha256": reference.sha256,
    }
    reference.check_weights("fid_paper", ["w"])
    reference.check_weights("cmmd", ["x"])  # it holds nothing of these


def test_its_identity_is_over_its_files(tmp_path):
    first = found(write_directory(tmp_path / "one"), tmp_path)
    assert found(write_directory(tmp_path / "two"), tmp_path).sha256 == first.sha256
    assert found(write_directory(tmp_path / "three", name="others"), tmp_path).sha256 != first.sha256


@pytest.mark.parametrize(("weights", "version"), [(["x"], 0), (["w"], 1)])
def test_statistics_of_other_weights_or_versions_are_refused(tmp_path, monkeypatch, weights, version):
    reference = found(write_directory(tmp_path / "photographs"), tmp_path)
    reference.about["families"]["fid_paper"]["version"] += version
    with pytest.raises(UserError, match="other weights or by another version") as error:
        reference.check_weights("fid_paper", weights)
    assert "make_reference_stats.py" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("about", ["", "[]", "3", '{"name": "x"}'])
def test_a_directory_of_something_else_is_one_line(tmp_path, about):
    (tmp_path / "photographs").mkdir()
    if about:
        (tmp_path / "photographs" / "reference.json").write_text(about)
    with pytest.raises(UserError, match="neither a directory of") as error:
        found(tmp_path / "photographs", tmp_path)
    assert "\n" not in str(error.value)


def test_no_such_place_is_one_line(tmp_path):
    for name in ("nothing", "nothing.npz"):
        with pytest.raises(UserError, match="neither a directory of"):
            found(tmp_path / name, tmp_path)


def test_a_family_whose_file_is_missing_is_named(tmp_path):
    directory = write_directory(tmp_path / "photographs")
    (directory / "fid_paper.safetensors").unlink()
    with pytest.raises(UserError, match="safetensors is missing"):
        found(directory, tmp_path)
