"""The store: one directory per stage, named by what went into it, done when its manifest is there.

    results/stages/<stage>/<label>-<fp8>/   config.json, payload, items/*.json, manifest.json (last)
    results/runs/<experiment>/<fp8>.json    which stage directories make one result

Whatever happens to a process (Ctrl-C, kill -9, a full disk), the same call again goes on; nothing half-made counts as
done. A `make` function overwrites what it finds, except for items that `read_item` vouches for. Imports no torch.
"""

import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vqdm.errors import UserError
from vqdm.runs import progress
from vqdm.runs.files import full_disk_is_mendable, make_newest, write_json
from vqdm.runs.heap import return_freed_memory
from vqdm.runs.locks import lock_if_free, locked
from vqdm.runs.stage import Stage
from vqdm.runs.stage_directory import (
    MANIFEST,
    announce_faults,
    clear_faulty,
    faults_of,
    has_work,
    payload_files,
    refuse_collision,
    remove_scratch,
    remove_temporaries,
    scratch_left,
    state_of,
    write_config,
    write_manifest,
)
from vqdm.runs.texts import check_file_name
from vqdm.runs.usage import Usage

TRASH = ".trash-"
log = logging.getLogger("vqdm")


@dataclass(frozen=True)
class StageEntry:
    """A stage directory as `Store.stages` finds it. `runs` are the run files, relative to results/runs."""

    directory: Path
    name: str
    label: str
    short: str
    size: int  # bytes
    age: float  # seconds since its newest file was written
    state: Literal["done", "partial", "open"]
    runs: tuple[str, ...]


