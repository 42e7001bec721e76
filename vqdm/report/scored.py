"""A finished run with the features that it was scored from, for scripts that compare runs."""

import json
from dataclasses import dataclass
from pathlib import Path

from vqdm.report.records import images_of, scores_of


@dataclass(frozen=True)
class Run:
    """A finished run: its evaluation and where its stages lie."""

    results: Path
    record: dict
    protocol: dict
    metrics: dict[str, dict]

    @property
    def scores(self) -> Path:
        return self.results / self.record["directories"]["evaluate"]

    def stages_of(self, kind: str) -> dict[str, Path]:
        """{family: directory} of the features ("features") or of those of the full-precision images ("originals")."""
        found = json.loads((self.scores / "config.json").read_text())["upstream"]
        of_kind = {key.partition("/")[2]: value for key, value in found.items() if key.startswith(f"{kind}/")}
        return {family: self._directory(fingerprint) for family, fingerprint in of_kind.items()}

    def _directory(self, fingerprint: str) -> Path:
        return next(self.results / d for d in self.record["stages"] if d.endswith(f"-{fingerprint[:8]}"))


def read_run(results: Path, record: dict) -> Run:
    written = scores_of(record, results)
    return Run(results, record, written["protocol"], written["metrics"])


def columns_of(run: Run, directory: Path | None) -> dict | None:
    from vqdm.stages.features import load_columns

    if directory is None:
        return None
    batch_size = json.loads((directory / "config.json").read_text())["config"]["batch_size"]
    return load_columns(directory, len(images_of(run.protocol)), batch_size)
