"""Bring MS-COCO's official archives, and the caption lists that go with it, to data/.

    python scripts/download_coco.py                               # what the SDXL experiments need: 256 MB
    python scripts/download_coco.py --what captions2014 val2014   # 6.9 GB; --list names all
    python scripts/download_coco.py --what val2017 --to /data/coco --keep
    python scripts/download_coco.py --what fid_reference         # published statistics for the paper's FID

Every file is checked against its published sha256; what broke off goes on; what is there is not fetched again. On a
machine without network put the archive where the message says, and run the same command.
"""

import argparse
import json
import logging
import shutil
import sys
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from vqdm.runs.command_line import run_script

from downloads import RemoteFile, check_room, fetch, part_of, size_of
from fid_reference import MEMBER, URL, download_reference
from tqdm import tqdm

from vqdm.errors import UserError
from vqdm.runs.files import full_disk_is_mendable, write_json
from vqdm.runs.locks import locked

COCO = "http://images.cocodataset.org"  # its HTTPS has a certificate for another name; the sha256 vouches instead
RAW = "https://raw.githubusercontent.com"
RECEIPTS = ".received"


@dataclass(frozen=True)
class Item:
    """A file, and what of it goes where: a zip's members that start with `members`, or the file under `name`."""

    file: RemoteFile
    what: str
    members: tuple[str, ...] = ()
    folder: str = ""  # below the target, for the members
    name: str | None = None


def _archive(path: str, size: int, sha256: str, what: str, *members: str) -> Item:
    return Item(RemoteFile(f"{COCO}/{path}", size, sha256), what, members)


# Sizes and sha256 of the archives: tensorflow/datasets, url_checksums/coco.txt and coco_captions.txt; the same sha256
# stand in pytorch/vision, torchvision/prototype/datasets/_builtin/coco.py. Those of the lists were taken from copies:
# PartiPrompts.tsv has the same in other projects' tables, the CSVs the same length as in yandex-research/switti.
ITEMS = {
    "captions2014": _archive(
        "annotations/annotations_trainval2014.zip", 252872794,
        "031296bbc80c45a1d1f76bf9a90ead27e94e99ec629208449507a4917a3bf009",
        "captions of train2014 and val2014", "annotations/captions_",
    ),
    "captions2017": _archive(
        "annotations/annotations_trainval2017.zip", 252907541,
        "113a836d90195ee1f884e704da6304dfaaecff1f023f49b6ca93c4aaae470268",
        "captions of train2017 and val2017", "annotations/captions_",
    ),
    "val2014": _archive(
        "zips/val2014.zip", 6645013297, "fe9be816052049c34717e077d9e34aa60814a55679f804cd043e3cbee3b9fde0",
        "40,504 photographs", "val2014/",
    ),
    "val2017": _archive(
        "zips/val2017.zip", 815585330, "4f7e2ccb2866ec5041993c9cf2a952bbed69647b115d0f74da7ce8f4bef82f05",
        "5,000 photographs", "val2017/",
    ),
    "train2014": _archive(
        "zips/train2014.zip", 13510573713, "ede4087e640bddba550e090eae701092534b554b42b05ac33f0300b984b31775",
        "82,783 photographs", "train2014/",
    ),
    "train2017": _archive(
        "zips/train2017.zip", 19336861798, "69a8bb58ea5f8f99d24875f21416de2e9ded3178e903f1f7603e283b9e06d929",
        "118,287 photographs", "train2017/",
    ),
    "karpathy": Item(
        RemoteFile(
            "https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip", 36745453,
            "4cfd70132527b80933105e5829dc9034eaab9573482e2e680abbab6130244817",
        ),
        "Karpathy's split of COCO 2014", ("dataset_coco.json",), folder="annotations",
    ),
    "captions30k": Item(
        RemoteFile(
            f"{RAW}/yandex-research/switti/302cd3797d00a45069a1c6ba22bf352e2e2a42fc/eval_prompts/coco.csv", 2700891,
            "5fe9155f1b7de0014272b7d0dfaa69e8c8e983ff931e5bb580f598bf52802bef",
        ),
        "the published list of 30,000 captions of val2014", name="coco2014_val_30k.csv",
    ),
    "parti": Item(
        RemoteFile(
            f"{RAW}/google-research/parti/2c99f6652cbc7f0d0441aa91f4c7e7055bcb0071/PartiPrompts.tsv", 123107,
            "fab29e41bb512a169b56acab4cf2a41dcb675e285df2efcde6640c7dd3c440eb",
        ),
        "1,632 PartiPrompts", name="PartiPrompts.tsv",
    ),
    "parti128": Item(
        RemoteFile(
            f"{RAW}/yandex-research/switti/302cd3797d00a45069a1c6ba22bf352e2e2a42fc/eval_prompts/parti-prompts-eval.csv",
            7898, "78e2d9720d1419cd8b066921fc2688b18a78f3d1f69a4564766145b2cbd0277f",
        ),
        "the 128 PartiPrompts of the paper's study", name="parti128.csv",
    ),
}  # fmt: skip
DEFAULT = ("captions30k", "captions2017")
REFERENCE = "fid_reference"  # not among the items: neither its size nor its sha256 is published


def download(name: str, item: Item, directory: Path, *, keep: bool = False, **options) -> bool:
    """Fetch and unpack an item below `directory`, unless it is there already: then False. `options`: of `fetch`."""
    receipt = directory / RECEIPTS / f"{name}.json"
    if _is_complete(receipt, item, directory):
        return False
    if item.name is not None:
        written = [fetch(item.file, directory / item.name, **options)]
    else:
        archive = directory / item.file.name
        here = max(size_of(archive), size_of(part_of(archive)))
        check_room(directory, 2 * item.file.size - here, f"fetch and unpack {archive.name}")  # JPEGs: as large again
        written = unpack(fetch(item.file, archive, **options), directory / item.folder, item.members)
    sizes = {path.relative_to(directory).as_posix(): path.stat().st_size for path in written}
    write_json(receipt, {"url": item.file.url, "sha256": item.file.sha256, "files": sizes})
    if item.name is None and not keep:
        archive.unlink()
    return True


