"""The store: one directory per stage, named by what went into it, done when its manifest is there.

    results/stages/<stage>/<label>-<fp8>/   config.json, payload, items/*.json, manifest.json (last)
    results/runs/<experiment>/<fp8>.json    which stage directories make one result

Whatever happens to a process (Ctrl-C, kill -9, a full disk), the same call again goes on; nothing half-made counts as
done. A `make` function overwrites what it finds, except for items that `read_item` vouches for. Imports no torch.
"""

import fnmatch
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Literal

from vqdm.errors import UserError
from vqdm.runs import progress
from vqdm.runs.files import (
    TEMPORARY_SUFFIX,
    atomic_write,
    canonical_json,
    describe_file,
    file_fault,
    full_disk_is_mendable,
    make_newest,
    read_sealed,
    sha256_file,
    write_json,
    write_sealed,
)
from vqdm.runs.heap import return_freed_memory
from vqdm.runs.items import read_item, write_item
from vqdm.runs.locks import LOCK, lock_if_free, locked
from vqdm.runs.provenance import provenance
from vqdm.runs.texts import check_file_name, is_file_name
from vqdm.runs.usage import Usage

__all__ = ["Stage", "StageEntry", "Store", "atomic_write", "read_item", "sha256_file", "write_item", "write_json"]

CONFIG, MANIFEST, TRASH = "config.json", "manifest.json", ".trash-"
log = logging.getLogger("vqdm")


@dataclass(frozen=True)
class Stage:
    """Everything a stage's output depends on. `label` is for people and not hashed; no devices or paths here.

    `config` can be written as JSON. An upstream that is a string is itself an identity, such as a hash of files.
    """

    name: str
    version: int
    label: str
    config: dict
    upstream: dict[str, "Stage | str"] = field(default_factory=dict)

    def __post_init__(self):
        for part in (self.name, self.label):
            if not is_file_name(part):
                raise ValueError(f"stage {self.name!r}, label {self.label!r}: {part!r} cannot be a directory's name")

    @cached_property
    def identity(self) -> dict:
        """Everything that is hashed, in full, as plain JSON values."""
        upstream = {key: up if isinstance(up, str) else up.fingerprint for key, up in self.upstream.items()}
        described = {"stage": self.name, "version": self.version, "config": self.config, "upstream": upstream}
        return json.loads(canonical_json(described))

    @cached_property
    def fingerprint(self) -> str:
        return _fingerprint(self.identity)

    @property
    def short(self) -> str:
        return self.fingerprint[:8]

    @property
    def directory_name(self) -> str:
        return f"{self.label}-{self.short}"


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
        _refuse_collision(directory, stage)
        if not _faults(directory, stage.fingerprint, hashed=False):
            return "done"
        return "partial" if _has_work(directory) else "missing"

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
        _refuse_collision(directory, stage)

        def found_faults() -> dict[str, str]:
            faults = _faults(directory, stage.fingerprint)
            return faults if faults or holds(directory) else {MANIFEST: "is of other files than there are now"}

        if not found_faults() and not _scratch_left(directory, scratch):
            return directory
        with locked(directory), full_disk_is_mendable(directory), progress.making(stage.name, stage.fingerprint):
            _refuse_collision(directory, stage)  # checked again: another process may have been here meanwhile
            if faults := found_faults():
                _announce(directory, faults)
                _clear(directory, faults)
                _write_config(directory, stage, extendable=False)
                return_freed_memory()  # what the stage before left, such as models that refer to themselves
                usage, summary = Usage(), make(directory)
                used = usage.so_far()
                files = [relative for relative in _files(directory) if not _matches(relative, scratch)]
                _write_manifest(directory, stage, files, used=used, environment=environment, summary=summary)
            _remove_scratch(directory, scratch)
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
            _refuse_collision(directory, stage)
            _remove_temporaries(directory)
            _write_config(directory, stage, extendable=True)
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


def _fingerprint(identity: dict) -> str:
    return hashlib.sha256(canonical_json(identity)).hexdigest()


def _discard(directory: Path) -> None:
    """Delete a stage, renaming it first: a kill halfway must not leave a stage that still looks done."""
    trash = directory.with_name(f"{TRASH}{os.getpid()}-{directory.name}")
    directory.rename(trash)
    shutil.rmtree(trash)


def _refuse_collision(directory: Path, stage: Stage) -> None:
    """Raise UserError if the directory belongs to another config whose hash begins with the same eight digits.

    A config.json that does not hash to the directory's own name is merely damaged, and will be written anew.
    """
    found = _stored_identity(directory)
    if found is None or found == stage.identity or not _fingerprint(found).startswith(stage.short):
        return
    raise UserError(
        f"{directory}: made from another config with the same hash prefix {stage.short}; "
        "move that directory away, or set results_dir=… to another place"
    )


