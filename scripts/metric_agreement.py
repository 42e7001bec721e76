"""Which metric to trust at which n: how each orders compressed variants, against caption fidelity on all images.

python run.py +experiment=codecs seeds=1 evaluate.prompts.n=2048
python scripts/metric_agreement.py [--prefix codecs_] [--model tiny] [--n 32 … 2048] [--results results]

Spearman's rank correlation over the compressed variants; where lower is better, the sign is turned.
Every cell is the mean over as many disjoint parts of n images as there are, with their standard deviation.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.stats

from vqdm.errors import UserError
from vqdm.metrics.resampling import Resamples
from vqdm.metrics.scores import score
from vqdm.metrics.tiny_world import load_reference
from vqdm.models.location import evaluators_directory
from vqdm.stages.features import load_columns
from vqdm.stages.layout import captions_of
from vqdm.store import Store

LOWER_IS_BETTER = ("fid", "kid", "cmmd", "distance_to_fp", "fid_to_fp")
SHOWN = (
    "fidelity", "all_right", "psnr_to_fp", "ssim_to_fp", "distance_to_fp", "agreement_with_fp", "fid_to_fp",
    "clip_score", "fid", "kid", "cmmd",
)  # fmt: skip
PARTS = 8  # of n images, at most


class Variant:
    """A run's columns on all its images, and those of the full-precision images."""

    def __init__(self, record: dict, originals: Path, results: Path, count: int):
        places = {name: results / path for name, path in record["directories"].items()}
        size = json.loads((places["features/tiny"] / "config.json").read_text())["config"]["batch_size"]
        self.method = record["method"]
        self.own = load_columns(places["features/tiny"], count, size)
        self.pairs = load_columns(places["features/paired"], count, size)
        self.originals = load_columns(originals, count, size)
        self.captions = captions_of(places["generate"], count)

    def scores(self, rows: slice, reference: dict) -> dict[str, float]:
        """Every metric on a part of the images."""
        own, originals, pairs = ({k: v[rows] for k, v in c.items()} for c in (self.own, self.originals, self.pairs))
        captions = self.captions[rows]
        once = Resamples(len(captions), count=2)  # errors are not used
        found = score("tiny", own, originals, captions=captions, reference=reference, resamples=once)
        paired = score("paired", pairs, None, captions=captions, reference=None, resamples=once)
        means = {name: float(np.mean(values)) for name, values in (found.images | paired.images).items()}
        return means | {name: entry["value"] for name, entry in found.sets.items()}


def variants(results: Path, prefix: str, model: str, count: int) -> list[Variant]:
    """The newest run of every compressed variant with that many images."""
    store, found = Store(results), {}
    for _, record in sorted(store.runs(), key=lambda pair: pair[0].stat().st_mtime):
        named = record["experiment"].startswith(prefix) and record.get("model") == model
        directory = results / record.get("directories", {}).get("evaluate", "none")
        if named and "features/paired" in record["directories"] and (directory / "metrics.json").is_file():
            config = json.loads((directory / "config.json").read_text())["config"]
            if config["n"] >= count and "bits" in record:
                found[record["experiment"]] = record
    if len(found) < 3:
        raise UserError(
            f"{len(found)} runs {prefix}* on {model} with {count} images under {results}; run a table first"
        )
    return [Variant(record, _originals(record, results), results, count) for record in found.values()]


def _originals(record: dict, results: Path) -> Path:
    """The features of the full-precision images: of the stages of family tiny the one that is not the run's own."""
    own = record["directories"]["features/tiny"]
    tiny = [s for s in record["stages"] if s.startswith("stages/features/") and "-tiny-" in s and s != own]
    return results / tiny[0]


def agreement(found: list[Variant], sizes: list[int], reference: dict) -> pd.DataFrame:
    """Rows metrics, columns n: rank correlation with fidelity on all images, mean and deviation over parts."""
    count = len(found[0].captions)
    whole = [variant.scores(slice(None), reference) for variant in found]
    truth = [scores["fidelity"] for scores in whole]
    cells: dict[int, dict[str, str]] = {}
    for n in sizes:
        parts = [slice(start, start + n) for start in range(0, count - n + 1, n)][:PARTS]
        tables = [[variant.scores(part, reference) for variant in found] for part in parts]
        cells[n] = {metric: _cell([_correlation(metric, table, truth) for table in tables]) for metric in SHOWN}
    return pd.DataFrame(cells).loc[list(SHOWN)]


def _correlation(metric: str, table: list[dict], truth: list[float]) -> float:
    sign = -1 if metric in LOWER_IS_BETTER else 1
    return float(scipy.stats.spearmanr([sign * scores[metric] for scores in table], truth).statistic)


def _cell(values: list[float]) -> str:
    return f"{np.mean(values):.2f}" + (f" ± {np.std(values):.2f}" if len(values) > 1 else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prefix", default="codecs_")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--n", type=int, nargs="+", default=[32, 64, 128, 256, 512, 1024, 2048])
    parser.add_argument("--results", type=Path, default=Path("results"))
    options = parser.parse_args()
    try:
        found = variants(options.results, options.prefix, options.model, max(options.n))
    except UserError as error:
        sys.exit(f"error: {error}")
    print(f"{len(found)} compressed variants: " + ", ".join(variant.method for variant in found))
    table = agreement(found, options.n, load_reference(evaluators_directory(None)))
    print(table.to_markdown())


if __name__ == "__main__":
    main()
