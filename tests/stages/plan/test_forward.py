"""The cost of a forward from shapes alone, against closed forms and against the same module computing on the CPU."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from unets import SMALL, sdxl_unet, small_unet

from vqdm.models.live_bytes import LiveBytes
from vqdm.models.specs import layer_specs
from vqdm.stages.plan.forward import (
    denoiser_inputs,
    inputs_of,
    latent_size,
    measure,
    measure_decoder,
    measure_denoiser,
)


def on_meta(**changes):
    return small_unet(**changes).to("meta")


def cost_of(unet, batch):
    arguments = denoiser_inputs(unet, batch=batch)
    return measure(lambda: unet(**arguments, return_dict=False))


def test_flops_of_a_linear_and_a_convolution_by_hand():
    module = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Flatten(2), nn.Linear(36, 5)).to("meta")
    image = torch.empty(2, 3, 6, 6, device="meta")
    cost = measure(lambda: module(image))
    assert cost.convolution_flops == 2 * 9 * 3 * 8 * 36 * 2
    assert cost.matmul_flops == 2 * 2 * 8 * 36 * 5
    assert cost.attention_flops == 0
    assert cost.peak_bytes == 4 * (2 * 8 * 36 + 2 * 8 * 5)


def test_products_in_place_count():
    total, rows = torch.empty(7, 7, device="meta"), torch.empty(11, 7, device="meta")
    assert measure(lambda: total.addmm_(rows.T, rows)).flops == 2 * 11 * 7 * 7


def test_attention_counts_as_one_kernel():
    query = torch.empty(2, 3, 50, 16, dtype=torch.float16, device="meta")
    text = torch.empty(2, 3, 7, 16, dtype=torch.float16, device="meta")
    cost = measure(lambda: F.scaled_dot_product_attention(query, text, value=text))
    assert cost.attention_flops == 4 * 2 * 3 * 50 * 7 * 16
    assert cost.peak_bytes == 2 * query.numel()  # its output, no scores


def test_live_bytes_follow_storages_not_views():
    given = torch.ones(1000)
    with LiveBytes() as live:
        own = given + 1
        view = own.view(10, 100)[2:]
        given.add_(1)
        assert live.live == 4000
        del own
        assert live.live == 4000  # the view holds it
        del view
        assert live.live == 0
    assert live.peak == 4000
    assert live.written == 8000  # the sum, and what was added in place


def test_meta_measures_what_the_cpu_does():
    assert cost_of(on_meta(), 2) == cost_of(small_unet(), 2)


def test_costs_are_linear_in_the_batch():
    one, three = cost_of(on_meta(), 1), cost_of(on_meta(), 3)
    assert dataclasses.astuple(three) == pytest.approx(dataclasses.astuple(one.times(3)), rel=0.01)


def test_layers_that_read_one_tensor_have_its_number():
    unet = on_meta()
    specs = layer_specs(unet)
    with inputs_of(unet, specs) as inputs:
        cost_of(unet, 2)
    assert inputs.keys() == {spec.name for spec in specs}
    first = "down_blocks.1.attentions.0.transformer_blocks.0"
    numbers = [inputs[f"{first}.attn1.to_{name}"].tensor for name in "qkv"]
    assert len(set(numbers)) == 1
    text = {inputs[name].tensor for name in inputs if ".attn2.to_k" in name or ".attn2.to_v" in name}
    assert len(text) == 1 and text.isdisjoint(numbers)  # all blocks read the same text
    assert inputs[f"{first}.attn1.to_q"].shape == (2, 16, SMALL["block_out_channels"][1])


def test_sdxl_without_weights():
    unet = sdxl_unet().half()
    cost = measure_denoiser(unet, layer_specs(unet))
    assert len(cost.inputs) == 771
    assert cost.sample.flops == pytest.approx(6.76e12, rel=0.01)
    attention = cost.sample.attention_flops  # 4 tokens² · width: 10 blocks of 64² tokens, 60 of 32², and 77 of text
    assert attention == 4 * (10 * 4096 * (4096 + 77) * 640 + 60 * 1024 * (1024 + 77) * 1280)
    assert cost.sample.peak_bytes < 200e6


@pytest.mark.parametrize("kind", ["PixArtTransformer2DModel", "SD3Transformer2DModel", "FluxTransformer2DModel"])
def test_transformers(kind):
    import diffusers

    options = {
        "PixArtTransformer2DModel": {"num_layers": 1, "caption_channels": 64, "use_additional_conditions": False},
        "SD3Transformer2DModel": {"num_layers": 1},
        "FluxTransformer2DModel": {"num_layers": 1, "num_single_layers": 1, "guidance_embeds": True},
    }[kind]
    with torch.device("meta"):
        model = getattr(diffusers, kind)(**options)
    cost = measure_denoiser(model, layer_specs(model, pattern="to_q$"), size=1024)
    assert cost.sample.flops > 0
    queries = next(read for name, read in cost.inputs.items() if name.startswith("transformer_blocks.0"))
    assert queries.shape[:2] == (2, 4096)  # patches of 2 × 2 latents


def test_a_denoiser_that_is_not_known_has_no_cost():
    unet = on_meta(addition_embed_type=None)
    unet.register_to_config(addition_embed_type="image")
    assert measure_denoiser(unet, []) is None


def test_decoder_and_its_latents():
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        vae = AutoencoderKL(
            block_out_channels=(16, 16),
            norm_num_groups=4,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
        )
    half, full = (measure_decoder(vae, (8, 8), dtype=dtype) for dtype in (torch.float16, torch.float32))
    assert full.flops == half.flops > 0
    assert full.peak_bytes == pytest.approx(2 * half.peak_bytes, rel=0.02)
    assert latent_size(on_meta(), None) == (8, 8) and latent_size(on_meta(), 512) == (64, 64)
