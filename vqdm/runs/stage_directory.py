"""What lies in a stage's directory: config, manifest, payload, scratch; what of it is whole, and what has to go."""

import fnmatch
import json
import logging
import os
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from vqdm.errors import UserError
from vqdm.runs.files import (
    TEMPORARY_SUFFIX,
    canonical_json,
    describe_file,
    file_fault,
    read_sealed,
    write_json,
    write_sealed,
)
from vqdm.runs.locks import LOCK
from vqdm.runs.provenance import provenance
from vqdm.runs.stage import Stage, fingerprint_of

CONFIG, MANIFEST = "config.json", "manifest.json"
log = logging.getLogger("vqdm")


def refuse_collision(directory: Path, stage: Stage) -> None:
    """Raise UserError if the directory belongs to another config whose hash begins with the same eight digits.

    A config.json that does not hash to the directory's own name is merely damaged, and will be written anew.
    """
    found = _stored_identity(directory)
    if found is None or found == stage.identity or not fingerprint_of(found).startswith(stage.short):
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


def write_config(directory: Path, stage: Stage, *, extendable: bool) -> None:
    config = stage.identity | {"label": stage.label, "fingerprint": stage.fingerprint, "extendable": extendable}
    if _stored_config(directory) != json.loads(canonical_json(config)):
        write_json(directory / CONFIG, config)


def write_manifest(
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


def faults_of(directory: Path, fingerprint: str, *, hashed: bool = True) -> dict[str, str]:
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


def announce_faults(directory: Path, faults: dict[str, str]) -> None:
    """Log in one line why an existing directory is worked on; nothing for a fresh one."""
    if (directory / MANIFEST).exists():
        name, fault = next(iter(faults.items()))
        others = f", and {len(faults) - 1} more" if len(faults) > 1 else ""
        log.warning("%s: %s %s%s; redone", directory, name, fault, others)
    elif has_work(directory):
        log.info("%s: half-written; going on from what is there", directory)


def clear_faulty(directory: Path, faults: dict[str, str]) -> None:
    """Remove files that cannot be trusted, the manifest first, so that a kill in between leaves an unfinished stage."""
    for name in (MANIFEST, *faults):
        (directory / name).unlink(missing_ok=True)
    remove_temporaries(directory)


def _matches(relative: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(relative, pattern) for pattern in patterns)


def scratch_left(directory: Path, scratch: tuple[str, ...]) -> set[str]:
    """Scratch files of a stage, but for those that an older manifest lists as its files."""
    found = {relative for relative in payload_files(directory) if _matches(relative, scratch)}
    with suppress(ValueError, TypeError):  # without a whole manifest another process makes it anew: its lock tells
        return found - set(read_sealed(directory / MANIFEST)["files"])
    return found


def remove_scratch(directory: Path, scratch: tuple[str, ...]) -> None:
    """Remove the scratch files of a stage that is done; only under its lock."""
    for relative in scratch_left(directory, scratch):
        (directory / relative).unlink(missing_ok=True)
    for folder in {(directory / pattern).parent for pattern in scratch} - {directory}:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def remove_temporaries(directory: Path) -> None:
    """Remove what an interrupted write left behind; nobody else writes here while the lock is held."""
    for path in directory.rglob(f"*{TEMPORARY_SUFFIX}"):
        path.unlink(missing_ok=True)


def has_work(directory: Path) -> bool:
    return any(relative != CONFIG for relative in payload_files(directory))


def payload_files(directory: Path, *, without: tuple[str, ...] = ()) -> list[str]:
    """Relative paths of the payload, sorted: all but manifest, lock, temporary files and those of a pattern given."""
    walked = (Path(folder) / name for folder, _, names in os.walk(directory) for name in names)
    found = {path.relative_to(directory).as_posix() for path in walked if not path.name.endswith(TEMPORARY_SUFFIX)}
    return sorted(name for name in found - {MANIFEST, LOCK} if not _matches(name, without))


def state_of(directory: Path) -> Literal["done", "partial", "open"]:
    """State of a directory, judged by itself and by sizes only.

    "open" is a stage of `Store.open`, which is never done.
    """
    config = _stored_config(directory) or {}
    done = not faults_of(directory, config.get("fingerprint", ""), hashed=False)
    return "open" if config.get("extendable") else "done" if done else "partial"
