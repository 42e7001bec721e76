"""Make a trained world the shipped one: copy its three folders into the package, or into models/ of the repository.

python scripts/publish_tiny.py results/stages/tiny_train/<directory>
python scripts/publish_tiny.py results/stages/tiny_train/<directory> --snapshot   # of a training that still goes on
python scripts/publish_tiny.py results/stages/tiny_train/<directory> --parts   # what it has finished so far

Into the package goes tiny; small is too large for it. What lies in models/ has its sha256 in models/SHA256SUMS, and its
growth curve and losses in models/<world>_training/. A snapshot has no few-step student. Finished parts go to
models/<world>_parts/, each in a folder, the denoiser as it was last looked at in unet_begun/.
"""

import argparse
import hashlib
import shutil
import sys
from pathlib import Path

from vqdm.runs.command_line import run_script

from vqdm.config.options import TINY_WORLDS
from vqdm.models.shipped import BESIDE, SUMS, UNET_BEGUN, part_names
from vqdm.runs.files import atomic_write, whole_directory

PACKAGE = Path(__file__).resolve().parent.parent / "vqdm" / "models"
PLACES = {"tiny": PACKAGE, "small": BESIDE}
LIMITS = {"tiny": 25 * 2**20, "small": 45 * 2**20}  # bytes of everything shipped


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="a tiny_train stage directory")
    parser.add_argument("--snapshot", action="store_true", help="the denoiser as it was last looked at in its training")
    parser.add_argument("--parts", action="store_true", help="what is finished, and the denoiser as far as it is")
    options = parser.parse_args()
    world, folders = _parts(options.directory) if options.parts else _folders(options.directory, options.snapshot)
    size = sum(path.stat().st_size for folder in folders.values() for path in folder.rglob("*") if path.is_file())
    if size > LIMITS[world]:
        sys.exit(f"error: {size / 2**20:.1f} MiB is more than the {LIMITS[world] / 2**20:.0f} MiB that may be shipped")
    place = BESIDE if options.parts else PLACES[world]
    for name, folder in folders.items():
        with whole_directory(place / name) as new:
            shutil.copytree(folder, new, dirs_exist_ok=True)
    if place == BESIDE:
        _keep_curves(options.directory / "training", place / f"{world}_training")
        _write_sums(place)
    print(f"published {size / 2**20:.1f} MiB from {options.directory} to {place}")


def _world_of(directory: Path) -> str:
    found = (world for world in TINY_WORLDS if (directory / f"{world}_evaluators").is_dir())
    world = next(found, None)
    if world is None:
        sys.exit(f"error: {directory} has no evaluators; run python run.py +experiment=tiny_train first")
    return world


def _parts(directory: Path) -> tuple[str, dict[str, Path]]:
    """(world, {folder in models/: where it is now}) of the parts that the training has finished."""
    world = _world_of(directory)
    places = {name: directory / "training" / name for name in part_names(world)}
    places[f"{world}_evaluators"] = directory / f"{world}_evaluators"
    if not places["unet"].is_dir():
        places[UNET_BEGUN] = directory / "training" / "snapshot" / "unet"
    return world, {f"{world}_parts/{name}": folder for name, folder in places.items() if folder.is_dir()}


def _folders(directory: Path, snapshot: bool) -> tuple[str, dict[str, Path]]:
    """(world, {name of a folder that is shipped: where it is now})."""
    world = _world_of(directory)
    folders = {name: directory / name for name in (world, f"{world}_turbo", f"{world}_evaluators")}
    if snapshot:
        folders[world] = directory / "training" / "snapshot"
        del folders[f"{world}_turbo"]
    missing = [str(folder) for folder in folders.values() if not folder.is_dir()]
    if missing:
        sys.exit(f"error: {', '.join(missing)} is not there yet; the same training goes on, or take its --snapshot")
    return world, folders


def _keep_curves(training: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for curve in [*training.glob("*.jsonl"), *training.glob("checkpoints/*.jsonl")]:
        shutil.copyfile(curve, target / curve.name)


def _write_sums(place: Path) -> None:
    """Write the list that `sha256sum -c` reads, of all that is there."""
    files = sorted(path for path in place.rglob("*") if path.is_file() and path.name != SUMS)
    lines = (f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(place)}\n" for path in files)
    atomic_write(place / SUMS, "".join(lines).encode())


if __name__ == "__main__":
    run_script(main)
