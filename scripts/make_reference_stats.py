"""Statistics of real images that FID, KID and CMMD are taken against: what `evaluate.reference` names.

python scripts/make_reference_stats.py data/val2014 --captions data/coco2014_val_30k.csv --out data/reference/coco30k
python scripts/make_reference_stats.py FOLDER ARCHIVE.zip --out DIR --metrics fid_standard

SOURCE: folders of images, and .zip archives, which are read in place. With --captions only the images that a caption
list names. It writes DIR/<family>.safetensors and, last, DIR/reference.json. The same command again goes on.
"""

import argparse
import hashlib
import shlex
import shutil
import sys
from pathlib import Path

from vqdm.runs.command_line import run_script

import torch
from safetensors.torch import load, save
from tqdm import tqdm

from vqdm.errors import UserError
from vqdm.metrics.distribution import Gaussian
from vqdm.metrics.families import FAMILIES
from vqdm.metrics.image_files import ImageFile, check_images, images_of, list_images, load_image
from vqdm.metrics.reference import ABOUT, find_reference
from vqdm.metrics.scores import SMALLEST_FID
from vqdm.metrics.sources import fetch, identity, missing
from vqdm.prompts import load_prompts
from vqdm.runs.files import atomic_write, canonical_json, full_disk_is_mendable, write_json
from vqdm.runs.items import batches, read_item, write_item
from vqdm.runs.provenance import git_state, versions

COLUMNS = {"fid_paper": "features", "fid_standard": "features", "cmmd": "image"}  # what is kept of each family
WORK = ".work"  # hidden, so that it is no part of the reference's identity


def choose(options: argparse.Namespace) -> tuple[list[ImageFile], str]:
    """The images, and one line on which they are."""
    images, what = list_images(options.sources), ", ".join(source.name for source in options.sources)
    if options.captions is None:
        return images, what
    prompts = load_prompts(source="file", path=str(options.captions), n=options.n)
    return images_of(prompts, images), f"{what}: the images of {prompts.origin}"


def locate(families: list[str], folder: Path, cache: Path) -> tuple[dict[str, list[Path]], dict[str, list[str]]]:
    """Paths and sha256 of each family's weights; UserError for what is neither here nor to be had."""
    needed = {family: FAMILIES[family].weights for family in families}
    absent = {missing(w, folder): None for weights in needed.values() for w in weights if fetch(w, folder) is None}
    if absent:
        raise UserError("; ".join(absent))
    paths = {family: [fetch(w, folder) for w in weights] for family, weights in needed.items()}
    hashes = {
        family: [identity(w, path, cache=cache) for w, path in zip(weights, paths[family], strict=True)]
        for family, weights in needed.items()
    }
    return paths, hashes


def extract(
    work: Path, images: list[ImageFile], hashes: list, *, batch_size: int, made_by: dict, make_extractors
) -> None:
    """Features of every batch that is not there yet, all families in one file."""
    whole = [
        (name, rows, {"images": hashes[rows.start : rows.stop]} | made_by)
        for name, rows in batches(len(images), batch_size)
    ]
    pending = [batch for batch in whole if read_item(work, batch[0]) != batch[2]]
    if not pending:
        return
    extractors = make_extractors()
    for name, rows, record in tqdm(pending, desc="features", unit="batch"):
        pixels = [load_image(images[i]) for i in rows]
        found = {family: extractor.columns(pixels)[COLUMNS[family]] for family, extractor in extractors.items()}
        file = save({family: column.float().contiguous() for family, column in found.items()})
        write_item(work, name, {f"{name}.safetensors": file}, record)


def write_family(out: Path, family: str, count: int, batch_size: int) -> None:
    """Features float32 [n, d], and for Fréchet distances mean [d] and covariance [d, d] in float64."""
    parts = (load((out / WORK / f"{name}.safetensors").read_bytes())[family] for name, _ in batches(count, batch_size))
    features = torch.cat(list(parts))
    tensors = {"features": features}
    if family != "cmmd":
        fitted = Gaussian.of(features)
        tensors |= {"mean": fitted.mean, "covariance": fitted.covariance}
    atomic_write(out / f"{family}.safetensors", save(tensors))


