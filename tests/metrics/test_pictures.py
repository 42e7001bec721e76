"""Pictures of one's own: files made here, edited as the world's own renders are; bad records refused in one line."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from test_structure import compose
from tiny_world import FEW, run

from vqdm.config.options import ModelConfig
from vqdm.errors import UserError
from vqdm.metrics.families import FAMILIES
from vqdm.metrics.probes import records
from vqdm.metrics.probes.asked import Asked
from vqdm.metrics.probes.edits import Edits, draw_edit
from vqdm.metrics.probes.pictures import Pictures
from vqdm.metrics.probes.records import read_records, records_identity, square
from vqdm.models.loader import load_pipeline
from vqdm.models.shipped import evaluators_directory
from vqdm.prompts import load_prompts
from vqdm.stages.graph.experiment import build_graph
from vqdm.tiny.scenes import TINY, render

PROMPTS = [[prompt.id, prompt.text] for prompt in load_prompts(source="tiny", split="test", n=2).prompts]


@pytest.fixture
def file(tmp_path):
    """A JSONL of two renders, the masks of what changes in them, and the edits' truths."""
    lines = []
    for name, caption in PROMPTS:
        edit = draw_edit(name, caption, TINY)
        before, after = render([edit.scene, edit.edited], world=TINY)
        mask = 255 * (before != after).any(-1).astype(np.uint8)
        for kind, pixels in (("image", before), ("truth", after), ("mask", mask)):
            Image.fromarray(pixels).save(tmp_path / f"{name}-{kind}.png")
        files = {kind: f"{name}-{kind}.png" for kind in ("image", "mask", "truth")}
        lines.append({"id": name, "caption": caption, "edited": edit.asked, **files})
    return written(tmp_path, lines)


def written(folder, lines):
    path = folder / "pictures.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def lines_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def pipeline():
    return load_pipeline(ModelConfig(builtin="tiny"), device="cpu")


def test_a_file_of_renders_is_edited_as_the_renders_are(file, pipeline):
    found = Pictures(pipeline, file, guidance=3.0).columns(PROMPTS)
    expected = Edits(pipeline, TINY, evaluators_directory(None), guidance=3.0).columns(PROMPTS)
    assert set(found) == set(FAMILIES["pictures"].metrics)
    for name in ("edit_psnr_in", "region_psnr_in", "region_psnr_out", "reconstruction_psnr"):
        torch.testing.assert_close(found[f"picture_{name}"], expected[name])
    assert (found["picture_gap"] > 0).all() and (found["picture_error"] > 0).all()


def test_without_truths_what_is_inside_the_mask_is_not_scored(file, pipeline, tmp_path):
    written(tmp_path, [{key: row[key] for key in row if key != "truth"} for row in lines_of(file)])
    metrics = ("evaluate.metrics=[pictures]", f"probes.path={file}")
    graph = build_graph(compose("+experiment=tiny_fp", *metrics), cache=tmp_path / "hashes.json")
    assert {name for name in graph.scoring.not_run} == {"picture_edit_psnr_in", "picture_region_psnr_in"}
    assert [prompt.id for prompt in graph.prompts.prompts] == [name for name, _ in PROMPTS]
    found = Pictures(pipeline, file, guidance=0.0).columns(PROMPTS[:1])
    assert set(found) == set(FAMILIES["pictures"].metrics) - set(graph.scoring.not_run)


def test_another_image_is_another_identity(file, tmp_path):
    before = records_identity(read_records(file), tmp_path / "hashes.json")
    assert records_identity(read_records(file), tmp_path / "hashes.json") == before
    Image.new("RGB", (32, 32), "red").save(tmp_path / f"{PROMPTS[0][0]}-image.png")
    assert records_identity(read_records(file), tmp_path / "hashes.json") != before