def _is_complete(receipt: Path, item: Item, directory: Path) -> bool:
    """True if everything that the receipt lists is there in full size and came from this very file."""
    try:
        known = json.loads(receipt.read_bytes())
        sizes = known["files"].items()
        whole = all((directory / path).stat().st_size == size for path, size in sizes)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False  # not there or damaged: made again
    return whole and known["sha256"] == item.file.sha256


def unpack(archive: Path, directory: Path, members: tuple[str, ...]) -> list[Path]:
    """Write the zip's files whose names start with one of `members`; each is whole or absent, its CRC checked.

    UserError for a damaged zip, for one without such files, and for any name that leads out of `directory`.
    """
    try:
        with zipfile.ZipFile(archive) as file:
            infos = file.infolist()
            _refuse_strange_names(infos, archive)
            chosen = [info for info in infos if not info.is_dir() and info.filename.startswith(members)]
            if not chosen:
                raise UserError(f"{archive} holds no {' or '.join(members)}…; fetch it again")
            check_room(directory, sum(info.file_size for info in chosen), f"unpack {archive.name}")
            bar = tqdm(chosen, desc=f"unpacking {archive.name}", unit="file", disable=None, leave=False)
            return [_extract(file, info, directory) for info in bar]
    except (zipfile.BadZipFile, EOFError, NotImplementedError, zlib.error) as error:
        raise UserError(f"{archive} is a damaged zip ({error}); remove it and run the same command again") from error


def _refuse_strange_names(infos: list[zipfile.ZipInfo], archive: Path) -> None:
    for info in infos:
        path = PurePosixPath(info.filename)
        if path.is_absolute() or ".." in path.parts or "\\" in info.filename or ":" in info.filename:
            raise UserError(f"{archive} has a file name that leads elsewhere ({info.filename[:100]!r}); do not use it")


def _extract(file: zipfile.ZipFile, info: zipfile.ZipInfo, directory: Path) -> Path:
    """Extract one file, written beside and renamed: a file of full size is whole, and an earlier one is kept."""
    target = directory / info.filename
    if target.is_file() and target.stat().st_size == info.file_size:
        return target
    with full_disk_is_mendable(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(target.name + ".tmp")
        with file.open(info) as source, temporary.open("wb") as output:
            shutil.copyfileobj(source, output, 1 << 20)
        temporary.replace(target)
    return target


def download_statistics(directory: Path, *, keep: bool, url: str) -> str | None:
    """Fetch the statistics for FID, unless they are there as a receipt lists them: then None."""
    receipt = directory / RECEIPTS / f"{REFERENCE}.json"
    known = _receipt(receipt)
    if known and (directory / MEMBER).is_file() and size_of(directory / MEMBER) == known["files"].get(MEMBER):
        return None
    return download_reference(directory, receipt, known, url=url, keep=keep)


def _receipt(file: Path) -> dict | None:
    """What was received earlier; None without a receipt, or for a damaged one."""
    try:
        known = json.loads(file.read_bytes())
        return known if isinstance(known["files"], dict) and isinstance(known["sha256"], str) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _needed(names: list[str], directory: Path) -> str:
    """A line on what is about to be downloaded."""
    absent = [
        n for n in names if n in ITEMS and not _is_complete(directory / RECEIPTS / f"{n}.json", ITEMS[n], directory)
    ]
    sizes = ", ".join(f"{name} {ITEMS[name].file.size / 1e6:,.1f} MB" for name in absent)
    return f"to download: {sizes}, {sum(ITEMS[n].file.size for n in absent) / 1e9:.2f} GB in all" if absent else ""


def mirrored(item: Item, mirror: str) -> Item:
    """The same file from elsewhere; its sha256 stays."""
    url = item.file.url.replace(COCO, mirror.rstrip("/"))
    return replace(item, file=replace(item.file, url=url))


def main(arguments: list[str] | None = None, *, say: Callable[[str], None] = print) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--what",
        nargs="+",
        choices=[*ITEMS, REFERENCE],
        default=DEFAULT,
        metavar="NAME",
        help=", ".join([*ITEMS, REFERENCE]),
    )
    parser.add_argument("--to", type=Path, default=Path("data"), help="directory (default: data)")
    parser.add_argument("--keep", action="store_true", help="keep the archives after unpacking them")
    parser.add_argument("--mirror", default=COCO, help=f"in the place of {COCO}")
    parser.add_argument("--list", action="store_true", help="say what there is, and fetch nothing")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if options.list:
        for name, item in ITEMS.items():
            say(f"{name:13} {item.file.size / 1e6:9,.1f} MB  {item.what}")
        say(f"{REFERENCE:13} size unknown  statistics for the paper's FID ({MEMBER}), from {URL}")
        return 0
    try:
        with locked(options.to):
            if needed := _needed(options.what, options.to):
                say(needed)
            for name in options.what:
                if name == REFERENCE:
                    found = download_statistics(options.to, keep=options.keep, url=URL)
                    say(f"{name}: {found or f'{options.to / MEMBER} was already there'}")
                    continue
                fresh = download(name, mirrored(ITEMS[name], options.mirror), options.to, keep=options.keep)
                say(f"{name}: {ITEMS[name].what} {'is now' if fresh else 'was already'} in {options.to}")
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    run_script(main)
