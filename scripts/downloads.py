"""Large files over HTTP: resumed where they broke off, checked against a known size and sha256. Imports no torch."""

import hashlib
import logging
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import requests
from tqdm import tqdm

from vqdm.errors import UserError
from vqdm.runs.files import full_disk_is_mendable

CHUNK = 1 << 16  # at most so many bytes are lost when a connection is dropped
PART_SUFFIX = ".part"
ATTEMPTS = 6  # in a row that bring no byte
SPARE = 100 * 10**6  # bytes to leave on the disk
_FAULTS_THAT_PASS = (408, 425, 429, 500, 502, 503, 504)
log = logging.getLogger("vqdm")


@dataclass(frozen=True)
class RemoteFile:
    url: str
    size: int  # bytes
    sha256: str | None  # None: not published

    @property
    def name(self) -> str:
        return self.url.rsplit("/", 1)[-1]


def fetch(file: RemoteFile, target: Path, *, attempts: int = ATTEMPTS, pause: float = 1.0, timeout: float = 30) -> Path:
    """Bring `file` to `target`, which is there only when it is whole and its sha256 right; returns `target`.

    What has come lies in `<target>.part`, so that the next call goes on from there. `pause` seconds, doubling, lie
    between attempts. UserError: no network, no room, another file than the one that is known.
    """
    if target.exists():
        check_file(file, target)
        return target
    part = part_of(target)
    if part.exists() and part.stat().st_size > file.size:
        part.unlink()
    check_room(target.parent, file.size - size_of(part), f"download {target.name}")
    with full_disk_is_mendable(part):
        target.parent.mkdir(parents=True, exist_ok=True)
        _complete(file, part, attempts=attempts, pause=pause, timeout=timeout)
    check_file(file, part)
    part.replace(target)
    return target


def stated_size(url: str, target: Path, *, timeout: float = 30) -> int:
    """Bytes of a file as its server states them. UserError without a network, and for a server that does not say."""
    try:
        headers = {"Accept-Encoding": "identity"}
        response = requests.head(url, headers=headers, allow_redirects=True, timeout=timeout)
    except requests.RequestException as error:
        if target.is_file():  # put there by hand
            return size_of(target)
        raise _offline(RemoteFile(url, 0, None), part_of(target), _in_words(error)) from error
    length = response.headers.get("Content-Length", "")
    if response.status_code != 200 or not length.isdigit():
        said = f"the server answers {response.status_code} {response.reason} when asked for the size"
        raise UserError(f"{url}: {said}; try again later, or put the file at {target} yourself")
    return int(length)


def part_of(target: Path) -> Path:
    """Path of a download until it is whole."""
    return target.with_name(target.name + PART_SUFFIX)


def check_file(file: RemoteFile, path: Path) -> None:
    """UserError unless the file at `path` is the known one. A download that is not is removed: it cannot be resumed."""
    size = size_of(path)
    if size == file.size:
        if file.sha256 is None:
            return
        found = _sha256(path)
        if found == file.sha256:
            return
        problem = f"has sha256 {found} instead of {file.sha256}"
    else:
        problem = f"has {size} bytes instead of {file.size}"
    if path.suffix == PART_SUFFIX:
        path.unlink()
        raise UserError(f"{file.url}: what came {problem}; it was removed, run the same command again")
    raise UserError(f"{path} {problem}; it is not {file.url}, remove it and run the same command again")


def check_room(directory: Path, needed: int, purpose: str) -> None:
    """UserError unless the disk of `directory`, which need not exist yet, has `needed` bytes and some to spare."""
    existing = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed + SPARE:
        raise UserError(
            f"{directory}: {free / 1e9:.1f} GB are free, but to {purpose} takes {(needed + SPARE) / 1e9:.1f} GB; "
            "free space or give another place by --to"
        )


def size_of(path: Path) -> int:
    """Size of a file, 0 if there is none."""
    return path.stat().st_size if path.exists() else 0


