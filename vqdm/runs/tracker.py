"""Experiment tracking. The only file that imports wandb; with tracking off, a tracker that does nothing."""

import json
import logging
import os
import re
from pathlib import Path

from vqdm.errors import UserError
from vqdm.runs import processes

log = logging.getLogger("vqdm")
MAX_IMAGES = 32
MAX_NAME = 128  # characters in the name of an artifact


class NullTracker:
    id: str | None = None

    def log(self, values: dict) -> None:
        """Log numbers by name; slashes make sections."""

    def table(self, name: str, rows: list[dict]) -> None:
        """Log a table of records; a key that a record lacks becomes an empty cell."""

    def images(self, name: str, paths: list[Path], captions: list[str]) -> None:
        """Log images with captions, at most 32."""

    def figures(self, paths: list[Path]) -> None:
        """Log pictures of plots by their file names; missing files are passed over."""

    def denoiser(self, name: str, directory: Path, metadata: dict) -> None:
        """Log a reference to a denoiser that a stage made, and what it came from; no weights leave the machine."""

    def finish(self, *, failed: bool) -> None:
        """End the run; always called, also when it fails."""


class WandbTracker(NullTracker):
    def __init__(self, run):
        self.run, self.id = run, run.id

    def log(self, values: dict) -> None:
        self.run.log(values)

    def table(self, name: str, rows: list[dict]) -> None:
        import wandb

        if rows:
            columns = list(dict.fromkeys(key for row in rows for key in row))
            cells = [[_cell(row.get(column)) for column in columns] for row in rows]
            self.run.log({name: wandb.Table(columns=columns, data=cells, allow_mixed_types=True)})

    def images(self, name: str, paths: list[Path], captions: list[str]) -> None:
        import wandb

        shown = zip(paths[:MAX_IMAGES], captions, strict=False)
        self.run.log({name: [wandb.Image(str(path), caption=caption) for path, caption in shown]})

    def figures(self, paths: list[Path]) -> None:
        import wandb

        there = [path for path in paths if path.is_file()]
        if there:
            self.run.log({f"figures/{path.stem}": wandb.Image(str(path)) for path in there})

    def denoiser(self, name: str, directory: Path, metadata: dict) -> None:
        """Log the reference by path, without hashing bytes: the path names what went into it.

        `use_artifact` would tell what a run started from, but wandb refuses it offline, so `metadata` does.
        """
        import wandb

        artifact = wandb.Artifact(re.sub(r"[^\w.-]", "_", name)[-MAX_NAME:], type="denoiser", metadata=metadata)
        artifact.add_reference((directory / "denoiser").resolve().as_uri(), name="denoiser", checksum=False)
        artifact.add_reference((directory / "manifest.json").resolve().as_uri(), checksum=False)
        self.run.log_artifact(artifact)

    def finish(self, *, failed: bool) -> None:
        self.run.finish(exit_code=1 if failed else 0)


def _cell(value):
    """A table cell: numbers stay numbers, so that W&B can sort and plot them; other values become JSON."""
    return value if value is None or isinstance(value, str | int | float) else json.dumps(value)


def _mode(mode: str) -> str:
    """The W&B mode: offline unless there is a key, since an online start without network blocks for minutes."""
    if mode != "auto":
        return mode
    asked = os.environ.get("WANDB_MODE")
    if asked in ("offline", "disabled"):
        return asked
    return "online" if os.environ.get("WANDB_API_KEY") else "offline"


def start_tracker(
    *, kind: str, mode: str, project: str, group: str | None, name: str, run_id: str, settings: dict, directory: Path
) -> NullTracker:
    """Start the tracker's run of an experiment; its id is the result's fingerprint, so a resumed run continues it.

    kind, mode, project, group: as in `TrackerConfig`.
    """
    if kind == "none" or not processes.is_main():
        return NullTracker()
    import wandb

    mode = _mode(mode)
    directory.mkdir(parents=True, exist_ok=True)
    try:
        run = wandb.init(
            project=project,
            group=group,
            name=name,
            id=run_id,
            config=settings,
            dir=str(directory),
            mode=mode,
            resume="allow" if mode == "online" else None,
            settings=wandb.Settings(silent=True, init_timeout=60, console="off"),
        )
    except (wandb.errors.CommError, wandb.errors.UsageError) as error:
        raise UserError(
            f"Weights & Biases does not start ({error}); use tracker.mode=offline or tracker=none"
        ) from error
    if mode == "offline":
        log.info("tracker: offline; upload with `wandb sync %s`", Path(run.dir).parent)
    return WandbTracker(run)
