"""The jobs of a sweep, each in a process of its own, and what became of them. A leaf: knows nothing of Hydra.

    results/sweeps/<name>/sweep.json           what was asked for, and which keys vary
    results/sweeps/<name>/<number>/job.json    one job: overrides, error (null when it is done), seconds, run record
    results/sweeps/<name>/<number>/log.txt     what it said

A job that fails or is killed takes no other with it, whichever launcher runs them; GPU memory goes back after each.
"""

import contextlib
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from vqdm.runs import progress
from vqdm.runs.files import canonical_json, write_json
from vqdm.runs.texts import file_name_of

SWEEP, JOB, LOG = "sweep.json", "job.json", "log.txt"
RUN_FILE = "VQDM_RUN_FILE"  # in a job's environment: the file in which the job names its own run record
UNKNOWN = "has not said how it ended: killed with its launcher, or still at work"
# overrides that change no result: the same sweep goes on under the same name
UNNAMED = (
    *("results_dir.", "threads.", "device.", "memory_budget_gb."),
    *("show_layers.", "picture.", "verbose.", "tracker."),
)
TAIL = 4000  # characters at the end of a job's log, where its error stands


def _key(override: str) -> str:
    return override.lstrip("+~").partition("=")[0]


def sweep_name(overrides: list[str], swept: list[str]) -> str:
    """A directory name that is the same for the same sweep: experiment, what varies, and a hash of all that counts."""
    counting = [o for o in overrides if _key(o) in swept or not f"{_key(o)}.".startswith(UNNAMED)]
    values = {_key(o): o.partition("=")[2] for o in overrides}
    first = values.get("name") or values.get("experiment") or values.get("table") or "sweep"
    varying = [o.lstrip("+") for o in counting if _key(o) in swept and values[_key(o)] != first]
    label = file_name_of("_".join([first, *varying]), longest=90)
    return f"{label}-{hashlib.sha256(canonical_json(counting)).hexdigest()[:8]}"


def write_sweep(directory: Path, *, overrides: list[str], swept: list[str]) -> None:
    write_json(directory / SWEEP, {"name": directory.name, "overrides": overrides, "swept": swept})


def job_label(directory: Path, overrides: list[str]) -> str:
    """The label that tells a job from its siblings: its values of the keys that vary. directory: the sweep's."""
    swept = json.loads((directory / SWEEP).read_text())["swept"]
    return " ".join(o.lstrip("+") for o in overrides if _key(o) in swept)


def run_job(
    command: list[str],
    directory: Path,
    *,
    number: int,
    overrides: list[str],
    label: str,
    show: bool,
    of: int | None = None,
) -> str | None:
    """Run one job to its end in a process of its own. Returns its error, or None if it succeeded.

    directory: the job's. show: print its output on this terminal too, besides writing it to its log. of: how many jobs
    there are, where that is known. W&B groups the runs by sweep, unless told otherwise.
    """
    directory.mkdir(parents=True, exist_ok=True)
    job = {"number": number, "overrides": overrides, "label": label, "error": UNKNOWN}
    run_file = directory / "run.json"
    run_file.unlink(missing_ok=True)
    write_json(directory / JOB, job)
    started = time.monotonic()
    environment = {"WANDB_RUN_GROUP": directory.parent.name} | os.environ | {RUN_FILE: str(run_file.resolve())}
    environment[progress.JOB] = f"job {number + 1}" + ("" if of is None else f" of {of}")
    environment[progress.WIDTH] = str(progress.terminal_width() or "") if show else ""
    job["error"] = _run(command, directory / LOG, environment, show=show)
    job["seconds"] = round(time.monotonic() - started, 1)
    job["run"] = json.loads(run_file.read_text())["run"] if run_file.exists() else None
    run_file.unlink(missing_ok=True)
    write_json(directory / JOB, job)
    return job["error"]


def _run(command: list[str], log: Path, environment: dict[str, str], *, show: bool) -> str | None:
    stderr = subprocess.PIPE if show else log.open("wb")
    with subprocess.Popen(command, env=environment, stderr=stderr) as process, _stopped_with_us(process):
        if show:
            _tee(process.stderr, log)
        process.wait()
    if process.returncode == 0:
        return None
    if process.returncode < 0:
        return f"killed by {signal.Signals(-process.returncode).name}"
    said = re.split(r"[\r\n]+", log.read_text(errors="replace")[-TAIL:].strip())
    return said[-1].removeprefix("error: ") or f"ended with exit code {process.returncode}"


def _tee(stream, log: Path) -> None:
    """Copy a stream to the log and to stderr as it comes, so that progress bars move."""
    with log.open("wb") as file:
        for chunk in iter(stream.read1, b""):
            file.write(chunk)
            file.flush()
            sys.stderr.write(chunk.decode(errors="replace"))
            sys.stderr.flush()


@contextlib.contextmanager
def _stopped_with_us(process: subprocess.Popen):
    """Stop the job when this process is stopped. Ctrl-C reaches it anyway; it gets time to finish its tracker."""
    try:
        yield
    except BaseException:
        for seconds, stop in ((2, process.terminate), (20, process.kill)):
            try:
                process.wait(timeout=seconds)
            except subprocess.TimeoutExpired:
                stop()
        process.wait()  # after Ctrl-C, `with` alone would not wait
        raise


def say_run(record: dict | None) -> None:
    """Tell the sweep, from within a job's process, which run record is the job's own (read by `jobs_of_sweep`)."""
    if record is not None and RUN_FILE in os.environ:
        name = f"runs/{record['experiment']}/{record['fingerprint'][:8]}.json"
        write_json(Path(os.environ[RUN_FILE]), {"run": name})


def is_job() -> bool:
    """True in the process of a sweep's job."""
    return RUN_FILE in os.environ


def jobs_of_sweep(directory: Path) -> list[dict]:
    """Everything known about each job, in order of their numbers; `run` is relative to results."""
    return sorted((json.loads(path.read_text()) for path in directory.glob(f"*/{JOB}")), key=lambda job: job["number"])


def failures(directory: Path) -> list[str]:
    """Lines for the user: one for each job that is not done, and one on how to go on; empty when all are done."""
    jobs = jobs_of_sweep(directory)
    lines = [
        f"error: job {job['number']} ({job['label']}): {job['error']}; its log: {directory / str(job['number']) / LOG}"
        for job in jobs
        if job["error"] is not None
    ]
    return [*lines, f"{len(lines)} of {len(jobs)} jobs failed; the same command runs what is missing"] if lines else []
