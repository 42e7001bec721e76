"""Tables of any runs, and what runs and tables end with on the terminal."""

import json

import pandas as pd
import pytest
from made_up_runs import PROTOCOL, score, write_run

from vqdm.errors import UserError
from vqdm.report.any_runs import find_records, report_runs, report_sweep, told_apart
from vqdm.report.formats import TableContent
from vqdm.report.terminal import run_summary, table_summary

PAIRED = {"fid": score(2.0, 0.1), "psnr_to_fp": score(30.0, 0.5)}


def experiments(records) -> list[str]:
    return sorted(record["experiment"] for record in records)


@pytest.fixture
def results(tmp_path):
    """Three runs, and a sweep of which two jobs are done."""
    for name in ("tiny_rtn4", "tiny_rtn3", "tiny_vq3"):
        write_run(tmp_path, name, PAIRED, method=name.removeprefix("tiny_"), model="tiny", fingerprint=name[-4:] * 2)
    sweep = tmp_path / "sweeps" / "bits"
    (sweep).mkdir(parents=True)
    (sweep / "sweep.json").write_text(json.dumps({"overrides": ["quantize.bits=2,3,4"], "swept": ["quantize.bits"]}))
    for number in range(3):
        write_run(tmp_path, "swept", PAIRED, model="tiny", fingerprint=str(number) * 8, bits=2.0 + number)
        run = f"runs/swept/{str(number) * 8}.json" if number < 2 else None
        about = {
            "number": number,
            "label": f"quantize.bits={2 + number}",
            "error": None if run else "killed",
            "run": run,
        }
        (sweep / str(number)).mkdir()
        (sweep / str(number) / "job.json").write_text(json.dumps(about))
    return tmp_path


def test_runs_are_found_by_name_glob_record_job_and_sweep(results):
    assert experiments(find_records(results, "tiny_rtn4")) == ["tiny_rtn4"]
    assert experiments(find_records(results, "tiny_rtn*")) == ["tiny_rtn3", "tiny_rtn4"]
    assert experiments(find_records(results, f"{results}/runs/tiny_vq3/_vq3_vq3.json")) == ["tiny_vq3"]
    assert find_records(results, "swept/11111111")[0]["bits"]["bits_quantized"] == 3
    for text in ("bits", str(results / "sweeps" / "bits")):
        assert [record["method"] for record in find_records(results, text)] == ["quantize.bits=2", "quantize.bits=3"]
    assert find_records(results, "bits/1")[0]["method"] == "quantize.bits=3"
    with pytest.raises(UserError, match=r"no finished run tiny_rtn5 under .*; there are tiny_rtn[34], tiny_rtn[34]"):
        find_records(results, "tiny_rtn5")
    with pytest.raises(UserError, match=r"no finished run tiny_rtn4 on sdxl under .*: there is none at all"):
        find_records(results, "tiny_rtn4", model="sdxl")


def test_any_runs_make_a_table_and_a_page(results):
    said = report_runs(
        find_records(results, "tiny_*"), name="mine", title="Mine", command="python scripts/report.py 'tiny_*'",
        results=results,
    )  # fmt: skip
    frame = pd.read_csv(results / "tables" / "mine.csv")
    assert set(frame["method"]) == {"rtn4", "rtn3", "vq3"} and list(frame["psnr_to_fp"]) == [30.0] * 3
    assert "To make it: `python scripts/report.py 'tiny_*'`." in (results / "tables" / "mine.md").read_text()
    assert said.splitlines()[-2:] == [f"protocol: {results}/tables/mine.md", f"open {results}/reports/mine.html"]
    assert "rtn4" in (results / "reports" / "mine.html").read_text()


def test_a_sweep_ends_with_a_table_of_the_jobs_that_are_done(results):
    said = report_sweep(results / "sweeps" / "bits", results)
    assert list(pd.read_csv(results / "tables" / "bits.csv")["method"]) == ["quantize.bits=2", "quantize.bits=3"]
    assert said.startswith("Sweep over quantize.bits\n") and said.endswith(f"open {results}/reports/bits.html")
    for job in (results / "sweeps" / "bits").glob("*/job.json"):
        job.write_text(json.dumps(json.loads(job.read_text()) | {"run": None}))
    assert report_sweep(results / "sweeps" / "bits", results) is None


def test_other_protocols_are_mixed_only_where_that_is_asked_for(results):
    write_run(results, "tiny_few", PAIRED, model="tiny", protocol=PROTOCOL | {"n": 7}, fingerprint="7" * 8)
    options = {"name": "mine", "title": "Mine", "command": "x", "results": results}
    with pytest.raises(UserError, match=r"different protocols: n is (5000|7) and"):
        report_runs(find_records(results, "tiny_*"), **options)
    report_runs(find_records(results, "tiny_*"), **options, mixed=True)


