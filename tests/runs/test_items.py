"""Who only reads an item believes its seal and looks at no file; a damaged sidecar is one clear line."""

import hashlib

import pytest

from vqdm.errors import UserError
from vqdm.runs.items import item_names, peek, write_item
from vqdm.stages.features import environments, extract, images_sha256
from vqdm.stages.layout import captions_of


def test_peek_sees_record_and_checksums_and_no_file(tmp_path):
    record = {"prompts": [["a", "a caption"]], "seed": 3}
    write_item(tmp_path, "000000", {"images/000000.png": b"pixels", "other": b""}, record)
    (tmp_path / "images" / "000000.png").unlink()
    found = peek(tmp_path, "000000")
    assert found.record == record
    assert found.files["images/000000.png"] == {"size": 6, "sha256": hashlib.sha256(b"pixels").hexdigest()}
    assert item_names(tmp_path) == ["000000"] and item_names(tmp_path, "1") == []


READERS = {
    "captions": lambda images: captions_of(images, 12),
    "checksum": lambda images: images_sha256([images], 12, 12),
    "environments": lambda images: environments(images, 12, 12),
    "features": lambda images: extract(
        images.with_name("features"), images, None, count=12, batch_size=12, make_extractor=None, environment={}
    ),
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS.keys())
def test_a_damaged_sidecar_is_one_line_that_says_what_to_do(tmp_path, read):
    images = tmp_path / "images"
    prompts = [[f"p{i}", f"a caption of number {i}"] for i in range(12)]
    write_item(images, "000000", {}, {"prompts": prompts, "environment": {}})
    sidecar = images / "items" / "000000.json"
    changed = sidecar.read_text().replace("a caption of number 7", "a caption of number 8")  # JSON as good as before
    for content in (changed, changed[:50]):
        sidecar.write_text(content)
        with pytest.raises(UserError, match=r"000000\.json .*; run its experiment again") as error:
            read(images)
        assert "\n" not in str(error.value)
