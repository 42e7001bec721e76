"""Distillation as stages: the way a user goes it, and every option once, on a few layers of the tiny model."""

import json
from pathlib import Path

import pytest
import torch
from composed import compose
from PIL import Image
from safetensors.torch import load_file
from tiny_world import run

from vqdm import pipeline
from vqdm.calibration.recording import OUTPUT, play
from vqdm.errors import UserError
from vqdm.models.loader import load_pipeline
from vqdm.prompts import load_prompts
from vqdm.runs import processes
from vqdm.runs.store import Store
from vqdm.runs.tracker import NullTracker
from vqdm.stages.graph.experiment import build_stages
from vqdm.stages.make import ensure_denoiser
from vqdm.stages.pipelines import Models
from vqdm.stages.trajectories import trajectories_in
from vqdm.tiny.data import scene_pixels

LAYERS = r"(mid_block|up_blocks\.1).*(resnets\.0\.conv2|attentions\.0.*attn1\.to_(q|k|v))$"
SMALL = (  # 2.5 bits, as few layers carry the whole table
    "quantize=trellis2", "quantize.bits=2.5", f"model.layers='{LAYERS}'", "model.sampler.steps=4", "calibration.n=4",
    "calibration.batch_size=4", "evaluate.prompts.n=8", "evaluate.batch_size=8", "evaluate.bootstrap=3", "threads=1",
    "tracker=none",
)  # fmt: skip
DISTIL = (
    "finetune=both", "finetune.block_steps=5", "finetune.steps=6", "finetune.learning_rate=1e-3", "finetune.warmup=0",
    "finetune.batch_size=4", "finetune.check_every=3", "finetune.validation_samples=4", "finetune.trajectories.n=4",
    "finetune.trajectories.validation=2", "finetune.trajectories.source=tiny", "finetune.trajectories.batch_size=4",
    "finetune.train.rest=false", "finetune.train.norms=false", "finetune.train.biases=false",
)  # fmt: skip
WEIGHTS = "denoiser/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    results = tmp_path_factory.mktemp("distilled")
    done = run("+experiment=tiny_codec", *SMALL, *DISTIL, f"results_dir={results}")
    assert done.returncode == 0, done.stderr
    return results


def only(directory: Path, pattern: str) -> Path:
    (found,) = directory.glob(pattern)
    return found


def fingerprint(directory: Path) -> str:
    return json.loads((directory / "config.json").read_text())["fingerprint"]


def test_the_stages_follow_each_other(finished):
    stages = {p.parent.parent.name: p.parent for p in finished.glob("stages/*/*/manifest.json")}
    made = {"calibrate", "quantize", "tune_blocks", "trajectories", "finetune", "evaluate"}
    assert made <= stages.keys()
    weights = {str(path.relative_to(stages["quantize"])) for path in stages["quantize"].rglob("*.safetensors")}
    assert weights == {WEIGHTS}, "each once"
    tuned = {path.name for path in stages["tune_blocks"].iterdir() if path.name != ".lock"}
    assert tuned == {"config.json", "manifest.json", "blocks.json", "errors.json", "denoiser"}
    config = json.loads((stages["finetune"] / "config.json").read_text())
    assert config["upstream"]["student"] == fingerprint(stages["tune_blocks"])
    images = json.loads((only(finished, "stages/generate/*finetuned*") / "config.json").read_text())
    assert images["upstream"]["finetune"] == fingerprint(stages["finetune"])
    record = json.loads(only(finished, "runs/tiny_codec/*.json").read_text())
    before = json.loads((stages["quantize"] / "manifest.json").read_text())["summary"]
    for bits in ("bits_per_weight", "bits_quantized", "bits_as_in_paper"):
        assert record["bits"][bits] == before[bits]
    assert record["bits"]["validation_loss"] <= record["bits"]["validation_loss_before"]
    history = json.loads((stages["finetune"] / "history.json").read_text())
    assert len(history["losses"]) == 6 and [found["step"] for found in history["validations"]] == [0, 3, 6]
    assert {path.name for path in (stages["finetune"] / "images").iterdir()} == {
        f"{step:06d}-{i}.png" for step in (0, 3, 6) for i in (0, 1)
    }


def test_codes_stay_and_scales_change(finished):
    before, tuned, after = (
        load_file(only(finished, f"stages/{stage}/*/{WEIGHTS}")) for stage in ("quantize", "tune_blocks", "finetune")
    )
    assert before.keys() == tuned.keys() == after.keys()
    codes = [name for name in before if name.endswith(".codes")]
    assert len(codes) == 8 and all(torch.equal(before[name], after[name]) for name in codes)
    scales = [name for name in before if name.endswith(".scales")]
    assert any(not torch.equal(before[name], tuned[name]) for name in scales)
    assert all(not torch.equal(tuned[name], after[name]) for name in scales)
    assert all(before[name].dtype == after[name].dtype for name in before)


