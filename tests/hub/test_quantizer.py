"""A quantized model through diffusers' own from_pretrained and save_pretrained."""

import copy
import json
import os
import pickle
import subprocess
import sys

import pytest
import torch
from diffusers import UNet2DConditionModel
from quantized import KINDS, quantized_unet
from unets import output, small_unet

import vqdm
from vqdm.errors import UserError
from vqdm.hub.config import VQDMConfig
from vqdm.hub.quantizer import attach
from vqdm.weights.base import SHARED_NAME
from vqdm.weights.layers import dequantize_layers, quantized_layers

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Kind -> (denoiser, the directory it was saved into)."""
    made = {}
    for kind in KINDS:
        unet, directory = quantized_unet(kind), tmp_path_factory.mktemp(kind)
        unet.save_pretrained(directory)
        made[kind] = unet, directory
    return made


def same_state(one, other) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_loaded_is_what_was_saved(saved, kind):
    unet, directory = saved[kind]
    loaded = UNet2DConditionModel.from_pretrained(directory)
    assert same_state(unet, loaded)
    assert torch.equal(output(unet), output(loaded))
    assert [layer.decode for layer in quantized_layers(loaded).values()] == ["per_call"] * len(quantized_layers(unet))


@pytest.mark.parametrize("kind", ["rtn", "shared"])
def test_shards_hold_the_same_and_shared_parts_stay_one(saved, kind, tmp_path):
    unet = saved[kind][0]
    unet.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    loaded = UNet2DConditionModel.from_pretrained(tmp_path)
    assert same_state(unet, loaded)
    if kind == "shared":
        part = loaded.get_submodule(SHARED_NAME)["codebooks"]
        assert all(layer.weight.shared[0] is part for layer in quantized_layers(loaded).values())


def test_saved_once_more_it_is_the_same_file(saved, tmp_path):
    _, directory = saved["trellis"]
    UNet2DConditionModel.from_pretrained(directory, dtype=torch.float16).save_pretrained(tmp_path)
    assert _data(tmp_path) == _data(directory)
    assert (tmp_path / "config.json").read_text() != ""


def _data(directory) -> bytes:
    """The file without its header, where two keys of metadata come in any order."""
    content = (directory / WEIGHTS).read_bytes()
    return content[8 + int.from_bytes(content[:8], "little") :]


def test_bfloat16_loads_computes_and_saves_what_it_holds(saved, tmp_path):
    unet, directory = saved["additive"]
    loaded = UNet2DConditionModel.from_pretrained(directory, dtype=torch.bfloat16)
    found = output(loaded, dtype=torch.bfloat16)
    assert found.dtype == torch.bfloat16
    assert torch.allclose(found.float(), output(unet), atol=0.1)
    loaded.save_pretrained(tmp_path)
    assert same_state(loaded, UNet2DConditionModel.from_pretrained(tmp_path, dtype=torch.bfloat16))


@pytest.mark.slow
@pytest.mark.parametrize("first", ["", "import diffusers.quantizers.auto\n"])
def test_a_process_that_knows_only_vqdm_and_diffusers_loads_it(first, saved):
    code = f"""
