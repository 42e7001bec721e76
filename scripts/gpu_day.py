"""What a GPU is to be asked, step by step, and what it answered, in one place. Run by scripts/gpu_day.sh.

python scripts/gpu_day.py [--rehearse] [--steps tests,sdxl_random] [--again] [--results results]

A step is a few commands within ten minutes, which leave a file. What it holds is kept with device, versions, commands
and seconds as <results>/gpu_day/<device>/<step>.json, also where it failed or ran out of time; what is done is not run
again.
"""

import argparse
import json
import re
import shlex
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vqdm.runs.command_line import run_script

import pandas as pd

from vqdm.errors import UserError
from vqdm.runs.files import atomic_write, write_json
from vqdm.runs.provenance import git_state, versions

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 600  # seconds of a step
TAIL = 4000  # characters of a failed command's output
RUN = "run.py +experiment=sdxl_random tracker=none results_dir={place}/runs"
TINY = (  # of `sdxl_random`: the tiny model's shapes
    " model.configs=vqdm/models/tiny model.path={place}/runs/models/tiny_random model.sampler.size=32"
    r" device=cpu threads=1 model.layers='mid_block.*to_q$'"
)


@dataclass(frozen=True)
class Step:
    """Python commands, in which {place} and {out} stand for the day's folder and the file they leave.

    rehearsal: the same with tiny shapes on the CPU. read: what that file holds, as JSON.
    """

    name: str
    commands: tuple[str, ...]
    rehearsal: tuple[str, ...]
    read: Callable[[Path], object]


def read_json(file: Path) -> object:
    return json.loads(file.read_bytes())


def read_tests(file: Path) -> dict:
    """Counts of a pytest run, and the reasons for what was skipped or failed."""
    suite = ElementTree.parse(file).getroot().find("testsuite")
    counts = {key: int(suite.get(key)) for key in ("tests", "failures", "errors", "skipped")}
    said = {str(case.get("message"))[:200] for kind in ("failure", "skipped") for case in suite.iter(kind)}
    return counts | {"said": sorted(said)}


def read_table(file: Path) -> list[dict]:
    return pd.read_csv(file).to_dict("records")


def _sdxl_random(options: str) -> tuple[str, ...]:
    measured = "scripts/measured_stages.py sdxl_random --results {place}/runs --json {out}"
    return f"{RUN}{options} plan=true", f"{RUN}{options}", measured


COMPILED = "--ways bf16 bf16_compiled per_call_compiled --batches 1 2"


def _bench(name: str, part: str, rehearsal: str, *, full: str = "") -> Step:
    """A part of scripts/bench_gpu.py; rehearsal and full: its options on the tiny model, and on SDXL."""
    tiny = f"--model tiny --device cpu --repeat 1 {rehearsal}"
    command = f"scripts/bench_gpu.py {part} --json {{out}} "
    return Step(name, (command + full,), (command + tiny,), read_json)


STEPS = (
    Step(
        "tests",
        ("-m pytest -q -m gpu -p no:cacheprovider tests/test_gpu.py --junitxml {out}",),
        ("-m pytest -q -m gpu -p no:cacheprovider tests/test_gpu.py --junitxml {out}",),
        read_tests,
    ),
    _bench("kernels", "decode", "--shapes 1 --no-all-layers"),
    _bench(
        "steps", "step", "--ways bf16 per_call --size 64 --batches 1", full="--ways bf16 per_call cached torch_path"
    ),
    _bench("steps_compiled", "step", "--ways bf16 per_call --size 64 --batches 1", full=COMPILED),
    _bench("peers", "peers", "--libraries torchao --size 64 --batches 1"),
    Step(
        "layers",
        ("scripts/bench_layers.py --device cuda --results {out}",),
        ("scripts/bench_layers.py --device cpu --tokens 1 --repeat 1 --results {out}",),
        lambda folder: read_table(folder / "tables" / "bench_layers.csv"),
    ),
    Step("sdxl_random", _sdxl_random(" model.sampler.size=1024"), _sdxl_random(TINY), read_json),
    Step(
        "encoding",
        ("scripts/bench_sdxl_layers.py --workers 8 --results {out}",),
        ("scripts/bench_sdxl_layers.py --shapes 320x640 --results {out}",),
        lambda folder: read_table(folder / "tables" / "bench_sdxl_layers.csv"),
    ),
)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes on the CPU; nothing is published")
    parser.add_argument("--steps", help=f"some of {','.join(step.name for step in STEPS)}, in that order")
    parser.add_argument("--again", action="store_true", help="also what is done")
    parser.add_argument("--results", type=Path, default=Path("results"))
    options = parser.parse_args(arguments)
    device = "rehearsal" if options.rehearse else gpu_name()
    place = (options.results / "gpu_day" / device).resolve()
    for step in chosen(options.steps):
        if options.again or outcome_of(place, step) != "done":
            write_json(place / f"{step.name}.json", run(step, place, device=device))
        print(f"{step.name}: {outcome_of(place, step)}", flush=True)
    published = place if options.rehearse else options.results / "published"
    print("wrote " + ", ".join(str(file) for file in collect(place, published, device=device)))
    return int(any(outcome_of(place, step) == "failed" for step in chosen(options.steps)))


