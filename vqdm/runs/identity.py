"""The identity of a model without a hub revision: the hash of its files."""

import contextlib
import hashlib
import json
from pathlib import Path

from vqdm.errors import UserError
from vqdm.runs.files import canonical_json, files_below, sha256_file, write_json


def files_identity(directory_or_file: Path, cache: Path) -> str:
    """sha256 over (relative path, sha256) of the model's files. `cache` is a JSON file, made when it is missing.

    File hashes are cached by path, size, times and inode: hashing 7 GB at every start would take longer than planning.
    Hidden files and *.md are left out: a download's bookkeeping or an edited model card does not make another model.
    """
    root = Path(directory_or_file)
    files = _model_files(root)
    if not files:
        raise UserError(f"{root}: no model files there; give an existing model directory or file")
    known = _read_cache(cache)
    fresh = {str(path.resolve()): _hashed(path, known) for path in files.values()}
    if any(known.get(key) != value for key, value in fresh.items()):
        _keep(cache, _read_cache(cache) | fresh)  # read again: another process may have added its own
    pairs = [[relative, fresh[str(path.resolve())]["sha256"]] for relative, path in sorted(files.items())]
    return hashlib.sha256(canonical_json(pairs)).hexdigest()


def file_identity(path: Path, cache: Path) -> str:
    """sha256 of one file's bytes, cached in the same way."""
    known, key = _read_cache(cache), str(path.resolve())
    fresh = _hashed(path, known)
    if known.get(key) != fresh:
        _keep(cache, _read_cache(cache) | {key: fresh})
    return fresh["sha256"]


def _model_files(root: Path) -> dict[str, Path]:
    """{path relative to the model: file}"""
    if root.is_file():
        return {root.name: root}
    found = {path.relative_to(root): path for path in files_below(root)}
    return {relative.as_posix(): path for relative, path in found.items() if _counts(relative)}


def _counts(relative: Path) -> bool:
    return relative.suffix != ".md" and not any(part.startswith(".") for part in relative.parts)


def _hashed(path: Path, known: dict) -> dict:
    """{size, mtime_ns, ctime_ns, inode, sha256} of a file; from `known` where all but the last still hold.

    Size and mtime can be those of another file that was put in its place (`cp -p`, rsync); inode and ctime cannot both.
    """
    stat = path.stat()
    now = {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "ctime_ns": stat.st_ctime_ns, "inode": stat.st_ino}
    cached = known.get(str(path.resolve()), {})
    if now.items() <= cached.items():
        return cached
    return now | {"sha256": sha256_file(path)}


def _keep(cache: Path, content: dict) -> None:
    """Write the cache if possible; else files are hashed again: results on a read-only disk can still be shown."""
    with contextlib.suppress(UserError):
        write_json(cache, content)


def _read_cache(cache: Path) -> dict[str, dict]:
    """Entries of a cache by path, without damaged ones, and none if it is missing: it can be made again."""
    try:
        content = json.loads(cache.read_bytes())
    except (OSError, ValueError):
        return {}
    entries = content.items() if isinstance(content, dict) else ()
    return {path: entry for path, entry in entries if isinstance(entry, dict) and isinstance(entry.get("sha256"), str)}
