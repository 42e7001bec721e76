"""A written pipeline sampled by a script that knows nothing else of it."""

import json

import pytest
from diffusers import DiffusionPipeline, UNet2DConditionModel
from tiny_world import run_script

from vqdm.hub.config import VQDMConfig
from vqdm.models.shipped import builtin_directory

SCRIPT = "scripts/sample_saved.py"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    tiny, place = builtin_directory("tiny"), tmp_path_factory.mktemp("saved")
    scheme = VQDMConfig("rtn4", layers=r"mid_block.*to_q$")
    unet = UNet2DConditionModel.from_pretrained(tiny / "unet", quantization_config=scheme)
    DiffusionPipeline.from_pretrained(tiny, unet=unet, local_files_only=True).save_pretrained(place)
    return place


def test_images_of_a_written_pipeline(saved, tmp_path):
    done = run_script(SCRIPT, str(saved), "--dtype=float32", f"--write={tmp_path}", f"--json={tmp_path / 'found.json'}")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert sum(found["layers"].values()) > 0 and all("4" in name for name in found["layers"])
    assert f"2 images of {found['size']}², 2 steps" in done.stdout and "CPU-seconds" in done.stdout
    assert found["range"][0] >= 0 and found["range"][1] <= 1 and found["range"][0] < found["range"][1]
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["0000.png", "0001.png"]


def test_what_is_no_pipeline_is_said(tmp_path):
    done = run_script(SCRIPT, str(tmp_path))
    assert (
        done.returncode == 1
        and done.stderr == f"error: {tmp_path} holds no model_index.json: give the directory of a written pipeline\n"
    )
