"""Peak memory of generating and scoring images, against their number: it should not grow.

python scripts/bench_evaluation_memory.py [--n 200,2000] [run.py arguments, +experiment=tiny_rtn4 by default]

Each number of images is a run.py of its own in a fresh folder; the peak is the resident set that the kernel reports.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from vqdm.runs.command_line import run_script

ROOT = Path(__file__).resolve().parent.parent


def peak_and_seconds(arguments: list[str]) -> tuple[float, float]:
    """Peak MiB and seconds of one run to its end."""
    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "run.py"), *arguments],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        sys.exit(f"error: the run failed; try `python run.py {' '.join(arguments)}`")
    return usage.ru_maxrss / 1024, time.monotonic() - began


def counts(text: str) -> list[int]:
    """Numbers of images, separated by commas, since further arguments are run.py's."""
    return [int(count) for count in text.split(",")]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=counts, default=[200, 2000], help="numbers of prompts")
    options, rest = parser.parse_known_args(arguments)
    peaks = []
    for count in options.n:
        with tempfile.TemporaryDirectory(prefix="vqdm-memory-") as folder:
            what = [*(rest or ["+experiment=tiny_rtn4"]), f"evaluate.prompts.n={count}", f"results_dir={folder}"]
            peak, seconds = peak_and_seconds([*what, "tracker=none", "threads=1"])
        peaks.append(peak)
        print(f"n = {count}: peak {peak:.0f} MiB, {peak / peaks[0]:.3f} of the first, {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    run_script(main)