@pytest.mark.parametrize(
    "change, said",
    [
        ({"caption": None}, "caption is no text"),
        ({"caption": "x" * 1001}, "caption is no text of 1 to 1000 characters"),
        ({"edited": " "}, "edited is no text"),
        ({"edited": PROMPTS[0][1]}, "caption and edited are the same"),
        ({"id": "../x"}, "no plain name"),
        ({"id": PROMPTS[1][0]}, "stands there twice"),
        ({"Mask": "x.png"}, "unknown key 'Mask'"),
        ({"image": "../outside.png"}, "not below the file's own folder"),
        ({"image": "/etc/hostname"}, "not below the file's own folder"),
        ({"image": "link.png"}, "not below the file's own folder"),
        ({"image": 3}, "not below the file's own folder"),
        ({"mask": "none.png"}, "there is no file 'none.png'"),
        ({"mask": "large.png"}, "mask has 40×40 pixels, the image 32×32"),
        ({"mask": "black.png"}, "has nothing white"),
        ({"image": "text.png"}, "cannot be read as PNG or JPEG"),
        ({"image": "cut.png", "mask": "cut.png"}, "cannot be read as PNG or JPEG"),
        ({"image": "image.gif"}, "cannot be read as PNG or JPEG"),
    ],
)  # fmt: skip
def test_a_bad_record_is_refused_in_one_line_that_names_it(change, said, file, tmp_path):
    (tmp_path.parent / "outside.png").write_bytes(b"")
    (tmp_path / "link.png").symlink_to(tmp_path.parent / "outside.png")
    (tmp_path / "text.png").write_text("no image")
    Image.new("L", (40, 40), 255).save(tmp_path / "large.png")
    Image.new("L", (32, 32), 0).save(tmp_path / "black.png")
    Image.new("RGB", (32, 32)).save(tmp_path / "image.gif")
    (tmp_path / "cut.png").write_bytes((tmp_path / f"{PROMPTS[0][0]}-image.png").read_bytes()[:60])
    first, second = lines_of(file)
    number = 2 if "id" in change and change["id"] == PROMPTS[1][0] else 1
    with pytest.raises(UserError, match=rf"pictures\.jsonl line {number}.*{said}") as refused:
        read_records(written(tmp_path, [first | change, second]))
    assert "\n" not in str(refused.value)


def test_sizes_are_limited_and_all_or_none_have_a_truth(file, tmp_path, monkeypatch):
    first, second = lines_of(file)
    second.pop("truth")
    with pytest.raises(UserError, match="line 2: a truth in some records only"):
        read_records(written(tmp_path, [first, second]))
    written(tmp_path, [first, lines_of(file)[0] | {"id": "other"}])
    for limit, said in (("MOST_RECORDS", "more than 1 records"), ("MOST_PIXELS", "32×32"), ("MOST_BYTES", "larger")):
        with monkeypatch.context() as patch, pytest.raises(UserError, match=said):
            patch.setattr(records, limit, 1)
            read_records(file)


def test_the_middle_square_stands_as_the_camera_was_held(tmp_path):
    image = Image.new("RGB", (8, 4))
    image.paste("red", (2, 0, 6, 2))  # the upper half of the middle square
    exif = Image.Exif()
    exif[0x0112] = 3  # held upside down
    image.save(tmp_path / "photo.png", exif=exif)
    found = square(tmp_path / "photo.png", 4, where="here")
    assert (found[2:] == [255, 0, 0]).all() and not found[:2].any()


@pytest.mark.parametrize("more", [["probes.path=x.jsonl"], ["evaluate.metrics=[pictures]"]])
def test_pictures_and_their_file_go_together(more):
    with pytest.raises(UserError, match="go together"):
        compose("+experiment=tiny_fp", *more)


@torch.no_grad()
def test_a_vae_that_overflows_in_float16_runs_in_float32(pipeline, file):
    picture = square(file.parent / f"{PROMPTS[0][0]}-image.png", 32, where="here")[None]
    expected = Asked(pipeline, "pictures").pictures(Asked(pipeline, "pictures").latents(picture))
    pipeline.vae.half()
    try:
        latents = Asked(pipeline, "pictures").latents(picture)
        found = Asked(pipeline, "pictures").pictures(latents)
        assert pipeline.vae.dtype == torch.float16 and latents.dtype == torch.float32
    finally:
        pipeline.vae.float()
    assert np.abs(found.astype(int) - expected).max() <= 4  # the weights were rounded


@pytest.mark.slow
def test_a_run_has_them_among_its_scores(file, tmp_path):
    asked = ("evaluate.metrics=[pictures]", f"probes.path={file}", f"results_dir={tmp_path / 'r'}")
    few = [option for option in FEW if not option.startswith("evaluate.prompts")]
    done = run("+experiment=tiny_codec", "quantize=rtn4", *asked, *few)
    assert done.returncode == 0, done.stderr
    assert "picture" in done.stdout
