"""Every command of README and docs/running.md is executed, made small; so is their Python. What they say must be true.

`@rule` says, pattern by pattern, what makes a command small: a few captions, one layer group, one row of a table, only
the plan, or no network, where the command ends in the one line that says what is missing. A new command needs a rule.
"""

import json
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from readme_commands import Checkout, Done, Rule, blocks_of, commands_of, inline_code
from tiny_world import ROOT
from vote_studies import ballot, write_ballot

from vqdm.runs.files import write_sealed

README, RUNNING = ((ROOT / page).read_text(encoding="utf-8") for page in ("README.md", "docs/running.md"))
TEXT = f"{README}\n{RUNNING}"
COMMANDS = commands_of(TEXT)
TINY = ROOT / "vqdm" / "models" / "tiny"
SMALL = (
    "evaluate.prompts.n=4", "evaluate.batch_size=4", "evaluate.bootstrap=3", "calibration.n=2",
    "calibration.batch_size=2", "model.sampler.steps=2", "threads=1", "device=cpu", "tracker=none",
    r"model.layers='(up_blocks\.0\.resnets\.0\.conv1|mid_block.*to_q)$'",
)  # fmt: skip
PAIRED = (*SMALL, "evaluate.metrics=[paired]")  # needs no network to look at images: 4 s less
DISTILLED = (
    "finetune.block_steps=2", "finetune.steps=2", "finetune.check_every=1", "finetune.batch_size=4",
    "finetune.validation_samples=3", "finetune.trajectories.n=4", "finetune.trajectories.validation=2",
    "finetune.block_samples=16",
)  # fmt: skip
DEMO = "sh scripts/run_demo.sh"
COMPRESS = "python run.py +experiment=compress model.path=my_model.safetensors quantize=trellis3 "
RULES: list[Rule] = []


def rule(pattern: str, *more: str, **options):
    """The decorated function checks what commands of this pattern have done."""

    def add(check):
        RULES.append(Rule(pattern, check, more, **options))
        return check

    return add


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Checkout:
    return Checkout(tmp_path_factory.mktemp("checkout"), RULES)


def pytest_generate_tests(metafunc):
    """Every command; by default those that end at once. What has no rule is run, and fails, at once."""
    if "command" in metafunc.fixturenames:
        matching = {c: [rule for rule in RULES if re.fullmatch(rule.pattern, c)] for c in COMMANDS}
        slow = {c for c, rules in matching.items() if rules and not rules[0].ends_at_once(c)}
        cases = [pytest.param(c, marks=pytest.mark.slow if c in slow else (), id=c[:90]) for c in COMMANDS]
        metafunc.parametrize("command", cases)


def test_the_command_does_what_the_page_says(command, checkout):
    done = checkout.execute(command)
    checkout.rule_of(command).check(done)


def test_no_rule_is_left_over_and_no_block_of_another_language_is_overlooked():
    unused = [rule.pattern for rule in RULES if not any(re.fullmatch(rule.pattern, c) for c in COMMANDS)]
    assert not unused
    assert {language for language, _ in blocks_of(TEXT)} == {"sh", "python", ""}, "only these are executed"
    assert not [line for language, body in blocks_of(TEXT) if not language for line in commands_of(f"`{body}`")]


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 120


def one_line(text: str) -> str:
    return " ".join(text.split())


def records(place: Path, experiment: str) -> list[dict]:
    return [json.loads(file.read_text()) for file in sorted((place / "results" / "runs" / experiment).glob("*.json"))]


def scores(place: Path, record: dict) -> dict:
    file = place / "results" / record["directories"]["evaluate"] / "metrics.json"
    return {name: entry["value"] for name, entry in json.loads(file.read_text())["metrics"].items()}


def resembles_the_original(place: Path, record: dict) -> bool:
    return scores(place, record)["psnr_to_fp"] > 15


def table_files(place: Path, name: str) -> list[Path]:
    tables, reports = place / "results" / "tables", place / "results" / "reports"
    return [*(tables / f"{name}.{kind}" for kind in ("md", "tex", "csv")), reports / f"{name}.html"]


# Two commands


