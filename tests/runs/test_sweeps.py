"""Sweeps as a user runs them: jobs side by side, one that fails, one that is killed, and the same command again."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import hydra
import psutil
import pytest
from safetensors.torch import load_file
from tiny_world import ROOT, command, environment, run, run_process

from vqdm.config.compose import register_schemas
from vqdm.runs.sweeps import failures, job_label, jobs_of_sweep, run_job, sweep_name, write_sweep

LAUNCHERS = sorted(path.stem for path in (ROOT / "conf" / "hydra" / "launcher").glob("*.yaml"))
SMALLEST = (
    "evaluate.prompts.n=4", "evaluate.batch_size=4", "evaluate.metrics=[paired]", "calibration.n=2",
    "calibration.batch_size=2", "model.sampler.steps=2", "threads=1", "tracker=none",
)  # fmt: skip
SIX = (
    "--multirun",
    "+experiment=tiny_codec",
    "quantize=rtn",
    "quantize.clip=mse,minmax",
    "quantize.bits=2,3,4",
    *SMALLEST,
)
FIRST, FIFTH = ("quantize.clip=mse", "quantize.bits=2"), ("quantize.clip=minmax", "quantize.bits=3")
TWO_WORKERS = ("hydra/launcher=parallel", "hydra.launcher.n_jobs=2")


def _sweep(results: Path) -> Path:
    (directory,) = (results / "sweeps").iterdir()
    return directory


def _wait_for(found, *, seconds: float = 600):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if value := found():
            return value
        time.sleep(0.02)
    raise TimeoutError


def _process_of(sweep: subprocess.Popen, *overrides: str) -> psutil.Process | None:
    """The job with these overrides, below the process of its sweep."""
    for process in psutil.Process(sweep.pid).children(recursive=True):
        try:
            arguments = process.cmdline()
        except psutil.Error:
            continue
        if "--multirun" not in arguments and {str(ROOT / "run.py"), *overrides} <= set(arguments):
            return process
    return None


def _times(results: Path) -> dict[Path, int]:
    """Of every file that a stage made."""
    return {p: p.stat().st_mtime_ns for p in (results / "stages").rglob("*") if p.is_file() and p.name != ".lock"}


@pytest.mark.slow
def test_six_jobs_on_two_workers_one_killed_and_the_same_command_again(tmp_path):
    results = tmp_path / "swept"
    arguments = command(*SIX, *TWO_WORKERS, f"results_dir={results}")
    with subprocess.Popen(arguments, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True) as sweep:
        _wait_for(lambda: len(list(results.glob("stages/quantize/tiny-rtn3-*"))) == 2)  # job 1's, and job 4's
        _process_of(sweep, *FIFTH).kill()
        said = sweep.communicate(timeout=600)[1]
    assert sweep.returncode == 1, said
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, said
    assert lines[0].startswith("error: job 4 (quantize.clip=minmax quantize.bits=3): killed by SIGKILL")
    assert said.splitlines()[-1] == "1 of 6 jobs failed; the same command runs what is missing"
    jobs = jobs_of_sweep(_sweep(results))
    assert [job["error"] is None for job in jobs] == [True, True, True, True, False, True]

    logs = [(_sweep(results) / str(job["number"]) / "log.txt").read_text() for job in jobs]
    for shared in ("calibrate: ", "generate tiny-fp: "):
        assert sum(shared in log for log in logs) == 1, f"{shared} is made once"

    before = _times(results)
    again = run_process(*SIX, *TWO_WORKERS, f"results_dir={results}")
    assert again.returncode == 0, again.stderr
    assert not failures(_sweep(results))
    swept = [json.loads((results / job["run"]).read_text()) for job in jobs_of_sweep(_sweep(results))]
    assert len({record["fingerprint"] for record in swept}) == 6
    written = {path for path, when in _times(results).items() if when != before.get(path)}
    own = [
        results / swept[4]["directories"][stage] for stage in ("quantize", "generate", "features/paired", "evaluate")
    ]
    assert {directory for directory in own if any(path.is_relative_to(directory) for path in written)} == set(own)
    assert all(any(path.is_relative_to(directory) for directory in own) for path in written), "only what was missing"

    alone = tmp_path / "alone"
    done = run("+experiment=tiny_codec", "quantize=rtn", *FIFTH, *SMALLEST, f"results_dir={alone}")
    assert done.returncode == 0, done.stderr
    record = json.loads(next(alone.glob("runs/tiny_codec/*.json")).read_text())
    assert swept[4]["directories"] == record["directories"]
    assert (swept[4]["method"], record["method"]) == ("quantize.clip=minmax quantize.bits=3", "tiny_codec")
    _same_results(results, alone, record["directories"])


def _same_results(one: Path, other: Path, directories: dict[str, str]) -> None:
    metrics = [json.loads((root / directories["evaluate"] / "metrics.json").read_text()) for root in (one, other)]
    assert metrics[0]["metrics"] == metrics[1]["metrics"]
    file = Path(directories["quantize"]) / "denoiser" / "diffusion_pytorch_model.safetensors"
    weights, others = load_file(one / file), load_file(other / file)
    assert weights.keys() == others.keys()
    assert all(weights[name].equal(others[name]) for name in weights)


@pytest.mark.parametrize(
    "launcher", ["basic", *(pytest.param(name, marks=pytest.mark.slow) for name in ("parallel", "slurm_here"))]
)
def test_a_job_that_fails_leaves_the_others_and_the_exit_code_says_so(launcher, tmp_path):
    arguments = ("+experiment=tiny_codec", "quantize=rtn", "quantize.bits=9,3", "plan=true", f"results_dir={tmp_path}")
    done = run_process("--multirun", *arguments, f"hydra/launcher={launcher}")
    assert done.returncode == 1, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: job")]
    assert len(lines) == 1, done.stderr
    assert "job 0 (quantize.bits=9): quantize.bits=9 must be 1 to 8 for rtn" in lines[0]
    assert "Traceback" not in done.stderr
    failed, other = jobs_of_sweep(_sweep(tmp_path))
    assert failed["error"] == "quantize.bits=9 must be 1 to 8 for rtn"
    assert other["error"] is None
    printed = "".join(path.read_text() for path in tmp_path.rglob("*_log.out")) + done.stdout
    assert "tiny-rtn3-" in printed, "the other job has run"


@pytest.mark.slow
def test_a_worker_that_dies_is_the_launchers_error_in_one_line(tmp_path):
    arguments = command(*SIX, *TWO_WORKERS, f"results_dir={tmp_path}")
    with subprocess.Popen(arguments, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True) as sweep:
        job = _wait_for(lambda: _process_of(sweep, *FIRST))
        job.parent().kill()
        said = sweep.communicate(timeout=600)[1]
        job.kill()
    assert sweep.returncode == 1
    assert said.splitlines()[-1].startswith("error: the sweep's launcher stopped: TerminatedWorkerError")
    assert "error: job 0 (quantize.clip=mse quantize.bits=2): has not said how it ended" in said


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_sweep_that_is_stopped_stops_its_job(number, tmp_path):
    arguments = command(*SIX, f"results_dir={tmp_path}")
    with subprocess.Popen(arguments, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True) as sweep:
        job = _wait_for(lambda: _process_of(sweep, *FIRST))
        time.sleep(1)
        sweep.send_signal(number)
        said = sweep.communicate(timeout=600)[1]
    assert sweep.returncode == 128 + number
    assert said.splitlines()[-1] == "stopped; the same command goes on from here"
    assert not job.is_running()
    assert not list(tmp_path.rglob("1/job.json")), "the next job is not begun"


@pytest.mark.parametrize("name", [*LAUNCHERS, "basic"])
def test_every_launcher_composes(name):
    register_schemas()
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        composed = hydra.compose("config", [f"hydra/launcher={name}"], return_hydra_config=True)
    assert composed.hydra.launcher._target_.endswith("Launcher")


@pytest.mark.slow
def test_a_value_with_quotes_and_commas_goes_through_and_names_the_row(tmp_path):
    layers = r"model.layers='.*conv(1|2)','.*\.to_(q|k)'"
    done = run_process("--multirun", "+experiment=tiny_rtn4", layers, "plan=true", f"results_dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    first, second = jobs_of_sweep(_sweep(tmp_path))
    assert (first["label"], second["label"]) == ("model.layers='.*conv(1|2)'", r"model.layers='.*\.to_(q|k)'")


SWEPT = ["+experiment=tiny_codec", "quantize=rtn,gptq", "quantize.bits=2,3"]


def test_a_sweeps_name_tells_what_varies_and_holds_for_the_same_results():
    keys = ["quantize", "quantize.bits"]
    name = sweep_name(SWEPT, keys)
    assert name.startswith("tiny_codec_quantize=rtn,gptq_quantize.bits=2,3-")
    same = ["results_dir=/elsewhere", "threads=2", "device=cpu", "tracker=none", "tracker.mode=offline"]
    assert sweep_name([*SWEPT, *same], keys) == name
    assert sweep_name([*SWEPT, "calibration.n=8"], keys) != name
    assert sweep_name([*SWEPT, "threads=1,2"], [*keys, "threads"]) != name
    assert sweep_name([*SWEPT, "name=mine"], keys).startswith("mine_")


def test_a_sweeps_name_is_a_directorys_whatever_varies():
    overrides = ["model.layers='(a|b)/../c','d'", f"evaluate.seed={','.join(str(i) for i in range(100))}"]
    name = sweep_name(overrides, ["model.layers", "evaluate.seed"])
    assert "/" not in name and len(name) <= 100


def test_a_job_is_labelled_by_what_varies(tmp_path):
    write_sweep(tmp_path, overrides=SWEPT, swept=["quantize", "experiment"])
    assert job_label(tmp_path, ["+experiment=a", "quantize=rtn", "threads=1"]) == "experiment=a quantize=rtn"
    write_sweep(tmp_path, overrides=["threads=1"], swept=[])
    assert job_label(tmp_path, ["threads=1"]) == ""


@pytest.mark.parametrize("show", [True, False])
@pytest.mark.parametrize(
    ("script", "error"),
    [
        ("print('fine', file=sys.stderr)", None),
        ("sys.exit('error: one line')", "one line"),
        ("print('half\\rbar', file=sys.stderr); raise ValueError('bug')", "ValueError: bug"),
        ("sys.exit(3)", "ended with exit code 3"),
        ("os.kill(os.getpid(), 9)", "killed by SIGKILL"),
    ],
)
def test_a_jobs_error_is_the_last_it_said(script, error, show, tmp_path, capsys):
    command = [sys.executable, "-c", f"import os, sys; {script}"]
    assert run_job(command, tmp_path / "7", number=7, overrides=["a=1"], label="a=1", show=show) == error
    (job,) = jobs_of_sweep(tmp_path)
    assert (job["number"], job["error"], job["run"]) == (7, error, None)
    said = (tmp_path / "7" / "log.txt").read_text()
    assert capsys.readouterr().err.split() == (said.split() if show else [])
