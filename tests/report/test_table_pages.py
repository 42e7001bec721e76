"""The report of a table holds what its runs left, and goes without what they did not."""

import json

import numpy as np
import pandas as pd
import pytest
from made_up_runs import PROTOCOL, score, write_run
from PIL import Image

from vqdm.errors import UserError
from vqdm.report.experiments import Row, Table
from vqdm.report.formats import table_content
from vqdm.report.grid import CELL, GAP, LINE, MARGIN, PADDING, write_grid
from vqdm.report.report import write_report
from vqdm.runs.items import write_item
from vqdm.stages.generate import load_images
from vqdm.stages.layout import png_bytes

CAPTIONS = ["a red ring", "</script><b>bold</b>"]


def with_images(results, record, *, copies=1, seed=0, captions=CAPTIONS):
    """Adds a generate stage and images.csv to a made-up run."""
    directory = results / "stages" / "generate" / record["experiment"]
    directory.mkdir(parents=True)
    rows = [[f"p{i}", text] for i, text in enumerate(captions) for _ in range(copies)]
    pixels = np.random.default_rng(seed).integers(0, 256, (len(rows), 8, 8, 3), dtype=np.uint8)
    files = {f"images/{i:06d}.png": png_bytes(Image.fromarray(image)) for i, image in enumerate(pixels)}
    write_item(directory, "000000", files, {"prompts": rows})
    record["directories"]["generate"] = str(directory.relative_to(results))
    scores = pd.DataFrame({"prompt": [name for name, _ in rows], "copy": 0, "psnr_to_fp": np.arange(len(rows)) + 20.5})
    scores.to_csv(results / record["directories"]["evaluate"] / "images.csv", index=False)
    return record


def report(results, rows):
    table = Table("made", "Made up", "sdxl", tuple(Row(r[0]["experiment"], "none") for r in rows), ("psnr_to_fp",))
    content = table_content(table, rows, model="sdxl", results=results)
    files = write_report(content, rows, commands=["python run.py table=made"], results=results)
    return files, files[-1].read_text(encoding="utf-8")


def run(results, name, *, n=2, copies=1, **options):
    protocol = PROTOCOL | {"n": n, "images_per_prompt": copies, "prompts_sha256": "ab"}
    return write_run(results, name, {"psnr_to_fp": score(25.0, 0.5)}, protocol=protocol, **options)


def test_numbers_alone_make_a_page_without_images(tmp_path):
    files, page = report(tmp_path, [[run(tmp_path, "vq3", method="VQ 3 bit")]])
    assert files[-1] == tmp_path / "reports" / "made.html"
    assert "VQ 3 bit" in page and "25.00 ± 0.50" in page and "python run.py table=made" in page
    assert 'id="gallery"' not in page
    assert {file.suffix for file in files[:-1]} == {".svg"} and all(file.is_file() for file in files)


def test_images_stand_beside_each_other_with_every_caption_once(tmp_path):
    rows = [[with_images(tmp_path, run(tmp_path, name, copies=2), copies=2, seed=i)] for i, name in enumerate("ab")]
    _, page = report(tmp_path, rows)
    assert 'id="gallery"' in page and page.count("a red ring") == 2, "one row for each image of a caption"
    assert "<b>bold" not in page


def test_images_of_other_captions_are_left_out(tmp_path):
    first, second = (with_images(tmp_path, run(tmp_path, name)) for name in ("a", "b"))
    file = tmp_path / second["directories"]["evaluate"] / "metrics.json"
    content = json.loads(file.read_text())
    content["protocol"]["prompts_sha256"] = "cd"
    file.write_text(json.dumps(content))
    table = Table("made", "Made up", "sdxl", (Row("a", "none"), Row("b", "none")), ("psnr_to_fp",))
    rows = [[first], [second]]
    content = table_content(table, rows, model="sdxl", results=tmp_path, mixed=True)
    page = write_report(content, rows, commands=[], results=tmp_path)[-1].read_text(encoding="utf-8")
    columns = page.partition('{"methods":')[2].partition('"scores"')[0]
    assert '"name":"a"' in columns and '"name":"b"' not in columns


