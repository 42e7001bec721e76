"""Scores on the way, after ever more prompts, and the same ones at the end."""

import json
from pathlib import Path

from composed import compose
from tiny_world import FEW, run

from vqdm.stages.experiment import rungs


def scored(results: Path, experiment: str) -> dict:
    record = json.loads(next((results / "runs" / experiment).glob("*.json")).read_text())
    return json.loads((results / record["directories"]["evaluate"] / "metrics.json").read_text())


def test_a_ladder_ends_in_the_same_numbers(tmp_path):
    plain, climbed = tmp_path / "plain", tmp_path / "climbed"
    assert run("+experiment=tiny_rtn4", *FEW, f"results_dir={plain}").returncode == 0
    done = run("+experiment=tiny_rtn4", *FEW, "evaluate.ladder=8,3,16", f"results_dir={climbed}")
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if " of 16 prompts: " in line]
    assert [line.split(": ")[1] for line in said] == ["3 of 16 prompts", "8 of 16 prompts"]
    assert all("psnr_to_fp" in line and " ± " in line for line in said)
    one, other = scored(plain, "tiny_rtn4"), scored(climbed, "tiny_rtn4")
    assert one == other and one["protocol"]["n"] == 16
    assert len(list((climbed / "stages" / "evaluate").iterdir())) == 3


def test_rungs_are_in_order_and_below_the_top():
    config = compose("+experiment=tiny_fp", "evaluate.ladder=[5000,128,128,512]")
    assert rungs(config, 512) == [128] and rungs(config, 6000) == [128, 512, 5000]
    assert rungs(compose("+experiment=tiny_fp"), 512) == []