def test_a_second_run_makes_nothing_again(finished):
    def files():
        found = (p for p in (finished / "stages").rglob("*") if p.is_file() and p.name != ".lock")
        return {path: path.stat().st_mtime_ns for path in found}

    before = files()
    done = run("+experiment=tiny_codec", *SMALL, *DISTIL, f"results_dir={finished}")
    assert done.returncode == 0, done.stderr
    assert files() == before


class Tracker(NullTracker):
    """Keeps what it is told; ends a run at a step, as a kill would."""

    def __init__(self, until=None):
        self.told, self.until = [], until

    def log(self, values):
        self.told.append(values)
        if self.until is not None and values.get("finetune/step") == self.until:
            raise KeyboardInterrupt


def distil(results: Path, *changes: str, until=None):
    """End to end alone, in this process, up to the denoiser: the stage's directory, and its losses."""
    config = compose("+experiment=tiny_codec", *SMALL, *DISTIL, "finetune.block_steps=0", *changes)
    store = Store(results)
    stages = build_stages(config, cache=store.hashes).quantization
    models = Models(config, "cpu")
    directory = ensure_denoiser(config, store, stages, models, environment={}, tracker=Tracker(until))
    return directory, json.loads((directory / "history.json").read_text())


@pytest.fixture(scope="module")
def plain(finished):
    """End to end alone, from the same quantized model."""
    return distil(finished)


def test_what_saves_memory_changes_no_loss(finished, plain):
    _, history = distil(finished, "finetune.checkpointing=true", "finetune.micro_batch_size=1")
    assert history["losses"][:3] == pytest.approx(plain[1]["losses"][:3], rel=1e-5)


@pytest.mark.parametrize("options", ["precision=bfloat16", "weighting=min_snr feature_weight=0.1", "tune_codes=true"])
def test_options_train(options, finished, plain):
    changes = [f"finetune.{option}" for option in options.split()]
    directory, history = distil(finished, *changes, "finetune.steps=3", "finetune.code_every=1")
    losses = [found["loss"] for found in history["validations"]]
    assert directory != plain[0] and losses[0] != losses[1] < 1.1 * losses[0]
    assert (history["losses"][0] == plain[1]["losses"][0]) == (options == "tune_codes=true")


def test_data_is_the_captions_own_images(finished, tmp_path):
    """At the last timestep there is next to no noise: what is decoded is the scene. Both halves are the same."""
    changes = ("finetune.trajectories.along=data", "finetune.steps=2", "finetune.check_every=2")
    distil(finished, *changes)
    config = compose("+experiment=tiny_codec", *SMALL, *DISTIL, *changes)
    found = trajectories_in(only(finished, "stages/trajectories/tiny-data-*"), "train")
    batch = found.batch([12, 13, 14, 15], device="cpu")
    assert len(found) == 4 * 4 and set(batch.timesteps.tolist()) == {1}
    own = load_pipeline(config.model, device="cpu")
    with torch.no_grad():
        assert torch.allclose(play(own.unet, batch.arguments), batch.target, atol=1e-5)
        latents = batch.arguments["sample"]
        assert torch.equal(latents[0::2], latents[1::2])
        pictures = own.vae.decode(latents[0::2] / own.vae.config.scaling_factor).sample
    prompts = load_prompts(source="tiny", n=6, order="shuffled", seed=1).prompts[:4]
    scenes = [torch.from_numpy(scene_pixels(p.id)).permute(2, 0, 1).float() / 127.5 - 1 for p in prompts]
    errors = torch.stack([(pictures - scene).square().mean((1, 2, 3)) for scene in scenes], 1)
    assert errors.argmin(1).tolist() == [0, 1, 2, 3] and float(errors.diagonal().max()) < 0.05

    for prompt in prompts:
        Image.fromarray(scene_pixels(prompt.id)).save(tmp_path / f"{prompt.id}.png")
    distil(finished, *changes, f"finetune.trajectories.images={tmp_path}")
    both = [trajectories_in(path, "train") for path in finished.glob("stages/trajectories/tiny-data-*")]
    assert len(both) == 2
    one, other = (samples.batch(range(16), device="cpu") for samples in both)
    assert torch.equal(one.target, other.target) and torch.equal(one.arguments["sample"], other.arguments["sample"])


OWN = ("finetune.trajectories.along=student", "finetune.steps=12", "finetune.refresh=2", "finetune.check_every=5")


def test_the_students_own_trajectories_are_recorded_anew(finished):
    directory, history = distil(finished, *OWN)
    assert len(history["losses"]) == 12
    rounds = sorted(path.name for path in directory.glob("round-*"))
    assert rounds == ["round-0005"], "the last checkpoint before step 11 is that of step 10"
    assert [path.name[:10] for path in (directory / "items").glob("round-*")] == ["round-0005"]
    own = trajectories_in(directory, "round-0005").batch([0, 3], device="cpu")
    original = load_pipeline(compose(*SMALL).model, device="cpu").unet
    with torch.no_grad():
        assert torch.allclose(play(original, own.arguments), own.target, atol=1e-5), "the teacher's predictions"