def _sha256(path: Path) -> str:
    """sha256 of a file, with a progress bar, as 20 GB take a minute."""
    digest = hashlib.sha256()
    with path.open("rb") as file, _progress(path.stat().st_size, f"checking {path.name}") as bar:
        while block := file.read(1 << 23):
            digest.update(block)
            bar.update(len(block))
    return digest.hexdigest()


def _progress(total: int, what: str, *, done: int = 0) -> tqdm:
    """A bar with the rate and the time left, on a terminal only."""
    return tqdm(total=total, initial=done, desc=what, unit="B", unit_scale=True, disable=None, leave=False)


def _complete(file: RemoteFile, part: Path, *, attempts: int, pause: float, timeout: float) -> None:
    """Request again and again from where the part ends, until it is whole or `attempts` in a row brought nothing.

    Two do where no server was reached at all: then there is no network, and the user should not wait to hear it.
    """
    failures, reached = 0, False
    with _progress(file.size, file.name, done=size_of(part)) as bar:
        while (before := size_of(part)) < file.size:
            try:
                _request(file, part, bar, timeout=timeout)
                reason = "the connection ended early"
            except requests.RequestException as error:
                reason = _in_words(error)
                reached = reached or error.response is not None
            came = size_of(part) != before
            reached, failures = reached or came, 0 if came else failures + 1
            if failures >= (attempts if reached else min(2, attempts)):
                raise _offline(file, part, reason)
            if size_of(part) < file.size:
                log.info("%s: %s at %d of %d bytes; trying again", file.name, reason, size_of(part), file.size)
                time.sleep(pause * 2 ** max(0, failures - 1))


def _request(file: RemoteFile, part: Path, bar: tqdm, *, timeout: float) -> None:
    """One request; what comes is appended. A server that knows no ranges sends all again, and the part starts anew."""
    start = size_of(part)
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    with requests.get(file.url, headers=headers, stream=True, timeout=timeout) as response:
        if response.status_code in _FAULTS_THAT_PASS:
            response.raise_for_status()
        _check_response(file, response, start)
        resumed = response.status_code == 206
        bar.initial = bar.n = start if resumed else 0  # `initial` counts for the length, not for the rate
        bar.refresh()
        with part.open("ab" if resumed else "wb") as output:
            for block in response.iter_content(CHUNK):
                output.write(block)
                bar.update(len(block))
                if output.tell() > file.size:  # without a length in its headers another file shows only here
                    break


def _check_response(file: RemoteFile, response: requests.Response, start: int) -> None:
    """UserError when trying again is of no use: no such file, or another one than is known."""
    if response.status_code not in (200, 206):
        raise UserError(
            f"{file.url}: the server answers {response.status_code} {response.reason}; try another --mirror"
        )
    offered = response.headers.get("Content-Length")
    if response.status_code == 206:
        span, _, total = response.headers.get("Content-Range", "").partition("/")
        if not span.startswith(f"bytes {start}-"):
            raise UserError(f"{file.url}: the server sends {span or 'no range'} when asked from byte {start} on")
        offered = total
    if offered is not None and offered != str(file.size):
        raise UserError(f"{file.url}: is {offered} bytes there instead of {file.size}; it is another file, not taken")


def _in_words(error: requests.RequestException) -> str:
    if isinstance(error, requests.HTTPError):
        return f"the server answers {error.response.status_code} {error.response.reason}"
    if isinstance(error, requests.Timeout):
        return "the server does not answer"
    if isinstance(error, requests.exceptions.ChunkedEncodingError):
        return "the connection was dropped"
    return f"no connection ({type(error).__name__})"


def _offline(file: RemoteFile, part: Path, reason: str) -> UserError:
    kept = f"{size_of(part)} of {file.size or 'unknown'} bytes are kept; " if part.exists() else ""
    whole = part.with_suffix("")
    return UserError(f"{file.url}: {reason}; {kept}run the same command again, or put the file at {whole} yourself")