import vqdm
from diffusers import UNet2DConditionModel
unet = UNet2DConditionModel.from_pretrained({str(saved["trellis"][1])!r})
print(type(unet.conv_in).__name__, type(unet.mid_block.resnets[0].conv1).__name__)
"""
    done = subprocess.run(
        [sys.executable, "-c", first + code], capture_output=True, text=True, check=False, env=os.environ
    )
    assert done.stdout.split() == ["Conv2d", "QuantizedConv2d"], done.stderr


def test_a_copy_stands_for_itself(saved, tmp_path):
    unet = copy.deepcopy(saved["additive"][0])
    next(iter(quantized_layers(unet).values())).weight.scales.data.mul_(2)
    unet.save_pretrained(tmp_path)
    assert same_state(unet, UNet2DConditionModel.from_pretrained(tmp_path))


def test_dequantized_it_is_an_ordinary_model(saved, tmp_path):
    unet, directory = saved["shared"]
    plain = UNet2DConditionModel.from_pretrained(directory)
    assert plain.dequantize() is plain
    assert not quantized_layers(plain) and list(plain.state_dict()) == list(small_unet().state_dict())
    assert torch.equal(output(plain), output(unet))
    plain.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert "quantization_config" not in config
    again = UNet2DConditionModel.from_pretrained(tmp_path)
    assert torch.equal(output(again), output(unet))
    with pytest.raises(ValueError, match="quantize your model"):
        again.dequantize()


def _copied(directory, tmp_path):
    for file in directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def _config_with(directory, change):
    config = json.loads((directory / "config.json").read_text())
    change(config)
    (directory / "config.json").write_text(json.dumps(config))


def _first_group(config):
    return config["quantization_config"]["groups"][0]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c["quantization_config"].update(version=9), "format version 9"),
        (lambda c: c["quantization_config"].pop("groups"), "scheme"),
        (lambda c: c["quantization_config"]["groups"].pop(), "other quantized layers"),
        (lambda c: _first_group(c)["layers"].append("somewhere.else"), "somewhere.else|other quantized layers"),
        (lambda c: _first_group(c).update(shape=[16, -1]), "not the shape of a weight"),
        (lambda c: _first_group(c)["scheme"].update(kind="magic"), "not a weight scheme"),
        (lambda c: c.update(norm_eps=0.1), "says norm_eps=0.1"),
        (lambda c: c.update(act_fn="gelu"), "says act_fn=gelu"),
        (lambda c: c["quantization_config"].update(options=[]), "options of a quantization_config"),
    ],
)
def test_an_altered_config_is_refused(saved, change, said, tmp_path):
    directory = _copied(saved["rtn"][1], tmp_path)
    _config_with(directory, change)
    with pytest.raises(UserError, match=said):
        UNet2DConditionModel.from_pretrained(directory)


def test_an_altered_or_truncated_file_is_refused(saved, tmp_path):
    directory = _copied(saved["rtn"][1], tmp_path)
    content = bytearray((directory / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (directory / WEIGHTS).write_bytes(content)
    with pytest.raises(UserError, match="is not as it was saved"):
        UNet2DConditionModel.from_pretrained(directory)
    (directory / WEIGHTS).write_bytes(content[:-8])
    with pytest.raises((UserError, OSError), match="diffusion_pytorch_model"):
        UNet2DConditionModel.from_pretrained(directory)


def test_what_cannot_be_saved_is_refused(saved, tmp_path):
    with pytest.raises(UserError, match="safetensors only"):
        saved["rtn"][0].save_pretrained(tmp_path, safe_serialization=False)


def test_a_model_with_decoded_layers_computes_the_same(saved):
    unet = saved["trellis"][0]
    assert torch.allclose(output(dequantize_layers(copy.deepcopy(unet))), output(unet))


def test_its_class_passes_for_that_of_diffusers(saved):
    """As DiffusionPipeline.from_pipe compares types; and a pickle knows the class again."""
    unet, directory = saved["trellis"]
    assert type(unet) == UNet2DConditionModel == type(unet)  # noqa: E721
    assert type(unet) in {UNet2DConditionModel} and type(unet) not in {torch.nn.Conv2d, torch.nn.Module}
    again = pickle.loads(pickle.dumps(unet))
    assert type(again) is type(unet) and same_state(again, unet)
    assert type(UNet2DConditionModel.from_pretrained(directory).dequantize()) is UNet2DConditionModel


def test_it_is_cast_like_any_module(saved):
    unet = copy.deepcopy(saved["rtn"][0])
    unet.to("cpu", torch.float16)
    assert {p.dtype for p in unet.parameters()} == {torch.float16} and next(unet.buffers()).dtype == torch.uint8
    assert same_state(unet, UNet2DConditionModel.from_pretrained(saved["rtn"][1], dtype=torch.float16))
    assert same_state(unet.to(dtype=torch.float32), saved["rtn"][0])  # scales are in 16 bit: nothing is lost


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"scheme": "rtn4", "groups": []},
        {"scheme": "rtn4", "decode": "never"},
        {"scheme": "rtn44"},
        {"scheme": "rtn4", "layer": "mid_block"},
    ],
)
def test_a_config_says_what_it_wants(arguments):
    with pytest.raises(UserError):
        VQDMConfig(**arguments)


def test_vqdm_offers_its_config():
    assert vqdm.VQDMConfig is VQDMConfig
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        vqdm.nothing  # noqa: B018


def test_attached_twice_it_is_attached_once(saved, tmp_path):
    unet = copy.deepcopy(saved["rtn"][0])
    attach(unet)
    unet.save_pretrained(tmp_path)
    assert same_state(unet, UNet2DConditionModel.from_pretrained(tmp_path))
