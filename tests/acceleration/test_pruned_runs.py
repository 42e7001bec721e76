"""Pruning as a stage: scores are made once, the codecs and distillation go on from what is left."""

import json

import pytest
from tiny_world import SMALL, run

from vqdm.acceleration.operators import inside

PRUNED = (*SMALL, "+experiment=tiny_fp", "prune=ld30", "prune.score=prediction", "name=pruned")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    place = tmp_path_factory.mktemp("pruned")
    done = run(*PRUNED, f"results_dir={place}")
    assert done.returncode == 0, done.stderr
    return place


def removed_in(results):
    return json.loads(next(results.glob("stages/prune/tiny-pruned30-*/removed.json")).read_text())


@pytest.mark.slow
def test_what_goes_is_what_scores_least(results):
    (file,), found = results.glob("stages/scores/*/scores.json"), removed_in(results)
    scores = json.loads(file.read_text())
    assert 0.3 <= found["weights"] / found["of"] < 0.6 and len(scores) == 39
    left = {name: score for name, score in scores.items() if not inside(f"{name}.", found["removed"])}
    assert max(scores[name] for name in found["removed"]) <= min(left.values())
    assert not list(file.parent.glob("items/*"))


@pytest.mark.slow
def test_another_share_goes_by_the_same_scores(results):
    done = run(*PRUNED, "name=less", "prune.share=0.05", f"results_dir={results}")
    assert done.returncode == 0, done.stderr
    assert len(list(results.glob("stages/scores/*"))) == 1 and len(list(results.glob("stages/prune/*"))) == 2


@pytest.mark.slow
def test_quantizing_starts_from_what_is_left(results):
    learning = ("finetune=end_to_end", "finetune.steps=2", "finetune.check_every=1", "finetune.batch_size=2",
                "finetune.trajectories.n=2", "finetune.trajectories.validation=1")  # fmt: skip
    done = run(*PRUNED, "name=both", "quantize=rtn4", *learning, f"results_dir={results}")
    assert done.returncode == 0, done.stderr
    removed = removed_in(results)["removed"]
    (layers,) = results.glob("stages/quantize/*/layers.json")
    names = [row["name"] for row in json.loads(layers.read_text())["quantized"]]
    assert names and not [name for name in names if name.startswith(tuple(f"{gone}." for gone in removed))
                          and not name.endswith("conv_shortcut")]  # fmt: skip
    (config,) = results.glob("stages/finetune/*/denoiser/config.json")
    assert json.loads(config.read_text())["quantization_config"]["removed"] == removed


@pytest.mark.slow
def test_a_pruned_model_in_full_precision_learns(results):
    done = run(*PRUNED, "name=healed", "finetune=end_to_end", "finetune.steps=8", "finetune.check_every=4",
               "finetune.batch_size=8", "finetune.trajectories.n=8", "finetune.trajectories.validation=4",
               f"results_dir={results}")  # fmt: skip
    assert done.returncode == 0, done.stderr
    losses = [json.loads(path.read_text())["validations"] for path in results.glob("stages/finetune/*/history.json")]
    assert any(loss[-1]["loss"] < 0.9 * loss[0]["loss"] for loss in losses)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("prune.share=0",), "prune.share=0 must be above 0"),
        (("prune.keep='('",), "prune.keep is no regular expression"),
        (("finetune=blocks",), "finetune.block_steps goes by the teacher's blocks"),
    ],
)
def test_refusals(overrides, said, tmp_path):
    done = run(*PRUNED, *overrides, f"results_dir={tmp_path}", "plan=true")
    assert done.returncode == 1 and said in done.stderr.replace("\n", " ")
