import itertools
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vqdm.tiny.captions import Request, RequestedThing, caption_of, describe, requested, vocabulary
from vqdm.tiny.clip import CLIP_CONFIG, clip_tokens
from vqdm.tiny.scenes import BACKGROUNDS, COLOURS, LAYOUTS, PATTERNS, SHAPES, Scene, Thing, draw_scene
from vqdm.tiny.tokenizer import MAX_TOKENS, build_tokenizer

RED_CIRCLE, BLUE_SQUARE = RequestedThing("circle", "red", "small"), RequestedThing("square", "blue", None)
SIZES = {"small": "small tiny little", "large": "large big huge"}
PATTERN_NAMES = {"plain": "plain simple", "striped": "striped", "dotted": "dotted spotted", "checkered": "checkered"}
LONGEST = "a picture of a small red circle to the left of a large blue square in front of a plain gray wall"


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def captions():
    """(scene, caption), the caption drawn as in training."""
    drawn = []
    for split, count in (("train", 2500), ("unseen_pairs", 700)):
        scenes = [draw_scene(1, split, i) for i in range(count)]
        drawn += [(s, caption_of(s, seed=1, split=split, index=i)) for i, s in enumerate(scenes)]
    return drawn


def by_position(scene: Scene) -> list[Thing]:
    """Left (upper) thing first, from the coordinates: the order in which the scene holds them does not count."""
    return sorted(scene.things, key=lambda t: t.x if scene.layout == "left" else t.y)


def check(scene: Scene, caption: str) -> None:
    request = requested(caption)
    words = caption.split()
    assert request is not None, caption
    assert request.layout == scene.layout
    assert [(t.shape, t.colour) for t in request.things] == [(t.shape, t.colour) for t in by_position(scene)]
    sizes = [t.size for t in request.things]
    assert all(size in (None, thing.size) for size, thing in zip(sizes, by_position(scene), strict=True))
    said = sum(word in " ".join(SIZES.values()).split() for word in words)
    assert said == sum(size is not None for size in sizes)
    assert request.background == (scene.background if scene.background in words else None)
    named = any(word in PATTERN_NAMES[scene.pattern].split() for word in words)
    assert request.pattern == (scene.pattern if named else None)


def test_captions_read_back_as_their_scenes(captions):
    for scene, caption in captions:
        check(scene, caption)


THINGS = st.builds(
    Thing,
    shape=st.sampled_from(SHAPES),
    colour=st.sampled_from(sorted(COLOURS)),
    size=st.sampled_from(sorted(SIZES)),
    x=st.floats(9, 16),
    y=st.floats(9, 16),
)


@settings(max_examples=150, deadline=None)
@given(
    first=THINGS,
    second=THINGS,
    layout=st.sampled_from(LAYOUTS),
    background=st.sampled_from(sorted(BACKGROUNDS)),
    pattern=st.sampled_from(PATTERNS),
    seed=st.integers(0, 2**32),
)
def test_any_scene_reads_back_two_alike_things_too(first, second, layout, background, pattern, seed):
    second = Thing(second.shape, second.colour, second.size, second.x + 8, second.y + 8)
    scene = Scene((first,) if layout == "single" else (first, second), layout, background, pattern)
    check(scene, describe(scene, np.random.default_rng(seed)))


def test_things_are_left_unsaid_as_often_as_meant_and_every_word_is_said(captions):
    requests = [requested(caption) for _, caption in captions]
    sizes = [thing.size for request in requests for thing in request.things]
    assert abs(np.mean([size is None for size in sizes]) - 0.25) < 0.03
    assert abs(np.mean([request.background is None for request in requests]) - 0.15) < 0.03
    assert all((request.background is None) == (request.pattern is None) for request in requests)
    assert {word for _, caption in captions for word in caption.split()} == set(vocabulary())


def test_caption_depends_on_seed_split_and_index_alone(captions):
    scene, caption = captions[5]
    assert caption_of(scene, seed=1, split="train", index=5) == caption
    others = {caption_of(scene, seed=1, split=split, index=i) for split in ("train", "test") for i in range(20)}
    assert len(others) > 10


