"""From a user's own model, as a directory or as one file, to a small pipeline that diffusers loads."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import tiny_world
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from tiny_world import ROOT, run_script

import vqdm
from vqdm.config.codecs import parse_scheme
from vqdm.config.options import Config
from vqdm.errors import UserError
from vqdm.hub.pipelines import quiet_diffusers
from vqdm.models.shipped import builtin_directory
from vqdm.seeds import torch_generator
from vqdm.stages.compress import show_picture
from vqdm.weights.bits import count_bits
from vqdm.weights.layers import quantized_layers

CAPTIONS = ["a red circle above a blue square", "a big green triangle"]
QUICK = ["quantize=rtn4", "calibration.n=4", "model.sampler.steps=4", "tracker=none", "threads=1"]


def tiny():
    with quiet_diffusers():
        pipeline = DiffusionPipeline.from_pretrained(builtin_directory("tiny"), dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def image(pipeline, **options) -> np.ndarray:
    generator = torch.Generator().manual_seed(0)
    made = pipeline(CAPTIONS[0], num_inference_steps=4, guidance_scale=3.0, generator=generator, **options)
    return np.asarray(made.images[0]).astype(int)


def run(*overrides, ok=True):
    done = tiny_world.run("+experiment=compress", *overrides)
    assert (done.returncode == 0) == ok, done.stderr
    return done


@pytest.fixture(scope="module")
def single_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("original") / "tiny.safetensors"
    assert run_script("scripts/to_single_file.py", str(builtin_directory("tiny")), str(file)).returncode == 0
    return file


@pytest.fixture(scope="module")
def compressed(single_file, tmp_path_factory):
    """A single file compressed by the command; the directory it wrote, and what it said."""
    results = tmp_path_factory.mktemp("results")
    output = results / "small"
    done = run(
        f"model.path={single_file}", f"model.configs={builtin_directory('tiny')}", f"output={output}",
        f"results_dir={results}", *QUICK,
    )  # fmt: skip
    return output, done, results


def test_a_single_file_becomes_a_pipeline_that_diffusers_loads(compressed):
    output, done, _ = compressed
    lines = [line for line in done.stderr.replace("\r", "\n").splitlines() if " bits, error " in line]
    assert len(lines) == 118 and all("left" in line for line in lines)
    assert (
        "license" not in (output / "README.md").read_text()
        and "rtn4 (118 layers)" in (output / "README.md").read_text()
    )


def test_the_card_shows_what_the_written_pipeline_makes(compressed):
    output, _, _ = compressed
    caption = re.search(r"Made by this pipeline in 4 steps: (.*)", (output / "README.md").read_text())[1]
    assert "![picture.png](picture.png)" in (output / "README.md").read_text()
    with quiet_diffusers():
        pipeline = DiffusionPipeline.from_pretrained(output)
    pipeline.set_progress_bar_config(disable=True)
    noise = torch_generator(0, "card")
    (made,) = pipeline(caption, num_inference_steps=4, guidance_scale=5.0, generator=noise).images
    shown = Image.open(output / "picture.png")
    assert shown.size == (32, 32) and np.abs(np.asarray(shown).astype(int) - np.asarray(made)).max() <= 1


def test_a_picture_that_cannot_be_made_costs_nothing_but_the_picture(compressed, monkeypatch, caplog):
    def sample(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.\nMore of it")

    before = (compressed[0] / "README.md").read_bytes()
    monkeypatch.setattr("vqdm.models.loader.sample", sample)
    with caplog.at_level("WARNING", logger="vqdm"):
        show_picture(None, compressed[0], Config(picture=True))
    assert (compressed[0] / "README.md").read_bytes() == before
    assert "the card has no picture (CUDA out of memory. More of it)" in caplog.text


@pytest.mark.slow
def test_a_process_that_knows_only_vqdm_and_diffusers_makes_the_same_image(compressed):
    output = compressed[0]
    code = f"""
