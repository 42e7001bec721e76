"""The whole way, as a user goes it: run.py on the shipped tiny model."""

import csv
import json
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file
from tiny_world import FEW, ROOT, SMALL, command, environment, run, run_process

WEIGHTS = "denoiser/diffusion_pytorch_model.safetensors"  # in the directory of a quantize stage
SHARED = ROOT.parent / "shared" / "data"


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Path:
    """The results of one small demo."""
    results = tmp_path_factory.mktemp("demo")
    done = run("+experiment=demo", *FEW, f"results_dir={results}")
    assert done.returncode == 0, done.stderr
    return results


@pytest.fixture(scope="session")
def whole(tmp_path_factory) -> Path:
    """The results of the demo on every layer."""
    results = tmp_path_factory.mktemp("whole")
    done = run("+experiment=demo", *SMALL, f"results_dir={results}")
    assert done.returncode == 0, done.stderr
    return results


def _table(results: Path) -> list[dict]:
    with (results / "tables" / "demo.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("made", ["finished", pytest.param("whole", marks=pytest.mark.slow)])
def test_the_demo_writes_its_table(made, request):
    finished = request.getfixturevalue(made)
    rows = _table(finished)
    assert [row["method"] for row in rows] == [
        "full precision",
        *("RTN 4 bit", "GPTQ 4 bit", "VQ 3 bit", "trellis 3 bit", "trellis 2 bit"),
    ]
    wanted = ["bits_per_weight", "bits_quantized", "mib", "fid", "kid", "clip_score", "fidelity", "psnr_to_fp"]
    assert set(wanted) <= set(rows[0])
    assert {f"{name}_se" for name in wanted[3:]} <= set(rows[0])
    assert all(float(row["psnr_to_fp"]) > 15 for row in rows[1:]), "every method resembles the original"
    assert float(rows[4]["bits_quantized"]) <= 3 and float(rows[5]["bits_quantized"]) <= 2
    assert rows[0]["psnr_to_fp"] == ""
    assert all(0 <= float(row["fidelity"]) <= 1 for row in rows)
    assert (finished / "tables" / "demo.md").is_file()
    assert (finished / "figures" / "demo.png").is_file() and (finished / "figures" / "demo-pareto-fid.svg").is_file()
    assert "trellis 3 bit" in (finished / "reports" / "demo.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("made", ["finished", pytest.param("whole", marks=pytest.mark.slow)])
def test_bits_are_those_of_the_file_on_disk(made, request):
    finished = request.getfixturevalue(made)
    for row in _table(finished)[1:]:
        runs = [json.loads(path.read_text()) for path in (finished / "runs").rglob("*.json")]
        record = next(r for r in runs if r["method"] == row["method"])
        file = finished / record["directories"]["quantize"] / WEIGHTS
        assert float(row["mib"]) == pytest.approx(file.stat().st_size / 2**20, rel=1e-5)
        header = int.from_bytes(file.read_bytes()[:8], "little") + 8
        assert record["bits"]["bytes"] == file.stat().st_size - header


def test_a_second_run_makes_nothing_again(finished):
    before = {p: p.stat().st_mtime_ns for p in (finished / "stages").rglob("*") if p.is_file() and p.name != ".lock"}
    table = (finished / "tables" / "demo.csv").read_bytes()
    done = run("+experiment=demo", *FEW, f"results_dir={finished}")
    assert done.returncode == 0, done.stderr
    after = {p: p.stat().st_mtime_ns for p in (finished / "stages").rglob("*") if p.is_file() and p.name != ".lock"}
    assert after == before
    assert (finished / "tables" / "demo.csv").read_bytes() == table


def _data(content: bytes) -> bytes:
    """A safetensors file without its header, where diffusers' metadata keys come in any order; a picture as it is."""
    return content if content.startswith(b"\x89PNG") else content[8 + int.from_bytes(content[:8], "little") :]


def test_a_flipped_byte_is_redone_and_said(finished, tmp_path):
    table = (finished / "tables" / "demo.csv").read_bytes()
    patterns = (f"stages/quantize/tiny-rtn4-*/{WEIGHTS}", "stages/generate/tiny-gptq4-*/images/000005.png")
    files = [next(finished.glob(pattern)) for pattern in patterns]
    good = [file.read_bytes() for file in files]
    for file, content in zip(files, good, strict=True):
        middle = len(content) // 2
        file.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    done = run("+experiment=demo", *FEW, f"results_dir={finished}")
    assert done.returncode == 0, done.stderr
    for file, content in zip(files, good, strict=True):
        assert file.parent.parent.name in done.stderr or file.parent.name in done.stderr
        assert _data(file.read_bytes()) == _data(content)
    assert (finished / "tables" / "demo.csv").read_bytes() == table


@pytest.mark.slow
def test_killed_twice_the_table_is_the_same(whole, tmp_path):
    pause = random.Random(0)
    for _ in range(2):
        process = subprocess.Popen(
            command("+experiment=demo", *SMALL, f"results_dir={tmp_path}"), cwd=ROOT, env=environment(),
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        time.sleep(pause.uniform(4, 12))
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = run("+experiment=demo", *SMALL, f"results_dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "tables" / "demo.csv").read_bytes() == (whole / "tables" / "demo.csv").read_bytes()


def test_more_images_keep_those_that_are_there(finished):
    images = next((finished / "stages" / "generate").glob("tiny-fp-*/images"))
    before = {p.name: p.stat().st_mtime_ns for p in images.iterdir()}
    small = [o for o in SMALL if not o.startswith("evaluate.prompts.n")]
    done = run("+experiment=tiny_fp", *small, "evaluate.prompts.n=20", f"results_dir={finished}")
    assert done.returncode == 0, done.stderr
    after = {p.name: p.stat().st_mtime_ns for p in images.iterdir()}
    assert len(after) == 20
    assert {name: after[name] for name in before} == before


def test_plan_lists_what_is_done(finished):
    done = run("+experiment=tiny_rtn4", *FEW, f"results_dir={finished}", "plan=true")
    lines = [line for line in done.stdout.splitlines() if "/stages/" in line]
    names = ["calibrate", "quantize", "generate", "generate", "features", "features", "features", "evaluate"]
    assert [line.split()[0] for line in lines] == names
    assert all(line.split()[1] == "done" for line in lines)
    done = run("+experiment=tiny_rtn4", *FEW, f"results_dir={finished}", "quantize.bits=2", "plan=true")
    states = {line.split()[0]: line.split()[1] for line in done.stdout.splitlines() if "/tiny-rtn2-" in line}
    assert states == {"quantize": "to", "generate": "to", "features": "to", "evaluate": "to"}


@pytest.mark.slow
def test_another_model_writes_another_table(whole):
    done = run("+experiment=demo", *SMALL, "model=tiny_outlier", "model.sampler.steps=2", f"results_dir={whole}")
    assert done.returncode == 0, done.stderr
    assert (whole / "tables" / "demo-tiny_outlier.csv").is_file()


@pytest.mark.slow
def test_the_turbo_experiment_runs(tmp_path):
    done = run("+experiment=tiny_turbo_vq3", *SMALL, f"results_dir={tmp_path}")
    assert done.returncode == 0, done.stderr


def test_tiny_train_runs_in_seconds(tmp_path):
    done = run("+experiment=tiny_train", "tiny_train=smoke", "threads=1", f"results_dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    directory = next((tmp_path / "stages" / "tiny_train").iterdir())
    world = (f"model.path={directory}/tiny", f"evaluate.evaluators={directory}/tiny_evaluators", "model.builtin=null")
    done = run("+experiment=tiny_rtn3", *FEW, *world, f"results_dir={tmp_path}")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_world_small_is_trained_looked_at_and_scored(tmp_path):
    done = run("+experiment=tiny_train", "tiny_train=small_smoke", "threads=1", f"results_dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    directory = next((tmp_path / "stages" / "tiny_train").glob("small-*"))
    (point,) = map(json.loads, (directory / "training" / "growth.jsonl").read_text().splitlines())
    assert point["step"] == 2 and 0 <= point["fidelity"] <= 1
    assert (directory / "training" / "unet.jsonl").is_file() and not (directory / "training" / "checkpoints").exists()
    assert Image.open(directory / "training" / "growth.png").size == (128, 64)
    for model in ("small", "training/snapshot"):
        path = ("model=small", "model.builtin=null", f"model.path={directory}/{model}", "model.sampler.steps=2")
        world = (*path, f"evaluate.evaluators={directory}/small_evaluators")
        done = run("+experiment=tiny_rtn3", *FEW, *world, f"results_dir={tmp_path}")
        assert done.returncode == 0, done.stderr
    scores = json.loads(next((tmp_path / "stages" / "evaluate").glob("*/metrics.json")).read_text())["metrics"]
    assert {"fidelity_texture", "psnr_to_fp"} <= set(scores)


@pytest.mark.slow
def test_training_goes_on_from_a_pipeline(tmp_path):
    start = ROOT / "vqdm" / "models" / "tiny"
    smoke = ("tiny_train=smoke", f"tiny_train.init_from={start}", "threads=1")
    done = run("+experiment=tiny_train", *smoke, f"results_dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    trained = next((tmp_path / "stages" / "tiny_train").iterdir()) / "tiny"
    same = {part: (trained / part / "model.safetensors").read_bytes() for part in ("text_encoder", "text_encoder_2")}
    assert same == {part: (start / part / "model.safetensors").read_bytes() for part in same}
    file = "unet/diffusion_pytorch_model.safetensors"
    old, new = load_file(start / file), load_file(trained / file)
    moved = sum(float((new[name].float() - old[name].float()).square().sum()) for name in old)
    assert 0 < moved < 0.01 * sum(float(tensor.float().square().sum()) for tensor in old.values())


@pytest.mark.slow
def test_a_unet_that_was_begun_is_trained_on(tmp_path):
    parts = tmp_path / "parts"
    for name, own in {"unet_begun": "unet", "vae": "vae"}.items():
        shutil.copytree(ROOT / "vqdm" / "models" / "tiny" / own, parts / name)
    smoke = ("tiny_train=smoke", f"tiny_train.parts={parts}", "threads=1")
    done = run("+experiment=tiny_train", *smoke, f"results_dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    (stage,) = (tmp_path / "stages" / "tiny_train").iterdir()
    file = "diffusion_pytorch_model.safetensors"
    old, new = load_file(parts / "unet_begun" / file), load_file(stage / "tiny" / "unet" / file)
    moved = sum(float((new[name].float() - old[name].float()).square().sum()) for name in old)
    assert 0 < moved < 0.01 * sum(float(tensor.float().square().sum()) for tensor in old.values())


@pytest.mark.slow
def test_training_takes_finished_parts_and_ends_with_the_same_model(tmp_path):
    smoke = ("+experiment=tiny_train", "tiny_train=smoke", "threads=1")
    assert run(*smoke, f"results_dir={tmp_path / 'one'}").returncode == 0
    (one,) = (tmp_path / "one" / "stages" / "tiny_train").iterdir()
    parts = tmp_path / "parts"
    for name in ("vae", "tokenizer", "text_encoder", "text_encoder_2"):
        shutil.copytree(one / "training" / name, parts / name)
    shutil.copytree(one / "tiny_evaluators", parts / "tiny_evaluators")
    done = run(*smoke, f"tiny_train.parts={parts}", f"results_dir={tmp_path / 'two'}")
    assert done.returncode == 0, done.stderr
    assert "vae: " not in done.stderr and "attribute_net: " not in done.stderr
    (two,) = (tmp_path / "two" / "stages" / "tiny_train").iterdir()
    files = sorted(path.relative_to(one) for path in (one / "tiny").rglob("*.safetensors"))
    assert len(files) == 4 and all((one / file).read_bytes() == (two / file).read_bytes() for file in files)


@pytest.mark.slow
def test_the_few_step_student_alone_is_trained_beside_a_finished_model(tmp_path):
    shutil.copytree(ROOT / "vqdm" / "models" / "tiny", tmp_path / "parts" / "tiny")
    shutil.copytree(ROOT / "vqdm" / "models" / "tiny_evaluators", tmp_path / "parts" / "tiny_evaluators")
    smoke = ("tiny_train=smoke", f"tiny_train.parts={tmp_path / 'parts'}", "threads=1")
    done = run("+experiment=tiny_train", *smoke, f"results_dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    (stage,) = (tmp_path / "stages" / "tiny_train").iterdir()
    assert {path.name for path in (stage / "training").glob("*.jsonl")} == {"turbo.jsonl"}
    weights = "unet/diffusion_pytorch_model.safetensors"
    start = (tmp_path / "parts" / "tiny" / weights).read_bytes()
    assert (stage / "tiny" / weights).read_bytes() == start != (stage / "tiny_turbo" / weights).read_bytes()


@pytest.mark.parametrize("name", ["coco/captions_val2017.json", "prompts/PartiPrompts.tsv"])
def test_real_captions_calibrate(tmp_path, name):
    if not (SHARED / name).is_file():
        pytest.skip(f"{SHARED / name} is not here")
    quick = ("evaluate.prompts.n=4", "evaluate.metrics=[paired]")
    done = run("+experiment=tiny_rtn4", *FEW, *quick, f"calibration.path={SHARED / name}", f"results_dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    (stage,) = (tmp_path / "stages" / "calibrate").iterdir()
    assert len((stage / "prompts.jsonl").read_text().splitlines()) == 4
    tokens = json.loads((stage / "manifest.json").read_text())["summary"]["tokens"]
    cut = bool(tokens["unknown"] or tokens["truncated_prompts"])
    assert cut == name.startswith("coco")  # the first prompts of PartiPrompts are single words
    assert ("unknown" in done.stderr and "truncated" in done.stderr) == cut  # said where there is something to say


def test_any_captions_can_be_compared_with_full_precision(tmp_path):
    own = ("evaluate.prompts.source=builtin", "evaluate.metrics=[paired]", f"results_dir={tmp_path}")
    done = run("+experiment=tiny_rtn4", *FEW, *own)
    assert done.returncode == 0, done.stderr
    metrics = json.loads(next((tmp_path / "stages" / "evaluate").glob("*/metrics.json")).read_text())["metrics"]
    assert set(metrics) == {"psnr_to_fp", "ssim_to_fp"}
    done = run("+experiment=tiny_rtn4", *FEW, own[0], own[2])
    assert done.returncode != 0
    assert "evaluate.metrics=[paired]" in done.stderr


def _tiny_without_unet(tmp_path: Path) -> str:
    directory = tmp_path / "broken"
    directory.mkdir()
    (directory / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline", "unet": ["a", "b"]}')
    return str(directory)


def _file(tmp_path: Path, name: str, content: str) -> str:
    path = tmp_path / name
    path.write_text(content)
    return str(path)


BAD = {
    "unknown option": (lambda t: ["quantize.bitz=3"], "bitz"),
    "unknown experiment": (lambda t: ["+experiment=tiny_vq33"], "tiny_vq33"),
    "unknown table": (lambda t: ["table=nonsense"], "nonsense"),
    "no bits": (lambda t: ["quantize=rtn", "quantize.bits=0"], "quantize.bits=0"),
    "a name for a list": (lambda t: ["+experiment=tiny_fp", "evaluate.metrics=paired"], "str is not a ListConfig"),
    "not a number": (lambda t: ["quantize=rtn", "quantize.bits=three"], "three"),
    "group size does not divide": (
        lambda t: ["quantize=rtn4", "quantize.group_size=24", "evaluate.prompts.n=4"], "group_size 24 does not divide",
    ),
    "missing prompt file": (
        lambda t: ["quantize=rtn4", "calibration=file", "calibration.path=nowhere.csv"], "nowhere.csv",
    ),
    "malformed COCO": (
        lambda t: ["quantize=rtn4", "calibration=file", f"calibration.path={_file(t, 'bad.json', '{')}"], "bad.json",
    ),
    "empty list": (
        lambda t: ["quantize=rtn4", "calibration=file", f"calibration.path={_file(t, 'empty.txt', '')}"], "empty.txt",
    ),
    "no denoiser": (lambda t: ["model.builtin=null", f"model.path={_tiny_without_unet(t)}"], "denoiser"),
    "hub out of reach": (
        lambda t: ["+experiment=sdxl_vq3", "calibration=builtin", "evaluate=tiny", "evaluate.metrics=[paired]"],
        "stabilityai/stable-diffusion-xl-base-1.0",
    ),
    "hub and captions missing": (lambda t: ["+experiment=sdxl_vq3"], "captions_train2017.json"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_line_before_any_work(case, tmp_path, monkeypatch):
    make, said = BAD[case]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    done = run(*make(tmp_path), "tracker=none", f"results_dir={tmp_path / 'results'}")
    assert done.returncode != 0
    assert said in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    assert not list((tmp_path / "results").glob("stages/*/*/manifest.json"))


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_nothing_half_written_counts(tmp_path):
    """A limit on the size of files stands for a full disk; without it the same command completes."""
    results = tmp_path / "results"
    arguments = command("+experiment=tiny_rtn4", *SMALL, f"results_dir={results}")
    limited = ["bash", "-c", 'ulimit -f 600; exec "$@"', "bash", *arguments]  # 600 KiB; the denoiser takes two MiB
    done = subprocess.run(limited, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode not in (0, -signal.SIGXFSZ)
    assert done.stderr.splitlines()[-1].startswith("error: no space left")
    assert not list(results.glob("stages/quantize/*/manifest.json"))
    done = subprocess.run(arguments, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_two_processes_share_the_work(tmp_path):
    both = [
        subprocess.Popen(
            command(f"+experiment={name}", *SMALL, f"results_dir={tmp_path}"),
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in ("tiny_rtn4", "tiny_rtn3")
    ]
    said = [process.communicate(timeout=600)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert sum("calibrate: " in text for text in said) == 1, "the shared calibration is made once"


def test_an_unsupported_python_is_one_line(tmp_path):
    fake = tmp_path / "sitecustomize.py"
    fake.write_text("import sys\nsys.version_info = (3, 10, 0, 'final', 0)\n")
    extra = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    done = run_process("+experiment=demo", **extra)
    assert done.returncode != 0
    assert done.stderr.startswith("vqdm needs Python 3.11") and len(done.stderr.splitlines()) == 1