class Store:
    """All stage directories and run records under one results directory."""

    def __init__(self, root: Path):
        self.root = Path(root)

    @property
    def hashes(self) -> Path:
        """The cache of model files' hashes."""
        return self.root / "cache" / "file_hashes.json"

    def directory(self, stage: Stage) -> Path:
        return self.root / "stages" / stage.name / stage.directory_name

    def status(self, stage: Stage) -> Literal["done", "partial", "missing"]:
        """State of a stage, for listing a plan, from file sizes alone.

        A stage of `open` is never "done": count its items.
        """
        directory = self.directory(stage)
        refuse_collision(directory, stage)
        if not faults_of(directory, stage.fingerprint, hashed=False):
            return "done"
        return "partial" if has_work(directory) else "missing"

    def ensure(
        self,
        stage: Stage,
        make: Callable[[Path], dict | None],
        *,
        environment: dict,
        holds: Callable[[Path], bool] = lambda directory: True,
        scratch: tuple[str, ...] = (),
    ) -> Path:
        """The stage's directory, made now unless it is there and every file matches its checksum.

        `make(directory)` writes the files; what it returns is kept in the manifest under "summary". `environment`
        (device and its reason, dtype, …) is kept there too. `holds` tells whether a finished stage was made from the
        upstream files as they are now: those of `open` may be remade on another device.
        scratch: patterns of paths below the directory that serve only to go on after a stop. They are removed once the
        manifest, which does not list them, says that the rest is whole.
        Raises UserError on a full disk or a fingerprint collision.
        """
        directory = self.directory(stage)
        refuse_collision(directory, stage)

        def found_faults() -> dict[str, str]:
            faults = faults_of(directory, stage.fingerprint)
            return faults if faults or holds(directory) else {MANIFEST: "is of other files than there are now"}

        if not found_faults() and not scratch_left(directory, scratch):
            return directory
        with locked(directory), full_disk_is_mendable(directory), progress.making(stage.name, stage.fingerprint):
            refuse_collision(directory, stage)  # checked again: another process may have been here meanwhile
            if faults := found_faults():
                announce_faults(directory, faults)
                clear_faulty(directory, faults)
                write_config(directory, stage, extendable=False)
                return_freed_memory()  # what the stage before left, such as models that refer to themselves
                usage, summary = Usage(), make(directory)
                used = usage.so_far()
                files = payload_files(directory, without=scratch)
                write_manifest(directory, stage, files, used=used, environment=environment, summary=summary)
            remove_scratch(directory, scratch)
        return directory

    def summary(self, stage: Stage) -> dict:
        """The summary of a finished stage: what `make` returned."""
        return json.loads((self.directory(stage) / MANIFEST).read_bytes())["summary"]

    @contextmanager
    def open(self, stage: Stage) -> Iterator[Path]:
        """Lock and yield the directory of a stage that can always be extended (images).

        Its items alone tell what is done.
        """
        directory = self.directory(stage)
        with locked(directory), full_disk_is_mendable(directory), progress.making(stage.name, stage.fingerprint):
            refuse_collision(directory, stage)
            remove_temporaries(directory)
            write_config(directory, stage, extendable=True)
            yield directory

    def record_run(self, experiment: str, payload: dict) -> Path:
        """Write runs/<experiment>/<fp8>.json, with fp8 from payload["fingerprint"].

        payload["stages"] names *all* stage directories of the run, upstream ones included: `prune` keeps nothing else.
        """
        check_file_name("name", experiment, folders=True)
        stages = [self._relative(directory) for directory in payload["stages"]]
        path = self.root / "runs" / experiment / f"{payload['fingerprint'][:8]}.json"
        write_json(path, payload | {"experiment": experiment, "stages": stages})
        make_newest(path, path.parent.glob("*.json"))
        return path

    def _relative(self, directory: Path | str) -> str:
        directory = Path(directory)
        if directory.is_absolute() or directory.is_relative_to(self.root):
            return directory.resolve().relative_to(self.root.resolve()).as_posix()
        return directory.as_posix()

    def runs(self) -> Iterator[tuple[Path, dict]]:
        """(file, payload) of every recorded run.

        A damaged file is an error: `prune` must not treat it as no run at all.
        """
        for path in sorted((self.root / "runs").rglob("*.json")):
            try:
                payload = json.loads(path.read_bytes())
                payload["stages"] = list(payload["stages"])
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{path}: not a run record; run its experiment again, or delete the file") from error
            yield path, payload

    def stages(self) -> list[StageEntry]:
        """Every stage directory on disk, done or not, by stage name and label."""
        referring: dict[str, list[str]] = {}
        for path, payload in self.runs():
            for directory in payload["stages"]:
                referring.setdefault(directory, []).append(path.relative_to(self.root / "runs").as_posix())
        found = sorted((self.root / "stages").glob("*/[!.]*/"))
        return [_entry(directory, referring.get(self._relative(directory), [])) for directory in found]

    def prune(self, dry_run: bool) -> list[StageEntry]:
        """Remove, or only list, the stage directories that no run refers to; those in use by a process stay."""
        removed = []
        for entry in self.stages():
            if entry.runs:
                continue
            with lock_if_free(entry.directory) as free:
                if not free:
                    log.info("%s: kept, as another process is working in it", entry.directory)
                    continue
                if not dry_run:
                    _discard(entry.directory)
                removed.append(entry)
        if not dry_run:
            for leftover in (self.root / "stages").glob(f"*/{TRASH}*"):  # left by a prune that was killed
                shutil.rmtree(leftover)
        return removed


def _entry(directory: Path, runs: list[str]) -> StageEntry:
    label, _, short = directory.name.rpartition("-")
    stats = [(directory / relative).stat() for relative in payload_files(directory)] or [directory.stat()]
    return StageEntry(
        directory=directory,
        name=directory.parent.name,
        label=label,
        short=short,
        size=sum(stat.st_size for stat in stats),
        age=time.time() - max(stat.st_mtime for stat in stats),
        state=state_of(directory),
        runs=tuple(runs),
    )


def _discard(directory: Path) -> None:
    """Delete a stage, renaming it first: a kill halfway must not leave a stage that still looks done."""
    trash = directory.with_name(f"{TRASH}{os.getpid()}-{directory.name}")
    directory.rename(trash)
    shutil.rmtree(trash)
