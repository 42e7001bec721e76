"""Kill a run with SIGKILL at random moments, then let it finish: its table must be an uninterrupted run's.

python scripts/kill_test.py [--kills 10] [--seed 0] [run.py arguments, +experiment=demo by default]
"""

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def start(arguments: list[str], results: Path, *, log: Path) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "run.py"), *arguments, f"results_dir={results}"]
    return subprocess.Popen(command, cwd=ROOT, stdout=log.open("a"), stderr=subprocess.STDOUT)


def finish(arguments: list[str], results: Path, *, log: Path) -> float:
    """Run to the end; returns seconds."""
    began = time.monotonic()
    if start(arguments, results, log=log).wait() != 0:
        sys.exit(f"error: the run failed; see {log}")
    return time.monotonic() - began


def tables(results: Path) -> dict[str, bytes]:
    found = {path.name: path.read_bytes() for path in sorted((results / "tables").glob("*.csv"))}
    if not found:
        sys.exit(f"error: {results} holds no table; give arguments that make one, such as +experiment=demo")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options, rest = parser.parse_known_args()
    arguments = rest or ["+experiment=demo"]
    pause = random.Random(options.seed)
    with tempfile.TemporaryDirectory(prefix="vqdm-kill-") as folder:
        whole, broken, log = Path(folder) / "whole", Path(folder) / "broken", Path(folder) / "log"
        seconds = finish(arguments, whole, log=log)
        print(f"uninterrupted: {seconds:.0f} s", flush=True)
        for number in range(options.kills):
            process = start(arguments, broken, log=log)
            moment = pause.uniform(4, 4 + 2 * seconds / options.kills)  # a start takes seconds; ten spread over the run
            time.sleep(moment)
            met = "running" if process.poll() is None else "finished"
            process.send_signal(signal.SIGKILL)
            process.wait()
            manifests = len(list(broken.glob("stages/*/*/manifest.json")))
            images = len(list(broken.glob("stages/generate/*/images/*.png")))
            print(
                f"kill {number + 1}: after {moment:.1f} s ({met}), {manifests} manifests, {images} images", flush=True
            )
        finish(arguments, broken, log=log)
        same = tables(whole) == tables(broken)
    print("tables are identical" if same else "TABLES DIFFER")
    sys.exit(not same)


if __name__ == "__main__":
    main()
