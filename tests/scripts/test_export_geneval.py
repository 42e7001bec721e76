"""Images in the folders that GenEval's evaluation reads, with the list's own lines."""

import json

import pytest
from export_geneval import export

from vqdm.errors import UserError

LINES = [
    json.dumps({"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"}),
    json.dumps({"tag": "colors", "include": [], "prompt": "a photo of a red  dog"}),
]
CAPTIONS = ["a photo of a bench"] * 2 + ["a photo of a red dog"] * 2


def images(folder, count=4):
    paths = [folder / f"{i}.png" for i in range(count)]
    for i, path in enumerate(paths):
        path.write_bytes(bytes([i]))
    return paths


def test_every_prompt_has_a_folder_with_its_line_and_its_images(tmp_path):
    assert export(images(tmp_path), CAPTIONS, LINES, tmp_path / "out") == 2
    found = {
        path.relative_to(tmp_path / "out").as_posix(): path.read_bytes() for path in (tmp_path / "out").rglob("*.*")
    }
    assert found == {
        "00000/metadata.jsonl": LINES[0].encode() + b"\n", "00000/samples/0000.png": b"\0",
        "00000/samples/0001.png": b"\1", "00001/metadata.jsonl": LINES[1].encode() + b"\n",
        "00001/samples/0000.png": b"\2", "00001/samples/0001.png": b"\3",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("count", "captions", "lines", "said"),
    [
        (3, CAPTIONS[:3], LINES, "3 images are not of 2 prompts"),
        (4, CAPTIONS[::-1], LINES, "prompt 0 of the list"),
        (4, CAPTIONS, ["no json", LINES[1]], "no JSON with a prompt"),
        (4, CAPTIONS, [], "4 images are not of 0 prompts"),
    ],
)
def test_what_does_not_fit_together_is_one_line(count, captions, lines, said, tmp_path):
    with pytest.raises(UserError, match=said):
        export(images(tmp_path, count), captions, lines, tmp_path / "out")
