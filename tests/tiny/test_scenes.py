import dataclasses
import itertools
import math

import numpy as np
import pytest

from vqdm.tiny.scenes import (
    BACKGROUNDS,
    COLOURS,
    IMAGE_SIZE,
    PATTERNS,
    RADII,
    SHAPES,
    SPLITS,
    UNSEEN_PAIRS,
    Scene,
    Thing,
    draw_scene,
    draw_scenes,
    render,
)

# of radius 1, worked out from each outline: a ring is 1.02 outside and 0.46 inside, a triangle 1.7 high, …
UNIT_AREAS = {
    "circle": math.pi,
    "square": 1.72**2,
    "diamond": 2 * 1.15**2,
    "triangle": 1.7 * (1.7 / 1.8),
    "cross": 2 * 2 * 0.64 - 0.64**2,
    "ring": math.pi * (1.02**2 - 0.46**2),
}
COUNTS = {"train": 2500, "validation": 700, "test": 700, "reference": 700, "unseen_pairs": 1000}


@pytest.fixture(scope="module")
def drawn():
    return {split: draw_scenes(7, split, range(count)) for split, count in COUNTS.items()}


def alone(shape="circle", colour="white", size="large", x=16.0, y=16.0, background="gray", pattern="plain"):
    return Scene((Thing(shape, colour, size, x, y),), "single", background, pattern)


def recoloured(scene, slot, colour):
    things = list(scene.things)
    things[slot] = dataclasses.replace(things[slot], colour=colour)
    return dataclasses.replace(scene, things=tuple(things))


def cover(scenes, slot):
    """Share of each pixel that shows the thing, [n, 32, 32]: what changes when it turns from white to black."""
    light, dark = (render([recoloured(s, slot, colour) for s in scenes]).astype(float) for colour in ("white", "black"))
    return (light - dark).mean(-1) / (250 - 15)


def test_seed_split_and_index_fix_a_scene_and_each_of_them_matters():
    alike = [draw_scene(3, "train", i) for i in (8, 9, 10)]
    assert draw_scenes(3, "train", range(8, 11)) == alike
    others = [draw_scene(4, "train", 8), draw_scene(3, "test", 8), draw_scene(3, "train", 11)]
    assert len(set(alike + others)) == 6


def test_splits_share_no_scene_and_only_one_split_has_unseen_pairs(drawn):
    assert set(drawn) == set(SPLITS)
    keys = {split: {scene.key for scene in scenes} for split, scenes in drawn.items()}
    for one, other in itertools.combinations(keys, 2):
        assert not keys[one] & keys[other], (one, other)
    for split, scenes in drawn.items():
        has_one = {any((t.shape, t.colour) in UNSEEN_PAIRS for t in scene.things) for scene in scenes}
        assert has_one == {split == "unseen_pairs"}


def test_key_is_equal_for_two_scenes_that_differ_in_positions_alone():
    scene = alone("ring", "red", "small", 14.0, 17.0, "pink", "dotted")
    assert scene.key == alone("ring", "red", "small", 18.0, 12.5, "pink", "dotted").key
    changes = {"shape": "cross", "colour": "blue", "size": "large", "background": "cyan", "pattern": "plain"}
    same = {"shape": "ring", "colour": "red", "size": "small", "background": "pink", "pattern": "dotted"}
    assert len({scene.key, *(alone(**same | {k: v}).key for k, v in changes.items())}) == 6


def test_every_attribute_occurs(drawn):
    def things(split):
        return {(t.shape, t.colour, t.size) for scene in drawn[split] for t in scene.things}

    everything = set(itertools.product(SHAPES, COLOURS, RADII))
    unseen = {thing for thing in everything if thing[:2] in UNSEEN_PAIRS}
    assert len(everything) == 6 * 8 * 2
    assert len(unseen) == 12
    assert things("train") == everything - unseen
    assert things("unseen_pairs") >= unseen
    for split in SPLITS:
        grounds = {(s.layout, s.background, s.pattern) for s in drawn[split]}
        assert grounds == set(itertools.product(("single", "left", "above"), BACKGROUNDS, PATTERNS))


def test_layout_is_where_the_things_are(drawn):
    for scene in itertools.chain(*drawn.values()):
        if scene.layout == "single":
            assert len(scene.things) == 1
            continue
        first, second = scene.things
        apart = {"left": second.x - first.x, "above": second.y - first.y}
        across = {"left": second.y - first.y, "above": second.x - first.x}
        assert apart[scene.layout] > 14
        assert apart[scene.layout] > abs(across[scene.layout])


def test_render_gives_the_same_bytes_alone_and_in_a_batch(drawn):
    scenes = [*drawn["train"][:60], *drawn["unseen_pairs"][:40]]
    images = render(scenes)
    assert images.shape == (100, IMAGE_SIZE, IMAGE_SIZE, 3)
    assert images.dtype == np.uint8
    for scene, image in zip(scenes[::7], images[::7], strict=True):
        assert np.array_equal(render([scene])[0], image)


