"""scripts/lab/metric_agreement.py on variants of known order; scripts/bench_evaluation_memory.py on very small runs."""

import json

import bench_evaluation_memory
import metric_agreement
import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file

from vqdm.metrics.extractors import make_extractor
from vqdm.models.shipped import evaluators_directory
from vqdm.runs.identity import files_identity
from vqdm.runs.items import write_item
from vqdm.runs.store import Store
from vqdm.stages.layout import png_bytes
from vqdm.tiny.data import SceneSet

N, BATCH = 24, 10
NOISE = {"v_fine": 10, "v_rough": 60, "v_worse": 120, "v_lost": 400}  # levels of the pixels


@pytest.fixture(scope="module")
def scenes():
    return SceneSet(seed=0, split="test", n=N)


def noisy(scenes, level):
    noise = np.random.default_rng(0).normal(0, level, scenes.pixels.shape)
    return np.clip(scenes.pixels + noise, 0, 255).astype(np.uint8)


def write_features(results, name, fingerprint, columns):
    directory = results / "stages" / "features" / f"{name}-{fingerprint[:8]}"
    (directory / "features").mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps({"config": {"batch_size": BATCH}}))
    for start in range(0, N, BATCH):
        part = {key: column[start : start + BATCH].contiguous() for key, column in columns.items()}
        save_file(part, directory / "features" / f"{start:06d}.safetensors")
    return str(directory.relative_to(results))


def write_variant(results, name, images, scenes, *, captions=None, weights=None):
    """A finished run whose images are `images`, as renders of the scenes would be the full-precision ones."""
    captions = captions or scenes.captions
    tiny, paired = (make_extractor(f, [evaluators_directory(None)], device="cpu") for f in ("tiny", "paired"))
    fingerprints = {
        "features/tiny": f"{name:>8.8}".replace(" ", "0"), "features/paired": f"p{name:>7.7}".replace(" ", "0"),
        "originals/tiny": "originals",
    }  # fmt: skip
    columns = {
        "features/tiny": tiny.columns(list(images), captions), "features/paired": paired.columns(images, scenes.pixels),
        "originals/tiny": tiny.columns(list(scenes.pixels), captions),
    }  # fmt: skip
    stages = [write_features(results, name, fingerprints[key], column) for key, column in columns.items()]
    generate = results / "stages" / "generate" / name
    files = {f"images/{i:06d}.png": png_bytes(Image.fromarray(image)) for i, image in enumerate(images)}
    write_item(generate, "000000", files, {"prompts": [[f"p{i}", text] for i, text in enumerate(captions)]})
    evaluate = results / "stages" / "evaluate" / name
    evaluate.mkdir(parents=True)
    (evaluate / "config.json").write_text(json.dumps({"config": {}, "upstream": fingerprints}))
    weights = weights or files_identity(evaluators_directory(None), results / "hashes.json")
    metrics = {"fid": {"value": 0.0, "protocol": {"weights_sha256": [weights]}}}
    written = {"protocol": {"n": N, "images_per_prompt": 1}, "metrics": metrics, "not_run": {}}
    (evaluate / "metrics.json").write_text(json.dumps(written))
    directories = {
        key: str(place.relative_to(results)) for key, place in (("generate", generate), ("evaluate", evaluate))
    }
    record = {"fingerprint": name.encode().hex(), "method": name, "model": "tiny", "bits": {}, "stages": stages}
    Store(results).record_run(name, record | {"directories": directories})


def printed(results, capsys, *more):
    metric_agreement.main(["--prefix", "v_", "--results", str(results), *more])
    lines = capsys.readouterr().out.splitlines()
    return lines[0], {
        row[1].strip(): [cell.strip() for cell in row[2:-1]] for row in (line.split("|") for line in lines[3:])
    }


def test_metrics_that_order_noise_as_it_is_agree_with_fidelity(tmp_path, capsys, scenes):
    for name, level in NOISE.items():
        write_variant(tmp_path, name, noisy(scenes, level), scenes)
    first, table = printed(tmp_path, capsys, "--n", "12", str(N))
    assert first == "4 compressed variants: " + ", ".join(NOISE)
    for metric in ("fidelity", "psnr_to_fp", "ssim_to_fp", "distance_to_fp"):
        assert table[metric][1] == "1.00", metric
    assert all(float(cells[0].split()[0]) > 0.5 and "±" in cells[0] for cells in table.values()), "two parts of 12"


def test_variants_without_an_order_have_no_correlation(tmp_path, capsys, scenes):
    for name in list(NOISE)[:3]:
        write_variant(tmp_path, name, scenes.pixels, scenes)
    _, table = printed(tmp_path, capsys, "--n", str(N))
    assert {cell for cells in table.values() for cell in cells} == {"–"}


@pytest.mark.parametrize(
    ("last", "said"),
    [
        (None, "2 runs v_* on tiny with 24 images"),
        ({"weights": "w" * 64}, "v_c was scored with other evaluators"),
        ({"captions": ["a red ring"] * N}, "v_c has images of other captions than v_a"),
    ],
)
def test_what_cannot_be_compared_is_refused(last, said, tmp_path, capsys, scenes):
    for name in ("v_a", "v_b"):
        write_variant(tmp_path, name, scenes.pixels, scenes)
    if last is not None:
        write_variant(tmp_path, "v_c", scenes.pixels, scenes, **last)
    with pytest.raises(SystemExit) as error:
        printed(tmp_path, capsys, "--n", str(N))
    assert str(error.value).startswith("error: ") and said in str(error.value)


@pytest.mark.slow
def test_peaks_of_memory_are_those_of_whole_processes(capsys):
    arguments = ["+experiment=tiny_fp", "model.sampler.steps=1", "evaluate.bootstrap=2", "evaluate.batch_size=2"]
    bench_evaluation_memory.main(["--n", "2,3", *arguments])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["n = 2", "n = 3"]
    peaks = [float(line.split()[4]) for line in lines]
    assert all(200 < peak < 4000 for peak in peaks) and abs(peaks[1] / peaks[0] - 1) < 0.2, "MiB of torch and diffusers"


def test_a_run_that_fails_has_no_peak():
    with pytest.raises(SystemExit, match="the run failed"):
        bench_evaluation_memory.main(["--n", "2", "+experiment=nonsense"])