def test_a_table_says_on_which_processor_the_weights_were_made(tmp_path):
    """And a column may hold runs of several: that is no other protocol."""
    rows = [[run(tmp_path, name)] for name in "abc"]
    for (record,), made_on in zip(rows, ("one CPU", "another CPU", None), strict=True):
        place = tmp_path / "stages" / "quantize" / record["experiment"]
        place.mkdir(parents=True)
        record["directories"]["quantize"] = str(place.relative_to(tmp_path))
        (place / "manifest.json").write_text(json.dumps({} if made_on is None else {"processor": made_on}))
    table = Table("made", "Made up", "sdxl", tuple(Row(name, "none") for name in "abc"), ("psnr_to_fp",))
    notes = table_content(table, rows, model="sdxl", results=tmp_path).notes
    assert "processor: one CPU (a), another CPU (b)" in notes
    assert not any(
        "processor" in note for note in table_content(table, [[], [], rows[2]], model="sdxl", results=tmp_path).notes
    )


def test_what_most_rows_share_is_said_of_all_others(tmp_path):
    """Else a table of thirty rows, two of them of fewer steps, names all thirty. Rows of three seeds are one method."""
    steps = {"a": 20, "b, 2 steps": 2, "c": 20, "d, 1 step": 1, "e": 20}
    rows = [[run(tmp_path, name)] for name in steps]
    for (record,), count in zip(rows, steps.values(), strict=True):
        file = tmp_path / record["directories"]["evaluate"] / "metrics.json"
        content = json.loads(file.read_text())
        content["protocol"]["sampler.steps"] = count
        content["metrics"]["psnr_to_fp"]["note"] = "few images"
        file.write_text(json.dumps(content))
    rows[0] *= 3
    table = Table("made", "Made up", "sdxl", tuple(Row(name, "none") for name in steps), ("psnr_to_fp",))
    notes = table_content(table, rows, model="sdxl", results=tmp_path, mixed=True).notes
    assert "sampler: scheduler ddim, steps 2 (b, 2 steps), 1 (d, 1 step), 20 (all others)" in notes
    assert "psnr_to_fp: few images" in notes


def test_no_run_at_all_is_a_page_of_what_was_published(tmp_path):
    row = Row("a", "none", "VQDM", published={"psnr_to_fp": 30.0})
    table = Table("made", "Made up", "sdxl", (row,), ("psnr_to_fp",), source="a paper")
    content = table_content(table, [[]], model="sdxl", results=tmp_path)
    page = write_report(content, [[]], commands=[], results=tmp_path)[-1].read_text(encoding="utf-8")
    assert "not run" in page and "30.0" in page


@pytest.mark.parametrize("content", [None, b"", b"\x89PNG\r\n\x1a\nno more"])
def test_an_image_that_cannot_be_read_is_one_line_that_names_it(content, tmp_path):
    """In the picture of a table, in the gallery of its page, and where features are taken."""
    record = with_images(tmp_path, run(tmp_path, "a"))
    path = tmp_path / record["directories"]["generate"] / "images" / "000001.png"
    path.unlink() if content is None else path.write_bytes(content)
    makers = [
        lambda: write_grid(tmp_path / "grid.png", [record], tmp_path),
        lambda: load_images(path.parent.parent, range(2)),
        lambda: report(tmp_path, [[record]]),
    ]
    for make in makers[: 2 if content is None else 3]:  # a page shows the images that are there
        with pytest.raises(UserError, match=r"000001\.png is no readable image") as error:
            make()
        assert "\n" not in str(error.value)


def test_a_picture_shows_the_images_that_all_runs_have_and_no_other_captions(tmp_path):
    one = with_images(tmp_path, run(tmp_path, "a"))
    longer = with_images(tmp_path, run(tmp_path, "b"), captions=[*CAPTIONS, "more"])
    others = [with_images(tmp_path, run(tmp_path, "c"), captions=["else"])]
    others.append(with_images(tmp_path, run(tmp_path, "d", copies=2), copies=2))
    for records in ([one, longer, *others], [longer, others[0], one]):
        write_grid(tmp_path / "grid.png", records, tmp_path)
        size = (MARGIN + 2 * (CELL + GAP), LINE + 2 * PADDING + 2 * (CELL + GAP))
        assert Image.open(tmp_path / "grid.png").size == size