def test_own_trajectories_too_go_on_where_they_were_cut_off(finished, tmp_path):
    """Also where a checkpoint lies several recordings back."""
    whole, history = distil(finished, *OWN)
    for stage in ("calibrate", "quantize", "trajectories"):
        (tmp_path / "stages").mkdir(exist_ok=True)
        (tmp_path / "stages" / stage).symlink_to(finished / "stages" / stage)
    for step in (3, 10):
        with pytest.raises(KeyboardInterrupt):
            distil(tmp_path, *OWN, until=step)
    again, others = distil(tmp_path, *OWN)
    one, other = load_file(whole / WEIGHTS), load_file(again / WEIGHTS)
    assert again.is_relative_to(tmp_path) and history == others
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_few_step_model_without_guidance(finished):
    changes = (
        "model=tiny_turbo", f"model.layers='{LAYERS}'", "model.sampler.steps=2",
        "finetune.trajectories.sampler_steps=[2,1]", "finetune.steps=3",
    )  # fmt: skip
    directory, history = distil(finished, *changes)
    found = trajectories_in(only(finished, "stages/trajectories/tiny_turbo-*"), "train")
    assert len(found) == 4 * (2 + 1) and found.batch([0, 9], device="cpu").rows_each == 1
    names = {path.name for path in only(finished, "stages/trajectories/tiny_turbo-*").glob("train/*")}
    assert names == {"000000-001.safetensors", "000000-002.safetensors"}
    assert len(history["losses"]) == 3 and directory.name.startswith("tiny_turbo-")
    assert OUTPUT not in found.batch([0], device="cpu").arguments


REFUSED = {
    "nothing quantized": (["quantize=none"], "finetune needs a quantized model"),
    "negative steps": (["finetune.steps=-1"], "finetune.steps=-1"),
    "all constant and beyond": (["finetune.decay_from=1.5"], "finetune.decay_from=1.5"),
    "nothing to train": (["finetune.train.codebooks=false", "finetune.train.scales=false"], "nothing to train"),
    "no rate": (["finetune.learning_rate=0"], "finetune.learning_rate=0"),
    "no micro-batch": (["finetune.micro_batch_size=0"], "finetune.micro_batch_size=0"),
    "no recorded steps": (["finetune.trajectories.recorded_steps=0"], "recorded_steps=0"),
    "no steps to sample in": (["finetune.trajectories.sampler_steps=[]"], "sampler_steps=[]"),
    "endless captions": (["finetune.trajectories.n=null"], "finetune.trajectories.n"),
    "images for nothing": (["finetune.trajectories.images=/tmp"], "along=data"),
    "data without images": (
        ["finetune.trajectories.along=data", "finetune.trajectories.source=builtin"], "finetune.trajectories.images",
    ),
    "too few captions": (
        ["finetune.trajectories.source=builtin", "finetune.trajectories.n=255"], "has 256 prompts",
    ),
    "missing image": (
        ["finetune.trajectories.along=data", "finetune.trajectories.images=nowhere"], "nowhere has no train-",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_any_work(case, tmp_path):
    changes, said = REFUSED[case]
    with pytest.raises(UserError) as caught:
        pipeline.run(compose("+experiment=tiny_codec", *SMALL, *DISTIL, *changes, f"results_dir={tmp_path}"))
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert not list(tmp_path.glob("stages/*"))


@pytest.mark.parametrize("option", ["weighting=min_snr", "trajectories.along=data"])
def test_what_flow_matching_lacks_is_refused_before_any_work(option, tmp_path):
    config = compose("+experiment=tiny_codec", *SMALL, *DISTIL, f"finetune.{option}")
    pipeline._check_finetune(config, tmp_path)
    (tmp_path / "scheduler").mkdir()
    about = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match=f"finetune.{option} needs a noise schedule"):
        pipeline._check_finetune(config, tmp_path)


def test_a_missing_image_is_one_line_of_the_command(tmp_path):
    changes, said = REFUSED["missing image"]
    done = run("+experiment=tiny_codec", *SMALL, *DISTIL, *changes, f"results_dir={tmp_path}")
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert done.returncode != 0 and len(lines) == 1 and lines[0].startswith("error: ") and said in lines[0]


def test_processes_must_share_a_step_equally(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match="batch_size=4 cannot be shared by 3 processes"):
        pipeline.run(compose("+experiment=tiny_codec", *SMALL, *DISTIL, f"results_dir={tmp_path}"))
    assert not list(tmp_path.glob("stages/*"))
    processes.check_batch_size(6)
