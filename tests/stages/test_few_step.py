"""A few-step student is a model: made by its stages, compressed, saved and loaded as any other."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from composed import compose
from diffusers import DDIMScheduler, StableDiffusionXLPipeline
from safetensors.torch import load_file
from tiny_world import FEW, ROOT, run
from unets import small_unet

from vqdm.config.options import ModelConfig
from vqdm.errors import UserError
from vqdm.few_step.train import Training
from vqdm.models.loader import denoiser_of, load_pipeline
from vqdm.models.location import model_directory
from vqdm.runs.device import resolve_device
from vqdm.runs.store import Store
from vqdm.stages.few_step import first_weights
from vqdm.stages.graph.experiment import build_graph
from vqdm.stages.make import ensure_student

SMALL = (
    "few_step.pairs=6", "few_step.validation=2", "few_step.pairs_batch_size=4", "few_step.teacher_steps=2",
    "few_step.steps=4", "few_step.batch_size=2", "few_step.check_every=2", "few_step.warmup=1", "few_step.keep=last",
)  # fmt: skip
# a student's own steps, which the tests' four would replace
RUN = (*(option for option in FEW if not option.startswith("model.sampler.steps")), *SMALL, "evaluate.prompts.n=4")


@pytest.fixture(scope="module")
def compressed(tmp_path_factory):
    """(results, pipeline): a student at 4 bits, written for users."""
    results, output = (tmp_path_factory.mktemp("few_step") / name for name in ("results", "out"))
    asked = ("task=compress", "quantize=rtn4", "calibration=tiny", "few_step=direct", f"output={output}")
    done = run(*asked, *RUN, f"results_dir={results}")
    assert done.returncode == 0, done.stderr
    return results, output


def stage_of(results: Path, name: str) -> Path:
    (found,) = (results / "stages" / name).iterdir()
    return found


def test_a_student_is_a_pipeline_with_a_scheduler_of_its_own(compressed):
    directory = stage_of(compressed[0], "few_step")
    pipeline = StableDiffusionXLPipeline.from_pretrained(directory / "pipeline", local_files_only=True)
    assert isinstance(pipeline.scheduler, DDIMScheduler)
    asked = {key: pipeline.scheduler.config[key] for key in ("timestep_spacing", "clip_sample", "set_alpha_to_one")}
    assert asked == {"timestep_spacing": "trailing", "clip_sample": False, "set_alpha_to_one": True}
    assert str(ROOT) not in "".join(path.read_text() for path in directory.rglob("*.json"))
    assert not (directory / "checkpoints").exists() or not any((directory / "checkpoints").iterdir())
    history = json.loads((directory / "history.json").read_text())
    assert len(history["losses"]) == 4 and [found["step"] for found in history["validations"]] == [0, 2, 4]


def test_a_student_is_calibrated_in_its_own_steps_and_compressed(compressed):
    results, output = compressed
    calls = list((stage_of(results, "calibrate") / "calls").iterdir())
    assert {path.name.split("-")[-1] for path in calls} == {"00.safetensors"}, "one step a batch"
    assert stage_of(results, "quantize").name.startswith("tiny-direct-rtn4")
    pipeline = StableDiffusionXLPipeline.from_pretrained(output, local_files_only=True)
    weights = load_pipeline_of(stage_of(results, "few_step")).state_dict()
    found, teacher = pipeline.unet.conv_in.weight, tiny_weight("conv_in.weight")
    assert torch.equal(found.float(), weights["conv_in.weight"].float()), "what is not quantized is the student's"
    assert not torch.equal(found.float(), teacher.float())
    image = pipeline("a red circle", num_inference_steps=1, guidance_scale=0.0, output_type="np").images
    assert image.shape == (1, 32, 32, 3)


def load_pipeline_of(directory: Path):
    return StableDiffusionXLPipeline.from_pretrained(directory / "pipeline", local_files_only=True).unet


def tiny_weight(name: str) -> torch.Tensor:
    pipeline = load_pipeline(ModelConfig(builtin="tiny"), device="cpu")
    return denoiser_of(pipeline).state_dict()[name]


def test_a_student_is_scored_against_its_teacher(compressed):
    results = compressed[0]
    asked = ("+experiment=tiny_fp", "few_step=direct", "few_step.originals=teacher")
    done = run(*asked, *RUN, f"results_dir={results}")
    assert done.returncode == 0, done.stderr
    assert "few_step: " not in done.stderr, "the student is there"
    made = {path.name.rpartition("-")[0] for path in (results / "stages" / "generate").iterdir()}
    assert made == {"tiny-fp", "tiny-direct-fp"}


@pytest.mark.slow
def test_a_compressed_student_is_trained_by_its_many_step_teacher(compressed):
    results, _ = compressed
    asked = (
        "+experiment=tiny_rtn4",
        "few_step=direct",
        "finetune=matching",
        "finetune.steps=2",
        "finetune.batch_size=2",
        "finetune.critic_first=3",
    )
    done = run(*asked, *RUN, f"results_dir={results}")
    assert done.returncode == 0, done.stderr
    made, before = stage_of(results, "finetune"), stage_of(results, "quantize")
    assert made.name.startswith("tiny-direct-rtn4-matched")
    history = json.loads((made / "history.json").read_text())
    assert len(history["losses"]) == 2 and not (made / "checkpoints").exists()
    tuned, plain = (load_file(path / "denoiser" / "diffusion_pytorch_model.safetensors") for path in (made, before))
    changed = {name for name, tensor in tuned.items() if not torch.equal(tensor, plain[name])}
    assert changed and not any(name.endswith("codes") for name in changed)


def test_a_killed_student_goes_on_to_the_same_bytes(compressed, tmp_path, monkeypatch):
    config = compose("quantize=rtn4", "calibration=tiny", "few_step=direct", *RUN, f"results_dir={tmp_path}")
    store, save = Store(tmp_path), Training._save
    shutil.copytree(compressed[0] / "stages" / "pairs", tmp_path / "stages" / "pairs")

    def made():
        stage = build_graph(config, cache=store.hashes).images
        return ensure_student(config, store, stage, device=resolve_device("cpu", threads=1), environment={})

    def killed(self, history):
        save(self, history)
        if history.step == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Training, "_save", killed)
    with pytest.raises(KeyboardInterrupt):
        made()
    monkeypatch.setattr(Training, "_save", save)
    ours, whole = model_directory(made()), stage_of(compressed[0], "few_step") / "pipeline"
    files = [path.relative_to(whole) for path in whole.rglob("*") if path.is_file()]
    assert {name for name in files if (ours / name).read_bytes() != (whole / name).read_bytes()} == set()


def test_a_newer_option_changes_a_students_identity_only_if_it_is_used(tmp_path):
    def identity(*more: str) -> str:
        config = compose("quantize=rtn4", "calibration=tiny", "few_step=dmd", "few_step.start=tiny_turbo", *more)
        return build_graph(config, cache=tmp_path / "hashes").named()["few_step"].fingerprint

    assert identity() == identity("few_step.critic_first=0") != identity("few_step.critic_first=5")


def test_sampling_a_student_otherwise_does_not_train_it_anew(tmp_path):
    def stages(*overrides):
        config = compose("quantize=rtn4", "calibration=tiny", "few_step=reflow", *overrides)
        return build_graph(config, cache=tmp_path / "hashes").named()

    two, one, longer = stages(), stages("model.sampler.steps=1"), stages("few_step.steps=300")
    assert list(two)[:3] == ["pairs", "few_step", "calibrate"]
    assert two["few_step"].fingerprint == one["few_step"].fingerprint
    assert two["calibrate"].fingerprint != one["calibrate"].fingerprint
    assert two["pairs"].fingerprint == longer["pairs"].fingerprint
    assert two["few_step"].fingerprint != longer["few_step"].fingerprint
    other = stages("few_step=lcm", "model.sampler.steps=2")
    assert other["few_step"].fingerprint != stages("few_step=lcm")["few_step"].fingerprint, "it learns those steps"
    assert (
        other["few_step"].fingerprint
        == stages("few_step=lcm", "model.sampler.steps=2", "evaluate.steps=1")["few_step"].fingerprint
    )
    other = stages("few_step=dmd", "few_step.start=tiny_turbo")
    assert other["pairs"].fingerprint == two["pairs"].fingerprint, "all methods share them"


def test_matching_needs_pairs_and_teacher_but_no_trajectories(tmp_path):
    def stages(*overrides):
        asked = (
            "quantize=rtn4",
            "calibration=tiny",
            "few_step=dmd",
            "few_step.steps=0",
            "finetune=matching",
            *overrides,
        )
        return build_graph(compose(*asked), cache=tmp_path / "hashes").named()

    own, other = stages("few_step.start=tiny_turbo"), stages("few_step.start=tiny_turbo", "few_step.critic_rate=1e-3")
    assert list(own)[:5] == ["pairs", "few_step", "calibrate", "quantize", "finetune"]
    assert own["finetune"].upstream["pairs"] is not None and own["finetune"].label == "tiny-dmd-rtn4-matched"
    assert own["finetune"].fingerprint != other["finetune"].fingerprint
    unprepared = stages("few_step.start=tiny_turbo", "finetune.critic_first=0")
    assert own["finetune"].config["critic_first"] == 150 and "critic_first" not in unprepared["finetune"].config
    assert own["few_step"].fingerprint == unprepared["few_step"].fingerprint
    with pytest.raises(
        UserError, match=r"finetune\.loss=dmd trains a few-step student by its teacher: give few_step=dmd"
    ):
        compose("quantize=rtn4", "calibration=tiny", "finetune=matching")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["few_step=dmd", "few_step.divergence=js"], "few_step.divergence=js needs a discriminator"),
        (["few_step=direct", "few_step.start=nothing", "calibration=tiny"], "'nothing' is not shipped"),
        (["few_step=direct", "calibration=builtin", "few_step.pairs=1000000"], "few_step.pairs + few_step.validation"),
        (["few_step=direct", "few_step.batch_size=0"], "few_step.batch_size=0 must be 1"),
    ],
)
def test_what_cannot_be_made_is_refused_in_one_line_before_any_work(overrides, said, tmp_path):
    with pytest.raises(UserError) as error:
        build_graph(compose(*overrides), cache=tmp_path / "hashes")
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_student_starts_from_another_models_weights_if_they_fit():
    model = ModelConfig(builtin="tiny")
    teacher = denoiser_of(load_pipeline(model, device="cpu"))
    found = first_weights(teacher, "tiny_turbo", model, device="cpu").state_dict()
    turbo = denoiser_of(load_pipeline(ModelConfig(builtin="tiny_turbo"), device="cpu")).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in turbo.items())
    own = first_weights(teacher, None, model, device="cpu")
    assert own is not teacher and torch.equal(own.conv_in.weight, teacher.conv_in.weight)
    with pytest.raises(UserError, match="another denoiser than tiny"):
        first_weights(small_unet(), "tiny_turbo", model, device="cpu")