@rule(DEMO, *SMALL)
def the_demo_makes_its_table_and_picture_and_installs_nothing(done: Done):
    table = pd.read_csv(done.place / "results" / "tables" / "demo.csv")
    rows = ["full precision", "RTN 4 bit", "GPTQ 4 bit", "VQ 3 bit", "trellis 3 bit", "trellis 2 bit"]
    assert list(table["method"]) == rows and table["fid"].notna().all() and (table["psnr_to_fp"][1:] > 15).all()
    assert all(file.is_file() for file in table_files(done.place, "demo"))
    assert (done.place / "results" / "figures" / "demo.png").is_file()
    assert "full precision   16.00 " in done.out and all(len(line) <= 100 for line in done.out.splitlines())
    assert done.out.splitlines()[-1] == "open results/reports/demo.html"
    assert (done.place / ".venv" / "bin").is_symlink(), "setup.sh has left the environment alone"


@rule("sh scripts/run_tests.sh", "-n", "0", "-p", "no:cacheprovider", "tests/weights/test_bitpack.py")
def the_tests_pass(done: Done):
    """Of one module: all of them, in one of them, would never end."""
    assert "All checks passed!" in done.out and re.search(r"\b\d+ passed", done.out) and "failed" not in done.out


@rule("bash .ci/run", instead={"bash .ci/run": "bash -n .ci/run"})
def it_ends_in_the_command_that_runs_the_tests(done: Done):
    """Only read: what runs it may be running this."""
    assert (done.place / ".ci" / "run").read_text().splitlines()[-1] == "sh scripts/run_tests.sh"


@rule("conda env create -f environment.yml && conda activate vqdm", instead={"conda": "echo conda"})
def condas_file_makes_the_named_environment_from_the_same_pins(done: Done):
    """Not run: conda and its channel are not at hand."""
    content = (done.place / "environment.yml").read_text()
    assert re.search(r"^name: vqdm$", content, re.M) and "-r requirements.txt" in content


@rule(r"python run\.py \+experiment=demo", *SMALL, after=(DEMO,))
def again_it_makes_nothing_anew(done: Done):
    files = [file for file in (done.place / "results" / "stages").rglob("*") if file.is_file() and file.name != ".lock"]
    assert files and all(file.stat().st_mtime < done.began for file in files)
    assert done.err.count(": finished in ") == 6 and "generate " not in done.err


# What to run


@rule(
    r"\. \.venv/bin/activate",
    instead={"activate": "activate && python -c 'import os, sys; print(os.path.realpath(sys.prefix))'"},
)
def the_environments_python_is_the_one(done: Done):
    assert Path(done.out.strip()) in {Path(sys.prefix).resolve(), done.place / ".venv"}


@rule(r"python run\.py \+experiment=tiny_trellis3", *(o for o in SMALL if o != "tracker=none"), after=(DEMO,))
def the_row_is_run_in_all_its_stages(done: Done):
    (record,) = records(done.place, "tiny_trellis3")
    assert {stage.split("/")[1] for stage in record["stages"]} >= {"calibrate", "quantize", "generate", "evaluate"}
    assert record["bits"]["bits_quantized"] <= 3 and resembles_the_original(done.place, record)
    assert list((done.place / "results" / "tracker" / "wandb").glob(f"offline-run-*-{record['tracker']}"))


@rule(
    r"python run\.py \+experiment=tiny_trellis3 quantize\.bits=2\.5 quantize\.allocation=sensitivity",
    *PAIRED,
    "name=by_sensitivity",
)
def bits_go_by_sensitivity(done: Done):
    """By a name of its own: of runs of one name compare_runs.py takes the newest."""
    (record,) = records(done.place, "by_sensitivity")
    assert 2.4 < record["bits"]["bits_quantized"] <= 2.5 and resembles_the_original(done.place, record)


@rule(r"python run\.py \+experiment=tiny_trellis3 finetune=both name=tiny_trellis3_both", *PAIRED, *DISTILLED)
def it_is_distilled_block_by_block_and_end_to_end(done: Done):
    (record,) = records(done.place, "tiny_trellis3_both")
    assert {"tune_blocks", "trajectories"} <= set(record["directories"]) and "finetuned in 2 steps" in done.err
    assert resembles_the_original(done.place, record)