import vqdm, torch
from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained({str(output)!r})
made = pipeline({CAPTIONS[0]!r}, num_inference_steps=4, guidance_scale=3.0, generator=torch.Generator().manual_seed(0))
made.images[0].save({str(output.parent / "image.png")!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    from PIL import Image

    with quiet_diffusers():
        pipeline = DiffusionPipeline.from_pretrained(output)
    pipeline.set_progress_bar_config(disable=True)
    assert len(quantized_layers(pipeline.unet)) == 118
    found = np.asarray(Image.open(output.parent / "image.png")).astype(int)
    assert np.abs(found - image(pipeline)).max() <= 1


@pytest.mark.slow
def test_the_readmes_lines_go_from_load_to_image(compressed, tmp_path):
    readme = (ROOT / "README.md").read_text()
    code = re.search(r"```python\n(import vqdm\n.*?)```", readme, re.DOTALL)[1]
    assert len([line for line in code.splitlines() if line]) <= 5
    (tmp_path / "my_model_3bit").symlink_to(compressed[0])
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "image.png").stat().st_size > 100


def test_the_stages_file_is_what_the_pipeline_holds(compressed):
    output, _, results = compressed
    stage = next((results / "stages" / "quantize").iterdir()) / "denoiser"
    with quiet_diffusers():
        ours = DiffusionPipeline.from_pretrained(output).unet.state_dict()
        theirs = type(DiffusionPipeline.from_pretrained(output).unet).from_pretrained(stage).state_dict()
    assert list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_plan_foretells_the_file(compressed, single_file):
    output, _, results = compressed
    run(
        f"model.path={single_file}", f"model.configs={builtin_directory('tiny')}", f"results_dir={results}",
        "plan=true", *QUICK,
    )  # fmt: skip
    plan = json.loads((results / "plans" / "compress.json").read_text())
    assert plan["bytes"] == (output / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size
    assert {stage["name"]: stage["done"] for stage in plan["stages"]} == {"calibrate": True, "quantize": True}


def test_exported_it_is_a_plain_pipeline_of_the_same_images(compressed, tmp_path):
    export = ("scripts/export_plain.py", str(compressed[0]), str(tmp_path / "plain"))
    assert run_script(*export).returncode == 0
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "unet" / "config.json").read_text())
    with quiet_diffusers():
        plain = DiffusionPipeline.from_pretrained(tmp_path / "plain", dtype=torch.float32)
        small = DiffusionPipeline.from_pretrained(compressed[0], dtype=torch.float32)
    plain.set_progress_bar_config(disable=True)
    small.set_progress_bar_config(disable=True)
    assert not quantized_layers(plain.unet)
    assert np.abs(image(plain) - image(small)).max() <= 8  # its weights and text encoders are rounded to fp16
    done = run_script(*export)
    assert done.returncode == 1 and "exists already" in done.stderr


def test_nothing_else_is_overwritten(single_file, tmp_path):
    (tmp_path / "precious.txt").write_text("mine")
    done = run(
        f"model.path={single_file}", f"model.configs={builtin_directory('tiny')}", f"output={tmp_path}",
        f"results_dir={tmp_path / 'results'}", *QUICK, ok=False,
    )  # fmt: skip
    assert done.stderr.splitlines()[-1].startswith("error: output=") and "another place" in done.stderr
    assert (tmp_path / "precious.txt").read_text() == "mine"


def test_nothing_to_quantize_is_refused(tmp_path):
    for more in ([], ["plan=true"]):
        model = f"model.path={builtin_directory('tiny')}"
        done = run(model, "quantize=none", f"results_dir={tmp_path}", *more, ok=False)
        assert done.stderr.splitlines()[-1].startswith("error: quantize=none")


def test_without_a_model_the_command_says_what_to_give(tmp_path):
    done = run(f"results_dir={tmp_path}", ok=False)
    assert "model.path" in done.stderr.splitlines()[-1]


def test_compress_from_python_in_place(tmp_path):
    pipeline = tiny()
    original = image(pipeline)
    assert vqdm.compress(pipeline, "trellis4", CAPTIONS, steps=4, batch_size=2, folder=tmp_path / "work") is pipeline
    assert count_bits(pipeline.unet).bits_quantized == pytest.approx(4.0, abs=2e-3)
    assert np.abs(image(pipeline) - original).mean() < 10
    with quiet_diffusers():
        pipeline.save_pretrained(tmp_path / "saved")
        again = DiffusionPipeline.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    again.set_progress_bar_config(disable=True)
    assert np.abs(image(again) - image(pipeline)).max() <= 1
    with pytest.raises(UserError, match="quantized already"):
        vqdm.compress(pipeline, "rtn4", CAPTIONS)


