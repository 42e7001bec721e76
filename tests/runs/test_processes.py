"""Several real processes, and killed ones, make what one makes that runs through: losses, weights, images, scores."""

import contextlib
import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from composed import compose
from safetensors.torch import load_file
from tiny_world import ROOT, command, environment, run

from vqdm import pipeline

LAYERS = r"up_blocks\.1.*(resnets\.0\.conv2|attentions\.0.*attn1\.to_(q|k|v))$"
SMALL = (
    "+experiment=tiny_codec", "quantize=rtn4", "quantize.bits=2", f"model.layers='{LAYERS}'", "model.sampler.steps=3",
    "calibration.n=4", "calibration.batch_size=4", "threads=1", "tracker=none", "finetune=end_to_end",
    "finetune.steps=50", "finetune.check_every=25", "finetune.batch_size=4", "finetune.learning_rate=1e-3",
    "finetune.validation_samples=3", "finetune.trajectories.n=4", "finetune.trajectories.validation=2",
    "finetune.trajectories.source=tiny", "device=cpu",
)  # fmt: skip
OWN = ("finetune.train.rest=false", "finetune.train.norms=false", "finetune.train.biases=false")  # gradients end early
SCORED = ("evaluate.prompts.n=4", "evaluate.batch_size=4", "evaluate.bootstrap=3")
PATIENCE = 600  # seconds; who takes longer hangs


def only(directory: Path, pattern: str) -> Path:
    (found,) = directory.glob(pattern)
    return found


def outcome(results: Path) -> tuple[dict, dict]:
    """Losses, and the denoiser's tensors."""
    directory = only(results, "stages/finetune/*")
    weights = load_file(directory / "denoiser" / "diffusion_pytorch_model.safetensors")
    return json.loads((directory / "history.json").read_text()), weights


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The results of one process that nothing interrupts."""
    results = tmp_path_factory.mktemp("whole")
    pipeline.run(compose(*SMALL, *OWN, *SCORED, f"results_dir={results}"))
    return results


def fresh(whole: Path, place: Path) -> Path:
    """Results in which only what comes before distillation is done."""
    for stage in ("calibrate", "quantize", "trajectories"):
        shutil.copytree(whole / "stages" / stage, place / "stages" / stage)
    return place


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launched(launcher: list[str], *arguments: str) -> subprocess.CompletedProcess:
    """Two processes by a launcher's module, to their end. They are killed when they hang."""
    line = [sys.executable, "-m", *launcher, str(ROOT / "run.py"), *arguments]
    with subprocess.Popen(
        line, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:  # fmt: skip
        try:
            out, err = process.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            process.terminate()  # the launcher then ends what it started
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=15)
            process.kill()
            raise
    return subprocess.CompletedProcess(line, process.returncode, out, err)


def torchrun(count: int = 2) -> list[str]:
    return ["torch.distributed.run", "--nproc-per-node", str(count), "--master-port", str(free_port())]


@pytest.mark.slow
def test_two_processes_make_what_one_makes(whole, tmp_path):
    results = fresh(whole, tmp_path)
    done = launched(torchrun(), *SMALL, *OWN, *SCORED, f"results_dir={results}")
    assert done.returncode == 0, done.stderr
    (one, weights), (two, others) = outcome(whole), outcome(results)
    assert (
        len(one["losses"]) == len(two["losses"]) == 50
        and one["validations"][-1]["loss"] < one["validations"][0]["loss"]
    )
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-4)
    assert [f["step"] for f in two["validations"]] == [f["step"] for f in one["validations"]]
    assert [f["loss"] for f in two["validations"]] == pytest.approx([f["loss"] for f in one["validations"]], rel=1e-4)
    assert all(torch.equal(weights[n], others[n]) for n in weights if n.endswith(".codes"))
    assert all(torch.allclose(weights[n].float(), others[n].float(), rtol=5e-3, atol=1e-4) for n in weights)
    for stage, files in (("finetune", "checkpoints/*"), ("generate", "images/*"), ("evaluate", "metrics.json")):
        made = {len(list(directory.glob(files))) for directory in (results / "stages" / stage).iterdir()}
        assert made == {len(list(directory.glob(files))) for directory in (whole / "stages" / stage).iterdir()}
    assert not list(results.rglob("*.tmp"))
    assert done.stderr.count("finished in") == 1 and done.stderr.count("finetuned in") == 1, "one speaks"


