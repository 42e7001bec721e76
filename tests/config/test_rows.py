"""An experiment on SDXL is a row of a table: one set of stages, whichever of both commands makes it."""

from pathlib import Path

import composed
import pytest

from vqdm.report.experiments import read_table
from vqdm.stages.graph.experiment import build_stages

ROOT = Path(__file__).resolve().parent.parent.parent
ROWS = {  # experiment -> (table, row)
    "sdxl_fp": ("table1_sdxl", "table1_fp"),
    "sdxl_vq3": ("table1_sdxl", "table1_vqdm3"),
    "sdxl_trellis3": ("table1_sdxl", "table1_trellis3"),
    "sdxl_turbo_vq3": ("turbo_sdxl", "turbo_sdxl_vqdm3_4"),
    "sdxl_rtn4": ("bits_sweep", "bits_sweep_rtn4"),
    "sdxl_gptq4": ("bits_sweep", "bits_sweep_gptq4"),
}


@pytest.fixture(scope="module")
def compose(tmp_path_factory):
    """Compose with a list of captions in the place of COCO's, which are not here."""
    captions = tmp_path_factory.mktemp("captions") / "captions.csv"
    captions.write_text("captions\n" + "".join(f"a caption of number {i}\n" for i in range(6000)))
    lists = [f"calibration.path={captions}", "calibration.column=captions"]
    lists += [f"evaluate.prompts.path={captions}", "evaluate.prompts.sha256=null"]
    return lambda *overrides: composed.compose(*overrides, *lists)


def fingerprints(config, cache: Path) -> dict[str, str]:
    return {name: stage.fingerprint for name, stage in build_stages(config, cache=cache).named().items()}


def row_of(experiment: str) -> list[str]:
    table, row = ROWS[experiment]
    return read_table(ROOT / "experiments" / f"{table}.yaml").row(row).overrides_of_runs()[0]


@pytest.mark.parametrize("experiment", ROWS)
def test_an_experiment_makes_what_its_tables_row_makes(experiment, compose, tmp_path):
    alone, in_table = compose(f"+experiment={experiment}"), compose(*row_of(experiment))
    assert fingerprints(alone, tmp_path / "hashes") == fingerprints(in_table, tmp_path / "hashes")
    assert in_table.method.startswith(alone.method)  # and says what is its own: "(ours)", "4 steps"


def test_every_experiment_on_sdxl_is_a_row():
    named = {path.stem for path in (ROOT / "conf" / "experiment").glob("sdxl_*.yaml")}
    assert named == {*ROWS, "sdxl_codec", "sdxl_random"}  # which have no codec, or no weights, of their own


def test_the_papers_three_bits_are_by_its_recipe(compose):
    config = compose("+experiment=sdxl_vq3")
    assert (config.quantize.name, config.quantize.recipe, config.quantize.hessian_from) == ("vq3", "paper", "student")
    assert (config.finetune.steps, config.finetune.batch_size, config.finetune.learning_rate) == (1600, 64, 1e-6)
    assert config.calibration.recorded_steps == 4  # a deviation that table1_sdxl states


def test_deviations_are_one_override_away(compose, tmp_path):
    usual = fingerprints(compose("+experiment=sdxl_vq3"), tmp_path)
    whole = fingerprints(compose("+experiment=sdxl_vq3", "calibration.recorded_steps=50"), tmp_path)
    plain = fingerprints(compose("+experiment=sdxl_vq3", "finetune=none"), tmp_path)
    fast = fingerprints(compose("+experiment=sdxl_vq3", "quantize.recipe=fast"), tmp_path)
    assert whole["calibrate"] != usual["calibrate"] and fast["quantize"] != usual["quantize"]
    assert plain["quantize"] == usual["quantize"] and "finetune" not in plain
