"""The world small, and that tiny's scenes and captions are the bytes they were before there was another world."""

import dataclasses
import hashlib
import itertools

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0

from vqdm.prompts import load_prompts
from vqdm.stages.tiny_train.unet import TELLING_TIMESTEPS, build_unet, conditions, draw_timesteps
from vqdm.tiny.attributes import AttributeNet, as_seen, fidelity, kinds_of, labels, seen_by, targets_of, values_of
from vqdm.tiny.captions import caption_of, requested, vocabulary
from vqdm.tiny.data import SceneSet, scene_pixels
from vqdm.tiny.scenes import SPLITS, TINY, draw_scene, draw_scenes, render
from vqdm.tiny.small import SMALL
from vqdm.tiny.tokenizer import build_tokenizer
from vqdm.tiny.world import OPEN
from vqdm.tiny.worlds import WORLDS, world_of

COUNTS = {"train": 1500, "validation": 300, "test": 300, "reference": 300, "unseen_pairs": 400}
MARGINS = {"circle": 1.0, "square": 0.86, "triangle": 0.96, "diamond": 1.15, "cross": 1.0, "ring": 1.02}


@pytest.fixture(scope="module")
def drawn():
    return {split: draw_scenes(7, split, range(count), world=SMALL) for split, count in COUNTS.items()}


@pytest.fixture(scope="module")
def captions(drawn):
    """(scene, caption), the caption drawn as in training."""
    return [
        (scene, caption_of(scene, seed=7, split=split, index=i, world=SMALL))
        for split, scenes in drawn.items()
        for i, scene in enumerate(scenes)
    ]


def test_tiny_is_what_it_was_byte_for_byte():
    """Made by the code before worlds were arguments."""
    digest = hashlib.sha256()
    for split, count in (("train", 60), ("test", 30), ("unseen_pairs", 30)):
        scenes = draw_scenes(0, split, range(count))
        digest.update(render(scenes).tobytes())
        digest.update("\n".join(caption_of(s, seed=0, split=split, index=i) for i, s in enumerate(scenes)).encode())
        digest.update("\n".join(scene.key for scene in scenes).encode())
    digest.update("\n".join(vocabulary()).encode())
    assert digest.hexdigest() == "32518ebf8e064f9e5fd426c5170eeb1ccbcc6c47c40a5389c3807d9f46a56b4f"


def test_a_word_of_a_relation_tells_one_layout_and_one_order():
    for world in WORLDS.values():
        told = {}
        for layout, templates in world.relations.items():
            for template in templates:
                words = template.split()
                order = tuple(int(word[1]) for word in words if "{" in word)
                assert sorted(order) == list(range(len(order)))
                assert [w for w in words if "{" not in w and w not in OPEN], template
                for word in words:
                    if "{" not in word and word not in OPEN:
                        assert told.setdefault((word, len(order)), (layout, order)) == (layout, order), template
        assert world.readings == told
        assert set(world.relations) == set(world.layouts) - {"single"}


def test_no_word_of_small_means_two_things():
    groups = [SMALL.size_words, SMALL.texture_words, SMALL.pattern_words]
    words = [word for group in groups for words in group.values() for word in words]
    words += [*SMALL.shapes, *SMALL.colours, *SMALL.backgrounds, *SMALL.relation_words]
    assert len(words) == len(set(words))


def test_splits_share_no_scene_and_only_one_split_has_what_is_held_out(drawn):
    assert set(drawn) == set(SPLITS)
    keys = {split: {scene.key for scene in scenes} for split, scenes in drawn.items()}
    for one, other in itertools.combinations(keys, 2):
        assert not keys[one] & keys[other], (one, other)
    for split, scenes in drawn.items():
        held_out = {
            any((t.shape, t.colour) in SMALL.unseen or (t.texture, t.shape) in SMALL.unseen for t in scene.things)
            for scene in scenes
        }
        assert held_out == {split == "unseen_pairs"}