@pytest.mark.slow
def test_accelerate_launches_it_too(whole, tmp_path):
    results = fresh(whole, tmp_path)
    launcher = ["accelerate.commands.launch", "--num_processes", "2", "--cpu", "--main_process_port", str(free_port())]
    short = ("finetune.steps=2", "task=compress", f"output={tmp_path / 'made'}")
    done = launched(launcher, *SMALL, *short, f"results_dir={results}")
    assert done.returncode == 0, done.stderr
    losses = outcome(results)[0]["losses"]  # here all parameters train
    assert len(losses) == 2 and losses[0] == pytest.approx(outcome(whole)[0]["losses"][0], rel=1e-4)


def files_of(results: Path, *patterns: str) -> dict[str, bytes]:
    found = {str(f.relative_to(results)): f.read_bytes() for pattern in patterns for f in results.glob(pattern)}
    assert found
    return found


@pytest.mark.slow
def test_three_processes_share_images_and_features_and_make_the_same_files(tmp_path):
    """22 images in batches of 4: each process makes other batches, and the last is not full."""
    how = (
        "+experiment=tiny_rtn4", "evaluate.prompts.n=11", "evaluate.images_per_prompt=2", "evaluate.batch_size=4",
        "evaluate.bootstrap=3", "model.sampler.steps=2", "model.sampler.scheduler=euler_ancestral", "calibration.n=2",
        "calibration.batch_size=2", "threads=1", "tracker=none", "device=cpu",
    )  # fmt: skip
    done = run(*how, f"results_dir={tmp_path / 'one'}")
    assert done.returncode == 0, done.stderr
    done = launched(torchrun(3), *how, f"results_dir={tmp_path / 'three'}")
    assert done.returncode == 0, done.stderr
    kinds = ("stages/generate/*/images/*.png", "stages/features/*/features/*", "stages/evaluate/*/metrics.json")
    one, three = (files_of(tmp_path / name, *kinds) for name in ("one", "three"))
    assert len([name for name in one if name.endswith(".png")]) == 2 * 22
    assert one == three
    assert files_of(tmp_path / "one", "stages/*/*/images.csv") == files_of(tmp_path / "three", "stages/*/*/images.csv")


def test_what_two_cannot_share_is_refused_at_once(tmp_path):
    done = run(*SMALL, "finetune.batch_size=3", f"results_dir={tmp_path}", WORLD_SIZE="2", RANK="0")
    assert done.returncode != 0
    assert done.stderr.strip() == "error: finetune.batch_size=3 cannot be shared by 2 processes: give a multiple of 2"
    assert not list(tmp_path.glob("stages/*"))


@pytest.mark.slow
def test_killed_in_the_middle_it_goes_on_to_the_same_weights(whole, tmp_path):
    results = fresh(whole, tmp_path)
    arguments = (*SMALL, *OWN, *SCORED, f"results_dir={results}")
    process = subprocess.Popen(
        command(*arguments), cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    end = time.monotonic() + PATIENCE
    while not list(results.glob("stages/finetune/*/items/step-000025.json")):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not list(results.glob("stages/finetune/*/manifest.json"))
    pipeline.run(compose(*arguments))
    (one, weights), (again, others) = outcome(whole), outcome(results)
    assert one == again and all(torch.equal(weights[name], others[name]) for name in weights)


DISAGREE = """
import os
from vqdm.runs import processes
from vqdm.errors import UserError
processes.join(cpu=True)
processes.check_agreement("the same")
try:
    processes.check_agreement(os.environ["RANK"])
    print(f"[{os.environ['RANK']} goes on]")
except UserError:
    print(f"[{os.environ['RANK']} is refused]")
print(processes.my_share(lambda: [os.environ["RANK"]] * 3))
processes.leave()
"""


def test_a_process_that_would_make_something_else_is_refused(tmp_path):
    """And what there is to do is what the main process finds."""
    script = tmp_path / "disagree.py"
    script.write_text(DISAGREE)
    done = subprocess.run(
        [sys.executable, "-m", *torchrun(), str(script)], cwd=ROOT, env=environment(PYTHONPATH=str(ROOT)),
        capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "[0 goes on]" in done.stdout and "[1 is refused]" in done.stdout
    assert "['0', '0']" in done.stdout and "['0']" in done.stdout.replace("['0', '0']", "")
