"""Numbers that are NaN, infinite or too large are refused where they enter, by the name of their tensor."""

import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from vqdm.calibration.recording import Recorder
from vqdm.config.options import ModelConfig, RescaleConfig, SamplerConfig
from vqdm.errors import UserError
from vqdm.hub.checkpoint import to_stored
from vqdm.models.finite import LARGEST_STORED, check_call, check_images, check_storable, fault_of, is_storable
from vqdm.models.loader import load_pipeline, sample
from vqdm.models.shipped import builtin_directory
from vqdm.models.specs import layer_specs

NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module")
def pipeline():
    return load_pipeline(ModelConfig(builtin="tiny"), device="cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
@pytest.mark.parametrize(("value", "word"), [(1.0, None), (NAN, "NaN"), (INF, "infinite"), (-INF, "infinite")])
def test_one_bad_number_among_many_is_found(dtype, value, word):
    if dtype == torch.float8_e4m3fn and word == "infinite":
        pytest.skip("this dtype has no infinity")
    tensor = torch.zeros(7, 5)
    tensor[3, 2] = value
    assert fault_of(tensor.to(dtype)) == word
    assert fault_of(torch.zeros(0)) is None and fault_of(torch.zeros(3, dtype=torch.int64)) is None


@pytest.mark.parametrize(
    ("part", "file", "name"),
    [
        ("unet", "diffusion_pytorch_model.safetensors", "conv_in.bias"),
        ("vae", "diffusion_pytorch_model.safetensors", "decoder.conv_in.bias"),
        ("text_encoder", "model.safetensors", "text_model.final_layer_norm.bias"),
        ("text_encoder_2", "model.safetensors", "text_model.final_layer_norm.bias"),
    ],
)
def test_a_model_with_one_nan_is_not_loaded(part, file, name, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(builtin_directory("tiny"), model)
    weights = load_file(model / part / file)
    name = name if name in weights else name.removeprefix("text_model.")
    weights[name][0] = NAN
    save_file(weights, model / part / file, {"format": "pt"})
    with pytest.raises(
        UserError, match=rf"the weight \S*{name.rpartition('.')[0]}\.bias of the {part} has NaN"
    ) as error:
        load_pipeline(ModelConfig(path=str(model)), device="cpu")
    assert str(model) in str(error.value) and "\n" not in str(error.value)


def test_a_weight_beyond_half_precision_names_the_dtype(tmp_path):
    model = tmp_path / "model"
    shutil.copytree(builtin_directory("tiny"), model)
    file = model / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["conv_in.bias"][0] = 1e5
    save_file(weights, file, {"format": "pt"})
    config = ModelConfig(path=str(model), dtype="float16")
    with pytest.raises(UserError, match=r"conv_in\.bias of the unet .* beyond 65504; give model\.dtype=bfloat16"):
        load_pipeline(config, device="cpu")


def test_a_rescaling_that_overflows_the_dtype_is_said():
    config = ModelConfig(builtin="tiny", dtype="float16", rescale=RescaleConfig(sigma=5))
    with pytest.raises(UserError, match=r"model\.rescale\.sigma=5 in float16: the weight .* of the unet has infinite"):
        load_pipeline(config, device="cpu")


def test_images_are_those_of_diffusers_and_nan_is_no_black_image(pipeline, monkeypatch):
    settings = {"sampler": SamplerConfig(steps=2)}
    ours = sample(pipeline, ["a red circle"], generators=[torch.Generator().manual_seed(1)], **settings)[0]
    theirs = pipeline(
        "a red circle", num_inference_steps=2, guidance_scale=3.0, generator=torch.Generator().manual_seed(1)
    ).images[0]
    assert isinstance(ours, Image.Image) and ours.tobytes() == theirs.tobytes()
    bias = pipeline.vae.decoder.conv_out.bias
    with torch.no_grad():
        kept = bias.clone()
        bias[0] = NAN
        try:
            with pytest.raises(UserError, match="the image of 'a red circle' has NaN numbers"):
                sample(pipeline, ["a red circle"], generators=[torch.Generator().manual_seed(1)], **settings)
        finally:
            bias.copy_(kept)


def test_only_the_caption_of_the_bad_image_is_named():
    images = torch.zeros(3, 2, 2)
    images[1, 0, 0] = INF
    with pytest.raises(UserError, match="the image of 'two' has infinite"):
        check_images(images, ["one", "two", "three"])


def test_a_recorded_call_is_finite_but_for_masks(pipeline):
    check_call({"attention_mask": torch.full((2, 2), -INF), "sample": torch.zeros(2)}, denoiser="UNet")
    with pytest.raises(UserError, match="the input sample of the UNet has NaN"):
        check_call({"sample": torch.tensor([NAN])}, denoiser="UNet")
    layer = torch.nn.Conv2d(4, 4, 1)
    layer.register_forward_hook(lambda module, args, output: (output,))
    with pytest.raises(UserError, match="the input input of the Conv2d has NaN numbers"), Recorder(layer, steps={0}):
        layer(torch.full((1, 4, 4, 4), NAN))


def test_weights_that_16_bit_cannot_hold_are_named_before_calibration(pipeline):
    unet = load_pipeline(ModelConfig(builtin="tiny"), device="cpu").unet
    specs = layer_specs(unet)
    check_storable(unet, specs)
    with torch.no_grad():
        unet.conv_in.bias[0] = 70_000.0
        with pytest.raises(UserError, match=r"conv_in\.bias .* beyond fp16's 65504: load the model in bfloat16"):
            check_storable(unet, specs)
        unet.to(torch.bfloat16)
        check_storable(unet, specs)
        unet.get_submodule(specs[0].name).weight.view(-1)[0] = 70_000.0
        with pytest.raises(UserError, match=r"leave .* out of the layers to quantize"):
            check_storable(unet, specs)
        unet.conv_in.bias[0] = NAN
        with pytest.raises(UserError, match=r"conv_in\.bias of the denoiser has NaN"):
            check_storable(unet, specs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_what_fp16_holds_is_storable(dtype):
    limit = torch.tensor([0.0, LARGEST_STORED, -LARGEST_STORED])
    beyond = limit.to(dtype).abs() > LARGEST_STORED  # bfloat16 rounds the limit up
    assert is_storable(limit.to(dtype)) == (not bool(beyond.any()))
    if dtype != torch.float16:
        assert not is_storable(torch.tensor([0.0, -70_000.0], dtype=dtype))
    assert is_storable(torch.ones(2).to(torch.float8_e4m3fn))
    assert is_storable(torch.empty(0, dtype=dtype)) and is_storable(torch.tensor([1 << 20]))


def test_nothing_that_is_not_finite_is_saved():
    with pytest.raises(UserError, match=r"norm\.bias has NaN numbers"):
        to_stored({"norm.weight": torch.ones(2), "norm.bias": torch.tensor([0.0, NAN])}, [])
    assert list(to_stored({"norm.weight": torch.ones(2)}, [])) == ["norm.weight"]
