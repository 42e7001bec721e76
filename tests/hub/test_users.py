"""What users of diffusers do with a quantized model: it works, or one line says what does."""

import copy
import json
from pathlib import Path

import pytest
import torch
from diffusers import ControlNetModel, DiffusionPipeline, PipelineQuantizationConfig, UNet2DConditionModel
from diffusers.hooks import apply_layerwise_casting
from peft import LoraConfig
from quantized import quantized_unet
from to_single_file import write_single_file
from unets import output

import vqdm
from vqdm.errors import UserError
from vqdm.weights.layers import quantized_layers

TINY = Path(vqdm.__file__).parent / "models" / "tiny"


@pytest.fixture(scope="module")
def unet():
    made = DiffusionPipeline.from_pretrained(
        TINY, torch_dtype=torch.float32, quantization_config=PipelineQuantizationConfig(
            quant_backend="vqdm", quant_kwargs={"scheme": "rtn4"}, components_to_quantize=["unet"]
        ),
    )  # fmt: skip
    return made.unet


def test_a_pipelines_quant_backend_is_vqdm(unet):
    assert len(quantized_layers(unet)) == 118


def test_text_encoders_are_not_quantized():
    asked = PipelineQuantizationConfig(
        quant_backend="vqdm", quant_kwargs={"scheme": "rtn4"}, components_to_quantize=["text_encoder"]
    )
    with pytest.raises(UserError, match=r"denoisers, not text encoders: .*components_to_quantize"):
        DiffusionPipeline.from_pretrained(TINY, torch_dtype=torch.float32, quantization_config=asked)


def test_a_single_file_is_quantized_as_the_directory_is(unet, tmp_path):
    file = tmp_path / "tiny.safetensors"
    write_single_file(TINY, file, dtype=torch.float32)
    options = {"config": str(TINY), "subfolder": "unet", "torch_dtype": torch.float32}
    made = UNet2DConditionModel.from_single_file(str(file), quantization_config=vqdm.VQDMConfig("rtn4"), **options)
    ours, theirs = made.state_dict(), unet.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    saved = vqdm.VQDMConfig(groups=unet.config.quantization_config.groups)
    with pytest.raises(UserError, match="loaded by from_pretrained"):
        UNet2DConditionModel.from_single_file(str(file), quantization_config=saved, **options)


def test_a_control_net_is_made_from_decoded_weights_only(unet):
    with pytest.raises(UserError, match=r"from_unet copies weights as they are.*dequantize\(\)"):
        ControlNetModel.from_unet(unet)
    plain = copy.deepcopy(unet).dequantize()
    net = ControlNetModel.from_unet(plain)
    name = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    assert torch.equal(net.get_submodule(name).weight, plain.get_submodule(name).weight)
    assert quantized_layers(unet)


def test_a_plain_model_that_was_saved_with_a_quantized_ones_config_loads_as_plain(unet, tmp_path):
    fresh = UNet2DConditionModel.from_config(unet.config)
    for place in (tmp_path / "one", tmp_path / "two"):  # what was loaded so is saved as what it is
        fresh.save_pretrained(place)
        again = UNet2DConditionModel.from_pretrained(place)
        assert not quantized_layers(again) and "quantization_config" not in again.config
        assert all(
            torch.equal(a, b) for a, b in zip(fresh.state_dict().values(), again.state_dict().values(), strict=True)
        )
        fresh = again
    assert "quantization_config" not in json.loads((tmp_path / "two" / "config.json").read_text())


@pytest.mark.parametrize("cast", ["function", "method", "to"])
def test_eight_bits_are_refused_before_scales_are_rounded(cast):
    model = quantized_unet("rtn")
    scales = {name: layer.weight.scales.clone() for name, layer in quantized_layers(model).items()}
    with pytest.raises(UserError, match="would round the scales"):
        if cast == "function":
            apply_layerwise_casting(model, torch.float8_e4m3fn, torch.float32)
        elif cast == "method":
            model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
        else:
            model.to(torch.float8_e4m3fn)
    assert all(torch.equal(layer.weight.scales, scales[name]) for name, layer in quantized_layers(model).items())


def test_dora_is_named():
    model = quantized_unet("rtn")
    with pytest.raises(UserError, match="DoRA needs the weights themselves"):
        model.add_adapter(LoraConfig(r=4, target_modules=["to_q"], use_dora=True))


def test_captions_in_another_dtype_than_the_model_are_said(unet):
    pipeline = DiffusionPipeline.from_pretrained(TINY, unet=unet, torch_dtype=torch.float32)
    pipeline.text_encoder.half()
    pipeline.text_encoder_2.half()
    with pytest.raises(UserError, match=r"captions come in torch\.float16 and the UNet2DConditionModel computes in"):
        pipeline("a red circle", num_inference_steps=1)
    with torch.autocast("cpu", torch.bfloat16):
        assert output(quantized_unet("rtn")).isfinite().all()