def test_every_attribute_and_layout_occurs(drawn):
    things = [thing for scene in drawn["train"] for thing in scene.things]
    for kind, values in SMALL.thing_kinds.items():
        assert {getattr(thing, kind) for thing in things} == set(values)
    for name, values in (("layout", SMALL.layouts), ("background", SMALL.backgrounds), ("pattern", SMALL.patterns)):
        assert {getattr(scene, name) for scene in drawn["train"]} == set(values)
    assert {len(scene.things) for scene in drawn["train"]} == {1, 2, 3}
    shown = {pair for thing in things for pair in thing.pairs}
    assert not shown & SMALL.unseen
    assert len({pair for pair in shown if pair[0] in SMALL.shapes}) == 8 * 8 - 8


def test_layout_is_where_the_things_are(drawn):
    for scene in itertools.chain(*drawn.values()):
        places = np.array([(thing.x, thing.y) for thing in scene.things])
        if scene.layout in ("left", "row"):
            assert np.all(np.diff(places[:, 0]) > 18)
        elif scene.layout in ("above", "column"):
            assert np.all(np.diff(places[:, 1]) > 18)
        elif scene.layout == "roof":
            assert places[0, 1] < places[1:, 1].min() - 20
            assert places[1, 0] < places[2, 0] - 20
        elif scene.layout == "around":
            assert np.abs(places[0] - places[1]).max() <= 1
            assert [thing.size for thing in scene.things] == ["large", "small"]
            assert scene.things[0].colour != scene.things[1].colour


def test_things_lie_inside_and_apart(drawn):
    for scene in itertools.chain(*drawn.values()):
        reach = [MARGINS.get(t.shape, 1.1) * SMALL.radii[t.size] for t in scene.things]
        for thing, radius in zip(scene.things, reach, strict=True):
            assert all(radius - 0.5 <= place <= 64.5 - radius for place in (thing.x, thing.y)), thing
        if scene.layout != "around":
            for (a, ra), (b, rb) in itertools.combinations(zip(scene.things, reach, strict=True), 2):
                assert np.hypot(a.x - b.x, a.y - b.y) > 0.9 * (ra + rb)


def test_each_attribute_of_a_thing_changes_its_picture_and_nothing_far_from_it(drawn):
    scene = next(s for s in drawn["train"] if s.layout == "row" and s.things[1].size == "medium")
    thing = scene.things[1]
    image = render([scene], world=SMALL)[0].astype(int)
    y, x = np.mgrid[0:64, 0:64] + 0.5
    far = np.hypot(x - thing.x, y - thing.y) > 1.2 * SMALL.radii["medium"] + 1
    for kind, values in SMALL.thing_kinds.items():
        others = [value for value in values if value != getattr(thing, kind)]
        for other in others:
            changed = (scene.things[0], dataclasses.replace(thing, **{kind: other}), scene.things[2])
            picture = render([dataclasses.replace(scene, things=changed)], world=SMALL)[0].astype(int)
            difference = np.abs(picture - image).sum(-1)
            assert (difference > 30).sum() >= 10, (kind, other)
            assert kind == "size" or difference[far].max() == 0


def test_textures_show_on_every_colour():
    for colour in SMALL.colours:
        scene = draw_scene(0, "train", 3, world=SMALL)
        pictures = []
        for texture in SMALL.textures:
            thing = dataclasses.replace(scene.things[0], colour=colour, shape="square", size="small", texture=texture)
            pictures.append(render([dataclasses.replace(scene, things=(thing,))], world=SMALL)[0].astype(int))
        for one, other in itertools.combinations(pictures, 2):
            assert np.abs(one - other).max() > 60


def test_captions_read_back_as_their_scenes(captions):
    for scene, caption in captions:
        request = requested(caption, world=SMALL)
        assert request.layout == scene.layout, caption
        for wanted, thing in zip(request.things, scene.things, strict=True):
            assert (wanted.shape, wanted.colour) == (thing.shape, thing.colour), caption
            assert wanted.size in (None, thing.size) and wanted.texture in (None, thing.texture), caption
        assert request.background in (None, scene.background) and request.pattern in (None, scene.pattern)


def test_every_word_is_said_and_no_caption_is_too_long(captions):
    assert {word for _, caption in captions for word in caption.split()} == set(vocabulary(SMALL))
    assert max(len(caption.split()) for _, caption in captions) + 2 <= SMALL.max_tokens
    tokenizer = build_tokenizer(SMALL)
    assert all(len(tokenizer(word).input_ids) == 3 for word in vocabulary(SMALL))


