import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import nn
from unets import small_unet

from vqdm.calibration.recording import OUTPUT, PLAIN, Recorder, call_arguments, evenly_spread, play_back
from vqdm.errors import UserError

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


class Anything(nn.Module):
    """Takes what it is given; the last call's arguments are kept."""

    def forward(self, hidden_states, context, mask=None, scale=1.0, return_dict=True, **others):
        self.seen = {"hidden_states": hidden_states, "context": context, "mask": mask, "scale": scale, **others}
        return (hidden_states * 2,)


def played(*args, **kwargs):
    """What a call's play back from a file hands to the denoiser, beside what the call itself did; and the call."""
    denoiser = Anything()
    with Recorder(denoiser, steps={0}) as recorder:
        denoiser(*args, **kwargs)
    first, (call,) = denoiser.seen, recorder.calls
    output = play_back(denoiser, load(save(call)), device="cpu")
    assert torch.equal(output, call[OUTPUT])
    return first, denoiser.seen, call


def same(one, other):
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


@pytest.mark.parametrize(
    "argument",
    [
        True,
        3,
        0.1,
        "text",
        {},
        [],
        (1, None, "two"),
        [torch.ones(2), torch.zeros(3, dtype=torch.int64)],
        (torch.ones(1),),
        {"resolution": None, "aspect_ratio": None},
        {"text_embeds": torch.ones(2, 3), "strength": 0.5, "parts": [{"of": torch.zeros(1)}, None]},
        {"tensors": {"alone": torch.arange(3)}},
    ],
)
def test_every_kind_of_argument_comes_back_as_it_was(argument):
    first, again, _ = played(torch.randn(2, 3), context=argument, extra=argument, return_dict=False)
    assert same(first, again)


def test_none_counts_where_it_is_not_the_default():
    first, again, call = played(torch.randn(2), None, mask=None, scale=None)
    assert same(first, again) and again["context"] is None and again["scale"] is None
    assert call.keys() == {"hidden_states", PLAIN, OUTPUT}
    assert call_arguments(call, device="cpu").keys() == {"hidden_states", "context", "scale"}


def test_what_is_tensors_alone_needs_no_description():
    _, _, call = played(torch.randn(2), {"of": torch.ones(1)}, mask=None, return_dict=True)
    assert call.keys() == {"hidden_states", "context.of", OUTPUT}


@pytest.mark.parametrize("argument", [print, {1: torch.ones(1)}, {"a.b": 1}, [torch.float32], {"deep": [object()]}])
def test_an_argument_that_cannot_be_kept_is_named(argument):
    with pytest.raises(UserError, match=r"Anything is called with context\S* of type \w+, which cannot be recorded"):
        played(torch.randn(2), argument)


@pytest.mark.parametrize("name", [OUTPUT, PLAIN])
def test_names_that_a_call_uses_itself_are_refused(name):
    with pytest.raises(UserError, match=f"takes an argument '{name}'"):
        played(torch.randn(2), None, **{name: torch.ones(1)})


def test_a_stretched_tensor_is_stored_as_what_it_shows():
    first, again, _ = played(torch.randn(2, 3).T, torch.ones(1).expand(4))
    assert same(first, again)


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
