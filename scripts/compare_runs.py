"""Two runs on the same captions and noise, image by image: mean difference and its paired standard error.

python scripts/compare_runs.py codecs_trellis3 codecs_rtn4 [--model tiny_outlier] [--results results]

A run is named as in experiments/; its calibration seeds (NAME_seed1, …) are averaged image by image first.
"""

import argparse
import re
import sys
from pathlib import Path

import numpy as np
import pandas as pd

from vqdm.errors import UserError
from vqdm.stages.layout import IMAGES_FILE
from vqdm.store import Store

LOWER_IS_BETTER = ("distance_to_fp",)


def image_scores(results: Path, name: str, model: str) -> pd.DataFrame:
    """Scores of every image, by prompt; the mean over the calibration seeds that there are."""
    found = [
        (record["experiment"], file.stat().st_mtime, results / record["directories"]["evaluate"] / IMAGES_FILE)
        for file, record in Store(results).runs()
        if re.fullmatch(rf"{re.escape(name)}(_seed\d+)?", record["experiment"]) and record.get("model") == model
    ]
    newest = {run: scores for run, _, scores in sorted(found) if scores.is_file()}  # a later one replaces an earlier
    if not newest:
        raise UserError(f"no finished run {name} on {model} under {results}; run its experiment first")
    frames = [pd.read_csv(scores, index_col="prompt") for scores in newest.values()]
    return sum(frames) / len(frames)


def compare(one: pd.DataFrame, other: pd.DataFrame) -> pd.DataFrame:
    """Per metric: both means, mean difference, its paired standard error, and how many of them it is for the better."""
    if list(one.index) != list(other.index):
        raise UserError("the two runs were scored on other captions; run them with the same evaluate.prompts")
    rows = []
    for metric in (name for name in one.columns if name in other.columns):
        difference = (one[metric] - other[metric]).to_numpy()
        error = difference.std(ddof=1) / np.sqrt(len(difference))
        sign = -1 if metric in LOWER_IS_BETTER else 1
        rows.append(
            {
                "metric": metric,
                "first": one[metric].mean(),
                "second": other[metric].mean(),
                "difference": difference.mean(),
                "paired_se": error,
                "better_by_se": sign * difference.mean() / error if error else 0.0,
            }
        )
    return pd.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first")
    parser.add_argument("second")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--results", type=Path, default=Path("results"))
    options = parser.parse_args()
    try:
        both = [image_scores(options.results, name, options.model) for name in (options.first, options.second)]
        table = compare(*both)
    except UserError as error:
        sys.exit(f"error: {error}")
    print(f"{options.first} against {options.second} on {options.model}, n = {len(both[0])}")
    print(table.to_string(index=False, float_format=lambda value: f"{value:.5g}"))


if __name__ == "__main__":
    main()
