"""The README's commands are real: every `python run.py …` line in it composes, every script it names is there."""

import json
import re
import shlex
from pathlib import Path

import pytest
from composed import compose
from format_example import worked_example

from vqdm.__main__ import LADDER

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = re.findall(r"(?:python|sh) (?:run\.py|scripts/)[^\n`#]*", "\n".join(page.read_text() for page in PAGES))


def test_there_are_commands():
    assert len(COMMANDS) > 10


@pytest.mark.parametrize("command", sorted(set(COMMANDS)))
def test_a_command_of_the_docs_is_real(command):
    _, script, *arguments = shlex.split(command.replace("…", ""))
    assert (ROOT / script).is_file()
    if script != "run.py" or any(argument.startswith(("list=", "-sc")) for argument in arguments):
        return
    overrides = [LADDER.sub(r"\1[\2]", argument) for argument in arguments if not argument.startswith("--")]
    single = [re.sub(r"=([^,\[]*),.*", r"=\1", override) for override in overrides]  # of a sweep, the first value
    compose(*single)


def test_the_readmes_table_is_the_published_one():
    import csv

    readme = (ROOT / "README.md").read_text()
    with (ROOT / "results" / "published" / "demo.csv").open() as file:
        for row in csv.DictReader(file):
            assert f"| {row['method']} | {float(row['bits_per_weight']):.2f} | {float(row['mib']):.2f} |" in readme
            assert f"{float(row['fidelity']):.3f} ± {float(row['fidelity_se']):.3f}" in readme
    with (ROOT / "results" / "published" / "codecs.csv").open() as file:
        spread = {row["method"]: row["psnr_to_fp_seeds"] for row in csv.DictReader(file) if row["psnr_to_fp_seeds"]}
    shown = {method: re.search(rf"\| {method} \|.*", readme)[0] for method in spread}
    assert all(f" [{float(value):.2f}] |" in shown[method] for method, value in spread.items()), "over seeds"


def test_sdxls_table_is_the_published_one():
    table = (ROOT / "results" / "published" / "sdxl_random.md").read_text().split("\n\n")[0]
    assert f"\n{table}\n" in (ROOT / "docs" / "sdxl.md").read_text()


def test_a_published_table_says_the_command_that_made_it():
    """With all its overrides: another number of captions gives other figures."""
    folder = ROOT / "results" / "published"
    said = {}
    for file in [*folder.glob("*.md"), *folder.glob("*.tex")]:
        found = re.search(r"To make it: `([^`]*)`", file.read_text(encoding="utf-8"))
        if found:
            said[file.name] = found[1] == json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))["command"]
    assert len(said) > 20 and all(said.values()), [name for name, same in said.items() if not same]


def test_the_formats_worked_example_is_what_is_really_stored():
    assert f"```\n{worked_example()}\n```" in (ROOT / "docs" / "format.md").read_text(encoding="utf-8")
