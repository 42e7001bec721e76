"""What can be scored, and what of it tells one evaluation from another."""

import json

import pytest
import torch
from composed import compose
from safetensors.torch import save as to_bytes
from safetensors.torch import save_file

from vqdm.config.options import EvaluateConfig
from vqdm.errors import UserError
from vqdm.metrics.available import find_scoring
from vqdm.metrics.families import CLIP_H14, FAMILIES, INCEPTION
from vqdm.stages.graph.experiment import build_graph


def evaluation(tmp_path, *overrides, experiment="tiny_fp"):
    config = compose(f"+experiment={experiment}", f"evaluate.weights={tmp_path / 'weights'}", *overrides)
    return build_graph(config, cache=tmp_path / "hashes.json").evaluate


def scoring(tmp_path, *metrics, originals=True, **options):
    config = EvaluateConfig(metrics=list(metrics), weights=str(tmp_path / "weights"), **options)
    return find_scoring(config, originals=originals, cache=tmp_path / "hashes.json")


def put(tmp_path, weights, value=0.0):
    path = tmp_path / "weights" / weights.name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(to_bytes({"x": torch.tensor([value])}))
    return path


@pytest.mark.parametrize("family", ["paired", "clip_h14"])
@pytest.mark.parametrize("other", ["evaluate.seed=1", "model.sampler.steps=3", "evaluate.images_per_prompt=2"])
def test_other_images_are_another_evaluation_though_nothing_looks_at_them(family, other, tmp_path):
    """Full precision has no pairs, and the weights of clip_h14 are not here."""
    metrics = f"evaluate.metrics=[{family}]"
    one, two = (evaluation(tmp_path, metrics, *more) for more in ((), (other,)))
    assert not [name for name in one.upstream if name.startswith("features/")]
    assert one.fingerprint != two.fingerprint


def test_other_codecs_are_another_evaluation_though_nothing_looks_at_their_images(tmp_path):
    more = ("evaluate.metrics=[clip_h14]", "quantize.seed=1")
    assert len({evaluation(tmp_path, *more[:n], experiment="tiny_vq3").fingerprint for n in (1, 2)}) == 2


def test_weights_that_come_later_are_another_evaluation_and_their_folder_is_not(tmp_path):
    metrics = "evaluate.metrics=[tiny,clip_h14]"
    without = evaluation(tmp_path, metrics)
    assert evaluation(tmp_path, metrics, "evaluate.weights=elsewhere").fingerprint == without.fingerprint
    put(tmp_path, CLIP_H14)
    found = evaluation(tmp_path, metrics)
    assert found.fingerprint != without.fingerprint and "features/clip_h14" in found.upstream
    put(tmp_path, CLIP_H14, 1.0)
    assert evaluation(tmp_path, metrics).fingerprint not in (found.fingerprint, without.fingerprint)


def test_what_is_not_here_is_said_of_every_metric_that_was_asked_for(tmp_path):
    families = [name for name, family in FAMILIES.items() if not family.of_file]
    everything = scoring(tmp_path, *families)
    here = {"tiny", "recovery", "vocabulary", "edits", "concepts", "places", "paired"}
    assert set(everything.weights) == here
    assert set(everything.not_run) == {m for name in set(families) - here for m in FAMILIES[name].metrics}
    assert all(str(tmp_path / "weights") in why and "\n" not in why for why in everything.not_run.values())
    full_precision = scoring(tmp_path, *families, originals=False)
    assert set(full_precision.weights) == here - {"paired"}
    assert not [metric for metric in full_precision.not_run if metric.endswith("_to_fp")], "these do not apply"


def test_weights_that_are_not_the_published_ones_are_not_used(tmp_path):
    put(tmp_path, INCEPTION)
    found = scoring(tmp_path, "fid_paper")
    assert not found.weights and "6726825d" in found.not_run["fid_paper"]


def test_without_a_reference_its_metrics_alone_are_not_run(tmp_path):
    put(tmp_path, CLIP_H14)
    put(tmp_path, FAMILIES["cmmd"].weights[0])
    found = scoring(tmp_path, "clip_h14", "cmmd")
    assert set(found.weights) == {"clip_h14", "cmmd"} and set(found.not_run) == {"cmmd_l14_336"}
    assert "evaluate.reference" in found.not_run["cmmd_l14_336"]
    both = scoring(tmp_path, "cmmd", "pickscore").reasons()
    assert [line.partition(":")[0] for line in both] == ["cmmd_l14_336", "pickscore, pickscore_scaled"]


@pytest.mark.parametrize("content", [None, b"", b"no statistics"])
def test_a_reference_that_is_none_is_refused_before_any_work(content, tmp_path):
    path = tmp_path / "stats.npz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"stats\.npz") as error:
        scoring(tmp_path, "tiny", reference=str(path))
    assert "\n" not in str(error.value)


def test_a_weights_folder_that_is_a_file_has_nothing_in_it(tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "weights")
    assert set(scoring(tmp_path, "clip_h14").not_run) == {"clip_h14", "clip_h14_similarity_to_fp"}


@pytest.mark.parametrize("name", ["CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors", "PickScore_v1/model.safetensors"])
def test_weights_that_were_cut_off_are_not_run(name, tmp_path):
    """Before images are made for them."""
    path = tmp_path / "weights" / name
    path.parent.mkdir(parents=True)
    for content in (b"", to_bytes({"x": torch.zeros(9)})[:-4]):
        path.write_bytes(content)
        found = scoring(tmp_path, "clip_h14" if name.startswith("CLIP") else "pickscore")
        assert not found.weights and all("is damaged" in why and "\n" not in why for why in found.not_run.values())


def test_a_reference_that_was_cut_off_is_refused_before_any_work(tmp_path):
    about = {"name": "r", "images": 2, "images_sha256": "i", "families": {"cmmd": {}}}
    (tmp_path / "reference.json").write_text(json.dumps(about))
    (tmp_path / "cmmd.safetensors").write_bytes(to_bytes({"features": torch.zeros(9)})[:-4])
    with pytest.raises(UserError, match=r"cmmd\.safetensors is damaged") as error:
        scoring(tmp_path, "tiny", reference=str(tmp_path))
    assert "\n" not in str(error.value)
