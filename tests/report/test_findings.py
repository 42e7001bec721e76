"""What is said of paired differences is what a paired test over prompts finds."""

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from made_up_runs import PROTOCOL, score, write_run

from vqdm.report.paired import compare_images, findings, image_scores, paired_first, verdict_sentence

PROMPTS, COPIES = 40, 2
IMAGES = PROTOCOL | {"n": PROMPTS, "images_per_prompt": COPIES, "prompts_sha256": "ab"}


def write_scored(results, name, *, psnr, bits, seed, **options):
    """A run whose images' PSNR scatter around `psnr`, 1 dB from image to image and 4 dB from prompt to prompt."""
    protocol = IMAGES | options.pop("protocol", {})
    record = write_run(results, name, {"psnr_to_fp": score(psnr)}, bits=bits, protocol=protocol, **options)
    prompts = np.random.default_rng(0).normal(0, 4, (PROMPTS, 1))
    values = psnr + prompts + np.random.default_rng(seed).normal(0, 1, (PROMPTS, COPIES))
    index = pd.MultiIndex.from_product([range(PROMPTS), range(COPIES)], names=["prompt", "copy"])
    frame = pd.DataFrame({"clip_score": 0.5, "psnr_to_fp": values.flatten()}, index=index)
    frame.to_csv(results / record["directories"]["evaluate"] / "images.csv")
    return record, frame


def test_a_method_is_better_where_a_paired_t_test_says_so(tmp_path):
    """In differences from none to many standard errors; both orders say the same."""
    said = set()
    for step, shift in enumerate(np.linspace(-0.8, 0.8, 17)):
        (_, one), (_, other) = (
            write_scored(tmp_path, name, psnr=psnr, bits=3, seed=2 * step + i)
            for i, (name, psnr) in enumerate((("a", 25 + shift), ("b", 25.0)))
        )
        means = [frame["psnr_to_fp"].groupby("prompt").mean() for frame in (one, other)]
        t = scipy.stats.ttest_rel(*means).statistic
        sentences = [
            verdict_sentence("a", "b", compare_images(one, other)),
            verdict_sentence("b", "a", compare_images(other, one)),
        ]
        if abs(t) > 1.96:
            names = "a is better than b" if t > 0 else "b is better than a"
            assert sentences == [f"{names} in 1 of 1 paired metrics."] * 2
        else:
            assert sentences[0] == "No paired metric of 1 tells a from b."
        said.add(sentences[0])
    assert len(said) == 3, "the differences reach from one side over none to the other"


def test_metrics_that_are_not_paired_do_not_vote():
    index = pd.MultiIndex.from_product([range(9), [0]], names=["prompt", "copy"])
    noise = np.random.default_rng(0).normal(0, 0.1, (2, 9))
    one, other = (
        pd.DataFrame({"clip_score": level + part}, index=index) for level, part in zip((0, 9), noise, strict=True)
    )
    assert verdict_sentence("a", "b", compare_images(one, other)) == "a and b have no paired metric in common."


def test_lower_distances_are_better():
    index = pd.MultiIndex.from_product([range(9), [0]], names=["prompt", "copy"])
    noise = np.random.default_rng(0).normal(0, 0.1, (2, 9))
    columns = ("lpips_to_fp", "distance_to_fp", "ssim_to_fp")
    frames = [pd.DataFrame({c: i + noise[i] for c in columns}, index=index) for i in range(2)]
    assert (
        verdict_sentence("a", "b", compare_images(*frames))
        == "a is better than b in 2 of 3 paired metrics, worse in 1."
    )


def test_calibration_seeds_are_averaged_image_by_image(tmp_path):
    runs = [write_scored(tmp_path, name, psnr=25, bits=3, seed=i) for i, name in enumerate("ab")]
    files = [tmp_path / record["directories"]["evaluate"] / "images.csv" for record, _ in runs]
    expected = (runs[0][1]["psnr_to_fp"] + runs[1][1]["psnr_to_fp"]) / 2
    assert image_scores(files)["psnr_to_fp"].to_numpy() == pytest.approx(expected.to_numpy())


def test_findings_say_what_came_closest_and_what_won_against_more_bits(tmp_path):
    table = {"fp": (50, 16), "scalar 4": (30, 4), "codes 3": (33, 3), "scalar 3": (26, 3.5), "codes 2": (26.02, 2)}
    rows = [
        [write_scored(tmp_path, name.replace(" ", "_"), psnr=psnr, bits=bits, seed=i, method=name)[0]]
        for i, (name, (psnr, bits)) in enumerate(table.items())
    ]
    (tmp_path / rows[0][0]["directories"]["evaluate"] / "images.csv").unlink()
    mean = pd.read_csv(tmp_path / rows[2][0]["directories"]["evaluate"] / "images.csv")["psnr_to_fp"].mean()
    won = "better than {}scalar 4 (4.25 bits){} in 1 of 1 paired metrics"
    assert findings([*rows, []], tmp_path) == [
        f"codes 3 (3.25 bits) comes closest to full precision, PSNR {mean:.2f} dB: {won.format('the next, ', ',')}.",
        f"codes 3 (3.25 bits) is {won.format('', '')}, and than one other of more bits.",
    ]


def test_the_smallest_of_those_that_win_is_named(tmp_path):
    table = {"scalar": (20, 4), "large codes": (40, 3.5), "small codes": (30, 2)}
    rows = [
        [write_scored(tmp_path, name.replace(" ", "_"), psnr=psnr, bits=bits, seed=i, method=name)[0]]
        for i, (name, (psnr, bits)) in enumerate(table.items())
    ]
    assert findings(rows, tmp_path)[1:] == [
        "small codes (2.25 bits) is better than scalar (4.25 bits) in 1 of 1 paired metrics."
    ]


def test_rows_of_other_protocols_are_not_compared(tmp_path):
    steps = [({"sampler": {"steps": 4}}, 30), ({"sampler": {"steps": 1}}, 40)]
    rows = [
        [write_scored(tmp_path, f"r{i}{j}", psnr=psnr - 5 * j, bits=4 - j, seed=i, protocol=protocol)[0]]
        for j in range(2)
        for i, (protocol, psnr) in enumerate(steps)
    ]
    said = findings(rows, tmp_path)
    assert [sentence.partition(" comes closest")[0] for sentence in said] == ["r00 (4.25 bits)", "r10 (4.25 bits)"]
    assert findings(rows[:2], tmp_path) == []


def test_paired_metrics_come_first_and_else_the_order_stays():
    listed = ["fid", "psnr_to_fp", "clip_score", "agreement_with_fp", "fid_to_fp"]
    assert paired_first(listed) == ["psnr_to_fp", "agreement_with_fp", "fid_to_fp", "fid", "clip_score"]
