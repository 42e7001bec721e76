"""Where a compressed pipeline is written: whole or not at all, and never over anything else."""

import json

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionXLImg2ImgPipeline, UNet2DConditionModel
from PIL import Image
from quantized import quantized_unet

from vqdm.errors import UserError
from vqdm.hub.card import add_picture
from vqdm.hub.pipelines import check_place, quiet_diffusers, replace_denoiser, save_pipeline, set_decode
from vqdm.models.shipped import builtin_directory
from vqdm.runs.locks import LOCK
from vqdm.weights.layers import quantized_layers


@pytest.fixture(scope="module")
def pipeline():
    """The tiny model's with another, quantized U-Net: saved and loaded, never sampled."""
    with quiet_diffusers():
        pipeline = DiffusionPipeline.from_pretrained(builtin_directory("tiny"), dtype=torch.float32)
    replace_denoiser(pipeline, quantized_unet("rtn"))
    return pipeline


def contents(directory) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_an_older_pipeline_is_replaced_whole_and_nothing_is_left_beside(pipeline, tmp_path):
    place = tmp_path / "small"
    for left in (".small.tmp", ".small.tmp-old"):  # by processes that were killed
        (tmp_path / left / "unet").mkdir(parents=True)
        (tmp_path / left / "unet" / "of_yesterday.safetensors").write_bytes(b"half")
    save_pipeline(pipeline, place, base=None)
    first = contents(place)
    assert not any("yesterday" in name or LOCK in name for name in first)
    (place / "unet" / "of_yesterday.safetensors").write_bytes(b"an older model's shard")
    save_pipeline(pipeline, place, base=None)
    assert contents(place).keys() == first.keys()
    assert [path.name for path in tmp_path.iterdir() if path.name != ".small.tmp-old"] == ["small"]


def test_a_pipeline_whose_index_is_damaged_is_not_replaced(pipeline, tmp_path):
    save_pipeline(pipeline, tmp_path / "small", base=None)
    (tmp_path / "small" / "model_index.json").write_text("{")
    with pytest.raises(UserError, match=r"small holds README\.md, .* another place"):
        check_place(tmp_path / "small")


def test_a_link_stays_one(pipeline, tmp_path):
    (tmp_path / "disk" / "small").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "small")
    save_pipeline(pipeline, tmp_path / "link", base=None)
    save_pipeline(pipeline, tmp_path / "link", base=None)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "disk" / "small" / "model_index.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "link"]


def test_files_beside_those_of_the_pipeline_are_not_lost(pipeline, tmp_path):
    save_pipeline(pipeline, tmp_path / "small", base=None)
    (tmp_path / "small" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds notes\.txt"):
        save_pipeline(pipeline, tmp_path / "small", base=None)
    assert (tmp_path / "small" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("place", ["file", "file/below", "plain", "filled"])
def test_other_places_are_refused(place, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "plain" / "unet").mkdir(parents=True)
    (tmp_path / "plain" / "unet" / "config.json").write_text(json.dumps({"_class_name": "UNet2DConditionModel"}))
    (tmp_path / "filled").mkdir()
    (tmp_path / "filled" / "x").write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(UserError, match="another place"):
        check_place(tmp_path / place)
    assert contents(tmp_path) == before


def test_a_card_says_how_to_load_and_what_it_came_from(pipeline, tmp_path):
    save_pipeline(pipeline, tmp_path / "small", base="stabilityai/sdxl-turbo")
    first = (tmp_path / "small" / "README.md").read_text()
    assert "base_model: stabilityai/sdxl-turbo" in first and "sai-nc-community" in first and "dtype" not in first
    again = UNet2DConditionModel.from_pretrained(tmp_path / "small" / "unet", dtype=torch.float16)
    again.save_pretrained(tmp_path / "again")
    second = (tmp_path / "again" / "README.md").read_text()
    assert "base_model: stabilityai/sdxl-turbo" in second and "sai-nc-community" in second
    assert "import torch\n" in second and 'from_pretrained("this directory", dtype=torch.float16)' in second


def test_a_card_shows_a_picture_and_the_place_stays_one_of_ours(pipeline, tmp_path):
    place = tmp_path / "small"
    save_pipeline(pipeline, place, base=None)
    before = contents(place)
    add_picture(place, Image.new("RGB", (4, 4), "red"), caption="a <b>red | square", steps=3)
    after = contents(place)
    assert Image.open(place / "picture.png").getpixel((0, 0)) == (255, 0, 0)
    assert {name for name in after if after[name] != before.get(name)} == {"README.md", "picture.png"}
    card = after["README.md"].decode()
    assert card.index("# ") < card.index("![picture.png](picture.png)") < card.index("| bytes |")
    assert "in 3 steps: a &lt;b>red | square" in card
    assert card.splitlines()[-1] == before["README.md"].decode().splitlines()[-1]
    save_pipeline(pipeline, place, base=None)
    again = contents(place)
    assert set(again) == set(before), "an older picture does not stay beside another model"
    assert again["README.md"] == before["README.md"]


def test_only_known_ways_to_decode_are_set(pipeline):
    for decode in ("cached", "per_call"):
        set_decode(pipeline.unet, decode)
        assert {layer.decode for layer in quantized_layers(pipeline.unet).values()} == {decode}
    with pytest.raises(UserError, match="per_call"):
        set_decode(pipeline.unet, "chached")


def test_other_pipelines_are_made_of_its_parts(pipeline):
    other = StableDiffusionXLImg2ImgPipeline.from_pipe(pipeline)
    assert other.unet is pipeline.unet
