"""A compressed pipeline carries all of it; one line switches its cache on, and the images are those of the stage."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from quantized import quantized_unet
from tiny_world import FEW, run

import vqdm
from vqdm.acceleration.activations import input_quantizers
from vqdm.acceleration.branch_cache import cache_of
from vqdm.acceleration.operators import removed_operators
from vqdm.acceleration.stored_cache import CACHE_NAME, Schedule, StoredCache, store_cache
from vqdm.config.options import SamplerConfig
from vqdm.errors import UserError
from vqdm.hub.config import VQDMConfig
from vqdm.hub.quantizer import attach
from vqdm.models.loader import sample
from vqdm.runs.items import write_item
from vqdm.seeds import torch_generator
from vqdm.stages import activations, cache, prune
from vqdm.stages.generate import load_images

CACHED = (*FEW, "quantize=rtn4", "cache=cachequant2", "model.sampler.steps=8", "cache.prompts=4")
CACHED += ("prune=ld10", "prune.score=prediction", "prune.share=0.02", r"prune.keep='resnets|mid_block'")
CACHED += ("activations=dgq6", "activations.prompts=4", "activations.groups=3")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A results directory with a cached row and the compressed pipeline of the same settings."""
    root = tmp_path_factory.mktemp("cached")
    for task in (("+experiment=tiny_codec", "name=cached"), ("+experiment=compress", "model=tiny", "name=compressed")):
        extra = ("output=" + str(root / "pipeline"), "calibration=tiny") if "model=tiny" in task else ()
        done = run(*task, *CACHED, *extra, f"results_dir={root / 'results'}")
        assert done.returncode == 0, done.stderr
    return root


def test_from_pretrained_and_one_line_give_the_stages_own_images(made):
    (images,) = [path for path in made.glob("results/stages/generate/*") if "rtn4" in path.name]
    prompts = json.loads(next(iter(sorted(images.glob("items/*.json")))).read_bytes())["record"]["prompts"]
    pipeline = DiffusionPipeline.from_pretrained(made / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    assert removed_operators(pipeline.unet) and len(input_quantizers(pipeline.unet)) == 3
    vqdm.enable_cache(pipeline)
    sampler = SamplerConfig(steps=8, guidance=3.0)
    generators = [torch_generator(0, "image", name) for name, _ in prompts]
    found = sample(pipeline, [text for _, text in prompts], sampler=sampler, generators=generators)
    expected = load_images(images, range(len(prompts)))
    assert all(np.array_equal(np.asarray(image), other) for image, other in zip(found, expected, strict=True))
    vqdm.disable_cache(pipeline)
    assert cache_of(pipeline.unet) is None


def test_another_scheduler_than_the_saved_caches_is_refused(made):
    from diffusers import EulerDiscreteScheduler

    pipeline = DiffusionPipeline.from_pretrained(made / "pipeline")
    pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    with pytest.raises(UserError, match="8 steps of DDIMScheduler, and the pipeline samples with EulerDiscrete"):
        vqdm.enable_cache(pipeline)
    vqdm.enable_cache(pipeline, steps=9, interval=3)
    assert len(cache_of(pipeline.unet).schedule.full) == 3


def test_the_same_command_again_makes_nothing(made):
    done = run("+experiment=tiny_codec", "name=cached", *CACHED, f"results_dir={made / 'results'}")
    assert done.returncode == 0 and not any(word in done.stderr for word in ("features tiny", "prune ", "activations "))


def test_one_feature_batch_that_is_lost_is_made_again_alike(made):
    (directory,) = made.glob("results/stages/schedule/*")
    before = (directory / "schedule.json").read_bytes()
    (directory / "items" / "000002.json").unlink()
    (directory / "manifest.json").unlink()
    done = run("+experiment=tiny_codec", "name=cached", *CACHED, f"results_dir={made / 'results'}")
    assert done.returncode == 0, done.stderr
    assert (directory / "schedule.json").read_bytes() == before


@pytest.mark.slow
def test_what_is_stopped_between_items_goes_on_to_the_same_bytes(made, tmp_path, monkeypatch):
    """Stops among 39 operators' scores, then after the first of two batches: of the schedule, ranges, corrections."""
    shutil.copytree(made / "results" / "stages" / "calibrate", tmp_path / "stages" / "calibrate")
    left = 0

    def write(*item):
        nonlocal left
        if not left:
            raise RuntimeError("stopped")
        left -= 1
        write_item(*item)

    command = ("+experiment=tiny_codec", "name=cached", *CACHED, f"results_dir={tmp_path}")
    with monkeypatch.context() as patched:
        for module in (prune, cache, activations):
            patched.setattr(module, "write_item", write)
        for allowed, unfinished in ((5, "scores"), (35, "schedule"), (2, "activations"), (2, "correct")):
            left = allowed
            done = run(*command)
            assert done.returncode == 1 and "RuntimeError: stopped" in done.stderr
            assert not list(tmp_path.glob(f"stages/{unfinished}/*/manifest.json"))
    assert run(*command).returncode == 0
    for name in ("scores", "prune", "schedule", "activations", "correct", "generate"):
        for whole in (made / "results" / "stages" / name).glob("*/**/*.*"):
            if {"denoiser", "items"} & set(whole.parts):  # their notes are in any order, or say how long it took
                continue
            if whole.suffix in (".json", ".safetensors", ".png") and whole.name not in ("manifest.json", "errors.json"):
                assert (tmp_path / whole.relative_to(made / "results")).read_bytes() == whole.read_bytes(), whole


@pytest.fixture
def unet():
    unet = quantized_unet("rtn")
    stored = StoredCache(Schedule("DDIMScheduler", 8, tuple(range(8, 0, -1)), (0, 3), 1, "reuse"), 16)
    stored.scales.normal_()
    stored.shifts.normal_()
    store_cache(unet, stored)
    attach(unet)
    return unet


def test_corrections_are_saved_and_say_a_version_that_old_readers_refuse(unet, tmp_path):
    unet.save_pretrained(tmp_path)
    said = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert said["version"] == 3 and said["cache"]["full"] == [0, 3]
    loaded = UNet2DConditionModel.from_pretrained(tmp_path)
    ours, theirs = unet._modules[CACHE_NAME], loaded._modules[CACHE_NAME]
    assert torch.equal(ours.scales, theirs.scales) and torch.equal(ours.shifts, theirs.shifts)
    assert ours.schedule == theirs.schedule and theirs.scales.abs().sum() > 0
    assert CACHE_NAME not in dict(loaded.dequantize().named_modules())


def test_a_cache_without_corrections_leaves_the_version_as_it_was(unet, tmp_path):
    store_cache(unet, StoredCache(unet._modules[CACHE_NAME].schedule))
    attach(unet)
    unet.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["version"] == 1
    assert UNet2DConditionModel.from_pretrained(tmp_path)._modules[CACHE_NAME].channels == 0


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("channels", 10**9), ("channels", "16"), ("full", [1, 2]), ("full", [0, 99]), ("full", "all"), ("depth", 0),
        ("depth", None), ("timesteps", [1, 2]), ("timesteps", [None] * 8), ("predict", "cubic"), ("scheduler", 3),
    ],
)  # fmt: skip
def test_a_damaged_cache_is_refused(unet, key, value):
    fields = unet.hf_quantizer.quantization_config.to_dict()
    fields["cache"] = fields["cache"] | {key: value}
    with pytest.raises(UserError):
        VQDMConfig.from_dict(fields)
