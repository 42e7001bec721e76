"""scripts/make_reference_stats.py from folders and archives, with random weights of the published networks."""

import dataclasses
import hashlib
import json
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import make_reference_stats
import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image
from random_networks import PHOTOGRAPHS, random_inception, random_open_clip, textures
from safetensors.torch import load_file

from vqdm.metrics import extractors, image_files
from vqdm.metrics.distribution import FrechetDistance, Gaussian
from vqdm.metrics.extractors import make_extractor
from vqdm.metrics.families import FAMILIES, Weights
from vqdm.metrics.reference import find_reference
from vqdm.metrics.resampling import Resamples
from vqdm.metrics.scores import score

ROOT = Path(__file__).resolve().parent.parent.parent

RUN = """
import dataclasses, sys
sys.path.insert(0, "scripts")
import vqdm
from vqdm.metrics.families import FAMILIES, Weights
for name in ("fid_paper", "fid_standard"):
    FAMILIES[name] = dataclasses.replace(FAMILIES[name], weights=(Weights("inception.pth", url="…"),))
import make_reference_stats
make_reference_stats.main(sys.argv[1:])
"""  # as a user runs it, but with weights that are not the published ones


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    directory = tmp_path_factory.mktemp("weights")
    random_inception(directory)
    random_open_clip(directory)
    return directory


