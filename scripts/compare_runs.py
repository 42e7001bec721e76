"""Two runs on the same captions and noise, image by image and draw by draw: differences and their standard errors.

python scripts/compare_runs.py codecs_trellis3 codecs_rtn4 [--model tiny_outlier] [--results results]
python scripts/compare_runs.py sdxl_vq3 sdxl_qdiffusion4 --model sdxl --reference data/reference/coco2014_val_30k
python scripts/compare_runs.py SWEEP/0 SWEEP/2                      # jobs of a sweep, by folder, or by their labels

First comes a sentence on which is better, by the paired metrics; then the numbers, rounded by their errors (--exact:
as they are). A run is named as in experiments/; its calibration seeds (NAME_seed1, …) are averaged image by image
first. It is also named by NAME/FINGERPRINT, its record's file, a sweep's job or that job's label. Means over
images: paired standard error over prompts. Scores of a whole set (FID, KID, CMMD): the same prompts are drawn for both
runs, --resamples times, from the features that the runs kept; "bias" is how far the draws' mean difference lies from
the difference of all images, as FID rises when images stand twice; the 95 % interval is of the draws less this bias.
The Inception score and KID over subsets have no such draws and are left out.
"""

import argparse
import functools
import math
import re
import sys
from pathlib import Path

from vqdm.runs.command_line import run_script

import numpy as np
import pandas as pd
from tabulate import tabulate

from vqdm.config.options import TINY_WORLDS
from vqdm.errors import UserError
from vqdm.report.any_runs import find_records
from vqdm.report.formats import DIGITS
from vqdm.report.paired import (
    SAME_IMAGES,
    SAME_NUMBERS,
    compare_images,
    difference_row,
    image_scores,
    verdict_sentence,
)
from vqdm.report.records import is_finished
from vqdm.report.scored import Run, columns_of, read_run
from vqdm.runs.store import Store
from vqdm.stages.layout import IMAGES_FILE


def find_runs(results: Path, name: str, model: str) -> list[Run]:
    """The newest of every calibration seed that there is; a job of a sweep, or one run's record, is what it names."""
    found = [
        (record["experiment"], file.stat().st_mtime, record)
        for file, record in Store(results).runs()
        if re.fullmatch(rf"{re.escape(name)}(_seed\d+)?", record["experiment"]) and record.get("model") == model
    ]
    found = [one for one in found if is_finished(one[2], results)]
    newest = {run: record for run, _, record in sorted(found, key=lambda one: one[:2])}
    records = list(newest.values()) or find_records(results, name, model=model)
    if not newest and len(records) > 1:
        raise UserError(f"{name} names {len(records)} runs; give one, or all of them to scripts/report.py")
    return [read_run(results, record) for record in records]


def check(runs: list[Run], *, mixed: bool) -> list[str]:
    """The metrics that all runs have; UserError if they are not of the same images, or of one protocol."""
    first = runs[0]
    for run in runs[1:]:
        if any(run.protocol.get(key) != first.protocol.get(key) for key in SAME_IMAGES):
            raise UserError("the two runs were scored on other captions or noise; run them with the same evaluate.*")
    shared = [name for name in first.metrics if all(name in run.metrics for run in runs)]
    for name, run in ((name, run) for name in shared for run in runs[1:]):
        differing = [key for key in SAME_NUMBERS if run.protocol.get(key) != first.protocol.get(key)]
        ours, theirs = (one.metrics[name].get("protocol", {}) for one in (first, run))
        differing += sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
        if differing and not mixed:
            raise UserError(
                f"{name} has another {', '.join(differing)} in one run than in the other; give --mixed "
                "to compare them all the same"
            )
    return shared


def set_scores(runs: list[Run], load_reference, *, resamples) -> dict[str, tuple[float, np.ndarray]]:
    """Per metric of a whole set: of all images, and of every draw [count]; means over the calibration seeds."""
    from vqdm.metrics.scores import set_statistics

    found: dict[str, list] = {}
    for run in runs:
        originals = run.stages_of("originals")
        for family, directory in run.stages_of("features").items():
            reference = load_reference(family, run)
            if family == "tiny" and reference is None:
                continue
            columns = [columns_of(run, place) for place in (directory, originals.get(family))]
            for metric, statistic in set_statistics(family, *columns, reference=reference).items():
                found.setdefault(metric, []).append(statistic(resamples))
    return {
        metric: (float(np.mean([value for value, _ in seeds])), np.mean([draws.numpy() for _, draws in seeds], axis=0))
        for metric, seeds in found.items()
        if len(seeds) == len(runs)
    }


def compare_sets(one: dict, other: dict) -> list[dict]:
    rows = []
    for metric in (name for name in one if name in other):
        (first, draws), (second, other_draws) = one[metric], other[metric]
        differences = draws - other_draws
        bias = differences.mean() - (first - second)
        low, high = np.quantile(differences - bias, [0.025, 0.975])
        rows.append(difference_row(metric, first, second, differences.std(ddof=1), low=low, high=high, bias=bias))
    return rows


