"""The scripts that compare finished runs, on made-up scores."""

import contextlib
import io
import json
import types

import compare_runs
import equal_bits
import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
from safetensors.torch import save_file

from vqdm.errors import UserError
from vqdm.metrics.distribution import FrechetDistance, Gaussian, cmmd
from vqdm.metrics.reference import find_reference
from vqdm.metrics.resampling import Resamples
from vqdm.models.shipped import evaluators_directory
from vqdm.runs.identity import files_identity

N, COPIES = 12, 2
WEIGHTS = "w" * 64


def by_image(seed, **means):
    """Scores of two images of every prompt, which are alike."""
    generator = np.random.default_rng(seed)
    index = pd.MultiIndex.from_product([[f"p{i:02d}" for i in range(N)], range(COPIES)], names=["prompt", "copy"])
    values = {
        name: (generator.normal(mean, 1, (N, 1)) + generator.normal(0, 0.1, (N, COPIES))).flatten()
        for name, mean in means.items()
    }
    return pd.DataFrame(values, index=index)


def rows(seed, columns=6, shift=0.0):
    generator = np.random.default_rng(seed)
    return torch.from_numpy(generator.normal(shift, 1, (N * COPIES, columns))).float()


def write_features(results, name, fingerprint, **columns):
    """In batches of 5 images."""
    directory = results / "stages" / "features" / f"{name}-{fingerprint[:8]}"
    (directory / "features").mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps({"config": {"batch_size": 5}}))
    for start in range(0, N * COPIES, 5):
        part = {key: column[start : start + 5].contiguous() for key, column in columns.items()}
        save_file(part, directory / "features" / f"{start:06d}.safetensors")
    return str(directory.relative_to(results))


def write_run(results, name, *, seed, reference="r" * 64, model="tiny", method=None, **protocol):
    """A run whose features are rows(seed), rows(seed + 1), …; returns its scores by image."""
    frame = by_image(seed, clip_h14=0.3, lpips_to_fp=0.1)
    evaluate = results / "stages" / "evaluate" / name
    evaluate.mkdir(parents=True)
    frame.to_csv(evaluate / "images.csv")
    own, originals, vectors = (f"{kind}{seed:07d}{'0' * 56}" for kind in "abc")
    stages = [
        write_features(results, name, own, features=rows(seed, shift=0.1 * seed)),
        write_features(results, f"{name}-fp", originals, features=rows(99)),
        write_features(results, f"{name}-cmmd", vectors, image=rows(seed + 1, shift=0.5)),
    ]
    upstream = {"features/fid_paper": own, "originals/fid_paper": originals, "features/cmmd": vectors}
    (evaluate / "config.json").write_text(json.dumps({"config": {}, "upstream": upstream}))
    common = {"n": N, "images_per_prompt": COPIES, "prompts_sha256": "p", "image_seed": 0, "dtype": "float16"}
    own_protocol = {"weights_sha256": [WEIGHTS], "reference_sha256": reference, "device": "cpu"}
    metrics = ("clip_h14", "lpips_to_fp", "fid_paper", "fid_paper_to_fp", "cmmd_l14_336")
    entries = {metric: {"value": 0.0, "protocol": own_protocol} for metric in metrics}
    written = {"protocol": common | {"device": "cuda"} | protocol, "metrics": entries, "not_run": {}}
    (evaluate / "metrics.json").write_text(json.dumps(written))
    (results / "runs" / name).mkdir(parents=True)
    directories = {"evaluate": str(evaluate.relative_to(results))}
    record = {
        "experiment": name,
        "method": method or name,
        "model": model,
        "stages": stages,
        "directories": directories,
        "bits": {},
    }
    (results / "runs" / name / "0.json").write_text(json.dumps(record))
    return frame


