"""Scores hang on the images that are there, and say what these were made by."""

import json
import logging
import shutil

import numpy as np
import pytest
from composed import compose
from PIL import Image

from vqdm import pipeline
from vqdm.runs.items import read_item, write_item
from vqdm.stages.layout import image_path, png_bytes

N = 5
RUN = (
    "+experiment=tiny_fp", f"evaluate.prompts.n={N}", "evaluate.batch_size=4", "evaluate.bootstrap=2",
    "model.sampler.steps=1", "threads=1", "tracker=none", "device=cpu",
)  # fmt: skip


def scores(results, *more):
    record = pipeline.run(compose(*RUN, f"results_dir={results}", *more))
    places = {name: results / place for name, place in record["directories"].items()}
    return places, json.loads((places["evaluate"] / "metrics.json").read_text())


def make_again(images, **environment):
    """The second batch of images, as another machine might have made it: other pixels."""
    record = read_item(images, "000004")
    path = image_path(images, 4)
    pixels = 255 - np.asarray(Image.open(path))
    files = {str(path.relative_to(images)): png_bytes(Image.fromarray(pixels))}
    write_item(images, "000004", files, record | {"environment": record["environment"] | environment})


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    place = tmp_path_factory.mktemp("finished")
    scores(place)
    return place


@pytest.fixture
def results(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "results")


def test_images_that_were_made_again_are_scored_again(results, caplog):
    places, before = scores(results)
    make_again(places["generate"], device="cuda", torch="9.9")
    with caplog.at_level(logging.WARNING, logger="vqdm"):
        _, after = scores(results)
    assert [r for r in caplog.records if "of other files" in r.message and "evaluate" in r.message]
    assert after["metrics"]["clip_score"]["value"] != before["metrics"]["clip_score"]["value"]
    assert after["images_sha256"] != before["images_sha256"]
    assert after["protocol"]["device"] == "cpu, cuda"
    assert after["protocol"]["versions"]["torch"] == f"{before['protocol']['versions']['torch']}, 9.9"
    written = (places["evaluate"] / "manifest.json").stat().st_mtime_ns
    assert scores(results)[1] == after
    assert (places["evaluate"] / "manifest.json").stat().st_mtime_ns == written, "nothing is new"


def test_more_images_leave_the_scores_of_fewer_as_they_are(results):
    places, before = scores(results)
    written = (places["evaluate"] / "manifest.json").stat().st_mtime_ns
    scores(results, "evaluate.prompts.n=7")
    assert scores(results) == (places, before)
    assert (places["evaluate"] / "manifest.json").stat().st_mtime_ns == written


def test_features_keep_the_library_that_made_them(results):
    places, before = scores(results)
    features = places["features/tiny"]
    for name in ("000000", "000004"):
        record = read_item(features, name)
        file = f"features/{name}.safetensors"
        made_by = record["environment"] | {"library": "open_clip_torch 0.1"}
        write_item(features, name, {file: (features / file).read_bytes()}, record | {"environment": made_by})
    (places["evaluate"] / "manifest.json").unlink()
    _, after = scores(results)
    assert before["metrics"]["fid"]["protocol"]["library"].startswith("open_clip_torch ")
    assert after["metrics"]["fid"]["protocol"]["library"] == "open_clip_torch 0.1"
    assert after["metrics"]["fid"]["value"] == before["metrics"]["fid"]["value"]