@pytest.mark.parametrize(
    ("text", "layout"),
    [
        ("a tiny red circle left of a blue square", "left"),
        ("a little red circle to the left of a blue square", "left"),
        ("a blue square right of a small red circle", "left"),
        ("a blue square to the right of a small red circle", "left"),
        ("a small red circle above a blue square", "above"),
        ("a small red circle over a blue square", "above"),
        ("a blue square below a tiny red circle", "above"),
        ("a blue square under a tiny red circle", "above"),
    ],
)
def test_every_relation_puts_the_left_or_upper_thing_first(text, layout):
    assert requested(text) == Request((RED_CIRCLE, BLUE_SQUARE), layout, None, None)
    whole = f"We see {text} in front of a spotted pink wall"
    assert requested(whole) == Request((RED_CIRCLE, BLUE_SQUARE), layout, "pink", "dotted")


def test_words_of_size_and_pattern_in_either_order():
    for size, names in SIZES.items():
        for name in names.split():
            assert requested(f"a {name} red circle").things[0].size == size
    for pattern, names in PATTERN_NAMES.items():
        for name, ground in itertools.product(names.split(), BACKGROUNDS):
            for order in (f"{name} {ground}", f"{ground} {name}"):
                request = requested(f"a red circle on a {order} floor")
                assert (request.background, request.pattern) == (ground, pattern)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "   ",
        "a photograph of an astronaut riding a horse on mars",
        "a circle",  # no colour
        "a red thing on a plain gray background",
        "a red circle and a blue square",  # no relation
        "a red circle left of a blue square above a green ring",
        "a red circle left of a tree",
        "a woman in a red dress left of a white square on a black ring",  # strange words around known ones
        "a man under a red circle above a black square",
        "ein roter Kreis",
        "日本語 😀",
    ],
)
def test_foreign_captions_are_none(text):
    assert requested(text) is None


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from([*vocabulary(), "and", "car", "Ring"]), max_size=14))
def test_any_words_give_none_or_a_request_of_one_or_two_things(words):
    request = requested(" ".join(words))
    if request is not None:
        assert (len(request.things), request.layout == "single") in ((1, True), (2, False))
        assert not {"and", "car"} & set(words)


def test_every_word_is_one_token_and_no_two_share_one(tokenizer):
    words = vocabulary()
    ids = [tokenizer(word, add_special_tokens=False).input_ids for word in words]
    assert all(len(row) == 1 for row in ids)
    assert len({row[0] for row in ids}) == len(words)
    assert len(tokenizer) == CLIP_CONFIG["text_cfg"]["vocab_size"]


def test_captions_fit_and_are_a_token_a_word(tokenizer, captions):
    texts = [caption for _, caption in captions] + [LONGEST]
    rows = tokenizer(texts).input_ids
    assert [len(row) for row in rows] == [len(text.split()) + 2 for text in texts]
    assert len(rows[-1]) == MAX_TOKENS == max(map(len, rows))
    special = {tokenizer.bos_token_id, tokenizer.eos_token_id}
    assert tokenizer.unk_token_id in special
    assert not any(special & set(row[1:-1]) for row in rows)
    assert [tokenizer.decode(row[1:-1]) for row in rows] == texts


def test_open_clip_pools_at_the_end_token_which_has_the_highest_id(tokenizer, captions):
    texts = [caption for _, caption in captions[:50]] + [LONGEST, "word " * 40]
    tokens = clip_tokens(tokenizer, texts, length=MAX_TOKENS)
    assert tokens.shape == (52, CLIP_CONFIG["text_cfg"]["context_length"])
    places = [min(len(text.split()) + 1, 23) for text in texts]
    assert tokens.argmax(1).tolist() == places
    assert {int(row[place]) for row, place in zip(tokens, places, strict=True)} == {tokenizer.eos_token_id}


def without_space(text: str) -> str:
    return "".join(c for c in text if not c.isspace())


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(max_codepoint=0x2FFF, exclude_categories=("Cs", "Cn", "Co")), max_size=40))
def test_any_text_is_encoded_without_unknowns_and_read_back(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.unk_token_id not in ids
    lowered = "".join(c.lower() for c in unicodedata.normalize("NFC", text))
    assert without_space(tokenizer.decode(ids)) == without_space(lowered)


def test_tokenizer_is_the_same_after_save_and_load(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = type(tokenizer).from_pretrained(tmp_path)
    texts = [LONGEST, "Ünïcode 😀 it's 12 o'clock", ""]
    settings_ = {"padding": "max_length", "truncation": True}
    assert loaded(texts, **settings_).input_ids == tokenizer(texts, **settings_).input_ids
    assert loaded.model_max_length == MAX_TOKENS
