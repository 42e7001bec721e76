"""A table, figures and a page of any finished runs, without a file of experiments/; nothing is run.

python scripts/report.py tiny_fp tiny_rtn4 tiny_trellis3          # runs by name
python scripts/report.py 'codecs_*' --name codecs_so_far           # a glob; the files' name
python scripts/report.py results/sweeps/tiny_codec*               # all jobs of a sweep; SWEEP/2 is one of them

A run is also named by its record (results/runs/NAME/FINGERPRINT.json) or by the label of its job, such as
"quantize.bits=3". Runs of other protocols, models, dtypes or devices share a column only with --mixed; footnotes then
say which has what.
"""

import argparse
import shlex
import sys
from pathlib import Path

from vqdm.runs.command_line import run_script

from vqdm.report.any_runs import find_records, report_runs
from vqdm.runs.texts import check_file_name, file_name_of

LONGEST_NAME = 80


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="name, glob, record, sweep or job, in the table's order")
    parser.add_argument("--name", help="of the files to write (default: from the runs')")
    parser.add_argument("--title", default="Runs side by side")
    parser.add_argument("--model", help="only runs on this model")
    parser.add_argument("--mixed", action="store_true", help="let runs of different protocols share a column")
    parser.add_argument("--results", type=Path, default=Path("results"))
    options = parser.parse_args(arguments)
    name = options.name or file_name_of("-".join(Path(run).name for run in options.runs), longest=LONGEST_NAME)
    check_file_name("--name ", name)
    records = [record for run in options.runs for record in find_records(options.results, run, model=options.model)]
    command = shlex.join(["python", "scripts/report.py", *(sys.argv[1:] if arguments is None else arguments)])
    said = report_runs(
        records, name=name, title=options.title, command=command, results=options.results, mixed=options.mixed
    )
    print(said)


if __name__ == "__main__":
    run_script(main)
