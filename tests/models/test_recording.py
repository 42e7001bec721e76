import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import nn
from unets import small_unet

from vqdm.models.recording import OUTPUT, Recorder, evenly_spread, play_back

LIKE_SDXL = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 12 + 6 * 8,
}


@pytest.fixture(scope="module")
def unet():
    return small_unet(**LIKE_SDXL)


def inputs(seed):
    """As a pipeline calls SDXL's U-Net."""
    generator = torch.Generator().manual_seed(seed)
    text, added = torch.randn(2, 5, 32, generator=generator), torch.randn(2, 12, generator=generator)
    times = torch.tensor([[32.0, 32, 0, 0, 32, 32]] * 2)
    return {
        "sample": torch.randn(2, 4, 8, 8, generator=generator),
        "timestep": torch.tensor(900 - 100 * seed),
        "encoder_hidden_states": text,
        "timestep_cond": None,
        "cross_attention_kwargs": None,
        "added_cond_kwargs": {"text_embeds": added, "time_ids": times},
    }


@torch.no_grad()
def record(unet, steps, *, count=4):
    outputs = []
    with Recorder(unet, steps=steps) as recorder:
        for i in range(count):
            outputs.append(unet(**inputs(i), return_dict=False)[0].clone())
    return recorder.calls, outputs


def test_play_back_gives_the_recorded_outputs_to_the_bit(unet):
    calls, outputs = record(unet, {0, 1, 2, 3})
    assert len(calls) == 4
    for call, output in zip(calls, outputs, strict=True):
        assert torch.equal(call[OUTPUT], output)
        assert torch.equal(play_back(unet, call, device="cpu"), output)
    assert not torch.equal(outputs[0], outputs[1])


def test_only_the_steps_asked_for_are_kept(unet):
    calls, outputs = record(unet, {1, 3, 17})
    assert [int(call["timestep"]) for call in calls] == [800, 600]
    assert torch.equal(calls[1][OUTPUT], outputs[3])


def test_every_argument_is_there_and_survives_a_file(unet):
    (call,), (output, *_) = record(unet, {0})
    names = {"sample", "timestep", "encoder_hidden_states", OUTPUT}
    assert call.keys() == names | {"added_cond_kwargs.text_embeds", "added_cond_kwargs.time_ids"}
    assert torch.equal(play_back(unet, load(save(call)), device="cpu"), output)


def test_every_argument_matters_to_what_is_played_back(unet):
    (call,), (output, *_) = record(unet, {0})
    for name in call.keys() - {OUTPUT}:
        changed = call | {name: call[name] + 1}
        assert not torch.equal(play_back(unet, changed, device="cpu"), output), name


@torch.no_grad()
def test_an_output_object_and_positional_arguments_are_the_same_call():
    unet = small_unet()
    arguments = {name: inputs(0)[name] for name in ("sample", "timestep", "encoder_hidden_states")}
    with Recorder(unet, steps={0, 1}) as recorder:
        output = unet(**arguments).sample
        unet(*arguments.values(), return_dict=False)
    first, second = recorder.calls
    assert first.keys() == second.keys() == arguments.keys() | {OUTPUT}
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(play_back(unet, second, device="cpu"), output)


def test_names_are_those_of_the_denoiser_itself():
    class Transformer(nn.Module):
        def forward(self, hidden_states, scale, return_dict=True):
            return (hidden_states * scale,)

    denoiser = Transformer()
    with Recorder(denoiser, steps={0}) as recorder:
        denoiser(torch.ones(2), torch.tensor(3.0), return_dict=False)
    assert recorder.calls[0].keys() == {"hidden_states", "scale", OUTPUT}
    assert play_back(denoiser, recorder.calls[0], device="cpu").tolist() == [3.0, 3.0]


@torch.no_grad()
def test_a_sampler_that_works_in_place_does_not_change_the_record(unet):
    arguments = inputs(0)
    with Recorder(unet, steps={0}) as recorder:
        output = unet(**arguments, return_dict=False)[0]
    kept = output.clone()
    output.mul_(7)
    arguments["sample"].zero_()
    arguments["added_cond_kwargs"]["text_embeds"].zero_()
    assert torch.equal(recorder.calls[0][OUTPUT], kept)
    assert torch.equal(play_back(unet, recorder.calls[0], device="cpu"), kept)


@torch.no_grad()
def test_recording_ends_with_its_block_also_by_an_error(unet):
    recorder = Recorder(unet, steps={0, 1})
    with pytest.raises(KeyError), recorder:
        unet(**inputs(0))
        raise KeyError
    unet(**inputs(1))
    assert len(recorder.calls) == 1
    assert not unet._forward_hooks


@given(total=st.integers(0, 300), count=st.integers(0, 320))
def test_evenly_spread_positions(total, count):
    found = sorted(evenly_spread(total, count))
    assert len(found) == min(total, count)
    assert all(0 <= position < total for position in found)
    for i, position in enumerate(found):  # in the middle of part i: never in another one
        assert i * total <= (position + 1) * len(found)
        assert position * len(found) < (i + 1) * total
    gaps = {b - a for a, b in itertools.pairwise(found)}
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_evenly_spread_by_hand():
    assert evenly_spread(50, 4) == {6, 18, 31, 43}
    assert evenly_spread(4, 1) == {2}
    assert evenly_spread(3, 8) == {0, 1, 2}
