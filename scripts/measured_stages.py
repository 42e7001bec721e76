"""Memory that a plan foretold of every stage beside what the stage took, with its CPU time.

python run.py +experiment=sdxl_random plan=true && python run.py +experiment=sdxl_random
python scripts/measured_stages.py sdxl_random [--results results] [--json FILE]

Measured is the peak of the process (on a GPU: of what torch allocated) while a stage was made, from its manifest; for
images, from their batches. A stage that was interrupted tells of its last part only.
"""

import argparse
import json
import sys
from pathlib import Path

from vqdm.runs.command_line import run_script

from vqdm.errors import UserError
from vqdm.runs.files import read_sealed, write_json
from vqdm.runs.items import item_names, peek

GIB = 2**30


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment")
    parser.add_argument("--results", type=Path, default=Path("results"))
    parser.add_argument("--json", type=Path, help="also write the rows there")
    arguments = parser.parse_args()
    try:
        rows = measured(arguments.experiment, arguments.results)
        print(table(rows))
        if arguments.json is not None:
            write_json(arguments.json, rows)
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def measured(experiment: str, results: Path) -> list[dict]:
    """A row for every planned stage that has been made: {stage, device, foretold, measured, cpu_seconds, seconds}.

    foretold, measured: bytes on the machine that computed it, the GPU or the CPU's. UserError without a plan or a run.
    """
    plan, record = results / "plans" / f"{experiment}.json", newest(results / "runs" / experiment)
    if not plan.is_file() or record is None:
        raise UserError(f"{plan} or a run of it is missing: run +experiment={experiment} with plan=true, then without")
    planned = json.loads(plan.read_bytes())
    foretold = {stage["name"]: stage["memory"] for stage in planned["stages"] if stage["memory"] is not None}
    place = "host" if planned["device"] == "cpu" else "device"
    rows = []
    for name, directory in stage_directories(record, results).items():
        used = usage(directory)
        if name in foretold and used is not None and used["peak_memory_bytes"][place] is not None:
            peak = {"foretold": foretold[name][place], "measured": used["peak_memory_bytes"][place]}
            rows.append({"stage": name, "device": planned["device"], **peak, **usage_times(used)})
    return rows


def newest(folder: Path) -> dict | None:
    """The record of the experiment's last run."""
    files = sorted(folder.glob("*.json"), key=lambda file: file.stat().st_mtime_ns)
    return json.loads(files[-1].read_bytes()) if files else None


def stage_directories(record: dict, results: Path) -> dict[str, Path]:
    """Directories by the plan's names, in the order of the run, which makes full-precision images first."""
    found = {}
    for relative in record["stages"]:
        directory = results / relative
        name = directory.parent.name
        if name == "generate":
            name = "images" if directory.name == Path(record["directories"]["generate"]).name else "teacher_images"
        found[name] = directory
    return found


def usage(directory: Path) -> dict | None:
    """What a stage used, from its manifest, or the most of its batches; None while it is not made."""
    if (manifest := read_sealed(directory / "manifest.json")) is not None:
        return manifest if "peak_memory_bytes" in manifest else None
    records = [peek(directory, name).record for name in item_names(directory)]
    records = [record for record in records if "peak_memory_bytes" in record]
    return max(records, key=lambda record: record["peak_memory_bytes"]["host"] or 0, default=None)


def usage_times(used: dict) -> dict:
    return {key: used[key] for key in ("cpu_seconds", "seconds")}


def table(rows: list[dict]) -> str:
    lines = ["| stage | foretold, GiB | measured, GiB | difference | CPU-seconds |", "|---|---|---|---|---|"]
    for row in rows:
        difference = row["measured"] / row["foretold"] - 1
        lines.append(
            f"| {row['stage']} | {row['foretold'] / GIB:.1f} | {row['measured'] / GIB:.1f} | {difference:+.0%} | "
            f"{row['cpu_seconds']:.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    run_script(main)
