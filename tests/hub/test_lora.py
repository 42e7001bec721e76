"""LoRA adapters beside quantized weights: loaded, scaled, unloaded, trained; never merged."""

import copy
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionXLPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from quantized import KINDS, quantized_unet
from torch import nn
from unets import output, small_unet

import vqdm
from vqdm.codecs import rtn
from vqdm.errors import UserError
from vqdm.hub.quantizer import attach
from vqdm.models.specs import layer_specs, spec_of, weight_to_matrix
from vqdm.seeds import seeded_initialisation, torch_generator
from vqdm.weights.layers import quantized_layers, swap

TINY = Path(vqdm.__file__).parent / "models" / "tiny"
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "mid_block.resnets.0.conv1"]
LORA = LoraConfig(r=4, lora_alpha=8, init_lora_weights="gaussian", target_modules=TARGETS)
TEXT_WIDTH, POOLED_WIDTH, IDS = 192, 128, 6  # of the tiny U-Net


def tiny_pipeline(unet=None):
    pipeline = DiffusionPipeline.from_pretrained(TINY, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    if unet is not None:
        pipeline.register_modules(unet=unet)
    return pipeline


def latents(pipeline, **options):
    return pipeline(
        "a large red circle", num_inference_steps=2, guidance_scale=3.0, output_type="latent",
        generator=torch_generator(0, "image"), **options,
    ).images  # fmt: skip


def add_lora(unet, config=LORA):
    with seeded_initialisation(0, "lora"):
        unet.add_adapter(config)
    return [parameter for name, parameter in unet.named_parameters() if "lora_" in name]


def train(unet, adapters, *, steps):
    """Adam towards a noise prediction of 1 everywhere; the loss of every step."""
    optimizer = torch.optim.Adam(adapters, lr=5e-3)
    generator, losses = torch_generator(0, "train"), []
    batch = torch.randn(2, 4, 8, 8, generator=generator)
    text, pooled = (torch.randn(2, *shape, generator=generator) for shape in ((5, TEXT_WIDTH), (POOLED_WIDTH,)))
    conditions = {"text_embeds": pooled, "time_ids": torch.ones(2, IDS)}
    for _ in range(steps):
        found = unet(batch, torch.tensor([3, 700]), text, added_cond_kwargs=conditions).sample
        loss = (found - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    """The directory of a LoRA that was trained on the full-precision U-Net."""
    unet, directory = tiny_pipeline().unet.requires_grad_(False), tmp_path_factory.mktemp("lora")
    losses = train(unet, add_lora(unet), steps=10)
    assert losses[-1] < 0.7 * losses[0]
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    StableDiffusionXLPipeline.save_lora_weights(directory, unet_lora_layers=layers)
    return directory


@pytest.fixture(scope="module")
def quantized_tiny():
    """The tiny U-Net at 4 bits; copy it to change it."""
    unet = tiny_pipeline().unet.requires_grad_(False)
    for spec in layer_specs(unet):
        swap(unet, spec, rtn.encode(weight_to_matrix(unet.get_submodule(spec.name).weight), bits=4).float())
    attach(unet)
    return unet.requires_grad_(False)


@pytest.fixture
def pipeline(quantized_tiny):
    return tiny_pipeline(copy.deepcopy(quantized_tiny))


def base_state(unet):
    """The state dict without the LoRA and its prefixes."""
    state = unet.state_dict()
    return {name.replace(".base_layer", ""): t.clone() for name, t in state.items() if "lora_" not in name}


def same(one, other) -> bool:
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


def test_a_lora_of_the_original_goes_on_the_compressed_model(pipeline, lora):
    state, plain = base_state(pipeline.unet), tiny_pipeline(copy.deepcopy(pipeline.unet).dequantize())
    layers = {name: id(layer) for name, layer in quantized_layers(pipeline.unet).items()}
    without = latents(pipeline)
    for each in (pipeline, plain):
        each.load_lora_weights(lora, adapter_name="style")
    adapted = latents(pipeline)
    assert any(name.endswith("conv1.base_layer") for name in quantized_layers(pipeline.unet))
    assert torch.allclose(adapted, latents(plain), atol=1e-5)
    assert not torch.allclose(adapted, without, atol=0.1)

    for each in (pipeline, plain):
        each.set_adapters("style", 0.5)
    half = latents(pipeline)
    assert torch.allclose(half, latents(plain), atol=1e-5)
    assert not torch.allclose(half, adapted, atol=0.1) and not torch.allclose(half, without, atol=0.1)
    pipeline.set_adapters("style", 1.0)
    assert torch.allclose(latents(pipeline, cross_attention_kwargs={"scale": 0.5}), half, atol=1e-5)
    assert torch.equal(latents(pipeline), adapted)
    assert same(base_state(pipeline.unet), state)

    pipeline.unload_lora_weights()
    assert torch.equal(latents(pipeline), without)
    assert same(pipeline.unet.state_dict(), state)
    assert {name: id(layer) for name, layer in quantized_layers(pipeline.unet).items()} == layers


@pytest.mark.parametrize("options", [{}, {"safe_fusing": True}, {"lora_scale": 0.5}, {"adapter_names": ["style"]}])
def test_fusing_is_refused_and_changes_nothing(pipeline, lora, options):
    without = latents(pipeline)
    pipeline.load_lora_weights(lora, adapter_name="style")
    adapted = latents(pipeline)
    with pytest.raises(UserError, match=r"keep the LoRA loaded, or dequantize\(\) the model") as caught:
        pipeline.fuse_lora(**options)
    assert "\n" not in str(caught.value)
    assert torch.equal(latents(pipeline), adapted)
    pipeline.unload_lora_weights()
    assert torch.equal(latents(pipeline), without)


def test_dequantized_it_can_be_fused(pipeline, lora):
    pipeline.load_lora_weights(lora)
    adapted = latents(pipeline)
    pipeline.unet.dequantize()
    assert torch.allclose(latents(pipeline), adapted, atol=1e-5)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    assert torch.allclose(latents(pipeline), adapted, atol=1e-3)
    assert list(pipeline.unet.state_dict()) == list(tiny_pipeline().unet.state_dict())


def test_a_lora_of_other_layers_can_be_fused():
    unet = quantized_unet("rtn")
    assert "conv_in" not in quantized_layers(unet)
    adapters = add_lora(unet, LoraConfig(r=2, init_lora_weights=False, target_modules=["conv_in"]))
    adapted = output(unet)
    unet.fuse_lora()
    assert adapters and torch.allclose(output(unet), adapted, atol=1e-4)


def test_with_a_lora_it_is_not_saved(pipeline, lora, tmp_path):
    pipeline.load_lora_weights(lora)
    with pytest.raises(UserError, match="carries a LoRA: unload it, then save"):
        pipeline.unet.save_pretrained(tmp_path)
    pipeline.unload_lora_weights()
    pipeline.unet.save_pretrained(tmp_path)
    assert same(type(pipeline.unet).from_pretrained(tmp_path).state_dict(), pipeline.unet.state_dict())


def test_a_lora_is_trained_on_the_compressed_model(quantized_tiny):
    unet = copy.deepcopy(quantized_tiny)
    state, adapters = base_state(unet), add_lora(unet)
    losses = train(unet, adapters, steps=10)
    assert losses[-1] < 0.7 * losses[0]
    assert all(float(parameter.grad.abs().sum()) > 0 for parameter in adapters)
    trained = {name for name, parameter in unet.named_parameters() if parameter.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    assert same(base_state(unet), state)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_weight_takes_a_lora(kind):
    unet = quantized_unet(kind)
    without, layers = output(unet), len(quantized_layers(unet))
    add_lora(unet, LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "conv1", "conv2", "ff.net.2"]))
    plain = copy.deepcopy(unet).dequantize()
    assert not quantized_layers(plain)
    assert torch.allclose(output(unet), output(plain), atol=1e-5)
    assert not torch.allclose(output(unet), without, atol=1e-2)
    unet.unload_lora()
    assert torch.equal(output(unet), without) and len(quantized_layers(unet)) == layers


@pytest.mark.parametrize("target", ["0", "1"])
@pytest.mark.parametrize("safe", [False, True])
def test_peft_alone_cannot_merge_either(target, safe):
    model = nn.Sequential(nn.Conv2d(16, 16, 3), nn.Linear(2, 16)).requires_grad_(False)
    for name in ("0", "1"):
        layer = model.get_submodule(name)
        swap(model, spec_of(name, layer), rtn.encode(weight_to_matrix(layer.weight), bits=4).float())
    inputs = torch.randn(1, 16, 4, 4, generator=torch_generator(0, "inputs"))
    adapted = get_peft_model(model, LoraConfig(target_modules=[target], init_lora_weights=False))
    expected = adapted(inputs)
    with pytest.raises(UserError, match="quantized weights merge neither with a LoRA"):
        adapted.merge_adapter(safe_merge=safe)
    assert torch.equal(adapted(inputs), expected)


def test_projections_are_not_fused_either():
    unet = quantized_unet("rtn")
    expected = output(unet)
    with pytest.raises(UserError, match="nor with each other"):
        unet.fuse_qkv_projections()
    assert torch.equal(output(unet), expected)


def test_the_target_names_are_those_of_the_original():
    """Adapters of a quantized model have the names and shapes of the full-precision one's."""
    config = LoraConfig(r=2, target_modules=["to_q", "conv1"])
    quantized, plain = quantized_unet("rtn"), small_unet()
    for unet in (quantized, plain):
        add_lora(unet, config)
    shapes = [{n: t.shape for n, t in get_peft_model_state_dict(unet).items()} for unet in (quantized, plain)]
    assert shapes[0] == shapes[1]
