"""Folders of results as runs leave them, with numbers that nobody measured."""

import json
from pathlib import Path

PROTOCOL = {
    "n": 5000, "prompts": "coco.csv, captions", "images_per_prompt": 1, "image_seed": 0,
    "sampler": {"scheduler": "ddim", "steps": 50}, "dtype": "float16", "device": "cuda",
}  # fmt: skip


def score(value: float | None, se: float | None = None, **more) -> dict:
    return {"value": value, "se": se, "protocol": {}} | more


def write_run(
    results: Path, name: str, metrics: dict, *, method: str | None = None, model: str = "sdxl", bits: float = 3.0,
    protocol: dict | None = None, not_run: dict | None = None, fingerprint: str = "0" * 8,
) -> dict:  # fmt: skip
    """A run record and its metrics.json."""
    directory = results / "stages" / "evaluate" / f"{name}-{fingerprint}"
    directory.mkdir(parents=True, exist_ok=True)
    content = {"protocol": PROTOCOL if protocol is None else protocol, "metrics": metrics, "not_run": not_run or {}}
    (directory / "metrics.json").write_text(json.dumps(content))
    sizes = {"bits_per_weight": bits + 0.25, "bits_quantized": bits, "bits_as_in_paper": bits + 0.125}
    record = {
        "fingerprint": fingerprint, "experiment": name, "method": method or name, "model": model,
        "stages": [str(directory.relative_to(results))],
        "directories": {"evaluate": str(directory.relative_to(results))},
        "bits": sizes | {"file_bytes": int(bits * 2**20)},
    }  # fmt: skip
    file = results / "runs" / name / f"{fingerprint}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(record))
    return record


def write_made_up(results: Path) -> None:
    """The runs of tests/report/golden/made_up.yaml: all but one row."""
    fid = {
        "protocol": {"resize": {"filter": "lanczos", "size": 256}, "reference_sha256": "ab12", "computed_in": "float32"}
    }
    clip = {"protocol": {"resize": {"filter": "bicubic", "size": 224}, "computed_in": "float32"}}
    hps = {"hpsv2": "needs hpsv2.safetensors at metrics/, or a network"}
    small = {"note": "half of the images were black", "bias": 0.25}
    write_run(
        results, "made_fp", {"pickscore": score(0.2263, 0.0002), "fid_paper": score(18.9, 0.1, bias=0.5, **fid)},
        method="full precision", bits=16.0, not_run=hps,
    )  # fmt: skip
    near = {"pickscore": score(0.224, 0.0002), "fid_paper": score(19.6, 0.1, bias=0.5, **fid)}
    write_run(results, "made_near", near | {"psnr_to_fp": score(20.0, 0.125)}, method="VQ_3 near", not_run=hps)
    for seed, name in enumerate(("made_far", "made_far_seed1")):
        far = {"pickscore": score(0.2 + 0.01 * seed, 0.0002), "fid_paper": score(25.0 + seed, 0.1, **fid, **small)}
        write_run(
            results, name, far | {"psnr_to_fp": score(10.0 + seed, 0.125)}, method="VQ_2 far", bits=2.0, not_run=hps
        )
    other = {"pickscore": score(0.22), "hpsv2": score(0.28, 0.001, **clip), "psnr_to_fp": score(30.0, 0.5)}
    write_run(results, "made_other", other, method="without a published value", bits=4.0)


def write_votes(results: Path, study: str, *rows: tuple[str, str, float, float, float]) -> None:
    """As scripts/score_votes.py does: (left, right, % for the left one, its interval)."""
    folder = results / "votes" / study
    folder.mkdir(parents=True, exist_ok=True)
    names = ("left", "right", "preference_for_left_percent", "low", "high")
    counts = {"n_votes": 512, "n_raters": 3, "n_prompts": 128}
    (folder / "human_preference.json").write_text(
        json.dumps([dict(zip(names, row, strict=True)) | counts for row in rows])
    )
