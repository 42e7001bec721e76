"""The search of a vocabulary: with a judge that knows the truth, with one that is misled, and with tiny itself."""

import dataclasses

import pytest
import torch
from tiny_world import FEW, run

from vqdm.config.options import ModelConfig
from vqdm.metrics.families import FAMILIES
from vqdm.metrics.probes.vocabulary import Vocabulary, agreement, all_of, recover, said
from vqdm.models.loader import load_pipeline
from vqdm.prompts import load_prompts
from vqdm.tiny.captions import requested
from vqdm.tiny.scenes import TINY, WORLD_SEED, draw_scene
from vqdm.tiny.small import SMALL

WORLDS = pytest.mark.parametrize("world", [TINY, SMALL], ids=lambda world: world.name)


def scenes(world, count):
    return [draw_scene(WORLD_SEED, "test", index, world=world) for index in range(count)]


@WORLDS
def test_a_caption_says_what_it_is_made_of(world):
    for scene in scenes(world, 60):
        truth = all_of(scene, world)
        read = requested(said(truth, world), world=world)
        solid = [thing.texture or ("solid" if world is SMALL else None) for thing in read.things]
        things = [dataclasses.replace(one, texture=texture) for one, texture in zip(read.things, solid, strict=True)]
        assert dataclasses.replace(read, things=tuple(things)) == truth
    assert said(requested("a red ring"), TINY) == "a red ring"
    assert (
        said(requested("an orange ring below a huge blue square"), TINY) == "a large blue square above an orange ring"
    )


@WORLDS
def test_the_search_finds_what_a_judge_knows_who_counts_disagreements(world):
    """A count of attributes that are not as in the picture, as an error; surplus things count too."""
    asked = set()
    for scene in scenes(world, 12):
        truth = all_of(scene, world)

        def errors(candidates, truth=truth):
            found = []
            for one in candidates:
                asked.add(said(one, world))
                counts = list(agreement(truth, one, world))
                wrong = sum(there - right for right, there in counts)
                found.append(wrong + 0.1 * abs(len(one.things) - len(truth.things)))
            return found

        assert recover(errors, world) == truth
        pairs = {(thing.shape, thing.colour) for caption in asked for thing in requested(caption, world=world).things}
        assert not pairs & world.unseen
    assert len(asked) < 12 * (250 if world is TINY else 900)


def test_a_judge_who_cannot_tell_gets_the_first_of_everything():
    found = recover(lambda candidates: [1.0] * len(candidates), TINY)
    assert said(found, TINY) == "a small red circle on a plain gray background"


def test_tiny_finds_its_own_pictures_captions():
    pipeline = load_pipeline(ModelConfig(builtin="tiny"), device="cpu")
    prompts = load_prompts(source="tiny", split="test", n=2).prompts
    found = Vocabulary(pipeline, TINY).columns([[prompt.id, prompt.text] for prompt in prompts])
    assert set(found) == set(FAMILIES["vocabulary"].metrics)
    assert float(found["vocabulary_recovered"].mean()) >= 0.8


def test_a_model_that_predicts_the_same_for_all_captions_recovers_little(monkeypatch):
    pipeline = load_pipeline(ModelConfig(builtin="tiny"), device="cpu")
    probe = Vocabulary(pipeline, TINY)
    monkeypatch.setattr(probe.asked, "noise_with", lambda captions: lambda latents, time: torch.zeros_like(latents))
    found = probe.columns([["test-000003", ""], ["test-000004", ""]])
    assert float(found["vocabulary_exact"].sum()) == 0
    assert found["vocabulary_reached"].tolist() == [1, 1], "no caption is better than the truth"


@pytest.mark.slow
def test_a_run_has_the_vocabulary_among_its_scores(tmp_path):
    scores = "evaluate.metrics=[vocabulary]"
    done = run("+experiment=tiny_codec", "quantize=rtn4", scores, f"results_dir={tmp_path}", *FEW)
    assert done.returncode == 0, done.stderr
    assert "vocabulary_recovered" in done.stdout
