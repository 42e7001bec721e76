"""The true bits at which trellis codes equal each rival: the trellis_bits table read at the rivals' scores.

python run.py table=codecs && python run.py table=trellis_bits   # and adaround, if there
python scripts/lab/equal_bits.py [--model tiny_outlier] [--results results]

Bits are bits_quantized: of the quantized layers, all that is stored for them counted. Between the bits that were run,
scores are interpolated (FID and distance by their logarithm).
"""

import argparse
import sys
from pathlib import Path

from vqdm.runs.command_line import run_script

import numpy as np
import pandas as pd

METRICS = {"psnr_to_fp": np.asarray, "distance_to_fp": np.log, "fid_to_fp": np.log}
CURVES = {"uniform": r"trellis [\d.]+ bit", "by sensitivity": r"trellis [\d.]+ bit by sensitivity"}


def bits_at(bits: np.ndarray, scores: np.ndarray, score: float) -> str:
    """The bits of the first crossing of a rival's score; outside the bits that were run, on which side."""
    order = np.argsort(scores)
    if score < scores[order[0]] or score > scores[order[-1]]:
        nearest = order[0] if score < scores[order[0]] else order[-1]
        return ("< " if bits[nearest] == bits.min() else "> ") + f"{bits[nearest]:.2f}"
    return f"{np.interp(score, scores[order], bits[order]):.2f}"


def equal_bits(rivals: pd.DataFrame, trellis: pd.DataFrame) -> pd.DataFrame:
    rows = []
    for _, rival in rivals.iterrows():
        if rival["method"].startswith(("trellis", "full precision")):
            continue
        for curve, pattern in CURVES.items():
            points = trellis[trellis["method"].str.fullmatch(pattern)]
            if points.empty:  # of a table that is not finished
                continue
            row = {"rival": rival["method"], "its bits": round(rival["bits_quantized"], 3), "trellis": curve}
            for metric, scale in METRICS.items():
                found = bits_at(
                    points["bits_quantized"].to_numpy(), scale(points[metric].to_numpy()), scale(rival[metric])
                )
                row[f"equal {metric} at"] = found
            rows.append(row)
    return pd.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--results", type=Path, default=Path("results"))
    options = parser.parse_args()
    end = "" if options.model == "tiny" else f"-{options.model}"
    files = {name: options.results / "tables" / f"{name}{end}.csv" for name in ("codecs", "trellis_bits", "adaround")}
    missing = next((name for name in ("codecs", "trellis_bits") if not files[name].is_file()), None)
    if missing is not None:
        sys.exit(f"error: {files[missing]} is not there; run python run.py table={missing} first")
    found = {name: pd.read_csv(file) for name, file in files.items() if file.is_file()}
    tables = {name: table.dropna(subset="bits_quantized") for name, table in found.items()}  # rows that were run
    trellis = tables.pop("trellis_bits")
    print(equal_bits(pd.concat(tables.values()), trellis).to_string(index=False))


if __name__ == "__main__":
    run_script(main)
