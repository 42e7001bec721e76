"""Pipelines in memory that compress cannot take as they are: unwrapped, or refused in one line before any work."""

import pytest
import torch
from accelerate import cpu_offload
from diffusers import DiffusionPipeline

import vqdm
from vqdm.errors import UserError
from vqdm.models.shipped import builtin_directory
from vqdm.weights.layers import quantized_layers

CAPTIONS = ["a red circle", "a blue square"]
QUICK = {"steps": 2, "recorded_steps": 1, "batch_size": 2, "layers": "mid_block.*to_q$"}


def tiny():
    pipeline = DiffusionPipeline.from_pretrained(builtin_directory("tiny"), dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_a_compiled_denoiser_is_taken_out_of_its_wrapper():
    plain, compiled = tiny(), tiny()
    compiled.unet = torch.compile(compiled.unet, backend="eager")
    for pipeline in (plain, compiled):
        vqdm.compress(pipeline, "rtn4", CAPTIONS, **QUICK)
    assert quantized_layers(compiled.unet)
    ours, theirs = compiled.unet.state_dict(), plain.unet.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_one_that_is_compiled_in_place_is_refused():
    pipeline = tiny()
    pipeline.unet.compile(backend="eager")
    with pytest.raises(UserError, match="compiled in place"):
        vqdm.compress(pipeline, "rtn4", CAPTIONS, **QUICK)


def test_offloaded_weights_are_named():
    pipeline = tiny()
    cpu_offload(pipeline.unet, execution_device="cpu")  # as enable_sequential_cpu_offload does it, without a GPU
    with pytest.raises(UserError, match=r"weight .* of the pipeline's unet is on the meta device: .*offload"):
        vqdm.compress(pipeline, "rtn4", CAPTIONS, **QUICK)


def test_a_nan_is_named_before_any_work():
    pipeline = tiny()
    with torch.no_grad():
        pipeline.text_encoder_2.text_projection.weight[0, 0] = float("nan")
    with pytest.raises(UserError, match=r"weight text_projection\.weight of the text_encoder_2 has NaN numbers"):
        vqdm.compress(pipeline, "rtn4", CAPTIONS, **QUICK)


def test_text_encoders_in_half_beside_a_float_denoiser_are_said():
    pipeline = tiny()
    pipeline.text_encoder.half()
    pipeline.text_encoder_2.half()
    with pytest.raises(UserError, match="text encoders"):
        vqdm.compress(pipeline, "rtn4", CAPTIONS, **QUICK)
    assert not quantized_layers(pipeline.unet)
