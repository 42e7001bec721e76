"""Kill a run with SIGKILL at random moments, then let it finish: what it makes must be an uninterrupted run's.

python scripts/kill_test.py [--kills 10] [--seed 0] [run.py arguments, +experiment=demo by default]
python scripts/kill_test.py --kills 3 +experiment=tiny_rtn4 evaluate.prompts.n=2000 threads=1  # images and scores
python scripts/kill_test.py --kills 5 +experiment=tiny_codec quantize=trellis2 finetune=both  # distillation

Compared are tables, images and their scores, and of distillation every loss and the weights, bit for bit.
"""

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from vqdm.runs.command_line import run_script

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


def outcome(results: Path) -> dict[str, bytes]:
    """What a run is for, by its place: files, and denoisers without their header, whose keys come in any order."""
    scores = ("tables/*.csv", "stages/evaluate/*/images.csv", "stages/evaluate/*/metrics.json")
    patterns = (*scores, "stages/generate/*/images/*.png", "stages/finetune/*/history.json")
    found = {path: path.read_bytes() for pattern in patterns for path in results.glob(pattern)}
    for path in results.glob("stages/*/*/denoiser/*.safetensors"):
        content = path.read_bytes()
        found[path] = content[8 + int.from_bytes(content[:8], "little") :]
    if not found:
        sys.exit(f"error: {results} holds nothing to compare; give arguments that make a table, or images")
    return {str(path.relative_to(results)): content for path, content in found.items()}


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
            steps = sorted(path.stem for path in broken.glob("stages/finetune/*/items/step-*.json"))[-1:]
            done = ", ".join([f"{manifests} manifests", f"{images} images", *steps])
            print(f"kill {number + 1}: after {moment:.1f} s ({met}), {done}", flush=True)
        finish(arguments, broken, log=log)
        one, other = outcome(whole), outcome(broken)
    differ = sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))
    print(f"{len(one)} files are identical" if not differ else f"THESE DIFFER: {', '.join(differ)}")
    sys.exit(bool(differ))


if __name__ == "__main__":
    run_script(main)
