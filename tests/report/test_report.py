"""The report of a table holds what its runs left, and goes without what they did not."""

import json

import numpy as np
import pandas as pd
from made_up_runs import PROTOCOL, score, write_run
from PIL import Image

from vqdm.report.report import write_report
from vqdm.report.tables import Row, Table
from vqdm.report.writers import table_content
from vqdm.stages.layout import png_bytes
from vqdm.store import write_item

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
    _, _, data = page.partition('<script type="application/json"')
    assert '"name":"a"' in data.replace(" ", "") and '"name":"b"' not in data.replace(" ", "")


def test_no_run_at_all_is_a_page_of_what_was_published(tmp_path):
    row = Row("a", "none", "VQDM", published={"psnr_to_fp": 30.0})
    table = Table("made", "Made up", "sdxl", (row,), ("psnr_to_fp",), source="a paper")
    content = table_content(table, [[]], model="sdxl", results=tmp_path)
    page = write_report(content, [[]], commands=[], results=tmp_path)[-1].read_text(encoding="utf-8")
    assert "not run" in page and "30.0" in page
