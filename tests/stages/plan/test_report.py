"""What plan=true says of SDXL at full size, and of models small enough to write the file that it foretells."""

import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from composed import compose
from diffusers import UNet2DConditionModel
from quantized import checkpoint_bytes
from tiny_world import ROOT, run
from unets import sdxl_unet

from vqdm.hub.config import VQDMConfig
from vqdm.models.loader import denoiser_on_meta
from vqdm.models.shipped import builtin_directory
from vqdm.models.specs import layer_specs, skipped_specs
from vqdm.stages.plan.layers import assignment_of, plan_denoiser
from vqdm.stages.plan.report import layer_table
from vqdm.weights.layers import swap_empty

SDXL_LAYERS = Path(__file__).parent / "sdxl_layers.csv"


def planned(*overrides: str):
    config = compose(*overrides)
    denoiser = denoiser_on_meta(config.model)
    assignment = assignment_of(denoiser, config.quantize, pattern=config.model.layers, min_size=config.model.min_size)
    return plan_denoiser(denoiser, assignment)


@pytest.fixture(scope="module")
def sdxl_plan(tmp_path_factory):
    """As a user without data, weights, network or GPU gets it: what is printed, and the JSON."""
    results = tmp_path_factory.mktemp("results")
    done = run("+experiment=sdxl_vq3", "plan=true", f"results_dir={results}")
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads((results / "plans" / "sdxl_vq3.json").read_text())


def test_sdxl_as_the_paper_counts(sdxl_plan):
    printed, plan = sdxl_plan
    assert "771 layers quantized, 2,540,953,600 weights, 98.97% of 2,567,463,684; 23 layers stay in 16 bit" in printed
    assert plan["bits_as_in_paper"] == pytest.approx(3.154, abs=5e-4)
    assert plan["bits_per_weight"] == pytest.approx(3.173, abs=1e-3)
    assert len(plan["layers"]) == 771 + 23 and sum("reason" in layer for layer in plan["layers"]) == 23
    assert plan["bytes"] == sum(layer["bytes"] for layer in plan["layers"]) + sum(plan["rest"].values())
    assert plan["peak_memory_bytes"] > 2 * 2_567_463_684 and plan["seconds"] > 0
    assert {stage["name"] for stage in plan["stages"]} >= {"calibrate", "quantize", "images", "evaluate"}


def test_sdxls_layers_are_those_of_the_committed_list():
    """One line a layer: name, kind, matrix, whether it is quantized. Written once from the model on the meta device."""
    unet = sdxl_unet()
    rows = {spec.name: f"{spec.name},{spec.kind},{spec.shape[0]},{spec.shape[1]},1" for spec in layer_specs(unet)}
    rows |= {s.name: f"{s.name},{s.kind},{s.shape[0]},{s.shape[1]},0" for s, _ in skipped_specs(unet)}
    listed = SDXL_LAYERS.read_text().split()
    assert listed[0] == "name,kind,out,in,quantized"
    assert set(listed[1:]) == set(rows.values()) and len(listed) == 1 + 794
    assert [layer.name for layer in planned("+experiment=sdxl_vq3").layers] == [row.split(",")[0] for row in listed[1:]]


@pytest.mark.parametrize(("preset", "bits"), [("vq4", 4.153), ("vq3", 3.154), ("vq2", 2.154)])
def test_the_papers_three_widths(preset, bits):
    assert planned("model=sdxl", f"quantize={preset}").counts.bits_as_in_paper == pytest.approx(bits, abs=5e-4)


def test_three_bits_of_sdxl_are_a_fifth_of_its_file():
    plan = planned("+experiment=sdxl_trellis3")
    assert plan.counts.bits_quantized == pytest.approx(3.0, abs=1e-4)
    assert plan.bytes <= 0.20 * 2 * 2_567_463_684


def test_three_bits_of_tiny_are_less_than_a_quarter_of_its_file():
    original = ROOT / "vqdm" / "models" / "tiny" / "unet" / "diffusion_pytorch_model.safetensors"
    assert planned("+experiment=tiny_trellis3").bytes <= 0.24 * original.stat().st_size


