"""Image sets of a vote: of the same captions and noise, and with nothing but pixels in what is shown."""

import io
import os
import time

import numpy as np
import pytest
from PIL import Image
from vote_studies import CAPTIONS, write_run

from vqdm.errors import UserError
from vqdm.report.votes.images import chosen_images, encode, fill_up, image_set, trial_images
from vqdm.report.votes.study import DESTROYED, Trial
from vqdm.runs.store import Store
from vqdm.seeds import numpy_generator


def sets_of(results, *names):
    return [image_set(results, name, "tiny") for name in names]


def test_images_are_those_of_the_first_prompts_of_every_set(tmp_path):
    write_run(tmp_path, "one", copies=2)
    write_run(tmp_path, "four", copies=4)
    sets = sets_of(tmp_path, "one", "four")
    images = chosen_images(sets, n=3, per_prompt=2)
    expected = [(f"prompt-{i:03d}", CAPTIONS[i], copy) for i in range(3) for copy in range(2)]
    assert images == expected
    assert sets[1].path("prompt-002", 1).name == "000009.png"
    assert len(chosen_images(sets, n=None, per_prompt=None)) == 24


@pytest.mark.parametrize(
    ("other", "asked", "said"),
    [
        ({"captions": [*CAPTIONS[:5], "another", *CAPTIONS[6:]]}, {}, "other captions for prompt-005"),
        ({"seed": 7}, {}, r"other noise \(seeds 7 and 0\)"),
        ({"captions": CAPTIONS[:4]}, {}, "other has no image 0 of the prompt prompt-004"),
        ({}, {"n": 13}, "one has images of 12 prompts, not of 13"),
        ({}, {"per_prompt": 2}, "one has no image 1"),
        ({"model": "sdxl"}, {}, "no finished run other on tiny"),
    ],
)
def test_sets_that_cannot_be_compared_are_refused(tmp_path, other, asked, said):
    write_run(tmp_path, "one")
    write_run(tmp_path, "other", **other)
    with pytest.raises(UserError, match=said) as error:
        chosen_images(sets_of(tmp_path, "one", "other"), **{"n": None, "per_prompt": None} | asked)
    assert "\n" not in str(error.value)


def test_a_damaged_batch_is_refused(tmp_path):
    directory = write_run(tmp_path, "one")
    sidecar = directory / "items" / "000000.json"
    sidecar.write_text(sidecar.read_text().replace(CAPTIONS[7], CAPTIONS[8]))
    with pytest.raises(UserError, match=r"000000\.json does not match .*; run its experiment again"):
        image_set(tmp_path, "one", "tiny")


def test_a_missing_image_is_refused(tmp_path):
    write_run(tmp_path, "one")
    directory = write_run(tmp_path, "other")
    (directory / "images" / "000003.png").unlink()
    with pytest.raises(UserError, match=r"000003\.png is missing"):
        chosen_images(sets_of(tmp_path, "one", "other"), n=None, per_prompt=None)


def test_a_newer_run_that_only_compressed_is_passed_over(tmp_path):
    directory = write_run(tmp_path, "one")
    payload = {"fingerprint": "1" * 64, "model": "tiny", "stages": [], "directories": {"quantize": "stages/quantize/x"}}
    newer = Store(tmp_path).record_run("one", payload)
    os.utime(newer, (time.time() + 9, time.time() + 9))
    assert image_set(tmp_path, "one", "tiny").directory == directory


def trial(left, right):
    return Trial("p0", 1, "prompt-000", CAPTIONS[0], 0, left, right)


def test_lossless_images_keep_their_pixels_and_nothing_else(tmp_path):
    directory = write_run(tmp_path, "one", noise=20)
    sets = {"one": sets_of(tmp_path, "one")[0]}
    left, _ = trial_images(trial("one", "one"), sets, size=None, generator=numpy_generator(0, "test"))
    source = Image.open(directory / "images" / "000000.png")
    assert source.text and b"secret-one" not in encode(left, None)
    filled = fill_up([encode(left, None), b"0" * 9000], numpy_generator(0, "test"))
    assert [len(file) for file in filled] == [9000, 9000]
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(filled[0]))), np.asarray(source))


def test_a_destroyed_image_has_the_same_pixels_elsewhere(tmp_path):
    write_run(tmp_path, "one", noise=20, size=34)
    sets = {"one": sets_of(tmp_path, "one")[0]}
    left, right = trial_images(trial(DESTROYED, "one"), sets, size=None, generator=numpy_generator(0, "test"))
    left, right = (np.asarray(image) for image in (left, right))
    assert np.array_equal(np.sort(left, axis=None), np.sort(right, axis=None))
    assert (left != right).any(-1).mean() > 0.7


def test_images_of_other_sizes_are_refused_or_made_equal(tmp_path):
    write_run(tmp_path, "one")
    write_run(tmp_path, "other", size=64)
    sets = {own.system: own for own in sets_of(tmp_path, "one", "other")}
    with pytest.raises(UserError, match="give --size"):
        trial_images(trial("one", "other"), sets, size=None, generator=numpy_generator(0, "test"))
    pair = trial_images(trial("one", "other"), sets, size=48, generator=numpy_generator(0, "test"))
    assert {image.size for image in pair} == {(48, 48)}
