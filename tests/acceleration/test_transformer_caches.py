"""Transformers: PixArt and SD3 are refused by name; FLUX goes with diffusers' own caches, whose state is reset."""

import pytest
import torch
from denoisers import SIZE, tiny_flux, tiny_pixart, tiny_sd3
from diffusers import DiffusionPipeline, FirstBlockCacheConfig, TaylorSeerCacheConfig

import vqdm
from vqdm.acceleration.operators import operators
from vqdm.errors import UserError


def loaded(directory):
    pipeline = DiffusionPipeline.from_pretrained(directory)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize(("make", "name"), [(tiny_pixart, "PixArtTransformer2DModel"), (tiny_sd3, "SD3Trans")])
def test_pixart_and_sd3_are_refused_by_name(make, name, tmp_path):
    pipeline = loaded(make(tmp_path / "model"))
    with pytest.raises(UserError, match=f"for U-Nets .*{name}"):
        vqdm.enable_cache(pipeline, steps=20)
    with pytest.raises(UserError, match=name):
        operators(pipeline.transformer)


@pytest.mark.parametrize(
    "config", [FirstBlockCacheConfig(threshold=0.3), TaylorSeerCacheConfig(cache_interval=3)], ids=["first", "taylor"]
)
def test_two_images_in_a_row_of_flux_are_those_of_fresh_pipelines(config, tmp_path):
    directory, ran = tiny_flux(tmp_path / "flux"), []

    def image(pipeline, seed):
        draw = torch.Generator().manual_seed(seed)
        sizes = {"height": SIZE, "width": SIZE, "max_sequence_length": 24}
        return pipeline("a circle", num_inference_steps=9, generator=draw, output_type="latent", **sizes).images

    def cached():
        pipeline = loaded(directory)
        with pytest.raises(UserError, match="diffusers' own caches"):
            vqdm.enable_cache(pipeline)
        pipeline.transformer.enable_cache(config)
        return pipeline

    pipeline = cached()
    block = pipeline.transformer.single_transformer_blocks[0].attn.to_q
    block.register_forward_hook(lambda *_: ran.append(1))
    row = [image(pipeline, seed) for seed in (0, 1)]
    assert len(ran) < 18  # of 9 calls each
    assert torch.equal(row[0], image(cached(), 0)) and torch.equal(row[1], image(cached(), 1))