@pytest.mark.parametrize("shape", SHAPES)
def test_areas_are_those_of_the_outlines(shape):
    scenes = [alone(shape, size=size, x=x, y=16.3) for size in RADII for x in (15.5, 16.0, 16.21)]
    expected = [UNIT_AREAS[shape] * RADII[size] ** 2 for size in RADII for _ in range(3)]
    areas = cover(scenes, 0).sum((1, 2))
    assert np.allclose(areas, expected, rtol=0.05)
    assert areas[3:].min() > 2 * areas[:3].max()  # large against small


def test_shapes_differ_from_each_other_at_both_sizes():
    for size in RADII:
        covers = cover([alone(shape, size=size) for shape in SHAPES], 0)
        for one, other in itertools.combinations(covers, 2):
            assert np.abs(one - other).sum() > 0.1 * max(one.sum(), other.sum())


def test_triangle_points_up_and_the_others_are_symmetric():
    for shape in SHAPES:
        mask = cover([alone(shape)], 0)[0]
        assert np.allclose(mask, mask[:, ::-1])
        assert np.allclose(mask, mask[::-1]) == (shape != "triangle")
    widths = (cover([alone("triangle")], 0)[0] > 0.5).sum(1)
    rows = np.flatnonzero(widths)
    assert widths[rows[0]] < 4 < 10 < widths[rows[-1]]
    assert np.all(np.diff(widths[rows]) >= 0)


def test_a_thing_has_its_colour_at_its_centre_and_a_ring_on_its_rim(drawn):
    scenes = [*drawn["train"][:600], *drawn["unseen_pairs"][:300]]
    for scene, image in zip(scenes, render(scenes), strict=True):
        for thing in scene.things:
            colours = set()
            if thing.shape == "ring":
                middle = image[int(thing.y), int(thing.x)]
                assert tuple(middle) != COLOURS[thing.colour]  # the background is seen through it
                for dx, dy in ((1, 0), (-1, 0), (0, 1), (0, -1)):
                    rim = 0.74 * RADII[thing.size]
                    colours.add(tuple(image[int(thing.y + dy * rim), int(thing.x + dx * rim)]))
            else:
                colours.add(tuple(image[int(thing.y), int(thing.x)]))
            assert colours == {COLOURS[thing.colour]}


def test_things_are_seen_whole(drawn):
    """Neither the border nor the other thing takes more than a tip (of two large diamonds, at most 1 in 20)."""
    scenes = [*drawn["train"][:800], *drawn["unseen_pairs"][:400]]
    for slot in (0, 1):
        with_slot = [s for s in scenes if slot < len(s.things)]
        seen = cover(with_slot, slot).sum((1, 2))
        whole = [UNIT_AREAS[s.things[slot].shape] * RADII[s.things[slot].size] ** 2 for s in with_slot]
        assert np.all(seen > 0.93 * np.array(whole))


def test_backgrounds_and_patterns_are_told_apart_by_the_pixels_around_a_thing():
    """Coarsely: by the share of darkened pixels, and which rows and columns differ."""
    dark_share = {"plain": 0.0, "striped": 0.5, "dotted": 0.25, "checkered": 0.5}
    grounds = list(itertools.product(BACKGROUNDS, PATTERNS))
    images = render([alone("cross", "black", "small", background=b, pattern=p) for b, p in grounds])
    for (background, pattern), image in zip(grounds, images, strict=True):
        frame = np.concatenate([image[:8].reshape(-1, 3), image[-8:].reshape(-1, 3)])  # whole periods, no thing
        light, dark = np.array(BACKGROUNDS[background]), np.rint(np.array(BACKGROUNDS[background]) * 0.72)
        is_dark = np.abs(frame - dark).max(1) <= 1
        assert np.all(is_dark | (frame == light).all(1))
        assert is_dark.mean() == dark_share[pattern]
        rows_differ = bool(np.any(image[:8, 0] != image[0, 0]))
        columns_differ = bool(np.any(image[0] != image[0, 0])) or bool(np.any(image[3] != image[3, 0]))
        assert (rows_differ, columns_differ)[0] == (pattern == "striped") or pattern in ("dotted", "checkered")
        assert columns_differ == (pattern in ("dotted", "checkered"))
    assert len({image.tobytes() for image in images}) == 16


@pytest.mark.parametrize("change", [{"shape": "heart"}, {"pattern": "wavy"}, {"colour": "teal"}, {"size": "medium"}])
def test_unknown_attributes_are_refused(change):
    with pytest.raises((ValueError, KeyError)):
        images = render([alone(**change)])
        assert images is None, "an unknown attribute was drawn"
