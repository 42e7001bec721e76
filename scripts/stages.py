"""What lies in the store, and removal of what no run refers to.

    python scripts/stages.py                  # list the stages
    python scripts/stages.py --prune          # list what no run refers to, ask, remove
    python scripts/stages.py --prune --yes --results /data/results

Do not prune while an experiment runs that has not recorded itself yet: only directories in use at that moment are safe.
"""

import argparse
import logging
import sys
from pathlib import Path

from vqdm.runs.command_line import run_script

from vqdm.errors import UserError
from vqdm.runs.store import StageEntry, Store


def main() -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("results"), help="results directory (default: results)")
    parser.add_argument("--prune", action="store_true", help="remove the stages that no run refers to")
    parser.add_argument("--yes", action="store_true", help="do not ask before removing")
    arguments = parser.parse_args()
    store = Store(arguments.results)
    try:
        if arguments.prune:
            prune(store, ask=not arguments.yes)
        else:
            show(store.stages())
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def prune(store: Store, *, ask: bool) -> None:
    doomed = store.prune(dry_run=True)
    show(doomed)
    if not doomed or (ask and not confirmed(f"Remove these {len(doomed)}? [y/N] ")):
        return
    removed = store.prune(dry_run=False)
    print(f"removed {len(removed)} stages, {in_bytes(sum(entry.size for entry in removed))}")


def confirmed(question: str) -> bool:
    try:
        return input(question).strip().lower() in ("y", "yes")
    except EOFError:  # no terminal: nobody said yes
        return False


def show(entries: list[StageEntry]) -> None:
    if not entries:
        print("no stages")
        return
    rows = [("stage", "directory", "size", "age", "state", "runs"), *map(as_row, entries)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def as_row(entry: StageEntry) -> tuple[str, ...]:
    runs = ", ".join(entry.runs) or "none"
    return entry.name, entry.directory.name, in_bytes(entry.size), in_time(entry.age), entry.state, runs


def in_bytes(size: float) -> str:
    for unit in ("B", "KB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"


def in_time(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


if __name__ == "__main__":
    run_script(main)