@pytest.fixture
def reference(tmp_path):
    """(path, sha256, {family: features}) of a reference as scripts/make_reference_stats.py writes it."""
    real = {"fid_paper": torch.randn(40, 6, generator=torch.Generator().manual_seed(0)), "cmmd": rows(50)}
    directory = tmp_path / "reference"
    directory.mkdir()
    for family, features in real.items():
        fitted = Gaussian.of(features)
        save_file(
            {"features": features, "mean": fitted.mean, "covariance": fitted.covariance},
            directory / f"{family}.safetensors",
        )
    about = {"name": "real", "images": 40, "images_sha256": "i", "families": {family: {} for family in real}}
    (directory / "reference.json").write_text(json.dumps(about))
    return directory, find_reference(str(directory), cache=tmp_path / "hashes.json").sha256, real


def printed(results, *arguments):
    with contextlib.redirect_stdout(io.StringIO()) as found:
        compare_runs.main([*arguments, "--results", str(results)])
    return found.getvalue()


def compared(results, *more):
    """The printed table, by metric, with all digits."""
    text = printed(results, "x", "y", "--exact", *more)
    return pd.read_csv(io.StringIO(text.split("\n", 2)[2]), sep=r"\s+", index_col="metric")


def refused(said, results, *more):
    with pytest.raises(SystemExit) as error:
        compared(results, *more)
    message = str(error.value)
    assert message.startswith("error: ") and said in message and "\n" not in message


def test_paired_errors_are_those_of_a_paired_t_test_over_prompts(tmp_path):
    one, other = write_run(tmp_path, "x", seed=1), write_run(tmp_path, "y", seed=2)
    table = compared(tmp_path, "--images-only")
    for metric, sign in (("clip_h14", 1), ("lpips_to_fp", -1)):
        means = [frame[metric].groupby("prompt").mean() for frame in (one, other)]
        expected = scipy.stats.ttest_rel(*means)
        assert table.loc[metric, "better_by_se"] == pytest.approx(sign * expected.statistic, rel=1e-3)
        assert table.loc[metric, "difference"] == pytest.approx((means[0] - means[1]).mean(), rel=1e-3)
        as_if_all_were_prompts = scipy.stats.ttest_rel(one[metric], other[metric]).statistic
        assert abs(as_if_all_were_prompts) > 1.2 * abs(expected.statistic)


def test_runs_of_one_method_are_told_apart_by_the_names_that_were_asked_for(tmp_path):
    for name, seed in (("x", 1), ("y", 2)):
        write_run(tmp_path, name, seed=seed, method="trellis 3 bit")
    sentence = printed(tmp_path, "x", "y", "--images-only").splitlines()[0]
    assert {"x", "y"} <= set(sentence.replace(".", " ").split()) and "trellis" not in sentence


def by_hand(reference, metric, seed, drawn):
    """A set's score from the rows that were drawn, or of all."""
    _, _, real = reference
    if metric == "cmmd_l14_336":
        return float(cmmd(real["cmmd"], rows(seed + 1, shift=0.5)[drawn]))
    against = real["fid_paper"] if metric == "fid_paper" else rows(99)
    return FrechetDistance(Gaussian.of(against))(rows(seed, shift=0.1 * seed)[drawn])


@pytest.mark.parametrize("metric", ["fid_paper", "fid_paper_to_fp", "cmmd_l14_336"])
def test_scores_of_sets_are_compared_on_the_same_draws(tmp_path, reference, metric):
    for name, seed in (("x", 1), ("y", 3)):
        write_run(tmp_path, name, seed=seed, reference=reference[1])
    row = compared(tmp_path, "--reference", str(reference[0]), "--resamples", "30").loc[metric]
    everything = np.arange(N * COPIES)
    first, second = (by_hand(reference, metric, seed, everything) for seed in (1, 3))
    differences = []
    for prompts in Resamples(N, COPIES, count=30).draws().tolist():
        drawn = [COPIES * prompt + copy for prompt in prompts for copy in range(COPIES)]
        differences.append(by_hand(reference, metric, 1, drawn) - by_hand(reference, metric, 3, drawn))
    assert row["first"] == pytest.approx(first, rel=1e-3) and row["second"] == pytest.approx(second, rel=1e-3)
    assert row["paired_se"] == pytest.approx(np.std(differences, ddof=1), rel=1e-3)
    bias = np.mean(differences) - (first - second)
    assert row["bias"] == pytest.approx(bias, rel=2e-3, abs=1e-4 * abs(first))
    low, high = np.quantile(np.array(differences) - bias, [0.025, 0.975])
    assert (row["low95"], row["high95"]) == pytest.approx((low, high), rel=2e-3, abs=1e-4 * abs(first))
    assert row["better_by_se"] == pytest.approx(-(first - second) / np.std(differences, ddof=1), rel=2e-3)


