"""Train the table that ships with the trellis codec, and report its error on Gaussian data that it was not trained on.

python scripts/lab/train_trellis_table.py [--output vqdm/weights/trellis_table.safetensors] [--report-only]
"""

import argparse
from pathlib import Path

from vqdm.runs.command_line import run_script

import numpy as np
from safetensors.torch import save
from tqdm import tqdm

from vqdm.codecs.trellis_table import TABLE_FILE, excess_db, gaussian, load_table, target_scale, train_table
from vqdm.runs.files import atomic_write

SCALES = np.arange(0.84, 1.1201, 0.02)


def report(values: np.ndarray, samples: int) -> None:
    """A row per rate: dB above 2^(−2R) at `target_scale`, the best scale of the target, and dB there."""
    held_out = gaussian(samples, 0, "trellis held out")
    print("| bits | target scale | dB | best scale | dB |\n|---|---|---|---|---|")
    for rate in range(4, 25):
        error, scale = min((excess_db(values, held_out, rate, scale), scale) for scale in tqdm(SCALES, leave=False))
        used = f"{target_scale(rate):.3f} | {excess_db(values, held_out, rate):.3f}"
        print(f"| {rate / 4:.2f} | {used} | {scale:.2f} | {error:.3f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=TABLE_FILE)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--candidates", type=int, default=600, help="maps tried for the start")
    parser.add_argument("--iterations", type=int, default=60, help="of Lloyd's")
    parser.add_argument("--samples", type=int, default=1 << 17, help="per rate and iteration")
    parser.add_argument("--report-samples", type=int, default=1 << 17)
    parser.add_argument("--report-only", action="store_true", help="of the table that ships")
    options = parser.parse_args()
    if options.report_only:
        table = load_table()
    else:
        table = train_table(
            seed=options.seed,
            candidates=options.candidates,
            iterations=options.iterations,
            samples=options.samples,
            progress=lambda steps, name: tqdm(steps, desc=name),
        )
        atomic_write(options.output, save({"table": table.half()}))
    report(table.half().float().numpy(), options.report_samples)


if __name__ == "__main__":
    run_script(main)
