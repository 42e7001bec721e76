"""What a busy machine costs, in one run: the demo's main work alone and beside processes that only count.

    python scripts/bench_busy.py                     # two cores, four busy processes; minutes; wants a quiet machine
    python scripts/bench_busy.py --images 32 --repeats 1

The tiny model's images are made by run.py in three ways, one after the other, as often as `--repeats`: alone, alone and
"plain" (torch as it comes: OpenMP spins 300,000 rounds, a thread for every core), and beside busy processes.
Printed are medians and the two ratios that count: CPU time (user + system) busy to quiet, at most 1.5; and wall time as
it is to plain, quiet, at most 1.05. Exit code 1 where one is above.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from vqdm.runs.command_line import run_script

MOST_CPU, MOST_WALL = 1.5, 1.05
BUSY = "import os; us = os.getppid()\nwhile os.getppid() == us: sum(range(10**6))"  # ends with us, however we end
ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--busy", type=int, default=4, help="processes beside")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--plain-busy", action="store_true", help="plain beside busy processes too: 20 times as long")
    options = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])  # those started from here have it too
    ways = [(0, False), (0, True), (options.busy, False)] + [(options.busy, True)] * options.plain_busy
    measured: dict[tuple, list[tuple[float, float]]] = {way: [] for way in ways}
    for _ in range(options.repeats):
        for way in ways:
            measured[way].append(_run(options.images, busy=way[0], plain=way[1], cores=options.cores))
    wall, cpu = ({way: median(one[i] for one in found) for way, found in measured.items()} for i in (0, 1))
    for busy, plain in ways:
        name = f"{'plain' if plain else 'as it is'}, beside {busy} busy processes"
        print(f"{name}: {wall[busy, plain]:.1f} s, {cpu[busy, plain]:.1f} s of CPU")
    of_cpu = cpu[options.busy, False] / cpu[0, False]
    of_wall = wall[0, False] / wall[0, True]
    print(f"CPU time, busy : quiet = {of_cpu:.2f} (at most {MOST_CPU})")
    print(f"wall time, quiet, as it is : plain = {of_wall:.2f} (at most {MOST_WALL})")
    sys.exit(int(of_cpu > MOST_CPU or of_wall > MOST_WALL))


def _run(images: int, *, busy: int, plain: bool, cores: int) -> tuple[float, float]:
    """(wall, user + system) seconds of one run of run.py into a folder of its own."""
    chosen = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    environment = {name: value for name, value in os.environ.items() if name not in chosen}
    environment |= {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    if plain:
        environment |= {"OMP_NUM_THREADS": str(cores), "GOMP_SPINCOUNT": "300000"}
    beside = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(busy)]
    try:
        with tempfile.TemporaryDirectory() as place:
            command = [sys.executable, str(ROOT / "run.py"), "+experiment=tiny_fp", "tracker=none", "device=cpu"]
            command += [f"results_dir={place}", f"evaluate.prompts.n={images}", "evaluate.bootstrap=2"]
            before, began = os.times(), time.monotonic()
            subprocess.run(command, env=environment, check=True, capture_output=True)
            wall, after = time.monotonic() - began, os.times()
    finally:
        for process in beside:
            process.kill()
            process.wait()
    return wall, sum(after[2:4]) - sum(before[2:4])  # of ended children: the busy ones had not ended by then


if __name__ == "__main__":
    run_script(main)