@rule(r"python run\.py \+experiment=tiny_turbo_vq3", *PAIRED)
def the_student_runs(done: Done):
    (record,) = records(done.place, "tiny_turbo_vq3")
    assert record["model"] == "tiny_turbo" and resembles_the_original(done.place, record)


@rule(r"python run\.py table=codecs", *SMALL, "row=codecs_fp", after=(DEMO,))
def a_row_of_the_codecs_is_run(done: Done):
    table = pd.read_csv(done.place / "results" / "tables" / "codecs.csv", index_col="method")
    assert list(table.index[table["fid"].notna()]) == ["full precision"]
    codecs = {method.split()[0] for method in table.index}
    assert {method for method in table.index if method.endswith(" bit")} == {
        f"{codec} {bits} bit" for codec in codecs - {"full"} for bits in (2, 3, 4)
    }


def image(place: Path, record: dict) -> np.ndarray:
    file = place / "results" / record["directories"]["generate"] / "images" / "000000.png"
    return np.asarray(Image.open(file)).astype(int)


@rule(r"python run\.py table=demo model=tiny_outlier", *PAIRED, "row=tiny_fp", after=(DEMO,))
def another_model_writes_a_table_of_its_own(done: Done):
    """Its weights are others, but it is the same function."""
    assert all(file.is_file() for file in table_files(done.place, "demo-tiny_outlier"))
    runs = {record["model"]: record for record in records(done.place, "tiny_fp")}
    tiny, outlier = (image(done.place, runs[model]) for model in ("tiny", "tiny_outlier"))
    assert runs["tiny"]["directories"] != runs["tiny_outlier"]["directories"] and np.abs(tiny - outlier).max() <= 2


@rule(r"python run\.py \+experiment=sdxl_vq3 plan=true")
def the_plan_says_what_the_readme_says_of_sdxl(done: Done):
    assert "771 layers quantized" in done.out and "23 layers stay in 16 bit" in done.out
    assert "the denoiser's file: 1,018,859,064 bytes" in done.out
    bits = re.search(r"bits_per_weight (\S+), bits_quantized \S+, bits_as_in_paper (\S+)", done.out)
    assert [f"{float(value):.2f}" for value in bits.groups()] == ["3.17", "3.15"]
    assert "GiB of memory" in done.out and "what is still to run" in done.out
    quantized = [line for line in done.out.splitlines() if " 3x8g8 " in line]
    assert len(quantized) == 771, "a line for every layer"
    assert all(
        said in one_line(README) for said in ("771 layers", "and the 23", "1,018,859,064", "3.15 bits", "(3.17 with")
    )


@rule(r"python scripts/stages\.py", after=(DEMO,))
def stages_are_listed_with_size_and_age(done: Done):
    header, *lines = done.out.splitlines()
    assert header.split() == ["stage", "directory", "size", "age", "state", "runs"]
    assert any(line.startswith("quantize") and "tiny-trellis3-" in line and " MB " in line for line in lines)


def captions_of_a_user(checkout: Checkout) -> None:
    captions = [{"id": i, "image_id": i, "caption": f"a red circle above {i} blue squares"} for i in range(6)]
    content = {"images": [{"id": i, "file_name": f"{i}.jpg"} for i in range(6)], "annotations": captions}
    (checkout.place / "captions_val2017.json").write_text(json.dumps(content))


@rule(
    r"python run\.py \+experiment=tiny_vq3 calibration\.path=captions_val2017\.json",
    *PAIRED, prepare=captions_of_a_user,
)  # fmt: skip
def ones_own_captions_calibrate(done: Done):
    assert "calibration: captions_val2017.json" in done.err and "blue squares" not in TEXT
    record = next(r for r in records(done.place, "tiny_vq3") if "-file-" in r["directories"]["calibrate"])
    prompts = (done.place / "results" / record["directories"]["calibrate"]).rglob("*.json*")
    assert any("blue squares" in file.read_text() for file in prompts)


