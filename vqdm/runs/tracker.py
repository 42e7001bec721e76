"""Experiment tracking. The only file that imports wandb; with tracking off, a tracker that does nothing."""

import configparser
import contextlib
import functools
import importlib.util
import json
import logging
import netrc
import os
import urllib.parse
from collections.abc import Callable
from pathlib import Path

from vqdm.errors import UserError
from vqdm.runs import processes
from vqdm.runs.files import unwritable_is_mendable, write_json
from vqdm.runs.texts import file_name_of, in_one_line

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

    def denoiser(self, name: str, directory: Path, metadata: dict, inputs: tuple[str, ...] = ()) -> None:
        """Log a denoiser that a stage made, and what it came from; weights leave the machine only if asked for.

        inputs: names under which the denoisers that it was made from are logged.
        """

    def table_files(self, name: str, files: list[Path]) -> None:
        """Log a table's files as one artifact; missing ones are passed over."""

    def finish(self, *, failed: bool) -> None:
        """End the run; always called, also when it fails."""


class FinishedTracker(NullTracker):
    """Takes everything and logs nothing: of a run that was logged whole before, whose id it has."""

    def __init__(self, run_id: str):
        self.id = run_id


def _softly(method: Callable) -> Callable:
    """An extra that only decorates: where it fails, a line says so, and hours of work go on."""

    @functools.wraps(method)
    def called(self, *arguments) -> None:
        try:
            method(self, *arguments)
        except Exception as error:
            log.warning("tracker: %s left out (%s)", method.__name__, in_one_line(f"{type(error).__name__}: {error}"))

    return called


class WandbTracker(NullTracker):
    """A W&B run. logged: the file that says it was finished, so that a repeat logs nothing twice.

    uploads: True: artifacts hold files, False: references to them.
    """

    def __init__(self, run, *, logged: Path, uploads: bool):
        self.run, self.id, self.logged, self.uploads = run, run.id, logged, uploads

    def log(self, values: dict) -> None:
        self.run.log(values)

    @_softly
    def table(self, name: str, rows: list[dict]) -> None:
        import wandb

        if rows:
            columns = list(dict.fromkeys(key for row in rows for key in row))
            cells = [[_cell(row.get(column)) for column in columns] for row in rows]
            self.run.log({name: wandb.Table(columns=columns, data=cells, allow_mixed_types=True)})

    @_softly
    def images(self, name: str, paths: list[Path], captions: list[str]) -> None:
        import wandb

        shown = zip(paths[:MAX_IMAGES], captions, strict=False)
        self.run.log({name: [wandb.Image(str(path), caption=caption) for path, caption in shown]})

    @_softly
    def figures(self, paths: list[Path]) -> None:
        import wandb

        there = [path for path in paths if path.is_file()]
        if there:
            self.run.log({f"figures/{path.stem}": wandb.Image(str(path)) for path in there})

    @_softly
    def denoiser(self, name: str, directory: Path, metadata: dict, inputs: tuple[str, ...] = ()) -> None:
        """Log the files, or a reference by path without hashing bytes: the path names what went into it.

        `use_artifact` tells what a run started from, but wandb refuses it offline: there `metadata` alone does.
        """
        artifact = _artifact(name, "denoiser", metadata)
        if self.uploads:
            artifact.add_dir(str(directory / "denoiser"), name="denoiser")
            artifact.add_file(str(directory / "manifest.json"))
        else:
            artifact.add_reference((directory / "denoiser").resolve().as_uri(), name="denoiser", checksum=False)
            artifact.add_reference((directory / "manifest.json").resolve().as_uri(), checksum=False)
        if not self.run.offline:
            for one in inputs:
                self.run.use_artifact(f"{_artifact_name(one)}:latest")
        self.run.log_artifact(artifact)

    @_softly
    def table_files(self, name: str, files: list[Path]) -> None:
        artifact = _artifact(f"table-{name}", "table", {"table": name})
        for file in files:
            if file.is_file():
                artifact.add_file(str(file))
        self.run.log_artifact(artifact)

    def finish(self, *, failed: bool) -> None:
        place = str(Path(self.run.dir).parent)
        self.run.finish(exit_code=1 if failed else 0)
        if not failed:
            write_json(self.logged, {"run": place})


