"""Keep a table and its picture: copy them from results/ into the tracked results/published/, with where they come from.

python scripts/publish_table.py demo --command "python run.py +experiment=demo" [--table-only]
"""

import argparse
import platform
import shutil
import sys
from pathlib import Path

from vqdm.provenance import git_state, versions
from vqdm.store import write_json

SUFFIXES = {"tables": (".csv", ".md"), "figures": (".png",)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="of the table, such as demo")
    parser.add_argument("--command", required=True, help="the command that made it")
    parser.add_argument("--table-only", action="store_true", help="leave the picture, which is large for many rows")
    parser.add_argument("--results", type=Path, default=Path("results"))
    options = parser.parse_args()
    published = options.results / "published"
    published.mkdir(parents=True, exist_ok=True)
    kinds = ("tables",) if options.table_only else tuple(SUFFIXES)
    files = [options.results / kind / f"{options.name}{end}" for kind in kinds for end in SUFFIXES[kind]]
    missing = [str(file) for file in files if not file.is_file()]
    if missing:
        sys.exit(f"error: {missing[0]} is not there; run {options.command} first")
    for file in files:
        shutil.copyfile(file, published / file.name)
    about = {"command": options.command, **git_state(), "versions": versions(), "machine": platform.machine()}
    write_json(published / f"{options.name}.json", about)
    print(f"published {options.name} to {published}")


if __name__ == "__main__":
    main()