@pytest.mark.parametrize("model", ["tiny", "tiny_turbo"])
@pytest.mark.parametrize(
    "quantizer",
    [
        "quantize=none",
        "quantize=rtn3",
        "quantize=gptq4",
        "quantize=vq2",
        "quantize=trellis3",
        "quantize=trellis3 quantize.bits=2.37",
        "quantize=vq3 quantize.codebooks=block",
        "quantize=trellis3 quantize.allocation=sensitivity",
        "quantize=trellis3 model.min_size=4 model.layers='(to_q|conv_out)$'",
    ],
)
def test_what_is_foretold_is_written_to_the_byte(model, quantizer):
    overrides = ("+experiment=tiny_turbo_fp" if model == "tiny_turbo" else "+experiment=tiny_codec", *quantizer.split())
    plan, config = planned(*overrides), compose(*overrides)
    denoiser = denoiser_on_meta(config.model).to_empty(device="cpu")
    for tensor in (*denoiser.parameters(), *denoiser.buffers()):
        tensor.data.zero_()
    assignment = assignment_of(denoiser, config.quantize, pattern=config.model.layers, min_size=config.model.min_size)
    assert plan.bytes == len(checkpoint_bytes(swap_empty(denoiser, assignment.quantized)))
    assert len(layer_table(plan).splitlines()) == len(plan.layers)
    assert sum(plan.groups().values()) == sum(layer.bytes for layer in plan.layers)


def test_a_model_in_bfloat16_is_foretold_too(tmp_path):
    """What is not quantized stays in bfloat16, whose name in the header is longer."""
    unet = UNet2DConditionModel.from_pretrained(
        builtin_directory("tiny") / "unet", quantization_config=VQDMConfig("rtn3"), dtype=torch.bfloat16
    )
    unet.save_pretrained(tmp_path)
    plan = planned("+experiment=tiny_codec", "quantize=rtn3", "model.dtype=bfloat16")
    assert plan.bytes == (tmp_path / "diffusion_pytorch_model.safetensors").stat().st_size


def test_full_precision_says_why_every_layer_stays():
    plan = planned("+experiment=tiny_fp")
    assert not plan.quantized and {layer.reason for layer in plan.layers} == {"full precision is asked for"}
    assert plan.counts.bits_per_weight == 16.0


@pytest.mark.slow
def test_the_stages_are_printed_within_seconds_and_nothing_is_made(tmp_path):
    command = [sys.executable, "-u", "run.py", "+experiment=tiny_trellis3", "plan=true", f"results_dir={tmp_path}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        first = process.stdout.readline()
        used = psutil.Process(process.pid).cpu_times()  # on a machine that is busy too
        rest = process.stdout.read()
    assert first.startswith("calibrate  to run (missing)") and used.user + used.system < 20
    assert "bits_quantized 3.000" in rest and not (tmp_path / "stages").exists()


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("finetune=both",), ("quantize=vq3", "quantize.hessian_from=student")])
@pytest.mark.parametrize("experiment", sorted(path.stem for path in (ROOT / "conf" / "experiment").glob("sdxl_*.yaml")))
def test_every_stage_of_sdxl_fits_on_a_card_of_24_gb(experiment, options, tmp_path):
    if experiment == "sdxl_fp" and options:
        pytest.skip("nothing is quantized")
    if experiment == "sdxl_random" and options == ("finetune=both",):
        pytest.skip("it has a distillation of its own")
    options = ("quantize=trellis3", *options) if experiment == "sdxl_codec" else options
    done = run(f"+experiment={experiment}", *options, "plan=true", "plan_for=4090", f"results_dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    stages = json.loads((tmp_path / "plans" / f"{experiment}.json").read_text())["stages"]
    assert {
        stage["name"]: stage["memory"]["device"] / 2**30 for stage in stages if stage["memory"]["device"] > 20 << 30
    } == {}
