"""Models that lie in the repository beside the package: found, checked, or missed in one line."""

import hashlib
import shutil
import sys

import pytest
from tiny_world import run_script

from vqdm.errors import UserError
from vqdm.models import shipped
from vqdm.models.shipped import (
    builtin_directory,
    check_parts,
    evaluators_directory,
    finished_parts,
    part_names,
)


@pytest.fixture
def beside(tmp_path, monkeypatch):
    monkeypatch.setattr(shipped, "BESIDE", tmp_path / "models")
    shipped._checked.cache_clear()
    yield tmp_path / "models"
    shipped._checked.cache_clear()


def put(beside, name):
    (beside / name).mkdir(parents=True)
    (beside / name / "model_index.json").write_text("{}")
    (beside / name / "attribute_net.safetensors").write_bytes(b"weights")
    files = sorted(path for path in beside.rglob("*") if path.is_file() and path.name != "SHA256SUMS")
    sums = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(beside)}" for path in files]
    (beside / "SHA256SUMS").write_text("\n".join(sums))


@pytest.mark.parametrize("name", ["small", "small_turbo"])
def test_a_model_that_was_not_made_yet_says_how(beside, name):
    with pytest.raises(UserError, match=r"small.* is not here.*tiny_train=small.*publish_tiny\.py") as caught:
        builtin_directory(name)
    assert str(beside / name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_evaluators_that_were_not_made_yet_say_how(beside):
    with pytest.raises(UserError, match=r"evaluate\.evaluators='small' is not here.*tiny_train=small"):
        evaluators_directory("small")
    assert evaluators_directory("tiny") == evaluators_directory(None)


def test_a_model_beside_the_package_is_found(beside):
    put(beside, "small")
    assert builtin_directory("small") == beside / "small"
    put(beside, "small_evaluators")
    assert evaluators_directory("small") == beside / "small_evaluators"
    assert builtin_directory("tiny").parent != beside


@pytest.mark.parametrize("damage", ["changed", "gone", "no list"])
def test_a_file_that_is_not_the_listed_one_is_refused(beside, damage):
    put(beside, "small")
    file = beside / "small" / "attribute_net.safetensors"
    if damage == "changed":
        file.write_bytes(b"weightz")
    else:
        (file if damage == "gone" else beside / "SHA256SUMS").unlink()
    with pytest.raises(UserError, match=r"from the repository") as caught:
        builtin_directory("small")
    assert ("SHA256SUMS" if damage == "no list" else str(file)) in str(caught.value)


def test_a_snapshot_is_published_with_its_curve_and_sums(beside, tmp_path, monkeypatch):
    import publish_tiny

    stage = tmp_path / "small-seed0-00000000"
    shutil.copytree(builtin_directory("tiny"), stage / "training" / "snapshot")
    (stage / "small_evaluators").mkdir()
    (stage / "small_evaluators" / "attribute_net.safetensors").write_bytes(b"weights")
    (stage / "training" / "growth.jsonl").write_text('{"step": 2}\n')
    monkeypatch.setattr(publish_tiny, "BESIDE", beside)
    monkeypatch.setitem(publish_tiny.PLACES, "small", beside)
    monkeypatch.setattr(sys, "argv", ["publish_tiny.py", str(stage)])
    with pytest.raises(SystemExit, match="small_turbo is not there yet"):
        publish_tiny.main()
    monkeypatch.setattr(sys, "argv", ["publish_tiny.py", str(stage), "--snapshot"])
    publish_tiny.main()
    assert (beside / "small_training" / "growth.jsonl").is_file()
    assert builtin_directory("small") == beside / "small"
    (beside / "small" / "unet" / "config.json").write_text("{}")
    shipped._checked.cache_clear()
    with pytest.raises(UserError, match=r"unet/config\.json is not the file"):
        builtin_directory("small")


def test_finished_parts_are_published_and_checked_when_they_are_taken(beside, tmp_path, monkeypatch):
    import publish_tiny

    stage = tmp_path / "small-seed0-00000000"
    shutil.copytree(builtin_directory("tiny") / "vae", stage / "training" / "vae")
    (stage / "small_evaluators").mkdir()
    (stage / "small_evaluators" / "attribute_net.safetensors").write_bytes(b"weights")
    monkeypatch.setattr(publish_tiny, "BESIDE", beside)
    monkeypatch.setattr(sys, "argv", ["publish_tiny.py", str(stage), "--parts"])
    publish_tiny.main()
    made = beside / "small_parts"
    assert {path.name for path in made.iterdir()} == {"vae", "small_evaluators"}
    shutil.copytree(builtin_directory("tiny") / "unet", stage / "training" / "snapshot" / "unet")
    publish_tiny.main()
    assert {path.name for path in made.iterdir()} == {"vae", "small_evaluators", "unet_begun"}
    assert check_parts(made, world="small") == made
    shutil.copytree(builtin_directory("tiny") / "unet", stage / "training" / "unet")
    world, folders = publish_tiny._parts(stage)
    assert (world, {*folders}) == ("small", {f"small_parts/{name}" for name in ("vae", "small_evaluators", "unet")})
    with pytest.raises(UserError, match=r"parts=.*none of vae, tokenizer"):
        check_parts(tmp_path, world="small")
    (made / "vae" / "config.json").write_text("{}")
    shipped._checked.cache_clear()
    with pytest.raises(UserError, match=r"vae/config\.json is not the file"):
        check_parts(made, world="small")


def test_parts_are_found_in_a_shipped_pipeline_too_and_checked(beside):
    import publish_tiny

    shutil.copytree(builtin_directory("tiny"), beside / "small")
    (beside / "small_evaluators").mkdir()
    (beside / "small_evaluators" / "attribute_net.safetensors").write_bytes(b"weights")
    publish_tiny._write_sums(beside)
    found = finished_parts(beside, world="small")
    assert found == {name: beside / "small" / name for name in part_names("small")[:-2]} | {
        "small_evaluators": beside / "small_evaluators",
        "unet": beside / "small" / "unet",
    }
    assert check_parts(beside, world="small") == beside
    (beside / "small" / "unet" / "config.json").write_text("{}")
    shipped._checked.cache_clear()
    with pytest.raises(UserError, match=r"unet/config\.json is not the file"):
        check_parts(beside, world="small")


def test_a_directory_without_a_training_is_refused(tmp_path):
    done = run_script("scripts/publish_tiny.py", str(tmp_path))
    assert done.returncode != 0
    assert "has no evaluators" in done.stderr