def test_a_run_against_itself_differs_in_nothing(tmp_path, reference):
    write_run(tmp_path, "x", seed=1, reference=reference[1])
    write_run(tmp_path, "y", seed=1, reference=reference[1])
    table = compared(tmp_path, "--reference", str(reference[0]), "--resamples", "5")
    assert len(table) == 5 and (table[["difference", "paired_se", "bias"]] == 0).all(axis=None)


def test_calibration_seeds_are_averaged_draw_by_draw(tmp_path, reference):
    frames = [write_run(tmp_path, name, seed=s, reference=reference[1]) for name, s in (("x", 1), ("x_seed1", 5))]
    write_run(tmp_path, "y", seed=3, reference=reference[1])
    write_run(tmp_path, "xy", seed=7, reference=reference[1])
    write_run(tmp_path, "x_seed2", seed=9, reference=reference[1], model="other")
    table = compared(tmp_path, "--reference", str(reference[0]), "--resamples", "5")
    assert table.loc["clip_h14", "first"] == pytest.approx(np.mean([f["clip_h14"].mean() for f in frames]), rel=1e-3)
    everything = np.arange(N * COPIES)
    mean = np.mean([by_hand(reference, "fid_paper", seed, everything) for seed in (1, 5)])
    assert table.loc["fid_paper", "first"] == pytest.approx(mean, rel=1e-3)


@pytest.mark.parametrize(
    ("protocol", "said"),
    [
        ({"dtype": "float32"}, "dtype"),
        ({"sampler": {"steps": 4}}, "sampler"),
        ({"device": "cpu"}, "device"),
        ({"reference": "s" * 64}, "reference_sha256"),
    ],
)
def test_other_protocols_are_refused_unless_asked_for(tmp_path, protocol, said):
    write_run(tmp_path, "x", seed=1)
    write_run(tmp_path, "y", seed=2, **protocol)
    refused(said, tmp_path, "--images-only")
    assert len(compared(tmp_path, "--images-only", "--mixed")) == 2


@pytest.mark.parametrize("protocol", [{"prompts_sha256": "q"}, {"image_seed": 1}, {"n": 11}])
def test_other_images_are_never_compared(tmp_path, protocol):
    write_run(tmp_path, "x", seed=1)
    write_run(tmp_path, "y", seed=2, **protocol)
    refused("other captions or noise", tmp_path, "--mixed", "--images-only")


def test_the_reference_must_be_the_runs(tmp_path, reference):
    for name, seed in (("x", 1), ("y", 2)):
        write_run(tmp_path, name, seed=seed)
    refused("--reference PATH", tmp_path)
    refused("--reference PATH", tmp_path, "--reference", str(reference[0]))
    refused("no finished run x on sdxl", tmp_path, "--model", "sdxl")
    refused("--resamples", tmp_path, "--resamples", "1")


def test_a_run_that_only_compressed_or_is_not_done_is_not_compared(tmp_path):
    """A newer one of the same name, which has no scores."""
    write_run(tmp_path, "x", seed=1)
    write_run(tmp_path, "y", seed=2)
    record = json.loads((tmp_path / "runs" / "x" / "0.json").read_text())
    half_done = tmp_path / "stages" / "evaluate" / "half_done"
    half_done.mkdir()
    (half_done / "images.csv").write_text("prompt,copy\n")
    for name, directories in (("1", {"quantize": "q"}), ("2", {"evaluate": "stages/evaluate/half_done"})):
        (tmp_path / "runs" / "x" / f"{name}.json").write_text(json.dumps(record | {"directories": directories}))
    assert len(compared(tmp_path, "--images-only")) == 2


