import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vqdm.tiny.attributes import KINDS, AttributeNet, Seen, as_seen, fidelity, look, targets_of, values_of
from vqdm.tiny.captions import Request, RequestedThing, caption_of, requested
from vqdm.tiny.scenes import BACKGROUNDS, COLOURS, LAYOUTS, PATTERNS, RADII, SHAPES, TINY, draw_scene

RED_CIRCLE, BLUE_SQUARE = ("circle", "red", "small"), ("square", "blue", "large")


def wanted(*things, layout=None, background="gray", pattern="dotted"):
    return Request(tuple(RequestedThing(*t) for t in things), layout or single_or_left(things), background, pattern)


def seen(*things, layout=None, background="gray", pattern="dotted"):
    return Seen(layout or single_or_left(things), things, background, pattern)


def single_or_left(things):
    return "single" if len(things) == 1 else "left"


def lost(request, picture):
    """{kind: attributes that are asked for and not found}, without the kinds that lose none."""
    tally = fidelity(request, picture)
    return {kind: asked - found for kind, (found, asked) in tally.items() if asked != found}


TWO = wanted(RED_CIRCLE, BLUE_SQUARE)


def test_everything_right():
    assert fidelity(TWO, seen(RED_CIRCLE, BLUE_SQUARE)) == {
        "count": (1, 1),
        "relation": (1, 1),
        "shape": (2, 2),
        "colour": (2, 2),
        "size": (2, 2),
        "background": (1, 1),
        "pattern": (1, 1),
    }
    one = fidelity(wanted(RED_CIRCLE), seen(RED_CIRCLE))
    assert one["relation"] == (0, 0)
    assert [one[kind] for kind in KINDS if kind != "relation"] == [(1, 1)] * 6


@pytest.mark.parametrize(
    ("picture", "expected"),
    [
        (seen(BLUE_SQUARE, RED_CIRCLE), {"relation": 1}),  # swapped
        (seen(RED_CIRCLE, BLUE_SQUARE, layout="above"), {"relation": 1}),
        (seen(BLUE_SQUARE, RED_CIRCLE, layout="above"), {"relation": 1}),
        (seen(("circle", "green", "small"), BLUE_SQUARE), {"colour": 1}),
        (seen(("circle", "blue", "small"), ("square", "red", "large")), {"colour": 2}),  # colours change owners
        (seen(("circle", "red", "large"), BLUE_SQUARE), {"size": 1}),
        (seen(RED_CIRCLE, ("ring", "blue", "large")), {"shape": 1}),
        (seen(RED_CIRCLE, BLUE_SQUARE, background="pink"), {"background": 1}),
        (seen(RED_CIRCLE, BLUE_SQUARE, pattern="plain"), {"pattern": 1}),
        (seen(RED_CIRCLE), {"count": 1, "relation": 1, "shape": 1, "colour": 1, "size": 1}),  # one is missing
        (seen(BLUE_SQUARE), {"count": 1, "relation": 1, "shape": 1, "colour": 1, "size": 1}),
        (
            seen(("ring", "white", "small"), background="cyan", pattern="plain"),  # its size is the red circle's
            {"count": 1, "relation": 1, "shape": 2, "colour": 2, "size": 1, "background": 1, "pattern": 1},
        ),
        (seen(RED_CIRCLE, RED_CIRCLE), {"shape": 1, "colour": 1, "size": 1}),
    ],
)
def test_two_things_asked_for(picture, expected):
    assert lost(TWO, picture) == expected


@pytest.mark.parametrize(
    ("picture", "expected"),
    [
        (seen(RED_CIRCLE, BLUE_SQUARE), {"count": 1}),  # one too many, the right one among them
        (seen(BLUE_SQUARE, RED_CIRCLE), {"count": 1}),
        (seen(BLUE_SQUARE), {"shape": 1, "colour": 1, "size": 1}),
        (seen(("circle", "blue", "small"), BLUE_SQUARE), {"count": 1, "colour": 1}),
    ],
)
def test_one_thing_asked_for(picture, expected):
    assert lost(wanted(RED_CIRCLE), picture) == expected


def test_what_is_left_open_is_not_counted():
    request = wanted(("circle", "red", None), ("square", "blue", "large"), background=None, pattern=None)
    tally = fidelity(request, seen(RED_CIRCLE, BLUE_SQUARE))
    assert (tally["size"], tally["background"], tally["pattern"]) == ((1, 1), (0, 0), (0, 0))
    assert tally == fidelity(request, seen(("circle", "red", "large"), BLUE_SQUARE, background="pink"))