@pytest.fixture
def unpublished(monkeypatch):
    """The families take any weights."""
    for name, file in (("fid_paper", "inception.pth"), ("fid_standard", "inception.pth"), ("cmmd", "clip.safetensors")):
        monkeypatch.setitem(FAMILIES, name, dataclasses.replace(FAMILIES[name], weights=(Weights(file, url="…"),)))
    monkeypatch.setitem(extractors.OPEN_CLIP, "cmmd", "tiny-random")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Seven pictures of several sizes and kinds, below folders."""
    place = tmp_path_factory.mktemp("pictures") / "val"
    pictures = [Image.fromarray(textures(1, (60 + 9 * i, 80), seed=i)[0]) for i in range(7)]
    pictures[2], pictures[4] = pictures[2].convert("L"), pictures[4].convert("CMYK")
    for index, picture in enumerate(pictures):
        path = place / ("a" if index < 3 else "b") / f"{index:03d}.{'jpg' if index == 4 else 'png'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
    (place / "list.txt").write_text("no image")
    return place


def made(sources, out, weights, *more):
    arguments = [*map(str, sources), "--out", str(out), "--weights", str(weights), "--device", "cpu"]
    make_reference_stats.main([*arguments, "--batch-size", "3", *more])
    return json.loads((out / "reference.json").read_text())


def refused(said, *arguments):
    with pytest.raises(SystemExit) as error:
        made(*arguments)
    message = str(error.value)
    assert message.startswith("error: ") and said in message and "\n" not in message
    return message


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def archive_of(folder, path):
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*"), reverse=True):
            archive.write(file, Path(folder.name) / file.relative_to(folder))
        archive.writestr(f"__MACOSX/{folder.name}/._x.png", b"no image")
    return path


def test_what_is_written_is_what_the_networks_see(folder, weights, unpublished, tmp_path, capsys):
    about = made([folder], tmp_path / "stats", weights)
    assert sorted(p.name for p in (tmp_path / "stats").iterdir()) == [
        "cmmd.safetensors", "fid_paper.safetensors", "fid_standard.safetensors", "reference.json",
    ]  # fmt: skip
    assert "7 images are too few" in capsys.readouterr().err
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.suffix in (".png", ".jpg"))
    pixels = [np.asarray(Image.open(folder / name).convert("RGB")) for name in names]
    hashes = [[name, hashlib.sha256((folder / name).read_bytes()).hexdigest()] for name in names]
    listed = json.dumps(hashes, separators=(",", ":")).encode()
    assert (about["name"], about["images"]) == ("stats", 7)
    assert about["images_sha256"] == hashlib.sha256(listed).hexdigest()
    for family, file, column in (
        ("fid_paper", "inception.pth", "features"),
        ("fid_standard", "inception.pth", "features"),
        ("cmmd", "clip.safetensors", "image"),
    ):
        expected = make_extractor(family, [weights / file], device="cpu").columns(pixels)[column]
        kept = load_file(tmp_path / "stats" / f"{family}.safetensors")
        assert kept["features"].dtype == torch.float32
        assert torch.allclose(kept["features"], expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
        sha256 = hashlib.sha256((weights / file).read_bytes()).hexdigest()
        assert about["families"][family]["weights_sha256"] == [sha256]
        assert about["families"][family]["version"] == FAMILIES[family].version
        assert sorted(about["families"][family]["columns"]) == sorted(kept)
        if family != "cmmd":
            rows = kept["features"].double().numpy()
            assert kept["mean"].dtype == kept["covariance"].dtype == torch.float64
            assert kept["mean"].numpy() == pytest.approx(rows.mean(0), rel=1e-6, abs=1e-9)
            assert np.allclose(kept["covariance"].numpy(), np.cov(rows.T), rtol=1e-6, atol=1e-9)


def test_an_archive_gives_the_folders_statistics(folder, weights, unpublished, tmp_path):
    archive = archive_of(folder, tmp_path / "val.zip")
    of_folder = made([folder], tmp_path / "one" / "stats", weights, "--metrics", "cmmd")
    of_archive = made([archive], tmp_path / "two" / "stats", weights, "--metrics", "cmmd")
    assert of_folder["images_sha256"] == of_archive["images_sha256"]
    one, two = (contents(tmp_path / where / "stats") for where in ("one", "two"))
    assert [name for name in one if one[name] != two[name]] == ["reference.json"]


def scored(rows, reference):
    resamples = Resamples(len(rows), count=2)
    own = {"features": rows}
    return score("fid_paper", own, None, captions=[], reference=reference, resamples=resamples).sets["fid_paper"]


def test_a_set_against_itself_is_at_0_and_another_where_the_formula_says(folder, weights, unpublished, tmp_path):
    made([folder], tmp_path / "stats", weights, "--metrics", "fid_paper")
    reference = find_reference(str(tmp_path / "stats"), cache=tmp_path / "hashes.json").load("fid_paper")
    size = float(reference["covariance"].trace())
    assert scored(reference["features"], reference)["value"] == pytest.approx(0, abs=1e-6 * size)
    network = make_extractor("fid_paper", [weights / "inception.pth"], device="cpu")
    rows = network.columns(textures(5, (70, 90), seed=50))["features"]
    one, two = reference["features"].double().numpy(), rows.double().numpy()
    # tr (C₁C₂)^½ is the sum of the singular values of X₁X₂ᵀ, of centred rows over the root of their number less one
    centred = [(x - x.mean(0)) / np.sqrt(len(x) - 1) for x in (one, two)]
    cross = scipy.linalg.svdvals(centred[0] @ centred[1].T).sum()
    gap = one.mean(0) - two.mean(0)
    expected = gap @ gap + sum(np.square(c).sum() for c in centred) - 2 * cross
    assert scored(rows, reference)["value"] == pytest.approx(expected, rel=1e-3)
    assert FrechetDistance(Gaussian.of(reference["features"]))(rows) == pytest.approx(expected, rel=1e-3)


def test_photographs_of_coco_by_their_captions(weights, unpublished, tmp_path):
    if not PHOTOGRAPHS.is_dir():
        pytest.skip("no photographs in ../shared/data/coco/mini")
    captions = PHOTOGRAPHS / "annotations" / "captions_val2017.json"
    sources = [PHOTOGRAPHS / "val2017", PHOTOGRAPHS / "train2017"]
    about = made(
        sources, tmp_path / "stats", weights, "--captions", str(captions), "--n", "6", "--metrics", "fid_paper"
    )
    first = [image["file_name"] for image in json.loads(captions.read_text())["images"][:6]]
    hashes = [[n, hashlib.sha256((PHOTOGRAPHS / "val2017" / n).read_bytes()).hexdigest()] for n in sorted(first)]
    listed = json.dumps(hashes, separators=(",", ":")).encode()
    assert about["images"] == 6 and about["images_sha256"] == hashlib.sha256(listed).hexdigest()
    assert "captions_val2017.json" in about["source"]
    features = load_file(tmp_path / "stats" / "fid_paper.safetensors")["features"]
    assert features.shape == (6, 2048) and float(features.std(0).mean()) > 1e-3


def test_an_image_of_two_captions_counts_once(folder, weights, unpublished, tmp_path):
    rows = ["file_name,caption", "001.png,one", "a/001.png,the same", "003.png,two", "val/b/004.jpg,three"]
    (tmp_path / "list.csv").write_text("\n".join(rows))
    more = ("--captions", str(tmp_path / "list.csv"), "--metrics", "cmmd")
    assert made([folder], tmp_path / "stats", weights, *more)["images"] == 3
    (tmp_path / "list.csv").write_text("file_name,caption\n001.png,one\n999.png,none")
    assert "first 999.png" in refused("1 of 2 images", [folder], tmp_path / "other", weights, *more)
    (tmp_path / "twins" / "val").mkdir(parents=True)
    (tmp_path / "twins" / "999.png").write_bytes((folder / "a" / "001.png").read_bytes())
    (tmp_path / "twins" / "val" / "999.png").write_bytes((folder / "a" / "002.png").read_bytes())
    (tmp_path / "list.csv").write_text("file_name,caption\ntrain/999.png,one\n999.png,two")
    refused("several images", [tmp_path / "twins"], tmp_path / "other", weights, *more)
    (tmp_path / "list.csv").write_text("caption\none\ntwo")
    refused("name their image", [folder], tmp_path / "other", weights, *more)


@pytest.mark.slow
def test_killed_and_repeated_it_writes_the_same_files(folder, weights, tmp_path):
    def start(out):
        arguments = [str(folder), "--out", str(out), "--weights", str(weights), "--device", "cpu"]
        more = ["--batch-size", "1", "--metrics", "fid_paper,fid_standard", "--name", "pictures"]
        return subprocess.Popen([sys.executable, "-c", RUN, *arguments, *more], cwd=ROOT, stderr=subprocess.PIPE)

    assert start(tmp_path / "whole").wait(timeout=600) == 0
    killed = start(tmp_path / "killed")
    items = tmp_path / "killed" / ".work" / "items"
    deadline = time.monotonic() + 600
    while len(list(items.glob("*.json"))) < 3 and killed.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    killed.kill()
    killed.wait()
    assert len(list(items.glob("*.json"))) >= 3 and not (tmp_path / "killed" / "reference.json").exists()
    again = start(tmp_path / "killed")
    told = again.communicate(timeout=600)[1].decode()
    assert again.returncode == 0 and "0/7" not in told.split("features", 1)[-1]
    one, two = (contents(tmp_path / where) for where in ("whole", "killed"))
    one["reference.json"] = one["reference.json"].replace(b"whole", b"killed")  # the command
    assert one == two


def test_done_it_stays_done_and_is_not_written_over(folder, weights, unpublished, tmp_path, monkeypatch):
    made([folder], tmp_path / "stats", weights, "--metrics", "cmmd")
    before = contents(tmp_path / "stats")
    monkeypatch.setattr(make_reference_stats, "_extractors", None)  # nothing is looked at again
    made([folder], tmp_path / "stats", weights, "--metrics", "cmmd")
    refused("another reference", [folder / "a"], tmp_path / "stats", weights, "--metrics", "cmmd")
    assert contents(tmp_path / "stats") == before


@pytest.mark.parametrize("damage", [lambda data: data[:200], lambda _: b"no image", lambda _: b""])
def test_unreadable_images_are_named_before_any_work(folder, weights, unpublished, tmp_path, monkeypatch, damage):
    whole = (folder / "a" / "001.png").read_bytes()
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for name in ("x.png", "y.png", "z.png"):
        (pictures / name).write_bytes(damage(whole) if name == "y.png" else whole)
    monkeypatch.setattr(make_reference_stats, "_extractors", None)
    message = refused("y.png", [pictures], tmp_path / "stats", weights)
    assert "x.png" not in message and not (tmp_path / "stats" / "reference.json").exists()


def test_images_of_16_bits_are_refused(weights, unpublished, tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for name in "xy":
        Image.fromarray(np.full((40, 40), 40_000, np.uint16)).save(pictures / f"{name}.png")
    refused("8 bits", [pictures], tmp_path / "stats", weights)


def test_sources_that_are_none(folder, weights, unpublished, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.zip").write_bytes(b"PK no archive")
    refused("no folder of images and no .zip", [tmp_path / "nothing"], tmp_path / "stats", weights)
    refused("no folder of images and no .zip", [tmp_path / "bad.zip"], tmp_path / "stats", weights)
    refused("holds no images", [tmp_path / "empty"], tmp_path / "stats", weights)
    refused("2 images are called", [folder, folder], tmp_path / "stats", weights)
    refused("--n belongs", [folder], tmp_path / "stats", weights, "--n", "3")


def test_weights_that_are_not_here_are_named(folder, weights, unpublished, tmp_path):
    message = refused("needs inception.pth", [folder], tmp_path / "stats", tmp_path / "none")
    assert "clip.safetensors" in message and message.count("inception.pth") == 1


def test_other_weights_than_published_are_refused(folder, weights, tmp_path, monkeypatch):
    published = Weights("inception.pth", url="…", sha256="6726825d")
    monkeypatch.setitem(FAMILIES, "fid_paper", dataclasses.replace(FAMILIES["fid_paper"], weights=(published,)))
    refused("6726825d", [folder], tmp_path / "stats", weights, "--metrics", "fid_paper")


def test_a_family_without_a_reference_is_refused(folder, weights, tmp_path, capsys):
    with pytest.raises(SystemExit):
        made([folder], tmp_path / "stats", weights, "--metrics", "lpips")
    assert "'lpips' has no reference" in capsys.readouterr().err


def test_names_are_below_the_deepest_common_folder(folder, tmp_path):
    names = [image.name for image in image_files.list_images([folder])]
    assert names == ["a/000.png", "a/001.png", "a/002.png", "b/003.png", "b/004.jpg", "b/005.png", "b/006.png"]
    assert [i.name for i in image_files.list_images([archive_of(folder, tmp_path / "val.zip")])] == names
    assert [i.name for i in image_files.list_images([folder / "a"])] == ["000.png", "001.png", "002.png"]