def test_a_sentence_comes_first_and_numbers_are_rounded_by_their_errors(tmp_path):
    write_run(tmp_path, "x", seed=1)
    write_run(tmp_path, "y", seed=2)
    exact = compared(tmp_path, "--images-only").loc["lpips_to_fp"]
    sentence, names, _, _, *lines = printed(tmp_path, "x", "y", "--images-only").splitlines()
    told = abs(exact["better_by_se"]) > 1.96
    assert ("is better than" in sentence) == told and "of 1 paired metrics" in sentence.replace(
        "metric of 1", "of 1 paired metrics"
    )
    assert names.startswith("x against y")
    row = next(line.split() for line in lines if line.startswith("lpips_to_fp"))
    assert float(row[3]) == pytest.approx(exact["difference"], abs=0.06 * exact["paired_se"])
    assert len(row[5].lstrip("0.")) == 2, "two digits of the error"


def test_a_job_of_a_sweep_is_compared_by_its_place_or_its_label(tmp_path):
    write_run(tmp_path, "y", seed=2)
    write_run(tmp_path, "swept", seed=1)
    job = tmp_path / "sweeps" / "bits" / "3"
    job.mkdir(parents=True)
    about = {"number": 3, "label": "quantize.bits=3", "error": None, "run": "runs/swept/0.json"}
    (job / "job.json").write_text(json.dumps(about))
    by_place, by_folder = (printed(tmp_path, name, "y", "--images-only") for name in ("bits/3", str(job)))
    assert (
        by_place.splitlines()[2:]
        == by_folder.splitlines()[2:]
        == printed(tmp_path, "swept", "y", "--images-only").splitlines()[2:]
    )
    record = tmp_path / "runs" / "swept" / "0.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"method": "quantize.bits=3"}))
    assert printed(tmp_path, "quantize.bits=3", "y", "--images-only").splitlines()[2:] == by_place.splitlines()[2:]


def test_an_unknown_name_is_answered_with_the_runs_there_are(tmp_path):
    for name, seed in (("x", 1), ("codecs_trellis3", 2), ("codecs_rtn4", 3)):
        write_run(tmp_path, name, seed=seed)
    with pytest.raises(
        SystemExit,
        match=r"no finished run codecs_treliss3 on tiny under .*; there are codecs_trellis3, codecs_rtn4, x$",
    ):
        compare_runs.main(["codecs_treliss3", "x", "--results", str(tmp_path)])


def test_equal_bits_are_read_off_the_trellis_curve():
    bits = np.array([2.0, 3.0, 4.0])
    methods = ["trellis 2 bit", "trellis 3 bit", "trellis 4 bit"]
    curve = {"psnr_to_fp": 10 + 6 * bits, "distance_to_fp": 2**-bits, "fid_to_fp": 4**-bits}
    trellis = pd.DataFrame({"method": methods, "bits_quantized": bits} | curve)
    trellis = pd.concat([trellis, trellis.assign(method=trellis["method"] + " by sensitivity")])
    rival = {
        "method": "GPTQ 4 bit",
        "bits_quantized": 4.1,
        "psnr_to_fp": 25.0,
        "distance_to_fp": 2**-2.5,
        "fid_to_fp": 1.0,
    }
    rows = equal_bits.equal_bits(pd.DataFrame([rival, {"method": "full precision"}]), trellis)
    assert rows["rival"].tolist() == ["GPTQ 4 bit"] * 2
    assert rows["equal psnr_to_fp at"].tolist() == ["2.50"] * 2
    assert rows["equal distance_to_fp at"].tolist() == ["2.50"] * 2
    assert rows["equal fid_to_fp at"].tolist() == ["< 2.00"] * 2


@pytest.mark.parametrize("world", ["tiny", "small"])
def test_evaluators_of_a_shipped_world_need_not_be_named(tmp_path, world):
    cache, directory = tmp_path / "hashes.json", evaluators_directory(world)
    scored = {"clip_score": {"protocol": {"weights_sha256": [files_identity(directory, cache)]}}}
    run = types.SimpleNamespace(record={"experiment": "mine"}, metrics=scored)
    assert compare_runs._evaluators_of(run, None, cache) == directory
    with pytest.raises(UserError, match="mine was scored with other evaluators; give --evaluators DIR"):
        compare_runs._evaluators_of(run, {"tiny": "small", "small": "tiny"}[world], cache)