def test_rows_of_one_name_are_told_apart():
    runs = [
        {"method": "RTN", "model": "tiny", "experiment": "a", "fingerprint": "1" * 64},
        {"method": "RTN", "model": "other", "experiment": "a", "fingerprint": "2" * 64},
        {"method": "RTN", "model": "other", "experiment": "b", "fingerprint": "3" * 64},
        {"method": "VQ", "model": "tiny", "experiment": "c", "fingerprint": "4" * 64},
    ]
    found = told_apart([*runs, runs[0] | {"method": "quantize=rtn"}])  # a sweep's job that is the same run
    assert [run["method"] for run in found] == ["RTN, tiny", "RTN, other, a", "RTN, other, b", "VQ"]
    assert len({run["experiment"] for run in found}) == 4, "their figures have names of their own"


def content(columns: dict) -> TableContent:
    data = pd.DataFrame({"bits_per_weight": [float(bits) for bits in columns["bits_per_weight"]]})
    return TableContent("demo", "Demo", data, pd.DataFrame(columns), [], [])


def test_the_terminals_table_fits_and_begins_with_what_can_be_trusted(tmp_path):
    cells = {
        "method": ["full precision", "RTN 4 bit"], "bits_per_weight": ["16.000", "4.773"],
        "bits_quantized": ["16.000", "4.139"], "mib": ["6.88", "2.12"],
    }  # fmt: skip
    others = (
        "fid",
        "kid",
        "clip_score",
        "distance_to_fp",
        "fid_to_fp",
        "agreement_with_fp",
        "ssim_to_fp",
        "psnr_to_fp",
    )
    cells |= {name: ["–", "29.95 ± 0.28"] for name in others}
    lines = table_summary(content(cells), file=tmp_path / "demo.md").splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[2].split() == ["method", "bits", "MiB", "PSNR", "SSIM", "distance", "FID", "to", "fp", "agreement"]
    assert lines[-2].split()[:7] == ["RTN", "4", "bit", "4.77", "2.12", "29.95", "±0.28"]
    assert lines[-1] == f"3 more columns: {tmp_path}/demo.md"


def test_a_name_of_any_length_fits(tmp_path):
    cells = {"method": ["m" * 300], "bits_per_weight": ["3.000"], "psnr_to_fp": ["30.00 ± 0.10"]}
    assert max(map(len, table_summary(content(cells), file=tmp_path).splitlines()[:-1])) <= 100


def test_a_run_ends_with_its_scores_and_the_difference_to_full_precision(tmp_path):
    """The difference of means over images, whose error is that of the pairs."""
    protocol = PROTOCOL | {"n": 4, "prompts_sha256": "a"}
    of_images = {"fp": [0.9, 0.8, 0.7, 0.6], "rtn": [0.8, 0.7, 0.5, 0.6]}
    records = {}
    for name, values in of_images.items():
        metrics = {"clip_score": score(sum(values) / 4, 0.05), "fidelity_size": score(1.0, 0.0)}
        metrics |= {"psnr_to_fp": score(30.0, 0.5)} if name == "rtn" else {}
        records[name] = write_run(tmp_path, name, metrics, protocol=protocol, fingerprint=name[0] * 8)
        frame = pd.DataFrame({"prompt": range(4), "copy": 0, "clip_score": values})
        frame.to_csv(tmp_path / records[name]["directories"]["evaluate"] / "images.csv", index=False)
    records["rtn"]["directories"]["quantize"] = "stages/quantize/x"
    (tmp_path / "runs" / "rtn" / "rrrrrrrr.json").write_text(json.dumps(records["rtn"]))
    lines = run_summary(records["rtn"], tmp_path).splitlines()
    assert lines[0] == "rtn on sdxl: 3.25 bits, 3.00 MiB, 4 captions; ± one standard error"
    assert [line.split()[0] for line in lines[4:-1]] == ["PSNR", "clip"], "paired first, single attributes left out"
    difference = pd.Series(of_images["rtn"]) - pd.Series(of_images["fp"])
    assert lines[5].split()[-3:] == [f"{difference.mean():+.3f}", "±", f"{difference.sem():.3f}"]
    assert lines[-1].startswith("protocol: ") and lines[-1].endswith("metrics.json")
    assert "difference" not in run_summary(records["fp"], tmp_path)
