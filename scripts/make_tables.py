"""Make tables again from the runs that are there; nothing is run. Without a name: every table of experiments/.

python scripts/make_tables.py                          # all; cells of what was not run say so
python scripts/make_tables.py table1_sdxl --results results
python scripts/make_tables.py codecs --model tiny_outlier
python scripts/make_tables.py demo --from theirs.json  # one's own beside a file of somebody's results/share
python scripts/make_tables.py table1_sdxl --rows       # only its rows, as row=… of run.py takes them
"""

import argparse
import sys
from pathlib import Path

from vqdm.runs.command_line import run_script

from vqdm.config.places import EXPERIMENTS
from vqdm.errors import UserError
from vqdm.report.experiments import read_table
from vqdm.report.formats import table_content, write_table
from vqdm.report.records import newest_records
from vqdm.report.report import write_report
from vqdm.report.share import beside, read_share, write_share
from vqdm.runs.files import atomic_write
from vqdm.runs.texts import file_name_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="of a file of experiments/, such as table1_sdxl")
    parser.add_argument("--model", help="of the runs (default: the table's own); writes <table>-<model>")
    parser.add_argument("--mixed", action="store_true", help="let runs of different protocols share a column")
    parser.add_argument("--rows", action="store_true", help="print the names of the rows, and write nothing")
    parser.add_argument("--from", type=Path, dest="theirs", metavar="FILE", help="a results/share/*.json of others")
    parser.add_argument("--results", type=Path, default=Path("results"))
    options = parser.parse_args()
    if options.theirs is not None and len(options.names) != 1:
        sys.exit("error: --from FILE is for one table: give its name")
    names = options.names or sorted(path.stem for path in EXPERIMENTS.glob("*.yaml"))
    try:
        tables = [read_table(EXPERIMENTS / f"{name}.yaml") for name in names]
        for table in tables:
            print(",".join(row.name for row in table.rows) if options.rows else _make(table, options))
    except UserError as error:
        sys.exit(f"error: {error}")


def _make(table, options: argparse.Namespace) -> str:
    model = options.model or table.model
    rows = newest_records(table, options.results, model=model)
    if options.theirs is not None:
        return _beside(table, rows, options)
    content = table_content(table, rows, model=model, results=options.results, mixed=options.mixed)
    _, files = write_table(content, rows, results=options.results)
    commands = [table.command(model), f"python scripts/make_tables.py {table.name}"]
    files.append(write_share(table, content, rows, model=model, results=options.results))
    files += write_report(content, rows, commands=commands, results=options.results)
    return f"{sum(map(bool, rows))} of {len(rows)} rows: wrote {', '.join(map(str, files))}"


def _beside(table, rows: list[list[dict]], options: argparse.Namespace) -> str:
    shown = beside(table, rows, read_share(options.theirs), results=options.results, name=options.theirs.name)
    file = options.results / "tables" / f"{table.name}-beside-{file_name_of(options.theirs.stem)}.md"
    atomic_write(file, shown.encode())
    return f"{shown}\nwrote {file}"


if __name__ == "__main__":
    run_script(main)
