"""What plan=true says of images that are partly there."""

import json

from vqdm.runs.store import write_item
from vqdm.stages.plan.command import _images_made


def test_a_shorter_lists_last_batch_does_not_count_as_full(tmp_path):
    write_item(tmp_path, "000000", {}, {"prompts": [["a", "text"]] * 4})
    write_item(tmp_path, "000004", {}, {"rows": 2})
    assert [_images_made(tmp_path, count, batch_size=4) for count in (3, 4, 6, 8, 12)] == [3, 4, 6, 6, 6]


def test_a_damaged_batch_does_not_count(tmp_path):
    write_item(tmp_path, "000000", {}, {"rows": 4})
    sidecar = tmp_path / "items" / "000000.json"
    whole = sidecar.read_text()
    for damaged in (json.dumps({"record": {}})[:5], whole.replace('"rows": 4', '"rows": 3')):
        sidecar.write_text(damaged)
        assert damaged != whole and _images_made(tmp_path, 4, batch_size=4) == 0