@rule(r"python run\.py --help")
def help_is_in_our_words(done: Done):
    assert done.out.startswith("Usage: python run.py") and "trellis_bits" in done.out and "Hydra" not in done.out


@rule(r"python run\.py -sc install=bash")
def what_it_prints_lets_the_tab_key_complete(done: Done):
    assert "complete -o nospace -o default -F hydra_bash_completion" in done.out


@rule(r"python run\.py list=runs", after=(DEMO,))
def the_runs_are_listed(done: Done):
    assert re.search(r"^tiny_trellis3/[0-9a-f]{8} +trellis 3 bit +tiny ", done.out, re.M)


SWEPT = r"python run\.py --multirun \+experiment=tiny_codec quantize=rtn,"


@rule(SWEPT + r"additive,trellis quantize\.bits=2,3,4", *PAIRED, instead={",additive,trellis": "", "2,3,4": "2,4"})
def the_jobs_are_run_and_named(done: Done):
    assert [line for line in done.err.splitlines() if line.startswith("— job")] == [
        "— job 0: quantize.bits=2", "— job 0: done", "— job 1: quantize.bits=4", "— job 1: done",
    ]  # fmt: skip
    found = {record["method"]: record for record in records(done.place, "tiny_codec")}
    assert all(resembles_the_original(done.place, found[f"quantize.bits={bits}"]) for bits in (2, 4))
    *_, protocol, page = done.out.splitlines()
    table = pd.read_csv((done.place / protocol.removeprefix("protocol: ")).with_suffix(".csv"), index_col="method")
    assert list(table.index) == ["quantize.bits=2", "quantize.bits=4"]
    assert (done.place / page.removeprefix("open ")).is_file()


@rule(
    SWEPT + r"gptq quantize\.bits=2,3,4 hydra/launcher=parallel hydra\.launcher\.n_jobs=2",
    *SMALL, instead={"2,3,4": "4"}, after=(DEMO,),
)  # fmt: skip
def the_jobs_run_side_by_side(done: Done):
    lines = [line for line in done.err.splitlines() if line.startswith("— job")]
    assert {"— job 0: done", "— job 1: done"} < set(lines) and sum("; its log: " in line for line in lines) == 2
    found = {record["method"]: record for record in records(done.place, "tiny_codec")}
    assert all(resembles_the_original(done.place, found[f"quantize={codec}"]) for codec in ("rtn", "gptq"))


@rule(r"python run\.py --multirun \+experiment=sdxl_vq3 .* hydra/launcher=slurm hydra\.launcher\.partition=gpu", code=1)
def without_a_cluster_it_says_so(done: Done):
    assert "are you indeed on a slurm cluster?" in done.error()


# Tables, figures, pages


@rule(r"python run\.py table=table1_tiny", *SMALL, "row=table1_tiny_fp", after=(DEMO,))
def table_1s_twin_shows_what_was_run_and_what_was_not(done: Done):
    table = pd.read_csv(done.place / "results" / "tables" / "table1_tiny.csv", index_col="method")
    assert list(table.index[table["fid"].notna()]) == ["full precision"] and len(table) == 8
    assert done.out.count("not run") > 7


@rule(
    r"python run\.py table=table1_tiny 'evaluate\.ladder=\[64,128\]'", *SMALL, "row=table1_tiny_fp",
    instead={"[64,128]": "2,3"}, after=("python run.py table=table1_tiny",),
)  # fmt: skip
def a_table_is_scored_on_the_way(done: Done):
    assert [f"{n} of 4 prompts: " in done.err for n in (2, 3, 4)] == [True, True, False]


@rule(r"python run\.py table=table1_sdxl", "row=table1_vqdm3", code=1)
def every_run_names_at_once_what_it_lacks(done: Done):
    said = done.error()
    assert "captions_train2017.json" in said and "scripts/download_coco.py" in said
    assert "stabilityai/stable-diffusion-xl-base-1.0" in said


