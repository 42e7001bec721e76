"""Help says everything that there is: every option has a sentence, every file of conf/ and experiments/ is named."""

import dataclasses
import re
import subprocess
import sys

import pytest
from tiny_world import ROOT, environment, run

from vqdm.config.codecs import OPTIONS, TrellisConfig
from vqdm.config.compose import GROUPS
from vqdm.config.help import OPTION_GROUPS, completions, described, help_text, list_of, sentences
from vqdm.config.options import Config, PromptsConfig, TrajectoriesConfig
from vqdm.errors import UserError


@pytest.mark.parametrize("node", [Config, *GROUPS.values(), *OPTIONS.values()], ids=lambda node: node.__name__)
def test_every_option_has_a_sentence(node):
    assert [key for key, _, text in described(node) if len(text) < 5] == []


def test_a_sentence_is_the_comment_of_its_field():
    assert sentences(PromptsConfig)["order"] == "the first ones: first | shuffled"
    assert sentences(TrajectoriesConfig)["order"].startswith("with a seed other than the calibration's"), "its own"
    assert sentences(TrajectoriesConfig)["column"] == sentences(PromptsConfig)["column"], "its base's"
    assert (
        sentences(PromptsConfig)["split"].startswith("source=tiny, small: train")
        and "restval" in sentences(PromptsConfig)["split"]
    )
    assert sentences(TrellisConfig)["bits"] == "bits per weight"


def test_help_names_all_that_can_be_run_and_chosen():
    text = help_text()
    for folder in ("conf/experiment", "experiments", *(f"conf/{group}" for group in OPTION_GROUPS)):
        for file in (ROOT / folder).glob("*.yaml"):
            assert re.search(rf"\b{file.stem}\b", text), file
    assert {field.name for field in dataclasses.fields(Config) if not dataclasses.is_dataclass(field.type)} <= set(
        re.findall(r"^  (\w+)=", text, re.MULTILINE)
    )
    assert max(map(len, f"{text}\n{help_text('all')}".splitlines())) <= 120
    assert not re.search(r"\bNone\b|\bTrue\b|[A-Z]{3,}_[A-Z]+", help_text("all")), "as a command line has it"


def test_a_group_has_its_own_help():
    assert "quantize.allocation=uniform" in help_text("quantize") and "finetune" not in help_text("quantize")
    with pytest.raises(UserError, match="there is no group quantise: did you mean quantize"):
        help_text("quantise")


@pytest.mark.parametrize(("kind", "folder"), [("experiments", "conf/experiment"), ("tables", "experiments")])
def test_a_list_gives_each_name_with_its_purpose(kind, folder):
    names = {file.stem for file in (ROOT / folder).glob("*.yaml")}
    assert set(re.findall(r"^  (\S+) +\S", list_of(kind), re.MULTILINE)) == names


def test_the_tab_key_knows_tables_and_leaves_the_rest_to_hydra():
    assert {"table=table1_sdxl", "table=table1_tiny"} <= set(completions("python run.py table=table1"))
    assert completions("python run.py table=table1_s") != completions("python run.py table=table1_t")
    assert completions("python run.py list=r") == ["list=runs"]
    assert completions("python run.py quantize=tr") is None and completions("python run.py table=demo ") is None


def test_help_lists_and_the_nearest_name_from_the_command_line(tmp_path):
    assert run("--help").stdout.startswith("Usage: python run.py")
    assert "trellis_bits" in run("list=tables").stdout
    assert run("list=runs", f"results_dir={tmp_path}").stdout.startswith("no finished runs under")
    for arguments, said in (
        (["list=run"], "give list=experiments, list=tables or list=runs"),
        (
            ["+experiment=tiny_vq33"],
            "there is no experiment=tiny_vq33: did you mean tiny_vq3? there are compress, demo",
        ),
        (["quantize=trelis3"], "there is no quantize=trelis3: did you mean trellis3? there are adaround"),
        (["table=demp"], "there is no table 'demp': did you mean demo?"),
        (["table=demo", "row=tiny_rnt4"], "did you mean tiny_rtn4?"),
        (["evalute.n=3"], "there is no option evalute: did you mean evaluate"),
    ):
        done = run(*arguments, f"results_dir={tmp_path}", "tracker=none")
        assert done.returncode == 1 and said in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_bash_completes_a_table():
    """As the function that Hydra installs asks."""
    words = "python run.py table=fron"
    done = subprocess.run(
        [sys.executable, "run.py", "-sc", "query=bash"], cwd=ROOT, capture_output=True, text=True,
        env=environment(COMP_LINE=words, COMP_POINT=str(len(words))),
    )  # fmt: skip
    assert done.stdout.split() == ["table=frontier"], done.stderr
