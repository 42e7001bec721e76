"""Text encoders learn to say at the last word of a thing all that is said of it."""

from collections import Counter

import pytest
import torch
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from vqdm.seeds import seeded_initialisation
from vqdm.stages.tiny_train.text import ContrastivePair, token_ids
from vqdm.stages.tiny_train.words import SaidThings, teach_words
from vqdm.tiny.captions import caption_of, requested, said_things
from vqdm.tiny.scenes import draw_scenes
from vqdm.tiny.small import SMALL
from vqdm.tiny.tokenizer import build_tokenizer


@pytest.fixture(scope="module")
def captions():
    scenes = draw_scenes(3, "train", range(256), world=SMALL)
    return [caption_of(s, seed=3, split="train", index=i, world=SMALL) for i, s in enumerate(scenes)]


def test_a_thing_ends_with_its_shape_and_things_are_those_that_the_caption_asks_for(captions):
    for caption in captions:
        said = said_things(caption, world=SMALL)
        assert [caption.split()[place] for place, _ in said] == [thing.shape for _, thing in said]
        assert Counter(thing for _, thing in said) == Counter(requested(caption, world=SMALL).things)


def test_what_is_no_caption_of_the_world_is_named():
    with pytest.raises(ValueError, match="no caption of the world small: 'a red bicycle'"):
        said_things("a red bicycle", world=SMALL)


def test_tokens_of_things_are_their_shapes_and_classes_tell_what_is_said():
    captions = ["a banded red ring", "a tiny blue star above a green ring"]
    tokenizer = build_tokenizer(SMALL)
    row, token, classes = SaidThings(captions, SMALL).of(torch.tensor([1, 0, 1]))
    ids = token_ids(tokenizer, captions)[torch.tensor([1, 0, 1])]
    words = tokenizer.convert_ids_to_tokens(ids[row, token].tolist())
    assert [word.removesuffix("</w>") for word in words] == ["star", "ring", "ring", "star", "ring"]
    assert row.tolist() == [0, 0, 1, 2, 2]
    assert classes["texture"].tolist() == [0, 0, 1 + SMALL.textures.index("banded"), 0, 0]
    assert (classes["size"] > 0).tolist() == [True, False, False, True, False]
    assert classes["shape"].tolist() == [SMALL.shapes.index(word.removesuffix("</w>")) for word in words]


def shares(encoder, ids, place, wanted):
    """Share of what differs between states [things, width] that lies between the classes `wanted`."""
    states = encoder(ids, output_hidden_states=True).hidden_states[-2][place]
    means = torch.stack([states[wanted == one].mean(0) for one in wanted])
    return float((means - states.mean(0)).square().sum() / (states - states.mean(0)).square().sum())


def test_textures_become_visible_where_a_thing_ends_and_the_rest_stays(captions, tmp_path):
    tokenizer = build_tokenizer(SMALL)
    with seeded_initialisation(0, "test_words"):
        pair = ContrastivePair(tokenizer, SMALL)
    one, two = pair.text_encoder.eval(), pair.text_encoder_2.eval()
    assert (type(one), type(two)) == (CLIPTextModel, CLIPTextModelWithProjection)
    ids, said = token_ids(tokenizer, captions), SaidThings(captions, SMALL)
    row, token, classes = said.of(torch.arange(len(captions)))
    with torch.no_grad():
        before = [shares(encoder, ids, (row, token), classes["texture"]) for encoder in (one, two)]
        pooled = two(ids).text_embeds
    options = {"world": SMALL, "directory": tmp_path, "steps": 140, "batch_size": 16, "seed": 0}
    teach_words(tokenizer, one, two, captions, **options)
    with torch.no_grad():
        after = [shares(encoder, ids, (row, token), classes["texture"]) for encoder in (one, two)]
        moved = (two(ids).text_embeds - pooled).square().sum() / (pooled - pooled.mean(0)).square().sum()
    assert all(new > 1.5 * old for new, old in zip(after, before, strict=True)), (before, after)
    assert moved < 0.5
    assert not any(parameter.requires_grad for encoder in (one, two) for parameter in encoder.parameters())