def gpu_name() -> str:
    import torch

    if not torch.cuda.is_available():
        raise UserError(f"torch {torch.__version__} sees no GPU: nothing to measure; --rehearse runs tiny shapes here")
    return re.sub(r"\W+", "_", torch.cuda.get_device_name().lower()).strip("_")


def chosen(names: str | None) -> list[Step]:
    wanted = [step.name for step in STEPS] if names is None else names.split(",")
    if unknown := [name for name in wanted if name not in {step.name for step in STEPS}]:
        raise UserError(f"--steps: no step is {unknown[0]}; there are {', '.join(step.name for step in STEPS)}")
    return [step for step in STEPS if step.name in wanted]


def outcome_of(place: Path, step: Step) -> str:
    file = place / f"{step.name}.json"
    return read_json(file)["outcome"] if file.is_file() else "not run"


def run(step: Step, place: Path, *, device: str) -> dict:
    """Run a step's commands one after the other; returns what is kept of it: done, failed or out of time."""
    out, began = place / "out" / step.name, time.monotonic()
    out.parent.mkdir(parents=True, exist_ok=True)
    templates = step.rehearsal if device == "rehearsal" else step.commands
    found = {"step": step.name, "device": device, "versions": versions(), **git_state(), "outcome": "done"}
    commands = [
        shlex.split(template.format(place=shlex.quote(str(place)), out=shlex.quote(str(out)))) for template in templates
    ]
    for command in commands:
        print(f"{step.name}: python {shlex.join(command)}", flush=True)
        try:
            done = subprocess.run(
                [sys.executable, *command],
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=max(1, LIMIT - (time.monotonic() - began)),
            )
        except subprocess.TimeoutExpired:
            found["outcome"] = f"out of time after {LIMIT} s: run it again, it goes on"
            break
        if done.returncode:
            found |= {"outcome": "failed", "said": done.stdout[-TAIL:]}
            break
    result = step.read(out) if out.exists() else None
    relative = [shlex.join(command).replace(str(place), "PLACE") for command in commands]
    return found | {"commands": relative, "seconds": round(time.monotonic() - began, 1), "result": result}


def collect(place: Path, published: Path, *, device: str) -> list[Path]:
    """Write everything that is known of a device as JSON, and what came of every step as a table."""
    records = [read_json(file) for step in STEPS if (file := place / f"{step.name}.json").is_file()]
    files = [published / f"gpu_{device}{end}" for end in (".json", ".md")]
    write_json(files[0], records)
    atomic_write(files[1], page(records, device).encode())
    return files


def page(records: list[dict], device: str) -> str:
    """The steps' outcomes and results as Markdown."""
    lines = [f"# {device}", "", "Made by `sh scripts/gpu_day.sh`; commands and versions stand in the JSON beside.", ""]
    for record in records:
        lines += [f"## {record['step']}", "", f"{record['outcome'].split(':')[0]}, {record['seconds']} s", ""]
        result = record["result"]
        rows = [result] if isinstance(result, dict) else result or []
        if rows:
            lines += [pd.DataFrame(rows).to_markdown(index=False, floatfmt=".4g"), ""]
    return "\n".join(lines)


if __name__ == "__main__":
    run_script(main)