@functools.cache
def _reference(path: str | None, cache: Path):
    from vqdm.metrics.reference import find_reference

    return find_reference(path, cache=cache)


def reference_loader(options: argparse.Namespace):
    """(family, run) -> the tensors that the run was scored against; UserError if the given ones are others."""
    from vqdm.tiny.evaluator import load_reference

    cache = Store(options.results).hashes

    def load(family: str, run: Run) -> dict | None:
        if family == "tiny":
            return load_reference(_evaluators_of(run, options.evaluators, cache))
        used = next(
            (
                entry["protocol"]["reference_sha256"]
                for name, entry in run.metrics.items()
                if name in _metrics_of(family) and "reference_sha256" in entry["protocol"]
            ),
            None,
        )
        if used is None:
            return None
        reference = _reference(options.reference, cache)
        if reference is None or reference.sha256 != used:
            raise UserError(
                f"{run.record['experiment']} was scored against a reference of sha256 {used[:16]}…; give it as "
                "--reference PATH, or --images-only to leave FID, KID and CMMD out"
            )
        return reference.load(family)

    return load


def _evaluators_of(run: Run, named: str | None, cache: Path) -> Path:
    """The directory of the evaluators that scored a run: the one that is named, or that of a shipped world."""
    from vqdm.models.shipped import evaluators_directory
    from vqdm.runs.identity import files_identity

    for world in TINY_WORLDS if named is None else (named,):
        directory = evaluators_directory(world)
        if [files_identity(directory, cache)] == run.metrics["clip_score"]["protocol"]["weights_sha256"]:
            return directory
    raise UserError(f"{run.record['experiment']} was scored with other evaluators; give --evaluators DIR")


def _metrics_of(family: str) -> tuple[str, ...]:
    from vqdm.metrics.families import FAMILIES

    return FAMILIES[family].metrics


def compare(both: list[list[Run]], options: argparse.Namespace) -> pd.DataFrame:
    shared = check([run for runs in both for run in runs], mixed=options.mixed)
    rows = compare_images(*(image_scores(run.scores / IMAGES_FILE for run in runs) for runs in both))
    if not options.images_only:
        from vqdm.metrics.resampling import Resamples

        protocol = both[0][0].protocol
        resamples = Resamples(protocol["n"], protocol["images_per_prompt"], count=options.resamples)
        load = reference_loader(options)
        rows += compare_sets(*(set_scores(runs, load, resamples=resamples) for runs in both))
    return pd.DataFrame([row for row in rows if row["metric"] in shared])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first")
    parser.add_argument("second")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--results", type=Path, default=Path("results"))
    parser.add_argument("--resamples", type=int, default=100, help="draws of prompts")
    parser.add_argument("--reference", help="evaluate.reference of the runs")
    parser.add_argument("--evaluators", help="evaluate.evaluators of the runs, if not a shipped world's")
    parser.add_argument("--images-only", action="store_true", help="only what is a mean over images")
    parser.add_argument("--mixed", action="store_true", help="also where protocols, dtypes or devices differ")
    parser.add_argument("--exact", action="store_true", help="numbers with five digits, the interval and the bias")
    options = parser.parse_args(arguments)
    try:
        if options.resamples < 2:
            raise UserError("--resamples must be 2 at least: their spread is the standard error")
        both = [find_runs(options.results, name, options.model) for name in (options.first, options.second)]
        table = compare(both, options)
    except UserError as error:
        sys.exit(f"error: {error}")
    protocol = both[0][0].protocol
    copies = f" × {protocol['images_per_prompt']}" if protocol["images_per_prompt"] > 1 else ""
    asked = (options.first, options.second)
    names = tuple(map(called, both, asked))
    print(verdict_sentence(*(asked if names[0] == names[1] else names), table.to_dict("records")))
    print(f"{options.first} against {options.second} on {options.model}, n = {protocol['n']}{copies}")
    if options.exact:
        print(table.to_string(index=False, float_format=lambda value: f"{value:.5g}"))
    else:
        print(rounded(table))


def called(runs: list[Run], name: str) -> str:
    """A run's name for people, with its size where it is known."""
    record = runs[0].record
    bits = record["bits"].get("bits_per_weight")
    return record.get("method", name) + ("" if bits is None else f" ({bits:.2f} bits)")


def rounded(table: pd.DataFrame) -> str:
    """The differences ± their paired standard errors, both to two digits of the error."""
    rows = []
    for row in table.to_dict("records"):
        error = row["paired_se"]
        digits = DIGITS.get(row["metric"], 3) if not error > 0 else max(0, 1 - math.floor(math.log10(error)))
        numbers = [f"{row[key]:.{digits}f}" for key in ("first", "second")]
        difference = f"{row['difference']:+.{digits}f} ± {error:.{digits}f}"
        rows.append([row["metric"], *numbers, difference, f"{row['better_by_se']:+.1f}"])
    headers = ["metric", "first", "second", "difference ± error", "better by errors"]
    align = ["left", *["right"] * 4]
    return tabulate(rows, headers=headers, colalign=align, disable_numparse=True)


if __name__ == "__main__":
    run_script(main)