def test_a_thing_asked_for_twice_and_seen_once_counts_twice():
    same = RequestedThing(*RED_CIRCLE)
    request = Request((same, same), "left", None, None)  # one object in both places
    assert fidelity(request, seen(RED_CIRCLE))["shape"] == (1, 2)
    assert lost(request, seen(RED_CIRCLE, RED_CIRCLE)) == {}


THINGS = st.tuples(*(st.sampled_from(v) for v in (SHAPES[:3], sorted(COLOURS)[:3], sorted(RADII))))
OPEN_THINGS = st.builds(lambda thing, said: (*thing[:2], thing[2] if said else None), THINGS, st.booleans())
GROUNDS = st.fixed_dictionaries(
    {"background": st.sampled_from(sorted(BACKGROUNDS)), "pattern": st.sampled_from(PATTERNS)}
)
OPEN_GROUNDS = st.one_of(GROUNDS, st.just({"background": None, "pattern": None}))


def laid_out(make, things, grounds):
    one = st.builds(lambda a, g: make(a, layout="single", **g), things, grounds)
    two = st.builds(
        lambda a, b, layout, g: make(a, b, layout=layout, **g), things, things, st.sampled_from(LAYOUTS[1:]), grounds
    )
    return st.one_of(one, two)


@settings(max_examples=400, deadline=None)
@given(request=laid_out(wanted, OPEN_THINGS, OPEN_GROUNDS), picture=laid_out(seen, THINGS, GROUNDS))
def test_asked_depends_on_the_request_alone_and_found_is_the_best_pairing(request, picture):
    tally = fidelity(request, picture)
    n = len(request.things)
    assert {kind: asked for kind, (_, asked) in tally.items()} == {
        "count": 1,
        "relation": int(n == 2),
        "shape": n,
        "colour": n,
        "size": sum(t.size is not None for t in request.things),
        "background": int(request.background is not None),
        "pattern": int(request.pattern is not None),
    }
    assert all(0 <= found <= asked for found, asked in tally.values())

    def agreeing(order):
        return sum(
            a is not None and a == b
            for thing, (shape, colour, size) in zip(request.things, order, strict=True)
            for a, b in ((thing.shape, shape), (thing.colour, colour), (thing.size, size))
        )

    padded = (*picture.things, *[(None,) * 3] * (n - len(picture.things)))
    best = max(agreeing(order) for order in itertools.permutations(padded, n))
    assert sum(tally[kind][0] for kind in ("shape", "colour", "size")) == best
    in_place = len(picture.things) == n == 2 and agreeing(picture.things) == best
    assert tally["relation"][0] == int(in_place and picture.layout == request.layout)
    assert tally["count"][0] == int(len(picture.things) == n)


def test_truth_is_faithful_to_its_own_caption():
    for split, count in (("train", 1500), ("unseen_pairs", 700)):
        for index in range(count):
            scene = draw_scene(2, split, index)
            request = requested(caption_of(scene, seed=2, split=split, index=index))
            assert lost(request, as_seen(scene)) == {}


def test_truth_is_less_faithful_to_the_captions_of_others():
    scenes = [draw_scene(2, "train", i) for i in range(200)]
    requests = [requested(caption_of(s, seed=2, split="train", index=i)) for i, s in enumerate(scenes)]
    shares = []
    for request, scene in zip(requests, scenes[1:], strict=False):
        tally = fidelity(request, as_seen(scene)).values()
        shares.append(sum(found for found, _ in tally) / sum(asked for _, asked in tally))
    assert 0.2 < sum(shares) / len(shares) < 0.6


def test_looking_at_logits_of_the_targets_gives_back_the_truth():
    """targets_of and look are inverse: features that hold the target classes are read as the scene."""
    scenes = [draw_scene(4, "train", i) for i in range(60)]
    targets = targets_of(scenes)
    assert targets.keys() == values_of(TINY).keys()
    single = [scene.layout == "single" for scene in scenes]
    assert [bool(t) for t in targets["shape1"] == -100] == single

    class Oracle(AttributeNet):
        def logits(self, features):
            rows = features[:, 0].long()
            return {
                name: torch.nn.functional.one_hot(target[rows].clamp(min=0), len(values_of(TINY)[name])).float()
                for name, target in targets.items()
            }

    features = torch.arange(60.0)[:, None].expand(60, 64)
    assert look(Oracle(), features) == [as_seen(scene) for scene in scenes]


def test_net_gives_64_features_and_a_logit_for_every_value():
    net = AttributeNet().eval()
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        features = net(images)
        logits = net.logits(features)
        assert torch.allclose(net(images[1:2]), features[1:2], atol=1e-5)  # an image's features are its own
    assert features.shape == (3, 64)
    assert {name: tuple(v.shape) for name, v in logits.items()} == {
        name: (3, len(v)) for name, v in values_of(TINY).items()
    }