def test_tiny_does_not_know_the_words_of_small(captions):
    three = next(caption for scene, caption in captions if len(scene.things) == 3)
    assert requested(three) is None
    assert requested("a star red") is None


def lost(scene, picture):
    """{kind: attributes that are asked for and not found} for a scene that is asked for in full."""
    caption = caption_of(scene, seed=7, split="x", index=0, world=SMALL)
    tally = fidelity(requested(caption, world=SMALL), as_seen(picture, world=SMALL), world=SMALL)
    assert tuple(tally) == kinds_of(SMALL)
    return {kind: asked - found for kind, (found, asked) in tally.items() if asked != found}


def test_truth_is_faithful_and_a_swap_costs_the_relation_only(drawn):
    for scene in drawn["test"]:
        assert lost(scene, scene) == {}
        things = {(t.shape, t.colour) for t in scene.things}
        if len(scene.things) == 3 and len(things) == 3:
            first, second, third = scene.things
            assert lost(scene, dataclasses.replace(scene, things=(third, first, second))) == {"relation": 1}
            missing = dataclasses.replace(scene, things=(first, second), layout="left")
            assert {"count": 1, "relation": 1, "shape": 1, "colour": 1}.items() <= lost(scene, missing).items()


def test_what_the_network_names_is_turned_into_words(drawn):
    scenes = drawn["test"][:40]
    targets = targets_of(scenes, world=SMALL)
    assert targets.keys() == values_of(SMALL).keys()
    found = torch.stack(list(targets.values()), 1).clamp(min=0)
    assert seen_by(found, world=SMALL) == [as_seen(scene, world=SMALL) for scene in scenes]
    assert [world_of(len(values_of(world))) for world in (TINY, SMALL)] == [TINY, SMALL]


def test_the_network_of_small_reads_64_pixels():
    net = AttributeNet(SMALL).eval()
    with torch.no_grad():
        features = net(torch.zeros(2, 3, 64, 64))
    assert features.shape == (2, 96)
    assert labels(net, features).shape == (2, len(values_of(SMALL)))


def test_the_attention_that_trains_fast_computes_what_the_fused_one_does():
    unet = build_unet(SMALL)
    noisy, text, pooled = torch.randn(2, 4, 16, 16), torch.randn(2, 40, 224), torch.randn(2, 128)
    with torch.no_grad():
        plain = unet(noisy, 500, text, added_cond_kwargs=conditions(unet, pooled)).sample
        unet.set_attn_processor(AttnProcessor2_0())
        fused = unet(noisy, 500, text, added_cond_kwargs=conditions(unet, pooled)).sample
    torch.testing.assert_close(plain, fused, rtol=1e-4, atol=1e-4)
    assert not torch.equal(plain, fused)  # they are two


def test_three_in_four_timesteps_of_small_tell_of_words_and_none_is_left_out():
    low, high = TELLING_TIMESTEPS["small"]
    drawn = draw_timesteps(100_000, torch.Generator().manual_seed(0), telling=(low, high))
    density = torch.bincount(drawn, minlength=1000) / len(drawn)
    assert len(density) == 1000 and density.min() > 0
    within = density[low:high].sum()
    assert within.item() == pytest.approx(0.75 + 0.25 * (high - low) / 1000, abs=0.01)
    assert density[:low].mean().item() == pytest.approx(0.25 / 1000, rel=0.05)


def test_timesteps_of_tiny_are_drawn_as_they_were():
    same = torch.randint(1000, (64,), generator=torch.Generator().manual_seed(3))
    assert "tiny" not in TELLING_TIMESTEPS
    assert torch.equal(draw_timesteps(64, torch.Generator().manual_seed(3)), same)


def test_prompts_and_pictures_of_small_belong_together():
    prompts = load_prompts(source="small", split="test", n=3)
    scenes = SceneSet(seed=0, split="test", n=3, world=SMALL)
    assert prompts.texts == scenes.captions
    assert prompts.texts != load_prompts(source="tiny", split="test", n=3).texts
    assert np.array_equal(scene_pixels(prompts.prompts[2].id, world=SMALL), scenes.pixels[2])