@rule(r"python scripts/make_tables\.py", after=(DEMO, "python run.py table=table1_tiny"))
def every_table_is_there_again_and_nothing_was_run(done: Done):
    names = sorted(path.stem for path in (ROOT / "experiments").glob("*.yaml"))
    assert all(file.is_file() for name in names for file in table_files(done.place, name))
    assert "6 of 6 rows: wrote results/tables/demo.md" in done.out
    sdxl = (done.place / "results" / "tables" / "table1_sdxl.md").read_text()
    assert "not run" in sdxl and "published" in sdxl
    page = (done.place / "results" / "reports" / "demo.html").read_text(encoding="utf-8")
    assert "trellis 3 bit" in page and not re.search(r"""(src|href)=["']?(https?:)?//""", page), "no network"


@rule(r"python scripts/report\.py 'tiny_\*'", after=(DEMO,))
def any_runs_make_a_table_and_a_page(done: Done):
    *_, protocol, page = done.out.splitlines()
    table = pd.read_csv((done.place / protocol.removeprefix("protocol: ")).with_suffix(".csv"))
    assert {"RTN 4 bit", "trellis 3 bit"} <= set(table["method"]) and (
        done.place / page.removeprefix("open ")
    ).is_file()


def images_csv(place: Path, experiment: str) -> pd.DataFrame:
    record = next(r for r in records(place, experiment) if r["model"] == "tiny")
    return pd.read_csv(place / "results" / record["directories"]["evaluate"] / "images.csv")


@rule(r"python scripts/compare_runs\.py tiny_trellis3 tiny_rtn4", after=(DEMO,))
def the_difference_has_its_standard_error(done: Done):
    sentence, names, *table = done.out.splitlines()
    assert "trellis 3 bit" in sentence and "RTN 4 bit" in sentence and sentence.endswith(".")
    assert names == "tiny_trellis3 against tiny_rtn4 on tiny, n = 4"
    lines = {line.split()[0]: line.split() for line in table}
    assert {"psnr_to_fp", "fid", "kid"} <= lines.keys()
    one, other = (images_csv(done.place, name)["distance_to_fp"] for name in ("tiny_trellis3", "tiny_rtn4"))
    _, _, _, difference, _, error, _ = lines["distance_to_fp"]
    assert float(error) == pytest.approx((one - other).sem(), rel=0.05)
    assert float(difference) == pytest.approx((one - other).mean(), abs=0.1 * float(error))


STUDY = "tiny_trellis3-tiny_rtn4-tiny_fp-tiny"
VOTES = "python scripts/make_votes.py tiny_trellis3 tiny_rtn4 tiny_fp --n 32"


@rule(re.escape(VOTES), instead={"--n 32": "--n 4"}, after=(DEMO,))
def one_file_for_raters_and_a_key(done: Done):
    folder = done.place / "results" / "votes" / STUDY
    (page,) = folder.glob("votes-*.html")
    assert f"for raters: {page.relative_to(done.place)}" in done.out and "tiny_rtn4" not in page.read_text()
    assert (folder / "key.json").is_file()


def two_raters(checkout: Checkout) -> None:
    """Both always take the first of the two runs as the study lists them; attention checks as is expected."""
    from vqdm.report.votes.ballots import read_key

    key = read_key(checkout.place / "results" / "votes" / STUDY / "key.json")

    def prefer(trial) -> str:
        return trial.expected or ("left" if trial.left < trial.right else "right")

    for rater in ("anna", "bela"):
        write_ballot(checkout.place / "ballots", ballot(key, rater, prefer), rater)


@rule(
    rf"python scripts/score_votes\.py results/votes/{STUDY}/key\.json ballots/\*\.json",
    after=(VOTES,), prepare=two_raters,
)  # fmt: skip
def votes_become_shares_and_strengths(done: Done):
    folder = done.place / "results" / "votes" / STUDY
    rows = json.loads((folder / "human_preference.json").read_text())
    assert len(rows) == 3 and all(row["n_raters"] == 2 and row["n_votes"] == 8 for row in rows)
    # alphabetically first is preferred always: tiny_fp, then tiny_rtn4
    assert {(row["left"], row["right"]): row["preference_for_left_percent"] for row in rows} == {
        ("tiny_trellis3", "tiny_rtn4"): 0.0, ("tiny_trellis3", "tiny_fp"): 0.0, ("tiny_rtn4", "tiny_fp"): 0.0,
    }  # fmt: skip
    assert "Bradley" in done.out and (folder / "score.md").read_text() in done.out


