"""Half a model, a damaged one, and one for another task are said by name, from files alone, before any work."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from vqdm.config.options import ModelConfig
from vqdm.errors import UserError
from vqdm.models.location import local_directory
from vqdm.models.parts import check_parts
from vqdm.models.shipped import builtin_directory

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def model(tmp_path):
    return shutil.copytree(builtin_directory("tiny"), tmp_path / "model")


def said(model, **options):
    with pytest.raises(UserError) as error:
        local_directory(ModelConfig(path=str(model), **options))
    text = str(error.value)
    assert str(model) in text and "\n" not in text
    return text.replace(str(model), "MODEL")


def edit(file, **changes):
    content = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in (content | changes).items() if v is not ...}))


def test_shipped_models_are_whole():
    for name in ("tiny", "tiny_turbo"):
        assert check_parts(builtin_directory(name)) == builtin_directory(name)


def test_a_part_that_is_named_and_not_there(model):
    shutil.rmtree(model / "vae")
    assert "has no folder vae" in said(model)


@pytest.mark.parametrize("part", ["tokenizer", "tokenizer_2"])
def test_a_tokenizer_without_words(part, model):
    file = model / part / "tokenizer.json"
    edit(file, model={"vocab": {}})
    assert f"MODEL/{part}/tokenizer.json has an empty vocabulary" in said(model)
    file.unlink()
    assert f"MODEL/{part} has no vocabulary" in said(model)
    (model / part / "vocab.json").write_text('{"a": 0}')
    assert f"MODEL/{part} has no merges.txt" in said(model)
    (model / part / "merges.txt").write_text("#version: 0.2\n")
    assert local_directory(ModelConfig(path=str(model))) == model


def test_a_text_encoder_without_a_tokenizer_and_no_vae(model):
    edit(model / "model_index.json", tokenizer_2=[None, None])
    assert "names no tokenizer_2" in said(model)
    edit(model / "model_index.json", tokenizer_2=["transformers", "CLIPTokenizer"], vae=[None, None])
    assert "names no vae" in said(model)


def test_fp16_names_alone_name_the_cure(model):
    for file in list(model.rglob("*.safetensors")):
        file.rename(file.with_name(file.name.replace(".safetensors", ".fp16.safetensors")))
    assert "add model.variant=fp16 to this command" in said(model)
    assert local_directory(ModelConfig(path=str(model), variant="fp16")) == model


def test_configs_without_weights_and_pickles(model):
    (model / "unet" / WEIGHTS).unlink()
    assert "MODEL/unet has no weights (.safetensors): only the configs are here" in said(model)
    (model / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"x")
    assert "weights as pickles only" in said(model)


def test_a_shard_that_is_not_there(model):
    (model / "unet" / WEIGHTS).rename(model / "unet" / "diffusion_pytorch_model-00001-of-00002.safetensors")
    index = model / "unet" / f"{WEIGHTS}.index.json"
    names = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    index.write_text(json.dumps({"weight_map": {"a": names[0], "b": names[1]}}))
    assert f"has no {names[1]}, which {index.name} names" in said(model)
    index.write_text(json.dumps({"weight_map": [names]}))
    assert "has no weight_map" in said(model)


def test_a_file_that_was_cut_off(model):
    file = model / "text_encoder" / "model.safetensors"
    os.truncate(file, file.stat().st_size - 7)
    assert "MODEL/text_encoder/model.safetensors has" in said(model) and "it was cut off" in said(model)
    os.truncate(file, 5)
    assert "is no whole safetensors file" in said(model)


def test_weights_of_integers(model):
    file = model / "vae" / WEIGHTS
    weights = load_file(file)
    weights["decoder.conv_in.weight"] = weights["decoder.conv_in.weight"].to(torch.int8)
    save_file(weights, file, {"format": "pt"})
    assert "MODEL/vae/diffusion_pytorch_model.safetensors: the weight decoder.conv_in.weight is of I8" in said(model)


@pytest.mark.parametrize("content", ["[]", "3", '"x"', "null", "{", "[" * 100_000])
@pytest.mark.parametrize("name", ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json"])
def test_json_of_another_form(name, content, model):
    (model / name).write_text(content)
    assert f"MODEL/{name} " in said(model)


def test_class_names_that_are_missing_or_wrong(model):
    for wrong in (..., "AutoencoderKL", 5, None):
        edit(model / "unet" / "config.json", _class_name=wrong)
        assert "MODEL/unet/config.json says _class_name=" in said(model)
    edit(model / "unet" / "config.json", _class_name="UNet2DConditionModel")
    edit(model / "model_index.json", _class_name=...)
    assert "MODEL/model_index.json names no pipeline" in said(model)
    edit(model / "model_index.json", _class_name="StableDiffusionXLPipeline", vae=["diffusers"])
    assert "vae is ['diffusers'], no library and class" in said(model)


@pytest.mark.parametrize(
    ("index", "unet", "words"),
    [
        ({"_class_name": "StableDiffusionXLInpaintPipeline"}, {}, "for inpainting"),
        ({"_class_name": "StableDiffusionXLImg2ImgPipeline"}, {}, "for image to image"),
        ({"_class_name": "StableDiffusionXLControlNetPipeline"}, {}, "for control images"),
        ({"requires_aesthetics_score": True}, {}, "for refining"),
        ({}, {"in_channels": 9}, "reads 9 channels, its vae makes 4"),
    ],
)
def test_models_for_other_tasks(index, unet, words, model):
    edit(model / "model_index.json", **index)
    edit(model / "unet" / "config.json", **unet)
    assert words in said(model)
