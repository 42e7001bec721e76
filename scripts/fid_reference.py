"""The published statistics of real images that the paper's FID is against. Imported by download_coco.py.

Their archive's address stands in yandex-research/invertible-cd, training/stats/download_fid_files.sh. No hash of it is
published, and it was not seen where this was written: its size is asked of the server, its sha256 is kept at the first
download and has to come again ever after.
"""

import logging
import tarfile
import zlib
from pathlib import Path, PurePosixPath

from downloads import RemoteFile, check_room, fetch, stated_size

from vqdm.errors import UserError
from vqdm.metrics.reference import check_npz
from vqdm.runs.files import atomic_write, full_disk_is_mendable, sha256_file, write_json
from vqdm.runs.texts import in_one_line

URL = "https://storage.yandexcloud.net/yandex-research/invertible-cd/fid-files.tar.gz"
MEMBER = "fid_stats_mscoco512_val.npz"
log = logging.getLogger("vqdm")
LARGEST = 200 * 10**6  # bytes of the member: mu [2048] and sigma [2048, 2048] take 34 MB in float64
WAYS = "make one of val2014 by scripts/make_reference_stats.py, or give evaluate.reference=FILE.npz"


def download_reference(
    directory: Path, receipt: Path, known: dict | None, *, url: str = URL, keep: bool = False
) -> str:
    """Fetch the archive, take the statistics out of it, check them; returns what was found, in words.

    known: the receipt of an earlier download, whose sha256 must come again. UserError: no network, another archive than
    the first, no such member in it, or one that holds no statistics of Inception's 2048 features.
    """
    archive = directory / PurePosixPath(url).name
    directory.mkdir(parents=True, exist_ok=True)
    file = RemoteFile(url, stated_size(url, archive), (known or {}).get("sha256"))
    log.info("%s: %.1f MB to download", url, file.size / 1e6)
    fetch(file, archive)
    sha256 = file.sha256 or sha256_file(archive)
    target = directory / MEMBER
    names = _take_out(archive, target)
    check_npz(target)
    others = [name for name in names if PurePosixPath(name).name != MEMBER]
    write_json(
        receipt, {"url": url, "sha256": sha256, "files": {MEMBER: target.stat().st_size}, "not_unpacked": others}
    )
    if not keep:
        archive.unlink()
    beside = f"; beside it lay {', '.join(map(in_one_line, others[:20]))}" if others else ""
    return f"{target}, of an archive of {file.size / 1e6:,.1f} MB with sha256 {sha256}{beside}"


def _take_out(archive: Path, target: Path) -> list[str]:
    """Write the member to `target`; returns the names of all files of the archive. Nothing else is unpacked."""
    try:
        with tarfile.open(archive, "r:gz") as tar:
            members = [member for member in tar.getmembers() if member.isfile()]
            chosen = next((member for member in members if PurePosixPath(member.name).name == MEMBER), None)
            if chosen is None:
                there = ", ".join(in_one_line(member.name) for member in members[:20]) or "no file"
                raise UserError(f"{archive} holds no {MEMBER}, but {there}: {WAYS}")
            if chosen.size > LARGEST:
                raise UserError(f"{archive}: {MEMBER} has {chosen.size:,} bytes, no statistics are so large: {WAYS}")
            check_room(target.parent, chosen.size, f"unpack {MEMBER}")
            with full_disk_is_mendable(target):
                atomic_write(target, tar.extractfile(chosen).read())
            return [member.name for member in members]
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise UserError(
            f"{archive} is a damaged archive ({error}); remove it and run the same command again"
        ) from error
