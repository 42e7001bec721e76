"""Which metric to trust at which n: how each orders compressed variants, against caption fidelity at the largest n.

python run.py table=codecs seeds=1 evaluate.prompts.n=2048
python scripts/lab/metric_agreement.py [--prefix ""] [--model tiny] [--n 32 … 2048] [--results results]

Spearman's rank correlation over the compressed variants; where lower is better, the sign is turned.
Every cell is the mean over as many disjoint parts of n images as there are, at most 8, with their standard deviation; –
where a part gives all variants the same score.
"""

import argparse
import sys
from pathlib import Path

from vqdm.runs.command_line import run_script

import numpy as np
import pandas as pd
import scipy.stats

from vqdm.errors import UserError
from vqdm.metrics.resampling import Resamples
from vqdm.metrics.scores import score
from vqdm.models.shipped import evaluators_directory
from vqdm.report.records import LOWER_IS_BETTER, images_of, is_finished
from vqdm.report.scored import Run, columns_of, read_run
from vqdm.runs.identity import files_identity
from vqdm.runs.store import Store
from vqdm.stages.layout import captions_of
from vqdm.tiny.evaluator import load_reference

SHOWN = (
    "fidelity", "all_right", "psnr_to_fp", "ssim_to_fp", "distance_to_fp", "agreement_with_fp", "fid_to_fp",
    "clip_score", "fid", "kid", "cmmd",
)  # fmt: skip
PARTS = 8  # of n images, at most


class Variant:
    """A run's columns on its first `count` images, and those of the full-precision images."""

    def __init__(self, run: Run, count: int):
        features, originals = run.stages_of("features"), run.stages_of("originals")
        self.method = run.record["method"]
        self.own, self.pairs, self.originals = (
            {name: column[:count] for name, column in columns_of(run, place).items()}
            for place in (features["tiny"], features["paired"], originals["tiny"])
        )
        self.captions = captions_of(run.results / run.record["directories"]["generate"], count)

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
    """The newest run of every compressed variant with that many images, known by where its images are; UserError unless
    all can be compared.
    """
    newest: dict[str, Run] = {}
    for _, record in sorted(Store(results).runs(), key=lambda pair: pair[0].stat().st_mtime):
        named = record["experiment"].startswith(prefix) and record.get("model") == model
        if named and is_finished(record, results) and _serves(run := read_run(results, record), count):
            newest[record["directories"]["generate"]] = run
    if len(newest) < 3:
        raise UserError(
            f"{len(newest)} runs {prefix}* on {model} with {count} images under {results}; run a table first"
        )
    shipped = [files_identity(evaluators_directory(None), Store(results).hashes)]
    names = [run.record["experiment"] for run in newest.values()]
    for name, run in zip(names, newest.values(), strict=True):
        if run.metrics["fid"]["protocol"]["weights_sha256"] != shipped:
            raise UserError(f"{name} was scored with other evaluators than are shipped; run it with these")
    found = [Variant(run, count) for run in newest.values()]
    for name, variant in zip(names, found, strict=True):
        if variant.captions != found[0].captions:
            raise UserError(f"{name} has images of other captions than {names[0]}; run both on the same list")
    return found


def _serves(run: Run, count: int) -> bool:
    """Full precision has no pairs."""
    return len(images_of(run.protocol)) >= count and {"tiny", "paired"} <= set(run.stages_of("features"))


def agreement(found: list[Variant], sizes: list[int], reference: dict) -> pd.DataFrame:
    """Rows metrics, columns n: rank correlation with fidelity on all of them, mean and deviation over parts."""
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
    """NaN where all variants are alike: they have no order."""
    sign = -1 if LOWER_IS_BETTER.fullmatch(metric) else 1
    values = [sign * scores[metric] for scores in table]
    if min(len(set(values)), len(set(truth))) == 1:
        return float("nan")
    return float(scipy.stats.spearmanr(values, truth).statistic)


def _cell(values: list[float]) -> str:
    if np.isnan(values).any():
        return "–"
    return f"{np.mean(values):.2f}" + (f" ± {np.std(values):.2f}" if len(values) > 1 else "")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prefix", default="codecs_", help='of the runs\' names; "" for all')
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--n", type=int, nargs="+", default=[32, 64, 128, 256, 512, 1024, 2048])
    parser.add_argument("--results", type=Path, default=Path("results"))
    options = parser.parse_args(arguments)
    try:
        found = variants(options.results, options.prefix, options.model, max(options.n))
    except UserError as error:
        sys.exit(f"error: {error}")
    print(f"{len(found)} compressed variants: " + ", ".join(variant.method for variant in found))
    table = agreement(found, options.n, load_reference(evaluators_directory(None)))
    print(table.to_markdown(disable_numparse=True))


if __name__ == "__main__":
    run_script(main)
