"""Marks of a table: what stands first, the best of each column, and the front, against a search through all pairs."""

import numpy as np
import pandas as pd
import pytest

from vqdm.report.marks import front_of, marks_of
from vqdm.report.plot import plot_data

NAN = float("nan")


def frame(rows, **more):
    columns = ["method", "bits_per_weight", "mib", "fid", "fid_se", "psnr_to_fp", "psnr_to_fp_se"]
    return pd.DataFrame(rows, columns=columns).assign(**more)


FRAME = frame(
    [
        ("full precision", 16.0, 6.9, 0.5, 0.1, NAN, NAN),
        ("a", 4.0, 2.0, 1.0, 0.1, 30.0, 0.5),
        ("b", 4.0, 2.0, 2.0, 0.1, 30.0, 0.5),
        ("c", 3.0, 1.5, 3.0, 0.1, 31.0, 0.5),
        ("not run", NAN, NAN, NAN, NAN, NAN, NAN),
    ]
)


def test_full_precision_and_rows_not_run_win_nothing_and_equals_are_both_best():
    columns = ["method", "bits_per_weight", "mib", "fid", "psnr_to_fp"]
    marks = marks_of(FRAME.drop(index=3), columns)
    assert marks.best == {(1, 1), (2, 1), (1, 2), (2, 2), (1, 3), (1, 4), (2, 4)}
    assert marks.front == {1, 2} and marks.front_by == "PSNR to full precision"


def test_the_front_is_that_of_a_search_through_all_pairs():
    draw = np.random.default_rng(0)
    bits = draw.integers(20, 60, 40) / 10
    psnr = (25 + bits + draw.normal(0, 1, 40)).round(1)
    rows = [
        {"method": "m", "bits_per_weight": b, "psnr_to_fp": p, "lpips_to_fp": -p}
        for b, p in zip(bits, psnr, strict=True)
    ]
    expected = set()
    for i in range(40):
        no_worse = (bits <= bits[i]) & (psnr >= psnr[i])
        if not (no_worse & ((bits < bits[i]) | (psnr > psnr[i]))).any():
            expected.add(i)
    assert front_of(rows, "psnr_to_fp") == expected == front_of(rows, "lpips_to_fp")
    assert 2 < len(expected) < 20


def test_metrics_with_published_values_are_not_folded_and_without_paired_ones_nothing_is():
    columns = ["method", "bits_per_weight", "bits published", "mib", "fid", "fid published", "Δ fid", "psnr_to_fp"]
    marks = marks_of(FRAME.assign(clip=1.0, clip_se=0.1), [*columns, "clip"])
    named = [[*columns, "clip"][i] for i in marks.first]
    assert named == [
        "method", "bits_per_weight", "bits published", "psnr_to_fp", "fid", "fid published", "Δ fid", "mib",
    ]  # fmt: skip
    assert marks.folded == (8,)
    unpaired = marks_of(FRAME.drop(columns=["psnr_to_fp", "psnr_to_fp_se"]), ["method", "bits_per_weight", "fid"])
    assert unpaired.first == (0, 1, 2) and not unpaired.folded and not unpaired.front


def test_a_table_of_votes_has_no_marks_and_no_plot():
    votes = pd.DataFrame({"left": ["a"], "right": ["b"], "wins": [0.5], "wins_se": [0.1]})
    marks = marks_of(votes, ["left", "right", "wins"])
    assert marks.first == (0, 1, 2) and not marks.best
    assert plot_data(votes, [None]) is None


def test_the_plot_has_paired_metrics_first_and_published_values_at_their_own_bits():
    data = FRAME.assign(bits_published=[16, 4.15, NAN, NAN, 3.15], fid_published=[0.4, 1.5, NAN, NAN, 2.5])
    found = plot_data(data, [0, 1, None, 2, None])
    assert [metric["label"] for metric in found["metrics"]] == ["PSNR to full precision, dB ↑", "FID ↓"]
    assert [row["compressed"] for row in found["rows"]] == [False, True, True, True, True]
    assert found["rows"][1]["values"] == [[30.0, 0.5], [1.0, 0.1]]
    assert found["rows"][4]["publishedSizes"][0] == 3.15 and found["rows"][4]["published"] == [None, 2.5]
    assert [row["column"] for row in found["rows"]] == [0, 1, None, 2, None]


@pytest.mark.parametrize("column", ["psnr_to_fp", "fid"])
def test_a_metric_that_no_row_has_is_not_plotted(column):
    found = plot_data(FRAME.assign(**{column: NAN}), [None] * 5)
    assert len(found["metrics"]) == 1 and column.partition("_")[0].upper() not in found["metrics"][0]["label"]