def make(options: argparse.Namespace) -> dict:
    """The content of reference.json, which is written when all else is there."""
    work, families = options.out / WORK, options.metrics
    images, what = choose(options)
    if len(images) < 2:
        raise UserError(f"{what}: one image has no covariance; give more")
    if len(images) < SMALLEST_FID:
        said = f"{len(images)} images are too few for an FID that compares with others: {SMALLEST_FID:,} at least"
        print(said, file=sys.stderr)
    work.mkdir(parents=True, exist_ok=True)
    paths, weights = locate(families, options.weights, work / "file_hashes.json")
    hashes = [list(pair) for pair in check_images(images)]
    about = describe(hashes, weights, name=options.name or options.out.resolve().name, source=what)
    if (options.out / ABOUT).is_file():
        earlier = find_reference(str(options.out), cache=work / "file_hashes.json").about
        if about.items() <= earlier.items():
            return earlier
        raise UserError(f"{options.out} holds another reference, {earlier['name']}; give another --out")
    device = _device(options.device)
    extract(
        work,
        images,
        hashes,
        batch_size=options.batch_size,
        make_extractors=lambda: _extractors(paths, device),
        made_by={"families": about["families"], "device": device},
    )
    for family in families:
        write_family(options.out, family, len(images), options.batch_size)
    about |= {"device": device, "versions": versions(), "git": git_state(), "command": options.command}
    write_json(options.out / ABOUT, about)
    return about


def describe(hashes: list, weights: dict[str, list[str]], *, name: str, source: str) -> dict:
    """What makes it another reference: which images, seen by which networks."""
    families = {
        family: {
            "version": FAMILIES[family].version,
            "weights_sha256": sha256,
            "columns": ["features"] if family == "cmmd" else ["features", "mean", "covariance"],
        }
        for family, sha256 in weights.items()
    }
    images_sha256 = hashlib.sha256(canonical_json(hashes)).hexdigest()
    return {
        "name": name,
        "images": len(hashes),
        "images_sha256": images_sha256,
        "source": source,
        "families": families,
    }


def _device(wanted: str) -> str:
    from vqdm.runs.device import resolve_device

    return resolve_device(wanted, threads=None).name


def _extractors(paths: dict[str, list[Path]], device: str) -> dict:
    from vqdm.metrics.extractors import make_extractor

    return {family: make_extractor(family, files, device=device) for family, files in paths.items()}


def _families(text: str) -> list[str]:
    names = list(dict.fromkeys(text.split(",")))
    if strange := sorted(set(names) - set(COLUMNS)):
        raise argparse.ArgumentTypeError(f"{strange[0]!r} has no reference; choose among {','.join(COLUMNS)}")
    return names


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", type=Path, nargs="+", metavar="SOURCE")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--metrics", type=_families, default=list(COLUMNS), metavar=",".join(COLUMNS))
    parser.add_argument("--weights", type=Path, default=Path("data/metrics"), help="as evaluate.weights")
    parser.add_argument("--captions", type=Path, help="a caption list that names images: COCO .json, .csv, …")
    parser.add_argument("--n", type=int, help="only the first n captions")
    parser.add_argument("--name", help="what protocols call the reference; by default as DIR")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--batch-size", type=int, default=32)
    options = parser.parse_args(arguments)
    options.command = shlex.join(["scripts/make_reference_stats.py", *(arguments or sys.argv[1:])])
    try:
        if options.batch_size < 1 or (options.n is not None and options.captions is None):
            raise UserError("--batch-size is 1 at least, and --n belongs to --captions")
        with full_disk_is_mendable(options.out):
            about = make(options)
    except UserError as error:
        sys.exit(f"error: {error}")
    finally:
        if (options.out / ABOUT).is_file():
            shutil.rmtree(options.out / WORK, ignore_errors=True)
    print(f"{options.out}: {about['images']} images, {', '.join(about['families'])}; evaluate.reference={options.out}")


if __name__ == "__main__":
    run_script(main)
