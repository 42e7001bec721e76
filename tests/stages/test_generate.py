"""Images hang on their own noise alone: not on the batch, nor on how many there are, nor on how often it stops."""

import hashlib

import numpy as np
import pytest
from PIL import Image

from vqdm.config.options import ModelConfig, SamplerConfig
from vqdm.models.loader import load_pipeline, set_sampler
from vqdm.prompts import ImageList, load_prompts
from vqdm.runs.items import read_item
from vqdm.stages.generate import generate, load_images, noise_of
from vqdm.stages.layout import captions_of, image_path

STEPS = 2


def sampler(name="ddim", **settings) -> SamplerConfig:
    return SamplerConfig(scheduler=name, steps=STEPS, guidance=3.0, **settings)


@pytest.fixture(scope="module")
def pipeline():
    return load_pipeline(ModelConfig(builtin="tiny"), device="cpu")


def prompts(n):
    return load_prompts(source="tiny", split="test", n=n)


def make(directory, pipeline, n, *, batch_size, images_per_prompt=1, how=None):
    directory.mkdir(exist_ok=True)
    how = how or sampler()
    set_sampler(pipeline, how)
    calls = []

    def make_pipeline():
        calls.append(1)
        return pipeline

    generate(
        directory,
        make_pipeline,
        ImageList(prompts(n).prompts, images_per_prompt),
        sampler=how,
        batch_size=batch_size,
        seed=0,
        environment={"device": "cpu", "dtype": "float32"},
    )
    return len(calls)


def hashes(directory, count):
    return [hashlib.sha256(image_path(directory, i).read_bytes()).hexdigest() for i in range(count)]


def levels_apart(one, other, indices):
    pairs = zip(load_images(one, indices), load_images(other, indices), strict=True)
    return max(int(np.abs(a.astype(int) - b.astype(int)).max()) for a, b in pairs)


@pytest.mark.parametrize("name", ["ddim", "euler", "euler_ancestral", "dpm_solver"])
def test_an_image_is_the_same_in_a_batch_of_one_and_of_eight(name, pipeline, tmp_path):
    for size in (1, 8):
        make(tmp_path / str(size), pipeline, 8, batch_size=size, how=sampler(name))
    assert levels_apart(tmp_path / "1", tmp_path / "8", range(8)) <= 1
    assert len(set(hashes(tmp_path / "8", 8))) == 8


def test_more_images_leave_those_that_are_there_as_they_are(pipeline, tmp_path):
    """Also when the last batch was not full: it was filled up, so its arithmetic was that of a full one."""
    make(tmp_path / "grown", pipeline, 6, batch_size=4)
    before = hashes(tmp_path / "grown", 6)
    make(tmp_path / "grown", pipeline, 11, batch_size=4)
    make(tmp_path / "whole", pipeline, 11, batch_size=4)
    assert hashes(tmp_path / "grown", 11) == hashes(tmp_path / "whole", 11)
    assert hashes(tmp_path / "grown", 6) == before
    assert captions_of(tmp_path / "grown", 11) == prompts(11).texts


def test_fewer_images_than_are_there_need_no_work(pipeline, tmp_path):
    assert make(tmp_path / "a", pipeline, 6, batch_size=4) == 1
    assert make(tmp_path / "a", pipeline, 5, batch_size=4) == 0
    assert make(tmp_path / "a", pipeline, 6, batch_size=4) == 0
    assert len(list((tmp_path / "a" / "images").iterdir())) == 6, "what fills a batch up is not kept"


def test_several_images_of_a_prompt_differ_and_the_first_is_the_one_alone(pipeline, tmp_path):
    make(tmp_path / "two", pipeline, 3, batch_size=3, images_per_prompt=2)
    make(tmp_path / "one", pipeline, 3, batch_size=3)
    assert len(set(hashes(tmp_path / "two", 6))) == 6
    pairs = zip(load_images(tmp_path / "two", range(0, 6, 2)), load_images(tmp_path / "one", range(3)), strict=True)
    assert max(int(np.abs(a.astype(int) - b.astype(int)).max()) for a, b in pairs) <= 1
    assert captions_of(tmp_path / "two", 6) == [text for text in prompts(3).texts for _ in range(2)]
    names = [noise_of(*image) for image in ImageList(prompts(2).prompts, 2)]
    assert names == ["test-000000", "test-000000/1", "test-000001", "test-000001/1"]


def test_a_damaged_image_costs_its_batch_only(pipeline, tmp_path):
    make(tmp_path / "a", pipeline, 6, batch_size=2)
    before = hashes(tmp_path / "a", 6)
    times = [image_path(tmp_path / "a", i).stat().st_mtime_ns for i in range(6)]
    image_path(tmp_path / "a", 3).write_bytes(b"no image")
    assert make(tmp_path / "a", pipeline, 6, batch_size=2) == 1
    assert hashes(tmp_path / "a", 6) == before
    unchanged = [image_path(tmp_path / "a", i).stat().st_mtime_ns == times[i] for i in range(6)]
    assert unchanged == [True, True, False, False, True, True]


def test_other_prompts_in_the_same_place_are_made_anew(pipeline, tmp_path):
    make(tmp_path / "a", pipeline, 2, batch_size=2)
    record = read_item(tmp_path / "a", "000000")
    assert record["environment"] == {"device": "cpu", "dtype": "float32"}
    assert [text for _, text in record["prompts"]] == prompts(2).texts
    other = load_prompts(source="tiny", split="validation", n=2)
    images = ImageList(other.prompts)
    generate(tmp_path / "a", lambda: pipeline, images, sampler=sampler(), batch_size=2, seed=0, environment={})
    assert captions_of(tmp_path / "a", 2) == other.texts


def test_images_are_plain_rgb_pngs(pipeline, tmp_path):
    make(tmp_path / "a", pipeline, 1, batch_size=1)
    with Image.open(image_path(tmp_path / "a", 0)) as image:
        assert (image.format, image.mode, image.size) == ("PNG", "RGB", (32, 32))
