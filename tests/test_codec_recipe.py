"""The recipe of docs/codecs.md for a codec of one's own, followed word for word in a copy of the package."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
STEP = re.compile(r"^\d\. `(?P<file>[^`]+)`, (?P<where>[^:]+):.*?^```\w+\n(?P<body>.*?)^```$", re.M | re.S)
LAYERS = "mid_block.*resnets.0.conv2$"

# What a user does with a codec: a plan, a compressed and distilled model, the same from Python, and without data.
USED = """
import sys
from pathlib import Path

import vqdm  # before diffusers
import hydra
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel

from vqdm import pipeline as stages
from vqdm.config.compose import register_schemas, to_config
from vqdm.models.shipped import builtin_directory
from vqdm.weights.layers import quantized_layers

layers, place, tiny = sys.argv[1], Path(sys.argv[2]), builtin_directory("tiny")
register_schemas()


def run(*overrides):
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(Path("conf").resolve())):
        config = hydra.compose("config", [
            "+experiment=compress", "model=tiny", "quantize=sigma", f"results_dir={place}", f"output={place / 'small'}",
            f"model.layers='{layers}'", "model.sampler.steps=2", "calibration.n=2", "calibration.batch_size=2",
            "threads=1", "tracker=none", *overrides,
        ])
    return stages.run(to_config(config))


def schemes(model):
    return sorted({layer.weight.scheme.name for layer in quantized_layers(model).values()})


run("quantize.spread=2.5", "plan=true")
assert not list(place.glob("stages/*/*/manifest.json"))
run(
    "quantize.spread=2.5", "finetune=both", "finetune.block_steps=2", "finetune.steps=2", "finetune.batch_size=2",
    "finetune.trajectories.n=2", "finetune.trajectories.validation=1", "finetune.check_every=2",
    "finetune.validation_samples=2",
)
assert sorted(folder.name for folder in (place / "stages").iterdir()) == [
    "calibrate", "finetune", "quantize", "trajectories", "tune_blocks",
]
loaded = DiffusionPipeline.from_pretrained(place / "small")
print("loaded", *schemes(loaded.unet))
image = loaded("a red circle", num_inference_steps=1, output_type="np").images[0]
assert image.shape == (32, 32, 3)

compressed = DiffusionPipeline.from_pretrained(tiny, dtype=torch.float32)
vqdm.compress(compressed, "sigma3", ["a red circle"], steps=1, recorded_steps=1, layers=layers)
print("compressed", *schemes(compressed.unet))
free = UNet2DConditionModel.from_pretrained(tiny / "unet", quantization_config=vqdm.VQDMConfig("sigma2", layers=layers))
print("without data", *schemes(free))
"""


def steps() -> list[re.Match]:
    text = (ROOT / "docs" / "codecs.md").read_text(encoding="utf-8")
    return list(STEP.finditer(text.partition("## A codec of your own")[2]))


def follow(step: re.Match, copy: Path) -> None:
    """Do in the copy what a step says: a new file, or lines put into one that is there."""
    file, where, body = copy / step["file"], step["where"], step["body"]
    if where == "new":
        assert not file.exists()
        file.write_text(body, encoding="utf-8")
        return
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    if where == "among the imports":
        at = max(i for i, line in enumerate(lines) if line.startswith("from vqdm.")) + 1
    else:
        how, name = re.fullmatch(r"(above|in) `(\w+)`", where).groups()
        at = next(i for i, line in enumerate(lines) if re.match(rf"{name}\b.*=", line)) + (how == "in")
    file.write_text("".join([*lines[:at], body, *lines[at:]]), encoding="utf-8")


@pytest.fixture(scope="module")
def package(tmp_path_factory) -> Path:
    copy = tmp_path_factory.mktemp("package")
    for folder in ("vqdm", "conf"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__", "tiny_turbo"))
    for step in steps():
        follow(step, copy)
    return copy


def test_the_recipe_has_all_its_steps():
    assert [(step["file"], step["where"]) for step in steps()] == [
        ("vqdm/codecs/sigma.py", "new"),
        ("vqdm/config/codecs.py", "above `OPTIONS`"),
        ("vqdm/config/codecs.py", "in `OPTIONS`"),
        ("vqdm/codecs/cards.py", "among the imports"),
        ("vqdm/codecs/cards.py", "in `CODECS`"),
        ("conf/quantize/sigma.yaml", "new"),
    ]


@pytest.mark.slow
def test_a_made_up_codec_is_planned_encoded_saved_loaded_distilled(package, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(package), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", USED, LAYERS, str(tmp_path)],
        cwd=package, env=environment, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    said = done.stdout.splitlines()
    assert any("sigma4" in line and "mid_block" in line for line in said), "the plan lists the layers with their scheme"
    assert said[-3:] == ["loaded sigma4", "compressed sigma3", "without data sigma2"]
