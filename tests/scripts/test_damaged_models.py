"""Scripts meet a damaged model, or a place that cannot be, with one line."""

import os
import shutil
import sys
from pathlib import Path

import export_plain
import pytest
from diffusers import DiffusionPipeline

import vqdm
from vqdm.errors import UserError
from vqdm.runs.locks import locked

TINY = Path(vqdm.__file__).parent / "models" / "tiny"


@pytest.fixture(scope="module")
def compressed(tmp_path_factory):
    directory = tmp_path_factory.mktemp("compressed") / "model"
    asked = vqdm.VQDMConfig("rtn4", layers="mid_block.*to_q$")
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(TINY / "unet", quantization_config=asked)
    DiffusionPipeline.from_pretrained(TINY, unet=unet).save_pretrained(directory)
    return directory


def _cut_off(file):
    os.truncate(file, file.stat().st_size // 2)


@pytest.mark.parametrize(
    ("file", "damage", "said"),
    [
        ("model_index.json", lambda file: file.write_text("[]"), "holds list where an object should be"),
        ("unet/config.json", lambda file: file.write_text("{"), "is not JSON"),
        ("text_encoder/model.safetensors", _cut_off, "it was cut off"),
        ("text_encoder_2/config.json", lambda file: file.write_text('{"model_type": 5}'), "cannot be loaded as"),
        ("tokenizer/tokenizer.json", Path.unlink, "has no vocabulary"),
        ("unet/diffusion_pytorch_model.safetensors", _cut_off, "it was cut off"),
    ],
)
def test_export_plain_says_what_is_damaged(file, damage, said, compressed, tmp_path, monkeypatch):
    model = shutil.copytree(compressed, tmp_path / "model")
    damage(model / file)
    with pytest.raises(SystemExit) as error:
        export_plain.main([str(model), str(tmp_path / "plain")])
    line = str(error.value)
    assert line.startswith("error: ") and "\n" not in line and said in line and str(model) in line
    assert not (tmp_path / "plain").exists()


def test_export_plain_decodes_what_is_whole(compressed, tmp_path):
    export_plain.main([str(compressed), str(tmp_path / "plain")])
    assert not getattr(DiffusionPipeline.from_pretrained(tmp_path / "plain").unet, "is_quantized", False)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_a_place_that_cannot_be_made_is_said_at_once():
    with pytest.raises(UserError, match="/proc/nowhere"), locked(Path("/proc/nowhere/data")):
        pass