def _stored_config(directory: Path) -> dict | None:
    """The directory's config.json; None if it is missing or unreadable, in which case it is written anew."""
    try:
        config = json.loads((directory / CONFIG).read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return config if isinstance(config, dict) else None


def _stored_identity(directory: Path) -> dict | None:
    config = _stored_config(directory) or {}
    keys = ("stage", "version", "config", "upstream")
    return {key: config[key] for key in keys} if set(keys) <= set(config) else None


def _write_config(directory: Path, stage: Stage, *, extendable: bool) -> None:
    config = stage.identity | {"label": stage.label, "fingerprint": stage.fingerprint, "extendable": extendable}
    if _stored_config(directory) != json.loads(canonical_json(config)):
        write_json(directory / CONFIG, config)


def _write_manifest(
    directory: Path, stage: Stage, files: list[str], *, used: dict, environment: dict, summary: dict | None
) -> None:
    manifest = {
        "stage": stage.name,
        "fingerprint": stage.fingerprint,
        "files": {relative: describe_file(directory / relative) for relative in files},
        **used,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        **provenance(),
        "environment": environment,
        "summary": summary,
    }
    write_sealed(directory / MANIFEST, manifest)


def _faults(directory: Path, fingerprint: str, *, hashed: bool = True) -> dict[str, str]:
    """{relative path: what is wrong with it}; empty for a stage that is done."""
    try:
        manifest = read_sealed(directory / MANIFEST)
    except ValueError as error:
        return {MANIFEST: str(error)}
    if manifest is None:
        return {MANIFEST: "is missing"}
    if manifest["fingerprint"] != fingerprint:
        return {MANIFEST: "belongs to another config"}
    found = {name: file_fault(directory / name, known, hashed=hashed) for name, known in manifest["files"].items()}
    return {name: fault for name, fault in found.items() if fault}


def _announce(directory: Path, faults: dict[str, str]) -> None:
    """Log in one line why an existing directory is worked on; nothing for a fresh one."""
    if (directory / MANIFEST).exists():
        name, fault = next(iter(faults.items()))
        others = f", and {len(faults) - 1} more" if len(faults) > 1 else ""
        log.warning("%s: %s %s%s; redone", directory, name, fault, others)
    elif _has_work(directory):
        log.info("%s: half-written; going on from what is there", directory)


def _clear(directory: Path, faults: dict[str, str]) -> None:
    """Remove files that cannot be trusted, the manifest first, so that a kill in between leaves an unfinished stage."""
    for name in (MANIFEST, *faults):
        (directory / name).unlink(missing_ok=True)
    _remove_temporaries(directory)


def _matches(relative: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(relative, pattern) for pattern in patterns)


def _scratch_left(directory: Path, scratch: tuple[str, ...]) -> set[str]:
    """Scratch files of a stage, but for those that an older manifest lists as its files."""
    found = {relative for relative in _files(directory) if _matches(relative, scratch)}
    with suppress(ValueError, TypeError):  # without a whole manifest another process makes it anew: its lock tells
        return found - set(read_sealed(directory / MANIFEST)["files"])
    return found


def _remove_scratch(directory: Path, scratch: tuple[str, ...]) -> None:
    """Remove the scratch files of a stage that is done; only under its lock."""
    for relative in _scratch_left(directory, scratch):
        (directory / relative).unlink(missing_ok=True)
    for folder in {(directory / pattern).parent for pattern in scratch} - {directory}:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _remove_temporaries(directory: Path) -> None:
    """Remove what an interrupted write left behind; nobody else writes here while the lock is held."""
    for path in directory.rglob(f"*{TEMPORARY_SUFFIX}"):
        path.unlink(missing_ok=True)


def _has_work(directory: Path) -> bool:
    return any(relative != CONFIG for relative in _files(directory))


def _files(directory: Path) -> list[str]:
    """Relative paths of the payload, sorted: all but manifest, lock and temporary files."""
    walked = (Path(folder) / name for folder, _, names in os.walk(directory) for name in names)
    found = {path.relative_to(directory).as_posix() for path in walked if not path.name.endswith(TEMPORARY_SUFFIX)}
    return sorted(found - {MANIFEST, LOCK})


def _entry(directory: Path, runs: list[str]) -> StageEntry:
    label, _, short = directory.name.rpartition("-")
    stats = [(directory / relative).stat() for relative in _files(directory)] or [directory.stat()]
    return StageEntry(
        directory=directory,
        name=directory.parent.name,
        label=label,
        short=short,
        size=sum(stat.st_size for stat in stats),
        age=time.time() - max(stat.st_mtime for stat in stats),
        state=_state(directory),
        runs=tuple(runs),
    )


def _state(directory: Path) -> Literal["done", "partial", "open"]:
    """State of a directory, judged by itself and by sizes only.

    "open" is a stage of `Store.open`, which is never done.
    """
    config = _stored_config(directory) or {}
    done = not _faults(directory, config.get("fingerprint", ""), hashed=False)
    return "open" if config.get("extendable") else "done" if done else "partial"