# Your own model, small


@rule(r"python run\.py \+experiment=compress model=tiny output=tiny_3bit", *SMALL)
def the_shipped_model_is_written_small(done: Done):
    config = json.loads((done.place / "tiny_3bit" / "unet" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "vqdm"
    assert "wrote tiny_3bit: the denoiser takes" in done.out + done.err


def my_model(checkout: Checkout) -> None:
    made = checkout.shell(f"python scripts/to_single_file.py {shlex.quote(str(TINY))} my_model.safetensors")
    assert made.code == 0, made.err


MINE = (*SMALL, f"model.configs={TINY}")  # configs that come with vqdm are those of large models
PLAN = COMPRESS + "output=my_model_3bit plan=true"
WRITTEN = COMPRESS + "output=my_model_3bit"
DISTILLED_MODEL = COMPRESS + "finetune=both output=my_model_3bit"


@rule(re.escape(PLAN), *MINE, prepare=my_model)
def the_plan_says_what_will_come(done: Done):
    assert "3 layers quantized" in done.out and "memory and times for cpu" in done.out
    assert not (done.place / "my_model_3bit").exists()


@rule(re.escape(WRITTEN), *MINE, after=(PLAN,))
def the_file_is_as_planned_to_the_byte(done: Done):
    plan = json.loads((done.place / "results" / "plans" / "compress.json").read_text())
    written = next(r for r in records(done.place, "compress") if r["model"] == "local" and len(r["stages"]) == 2)
    assert plan["bytes"] == written["bits"]["file_bytes"] == unet_size(done.place)
    lines = [line for line in done.err.replace("\r", "\n").splitlines() if " bits, error " in line]
    assert len(lines) == 3 and all("left" in line for line in lines)


@rule(re.escape(DISTILLED_MODEL), *MINE, *DISTILLED, after=(WRITTEN,))
def distilled_the_file_keeps_its_size(done: Done):
    assert "finetuned in 2 steps" in done.err
    plan = json.loads((done.place / "results" / "plans" / "compress.json").read_text())
    assert plan["bytes"] == unet_size(done.place)


def unet_size(place: Path) -> int:
    return (place / "my_model_3bit" / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size


@rule(r"python scripts/export_plain\.py my_model_3bit my_model_plain", after=(DISTILLED_MODEL,))
def plain_weights_again(done: Done):
    assert done.out == "wrote my_model_plain\n"
    assert "quantization_config" not in json.loads((done.place / "my_model_plain" / "unet" / "config.json").read_text())


# What distillation wins back


def two_runs_of_these_names(checkout: Checkout) -> None:
    """Rows of the demo under the names of the frontier's: only that the comparison runs is shown."""
    for name, experiment in (("frontier_trellis225s_both", "tiny_trellis3"), ("frontier_paper3_both", "tiny_vq3")):
        more = shlex.join([*SMALL, f"name={name}"])
        assert checkout.shell(f"python run.py +experiment={experiment} {more}").code == 0


@rule(
    r"python scripts/compare_runs\.py frontier_trellis225s_both frontier_paper3_both",
    after=(DEMO,), prepare=two_runs_of_these_names,
)  # fmt: skip
def the_frontiers_rows_compare(done: Done):
    assert done.out.splitlines()[1] == "frontier_trellis225s_both against frontier_paper3_both on tiny, n = 4"
    assert re.search(r"^psnr_to_fp( +\S+){6}$", done.out, re.M)


@rule(r"python run\.py table=turbo", *SMALL, "row=turbo_2_none_1", "plan=true")
def a_row_of_the_few_step_table_is_planned(done: Done):
    assert re.findall(r"^— (.*)", done.out, re.M) == ["turbo_2_none_1, trellis 2 bit, 1 step"]
    bits = re.search(r"bits_quantized (\S+),", done.out)[1]
    assert 1.9 < float(bits) <= 2 and "/tiny_turbo-trellis2-" in done.out


@rule(r"python run\.py table=frontier", *SMALL, "row=frontier_fp", after=(DEMO,))
def a_row_of_the_frontier_is_run(done: Done, name: str = "frontier", rows: int = 11):
    table = pd.read_csv(done.place / "results" / "tables" / f"{name}.csv", index_col="method")
    assert list(table.index[table["fid"].notna()]) == ["full precision"] and len(table) == rows


@rule(r"python run\.py table=distillation", *SMALL, "row=distil_fp", after=(DEMO,))
def a_row_of_the_recipes_is_run(done: Done):
    a_row_of_the_frontier_is_run(done, "distillation", 21)


@rule(r"python run\.py table=trellis_bits", *SMALL, "row=bits_fp", after=(DEMO,))
def a_row_of_the_trellis_from_bit_to_bit_is_run(done: Done):
    a_row_of_the_frontier_is_run(done, "trellis_bits", 14)


# SDXL on a GPU


@rule(r"python scripts/download_coco\.py", code=1)
def without_network_it_says_where_the_file_goes(done: Done):
    assert "put the file at data/coco2014_val_30k.csv yourself" in done.error()
    assert "run the same command again" in done.error()


@rule(r"python scripts/download_coco\.py --what fid_reference", code=1)
def without_network_it_says_where_the_archive_goes(done: Done):
    assert "put the file at data/fid-files.tar.gz yourself" in done.error()


@rule(r"python run\.py \+experiment=sdxl_vq3( evaluate\.reference=\S+| quantize\.recipe=fast finetune=none)?", code=1)
def sdxl_names_at_once_what_it_lacks(done: Done):
    every_run_names_at_once_what_it_lacks(done)
    assert not list((done.place / "results" / "runs").glob("sdxl*"))


@rule(r"python scripts/make_reference_stats\.py data/val2014 .* --out data/reference/coco30k", code=1)
def without_photographs_it_says_so(done: Done):
    assert done.error().startswith("error: data/val2014 is no folder of images and no .zip archive")


@rule(r"python scripts/bench_sdxl_layers\.py --workers 2", "--shapes", "320x640")
def shapes_of_sdxls_layers_are_timed(done: Done):
    assert "2 layers" in done.out and "2 workers: " in done.out
    assert (pd.read_csv(done.place / "results" / "tables" / "bench_sdxl_layers.csv")["seconds"] > 0).all()


@rule(r"python run\.py table=table1_sdxl_quick plan=true plan_for=4090", "row=quick_rtn4")
def a_quick_tables_hours_are_said(done: Done):
    assert "RTX 4090" in done.out and "to download, about" in done.out and "captions to fetch first" in done.out
    assert re.search(r"^all 1 rows: [\d.]+ h, up to [\d.]+ GiB on disk", done.out, re.M)


def somebodys_table(checkout: Checkout) -> None:
    run = {"fingerprint": "ab", "bits": {}, "protocol": {"n": 512}, "not_run": [], "made": {}}
    run["metrics"] = {"psnr_to_fp": {"value": 30.0, "se": 0.3, "protocol": {}}}
    row = {"name": "tiny_rtn4", "method": "RTN 4 bit", "runs": [run]}
    about = {"format": 1, "table": "demo", "title": "a demo", "model": "tiny"}
    write_sealed(checkout.place / "theirs.json", about | {"rows": [row]})


@rule(r"python scripts/make_tables\.py demo --from theirs\.json", prepare=somebodys_table, after=(DEMO,))
def somebodys_numbers_stand_beside_ones_own(done: Done):
    assert re.search(r"^\| RTN 4 bit \|.* [\d.]+ / 30 \(", done.out, re.M) and "- n: " in done.out
    assert (done.place / "results" / "share" / "demo.json").is_file()


@rule(r"python run\.py \+experiment=sdxl_vq3 plan=true plan_for=h100")
def distillation_as_in_the_paper_is_planned(done: Done):
    said = next(line for line in done.out.splitlines() if line.split()[:1] == ["finetune"])
    assert "= 102,400 samples" in said and "6.6 GiB on the device" in said
    assert "6.6 GPU-hours" in said and "estimate: 0.4 × H100" in said
    assert "102,400 samples, 6.6 GiB on the GPU, an estimated 6.6 GPU-hours" in one_line(README)


# The tiny model


@rule(r"python run\.py \+experiment=tiny_train tiny_train=smoke", "threads=1")
def the_whole_world_is_trained_in_seconds(done: Done):
    directory = done.place / re.search(r"^trained: (\S+);", done.out, re.M)[1]
    assert (directory / "manifest.json").is_file() and list(directory.rglob("model_index.json"))


@rule(r"python run\.py \+experiment=tiny_train tiny_train=small", "plan=true")
def the_training_of_small_would_run(done: Done):
    assert done.out.startswith("tiny_train missing results/stages/tiny_train/small-")


@rule(r"python run\.py \+experiment=tiny_train", "plan=true")
def the_whole_training_would_run(done: Done):
    assert done.out.startswith("tiny_train missing results/stages/tiny_train/")


# Weights & Biases


@rule(r"wandb sync results/tracker/wandb", after=("python run.py +experiment=tiny_trellis3",), code=1)
def the_runs_are_found_and_a_key_is_asked_for(done: Done):
    said = done.out + done.err
    assert re.search(r"results/tracker/wandb/\S+\.wandb", said) and "No API key configured" in said


# Python


PROSE = {
    "compress": "vqdm.compress(",
    "set_decode": "vqdm.hub.pipelines.set_decode(",
    "save": "pipeline.save_pretrained(",
    "dequantize": "dequantize(",
    "from_pretrained": "from_pretrained(…, quantization_config",
}
FROM_PYTHON = """
import torch
from diffusers import UNet2DConditionModel
from vqdm.weights.layers import quantized_layers

prompts = ["a red circle above a blue square"]
pipeline = DiffusionPipeline.from_pretrained({tiny!r}, dtype=torch.float32)
{compress}
denoiser = pipeline.unet
print(len(quantized_layers(denoiser)))
{set_decode}
{save}
denoiser.{dequantize}
print(len(quantized_layers(denoiser)))
print(len(quantized_layers(UNet2DConditionModel.{from_pretrained})))
"""


@pytest.mark.slow
def test_the_readmes_python_does_what_it_says(checkout):
    """The block makes an image of the model that the commands have written; then the expressions of the prose run.

    What the README leaves out as … is filled in; fewer steps and layers make it small.
    """
    checkout.execute(DISTILLED_MODEL)
    (block,) = [body for language, body in blocks_of(TEXT) if language == "python"]
    code = {name: next(c for c in inline_code(TEXT) if c.startswith(begin)) for name, begin in PROSE.items()}
    code["compress"] = code["compress"].replace(")", ", steps=2, layers='mid_block.*resnets.0.conv')")
    code["save"] = code["save"].replace("…", "'saved'")
    code["from_pretrained"] = code["from_pretrained"].replace("…", repr(str(TINY / "unet"))).replace("trellis3", "rtn4")
    code = block + FROM_PYTHON.format(tiny=str(TINY), **code)
    done = checkout.shell(f"python -c {shlex.quote(code)}")
    assert done.code == 0, done.err[-2000:]
    assert Image.open(checkout.place / "image.png").size == (32, 32)
    assert done.out.split() == ["2", "0", "118"], "layers quantized: in place, after dequantize(), without any data"
    assert json.loads((checkout.place / "saved" / "unet" / "config.json").read_text())["quantization_config"]


def test_the_schemes_that_the_readme_names_are_known():
    from vqdm.config.codecs import parse_scheme

    listed = re.search(r"Schemes are\s+(.*?)\.\n", TEXT, re.S)[1]
    names = re.findall(r"`([^`]+)`", listed)
    assert len(names) >= 6 and all(parse_scheme(name).kind != "none" for name in names)


def test_a_command_without_a_rule_is_told_what_to_do(checkout):
    assert commands_of("```sh\npython run.py table=new  # a table\n```\n") == ["python run.py table=new"]
    with pytest.raises(AssertionError, match=r"write one for it in tests/test_readme_commands\.py"):
        checkout.execute("python run.py table=new")
