"""Memory that a plan foretold of every stage beside what the stage took, with its CPU time.

python run.py +experiment=sdxl_random plan=true && python run.py +experiment=sdxl_random
python scripts/measured_stages.py sdxl_random [MORE] [--results results] [--json FILE] [--publish NAME]

Measured is the peak of the process (on a GPU: of what torch allocated) while a stage was made, from its manifest; for
images, from their batches. A stage that was interrupted tells of its last part only. How much of the mapped files is
resident depends on what else the machine does, so a process is judged by its memory without them, where plan and
manifest tell it. --publish keeps the table as <results>/published/NAME.md, .csv and .json, with commits and versions.
"""

import argparse
import json
import platform
import shlex
import sys
from pathlib import Path

from vqdm.runs.command_line import run_script

import pandas as pd

from vqdm.errors import UserError
from vqdm.runs.files import atomic_write, read_sealed, write_json
from vqdm.runs.items import item_names, peek
from vqdm.runs.provenance import provenance
from vqdm.runs.texts import check_file_name

GIB = 2**30


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", nargs="+", help="runs by name; of stages that several share, the first tells")
    parser.add_argument("--results", type=Path, default=Path("results"))
    parser.add_argument("--json", type=Path, help="also write the rows there")
    parser.add_argument("--publish", metavar="NAME", help="also keep the table in <results>/published")
    arguments = parser.parse_args()
    try:
        rows = of_all(arguments.experiments, arguments.results)
        print(table(rows))
        if arguments.json is not None:
            write_json(arguments.json, rows)
        if arguments.publish is not None:
            publish(arguments.publish, rows, arguments.results)
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def of_all(experiments: list[str], results: Path) -> list[dict]:
    """The rows of all these runs, every directory once."""
    found: dict[str, dict] = {}
    for row in (row for name in experiments for row in measured(name, results)):
        found.setdefault(row["directory"], row)
    return list(found.values())


def measured(experiment: str, results: Path) -> list[dict]:
    """A row for every planned stage that has been made.

    Its columns: run, stage, directory, device, foretold, measured, foretold_anonymous, measured_anonymous,
    cpu_seconds, seconds, git_sha. foretold, measured: bytes on the machine that computed it, the GPU or the CPU's;
    anonymous: without mapped files, None on a GPU and in old manifests. UserError without a plan or a run.
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
            rows.append(
                {
                    "run": experiment,
                    "stage": name,
                    "directory": str(directory.relative_to(results)),
                    "device": planned["device"],
                    "foretold": foretold[name][place],
                    "measured": used["peak_memory_bytes"][place],
                    "foretold_anonymous": foretold[name].get("anonymous") if place == "host" else None,
                    "measured_anonymous": used["peak_memory_bytes"].get("anonymous") if place == "host" else None,
                    "cpu_seconds": used["cpu_seconds"],
                    "seconds": used["seconds"],
                    "git_sha": used.get("git_sha"),
                }
            )
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


def table(rows: list[dict]) -> str:
    """The rows in Markdown; the difference is that without mapped files, where both sides are known, else of all."""
    lines = [
        "| run | stage | foretold, GiB | measured, GiB | foretold without mapped files | measured without them | "
        "difference | CPU-seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        own = row["foretold_anonymous"], row["measured_anonymous"]
        foretold, measured = (row["foretold"], row["measured"]) if None in own else own
        cells = row["foretold"], row["measured"], *own
        sizes = " | ".join("–" if size is None else f"{size / GIB:.1f}" for size in cells)
        lines.append(
            f"| {row['run']} | {row['stage']} | {sizes} | {measured / foretold - 1:+.0%} | {row['cpu_seconds']:.0f} |"
        )
    return "\n".join(lines)


def publish(name: str, rows: list[dict], results: Path) -> None:
    """Write the rows as Markdown and CSV, and as JSON where they come from."""
    check_file_name("--publish", name)
    folder, command = results / "published", shlex.join(["python", "scripts/measured_stages.py", *sys.argv[1:]])
    about = {"command": command, **provenance(), "machine": platform.machine()}  # before these files are changes
    atomic_write(folder / f"{name}.md", f"{table(rows)}\n\nTo make it: `{command}`.\n".encode())
    atomic_write(folder / f"{name}.csv", pd.DataFrame(rows).to_csv(index=False).encode())
    write_json(folder / f"{name}.json", about | {"files": [f"{name}.md", f"{name}.csv"]})


if __name__ == "__main__":
    run_script(main)