def _artifact(name: str, kind: str, metadata: dict):
    import wandb

    return wandb.Artifact(_artifact_name(name), type=kind, metadata=metadata)


def _artifact_name(text: str) -> str:
    return "".join(c if c.isalnum() or c in "_.-" else "_" for c in text)[-MAX_NAME:]


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
    if asked != "online" and _setting("mode") in ("offline", "disabled"):  # `wandb offline` in this folder
        return "offline"
    return "online" if os.environ.get("WANDB_API_KEY") or _logged_in() else "offline"


def _setting(name: str) -> str | None:
    """A value of W&B's own settings files: this folder's, or the user's."""
    home = Path(os.environ.get("WANDB_CONFIG_DIR") or Path.home() / ".config" / "wandb")
    files = (home / "settings", Path(os.environ.get("WANDB_DIR") or ".") / "wandb" / "settings")
    found = configparser.ConfigParser(interpolation=None, default_section="default")
    with contextlib.suppress(configparser.Error, OSError, UnicodeError):
        found.read(files, encoding="utf-8")
    return found.defaults().get(name)


def _logged_in() -> bool:
    """True if `wandb login` has left a key for the server in the user's netrc, where wandb itself looks."""
    server = os.environ.get("WANDB_BASE_URL") or _setting("base_url") or "https://api.wandb.ai"
    named = os.environ.get("NETRC")
    files = [Path(named)] if named else [Path.home() / ".netrc", Path.home() / "_netrc"]
    host = urllib.parse.urlsplit(server).hostname or ""
    for file in files:
        with contextlib.suppress(OSError, netrc.NetrcParseError, UnicodeError):
            if (known := netrc.netrc(file).hosts.get(host)) and known[2]:
                return True
    return False


def start_tracker(
    *,
    kind: str,
    mode: str,
    project: str,
    group: str | None,
    artifacts: str = "reference",
    name: str,
    run_id: str,
    settings: dict,
    directory: Path,
) -> NullTracker:
    """Start the tracker's run of an experiment; its id is the result's fingerprint, so a resumed run continues it.

    kind, mode, project, group, artifacts: as in `TrackerConfig`.
    """
    if kind == "none" or not processes.is_main():
        return NullTracker()
    if importlib.util.find_spec("wandb") is None:
        if mode != "auto":
            raise UserError(f"tracker.mode={mode}: wandb is not installed; pip install wandb, or use tracker=none")
        log.info("tracker: wandb is not installed, so nothing is tracked; pip install wandb, or use tracker=none")
        return NullTracker()
    import wandb

    mode = _mode(mode)
    logged = directory / "logged" / f"{file_name_of(f'{project}-{run_id}')}-{mode}.json"
    if _is_logged(logged, mode):
        log.debug("tracker: this run was logged before; remove %s to log it again", logged)
        return FinishedTracker(run_id)
    with unwritable_is_mendable(directory):
        directory.mkdir(parents=True, exist_ok=True)
    earlier = sorted((directory / "wandb").glob(f"offline-run-*-{run_id}")) if mode == "offline" else []
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
        parts = [*earlier, Path(run.dir).parent]  # of a run that was stopped, each with its own part of the curves
        log.debug("tracker: offline; upload with `wandb sync %s`", " ".join(map(str, parts)))
    return WandbTracker(run, logged=logged, uploads=artifacts == "upload")


def _is_logged(logged: Path, mode: str) -> bool:
    """True if a run was logged to its end in this mode and, offline, is still there to upload."""
    try:
        place = json.loads(logged.read_text(encoding="utf-8"))["run"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return mode != "offline" or Path(place).is_dir()
