"""Lay the images of a finished run out as GenEval's evaluation reads them; it runs in an environment of its own.

python run.py +experiment=sdxl_vq3 evaluate.prompts.path=evaluation_metadata.jsonl evaluate.prompts.column=prompt \\
    evaluate.prompts.sha256=null evaluate.prompts.n=null evaluate.images_per_prompt=4
python scripts/export_geneval.py sdxl_vq3 --metadata evaluation_metadata.jsonl --out geneval/sdxl_vq3

    <out>/00000/metadata.jsonl      the prompt's line of GenEval's list
    <out>/00000/samples/0000.png    its images
"""

import argparse
import json
import shutil
from pathlib import Path

from vqdm.runs.command_line import run_script

from vqdm.errors import UserError
from vqdm.report.records import images_of, is_finished, scores_of
from vqdm.runs.store import Store
from vqdm.stages.layout import captions_of, image_path


def export(images: list[Path], captions: list[str], lines: list[str], out: Path) -> int:
    """Copy the images, `len(images) / len(lines)` of each prompt in turn, into folders; returns the number of folders.

    captions: of every image; lines: of GenEval's list, JSON with the prompt. UserError where they do not fit together.
    """
    copies, left = divmod(len(images), len(lines)) if lines else (0, 1)
    if left or not copies or out.exists():
        why = f"{out} exists already" if out.exists() else f"{len(images)} images are not of {len(lines)} prompts"
        raise UserError(f"{why}; run the experiment on GenEval's whole list, and give another --out")
    for number, line in enumerate(lines):
        own = range(number * copies, (number + 1) * copies)
        if {captions[i] for i in own} != {" ".join(_prompt(line).split())}:
            raise UserError(
                f"prompt {number} of the list is {_prompt(line)[:60]!r}, the run's {captions[own[0]][:60]!r}"
            )
        folder = out / f"{number:05d}" / "samples"
        folder.mkdir(parents=True)
        for copy, i in enumerate(own):
            shutil.copyfile(images[i], folder / f"{copy:04d}.png")
        (folder.parent / "metadata.jsonl").write_text(f"{line}\n", encoding="utf-8")
    return len(lines)


def _prompt(line: str) -> str:
    try:
        return str(json.loads(line)["prompt"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"a line of the list is no JSON with a prompt: {line[:60]!r}") from error


def _newest(results: Path, experiment: str) -> dict:
    found = [(file.stat().st_mtime, record) for file, record in Store(results).runs()
             if record["experiment"] == experiment and is_finished(record, results)]  # fmt: skip
    if not found:
        raise UserError(f"{results} has no finished run of {experiment}: run it first")
    return max(found, key=lambda one: one[0])[1]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", help="name of the run, as run.py was given it")
    parser.add_argument("--metadata", type=Path, required=True, help="GenEval's evaluation_metadata.jsonl")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--results", type=Path, default=Path("results"))
    options = parser.parse_args(arguments)
    record = _newest(options.results, options.experiment)
    directory = options.results / record["directories"]["generate"]
    count = len(images_of(scores_of(record, options.results)["protocol"]))
    lines = [line for line in options.metadata.read_text(encoding="utf-8").splitlines() if line.strip()]
    images = [image_path(directory, i) for i in range(count)]
    print(f"{export(images, captions_of(directory, count), lines, options.out)} prompts are in {options.out}")


if __name__ == "__main__":
    run_script(main)
