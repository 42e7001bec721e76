"""The families of metrics that can be scored, as their weights are here, and why others cannot. Imports no torch."""

from dataclasses import dataclass
from pathlib import Path

from vqdm.config.options import EvaluateConfig
from vqdm.errors import UserError
from vqdm.metrics.families import FAMILIES
from vqdm.metrics.probes.records import Record, read_records, records_identity
from vqdm.metrics.reference import Reference, find_reference
from vqdm.metrics.sources import find, identity, missing
from vqdm.models.shipped import evaluators_directory
from vqdm.runs.identity import files_identity


@dataclass(frozen=True)
class Scoring:
    """The families of metrics that can be run: paths of their weights, and the sha256 of each."""

    weights: dict[str, list[Path]]
    weights_sha256: dict[str, tuple[str, ...]]
    reference: Reference | None
    not_run: dict[str, str]  # {metric: why it cannot be run}

    def reasons(self) -> list[str]:
        """Lines for people, one for every reason, with the metrics that are not run because of it."""
        metrics: dict[str, list[str]] = {}
        for metric, why in self.not_run.items():
            metrics.setdefault(why, []).append(metric)
        return [f"{', '.join(names)}: {why}" for why, names in metrics.items()]


def find_scoring(config: EvaluateConfig, *, originals: bool, cache: Path, pictures: str | None = None) -> Scoring:
    """Find what can be scored.

    originals: True if there are full-precision images too. cache: of the files' hashes. pictures: the file of family
    pictures (probes.path); UserError for its first bad record.
    """
    reference = find_reference(_reference(config), cache=cache)
    scoring = Scoring({}, {}, reference, {})
    for name in dict.fromkeys(config.metrics):
        family = FAMILIES[name]
        if family.pairs and not originals:
            continue
        asked = [metric for metric in family.metrics if originals or metric not in family.against_originals]
        if family.of_file:
            records = read_records(Path(pictures))
            scoring.weights[name], scoring.weights_sha256[name] = [Path(pictures)], (records_identity(records, cache),)
            scoring.not_run.update(_without_truth(records, asked))
            continue
        try:
            paths, hashes = _weights(config, name, cache)
        except UserError as error:
            if family.evaluators:
                raise
            scoring.not_run.update(dict.fromkeys(asked, str(error)))
            continue
        scoring.not_run.update(_without_reference(reference, name, hashes))
        scoring.weights[name], scoring.weights_sha256[name] = paths, tuple(hashes)
    return scoring


def _without_truth(records: list[Record], metrics: list[str]) -> dict[str, str]:
    """{metric: why not} for metrics of pictures that need the truth of every edit."""
    if records[0].truth is not None:
        return {}
    return {name: "needs a truth in every record of probes.path" for name in metrics if name.endswith("_in")}


def _reference(config: EvaluateConfig) -> str | None:
    """The reference that is asked for, or else the published one if it is here."""
    published = config.published_reference
    return config.reference or (published if published is not None and Path(published).is_file() else None)


def _weights(config: EvaluateConfig, family: str, cache: Path) -> tuple[list[Path], list[str]]:
    """Paths and sha256 of a family's weights; UserError, worded for a table, if one is missing."""
    if FAMILIES[family].evaluators:
        directory = evaluators_directory(config.evaluators)
        return [directory], [files_identity(directory, cache)]
    folder = Path(config.weights)
    found = {weights: find(weights, folder) for weights in FAMILIES[family].weights}
    if absent := [missing(weights, folder) for weights, path in found.items() if path is None]:
        raise UserError("; ".join(absent))
    return list(found.values()), [identity(weights, path, cache=cache) for weights, path in found.items()]


def _without_reference(reference: Reference | None, family: str, weights: list[str]) -> dict[str, str]:
    """{metric: why not} for a family's metrics that the reference cannot serve; UserError if it was made otherwise."""
    if reference is None:
        why = (
            "needs evaluate.reference: statistics of real images, by scripts/download_coco.py --what fid_reference "
            "or scripts/make_reference_stats.py"
        )
        return dict.fromkeys(FAMILIES[family].against_reference, why)
    reference.check_weights(family, weights)
    lacking = [] if reference.serves(family) else FAMILIES[family].against_reference
    if reference.about is None:
        lacking = [metric for metric in FAMILIES[family].against_reference if not metric.startswith("fid")]
    return dict.fromkeys(lacking, f"needs features of real images: {reference.path} holds none for it")
