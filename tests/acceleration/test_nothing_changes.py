"""With caching, activations and pruning off, whatever their options say, no fingerprint is another."""

import pytest
from composed import compose

from vqdm.stages.graph.experiment import build_graph

OFF = ["cache.interval=7", "cache.correction=affine", "prune.share=0.5", "activations.bits=4", "activations.per=block"]
SETTINGS = {"sampler", "dtype", "batch_size", "images_per_prompt", "seed", "rescale", "prompts"}


def stages(cache, *overrides):
    return build_graph(compose(*overrides), cache=cache / "hashes").named()


@pytest.mark.parametrize("experiment", ["tiny_fp", "tiny_trellis3"])
def test_options_of_what_is_off_change_nothing(experiment, tmp_path):
    plain, same = stages(tmp_path, f"+experiment={experiment}"), stages(tmp_path, f"+experiment={experiment}", *OFF)
    assert {name: stage.fingerprint for name, stage in plain.items()} == {n: s.fingerprint for n, s in same.items()}
    assert set(plain["images"].config) == SETTINGS
    assert not {"scores", "prune", "schedule", "activations", "correct"} & set(plain)


@pytest.mark.parametrize(
    ("override", "new", "kept"),
    [
        ("cache=taylor2", set(), {"quantize"}),
        ("cache=cachequant2", {"schedule", "correct"}, {"quantize"}),
        ("activations=a8", set(), {"quantize"}),
        ("activations=dgq6", {"activations"}, {"quantize"}),
        ("prune=ld10", {"scores", "prune"}, {"calibrate"}),
        ("evaluate.original_steps=40", set(), {"quantize", "images"}),
    ],
)
def test_what_is_on_changes_its_own_stages_and_those_after(override, new, kept, tmp_path):
    plain = stages(tmp_path, "+experiment=tiny_trellis3")
    other = stages(tmp_path, "+experiment=tiny_trellis3", override)
    assert set(other) - set(plain) == new
    assert all(other[name].fingerprint == plain[name].fingerprint for name in kept)
    assert other["evaluate"].fingerprint != plain["evaluate"].fingerprint


def test_original_steps_that_are_the_images_own_are_still_told(tmp_path):
    """Else scores that were made without them, for another table, would serve a table whose other rows state them."""
    plain = stages(tmp_path, "+experiment=tiny_trellis3")
    told = stages(tmp_path, "+experiment=tiny_trellis3", "evaluate.original_steps=20")
    assert {name for name in plain if told[name].fingerprint != plain[name].fingerprint} == {"evaluate"}


def test_ranges_come_with_the_cache_running_and_corrections_last(tmp_path):
    found = stages(tmp_path, "+experiment=tiny_trellis3", "cache=cachequant3", "activations=dgq6")
    assert found["activations"].upstream["schedule"] == found["schedule"]
    assert found["correct"].upstream["activations"] == found["activations"]
    assert found["images"].upstream["correct"] == found["correct"] and "quantize" not in found["images"].upstream
