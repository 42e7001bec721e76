"""Make a trained tiny world the shipped one: copy its three folders into the package.

python scripts/publish_tiny.py results/stages/tiny_train/<directory>
"""

import argparse
import shutil
import sys
from pathlib import Path

from vqdm.runs.command_line import run_script

PACKAGE = Path(__file__).resolve().parent.parent / "vqdm" / "models"
FOLDERS = ("tiny", "tiny_turbo", "tiny_evaluators")
LIMIT = 25 * 2**20  # bytes of everything shipped


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="a tiny_train stage directory")
    directory = parser.parse_args().directory
    missing = [name for name in FOLDERS if not (directory / name).is_dir()]
    if missing:
        sys.exit(f"error: {directory} has no {', '.join(missing)}; run python run.py +experiment=tiny_train first")
    size = sum(path.stat().st_size for name in FOLDERS for path in (directory / name).rglob("*") if path.is_file())
    if size > LIMIT:
        sys.exit(f"error: {size / 2**20:.1f} MiB is more than the {LIMIT / 2**20:.0f} MiB that the package may hold")
    for name in FOLDERS:
        new = PACKAGE / f"{name}.new"
        shutil.rmtree(new, ignore_errors=True)
        shutil.copytree(directory / name, new)
        shutil.rmtree(PACKAGE / name, ignore_errors=True)
        new.rename(PACKAGE / name)
    print(f"published {size / 2**20:.1f} MiB from {directory}")


if __name__ == "__main__":
    run_script(main)