def test_a_folder_goes_on_with_the_same_call_and_only_with_it(tmp_path):
    pipelines = [tiny(), tiny(), tiny()]
    options = {"steps": 2, "batch_size": 2, "recorded_steps": 1, "folder": tmp_path}
    vqdm.compress(pipelines[0], "rtn4", CAPTIONS, **options)
    layers = next(tmp_path.glob("rtn4-*/quantized/layers"))
    written = {file: file.stat().st_mtime_ns for file in layers.iterdir()}
    vqdm.compress(pipelines[1], "rtn4", CAPTIONS, **options)
    assert {file: file.stat().st_mtime_ns for file in layers.iterdir()} == written
    vqdm.compress(pipelines[2], "rtn4", CAPTIONS[::-1], **options)
    assert len(list(tmp_path.iterdir())) == 2
    states = [pipeline.unet.state_dict() for pipeline in pipelines[:2]]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_another_scheduler_calibrates_anew(tmp_path):
    from diffusers import EulerDiscreteScheduler

    options = {"steps": 2, "batch_size": 2, "recorded_steps": 1, "folder": tmp_path}
    vqdm.compress(tiny(), "rtn4", CAPTIONS, **options)
    pipeline = tiny()
    pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    vqdm.compress(pipeline, "rtn4", CAPTIONS, **options)
    assert len(list(tmp_path.iterdir())) == 2


def image_to_image(pipeline):
    from diffusers import StableDiffusionXLImg2ImgPipeline

    return StableDiffusionXLImg2ImgPipeline(**pipeline.components)


IMPOSSIBLE = [
    ({"scheme": "magic"}, "is no scheme"),
    ({"scheme": "rtn0"}, "bits=0 must be 1 to 8"),
    ({"scheme": "rtn4g64"}, "group_size 64 does not divide in_features 288"),
    ({"prompts": [""]}, "strings with text"),
    ({"layers": "nothing_like_this"}, "selects no layer"),
    ({"steps": 0}, "steps=0"),
    ({"batch_size": 0}, "batch_size=0"),
    ({"recorded_steps": 0}, "recorded_steps=0"),
    ({"steps": 1001}, "steps=1001: .* 1000 timesteps"),
    ({"size": 33}, "size=33 must be a multiple of"),
    ({"guidance": float("nan")}, "guidance=nan"),
]


def test_what_compress_cannot_do_is_said_before_any_work(tmp_path):
    from peft import LoraConfig

    pipeline = tiny()
    for options, said in IMPOSSIBLE:
        with pytest.raises(UserError, match=said):
            vqdm.compress(pipeline, **({"scheme": "rtn4", "prompts": CAPTIONS, "folder": tmp_path} | options))
    for other, said in ((pipeline.unet, "no unet or transformer"), (image_to_image(pipeline), "from text alone")):
        with pytest.raises(UserError, match=said):
            vqdm.compress(other, "rtn4", CAPTIONS, folder=tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be made"):
        vqdm.compress(pipeline, "rtn4", CAPTIONS, folder=tmp_path / "file")
    (tmp_path / "file").unlink()
    pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(UserError, match="carries a LoRA"):
        vqdm.compress(pipeline, "rtn4", CAPTIONS, folder=tmp_path)
    assert not quantized_layers(pipeline.unet) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("scheme", ["rtn4", "trellis3"])
def test_quantized_on_the_fly_without_data(scheme, tmp_path):
    from diffusers import UNet2DConditionModel

    config = vqdm.VQDMConfig(scheme, decode="cached")
    unet = UNet2DConditionModel.from_pretrained(
        builtin_directory("tiny") / "unet", quantization_config=config, dtype=torch.float32
    )
    assert len(quantized_layers(unet)) == 118 and {p.dtype for p in unet.parameters()} == {torch.float32}
    assert {layer.decode for layer in quantized_layers(unet).values()} == {"cached"}
    unet.save_pretrained(tmp_path)
    again = UNet2DConditionModel.from_pretrained(tmp_path)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in unet.state_dict().items())


def test_codecs_that_need_data_say_so():
    from diffusers import UNet2DConditionModel

    with pytest.raises(UserError, match="gptq needs calibration data"):
        UNet2DConditionModel.from_pretrained(
            builtin_directory("tiny") / "unet", quantization_config=vqdm.VQDMConfig("gptq4")
        )


PRESETS = ("rtn3", "rtn4", "gptq3", "gptq4", "vq2", "vq3", "vq4", "trellis2", "trellis3", "trellis4")


@pytest.mark.parametrize("name", PRESETS)
def test_a_schemes_name_means_what_the_preset_means(name):
    from composed import compose

    assert parse_scheme(name) == compose(f"quantize={name}").quantize


def test_other_names_of_schemes():
    assert parse_scheme("3x8g8") == parse_scheme("vq3")
    assert parse_scheme("rtn4g64").group_size == 64 and parse_scheme("trellis2.5").bits == 2.5
    assert parse_scheme("adaround4").batch_size == 16
    for name in ("rtn", "rtn9", "vq2.5", "3x8g7", "trellis", "3x20g8", "rtn4g0"):
        with pytest.raises(UserError):
            parse_scheme(name)
