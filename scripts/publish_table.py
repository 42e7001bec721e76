"""Keep a table and its figures: copy them from results/ into the tracked results/published/, with where they come from.

python scripts/publish_table.py demo --command "python run.py +experiment=demo" [--figures "*psnr*"]
"""

import argparse
import fnmatch
import platform
import re
import shutil
import sys
from pathlib import Path

from vqdm.runs.command_line import run_script

from vqdm.errors import UserError
from vqdm.runs.files import atomic_write, write_json
from vqdm.runs.provenance import provenance
from vqdm.runs.texts import check_file_name

TABLE, FIGURES = (".md", ".tex", ".csv"), (".svg", ".png")
MADE_BY = re.compile(r"(To make it: |were run; )`[^`]*`")  # the table's own lines, which know nothing of the overrides


def files_of(name: str, results: Path) -> list[Path]:
    """The table's three files, and its figures as far as there are any; UserError without the table."""
    tables = [results / "tables" / f"{name}{end}" for end in TABLE]
    missing = next((file for file in tables if not file.is_file()), None)
    if missing is not None:
        raise UserError(f"{missing} is not there; run python run.py table=NAME, or scripts/make_tables.py NAME, first")
    names = {file.stem for file in (results / "tables").glob("*.md")}
    figures = sorted(file for file in (results / "figures").glob(f"{name}*") if file.suffix in FIGURES)
    return tables + [file for file in figures if _table_of(file.stem, names) == name]


def _table_of(figure: str, names: set[str]) -> str:
    """The longest name that a figure's begins with: turbo_tiny-pareto is not of the table turbo."""
    return max((name for name in names if figure.startswith(name)), key=len)


def publish(name: str, results: Path, *, command: str, figures: str = "*") -> Path:
    """Returns the folder with the copies and <name>.json: command, commit, versions.

    figures: a pattern of the names of figures' files to keep; "" for none.
    """
    check_file_name("name", name)
    published = results / "published"
    about = {"command": command, **provenance(), "machine": platform.machine()}
    files = [f for f in files_of(name, results) if f.suffix in TABLE or fnmatch.fnmatch(f.name, figures)]
    published.mkdir(parents=True, exist_ok=True)
    for file in files:
        if file.suffix in FIGURES:
            shutil.copyfile(file, published / file.name)
        else:
            text = MADE_BY.sub(lambda found: f"{found[1]}`{command}`", file.read_text(encoding="utf-8"))
            atomic_write(published / file.name, text.encode())
    write_json(published / f"{name}.json", about | {"files": [file.name for file in files]})
    return published


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="of the table, such as demo")
    parser.add_argument("--command", required=True, help="the command that made it")
    parser.add_argument("--figures", default="*", help='pattern of the figures to keep, "" for none (default: all)')
    parser.add_argument("--results", type=Path, default=Path("results"))
    options = parser.parse_args()
    try:
        folder = publish(options.name, options.results, command=options.command, figures=options.figures)
    except UserError as error:
        sys.exit(f"error: {error}")
    print(f"published {options.name} to {folder}")


if __name__ == "__main__":
    run_script(main)
