"""Rates, seconds and stages: invariants, and SDXL as a whole, on the meta device."""

import dataclasses
import itertools
import json
from collections import defaultdict

import pytest
import torch
from composed import compose
from unets import sdxl_unet, small_unet

from vqdm.calibration.hessian import add_second_moment
from vqdm.config.codecs import OPTIONS, GptqConfig, RtnConfig
from vqdm.config.options import PLAN_CARDS, CalibrationConfig, Config, EvaluateConfig, ModelConfig, SamplerConfig
from vqdm.models.specs import ConvGeometry, layer_specs
from vqdm.runs.files import write_sealed
from vqdm.runs.stage import Stage
from vqdm.runs.store import Store
from vqdm.runs.texts import duration
from vqdm.stages.graph.experiment import build_stages
from vqdm.stages.plan.cost import guidance_factor, stage_costs
from vqdm.stages.plan.expected import missing_stages
from vqdm.stages.plan.forward import ForwardCost, measure
from vqdm.stages.plan.quantization import least_encoding_flops, second_moment_cost
from vqdm.stages.plan.rates import CARDS, REACHED, Machine, Rates, machine_of
from vqdm.stages.plan.recorded import Recorded
from vqdm.stages.plan.stage import gibibytes

CPU = Machine("cpu", 1)
CORE = REACHED * 99e9  # FLOP/s


def costs(config, unet, specs=None, **changes):
    options = {"parts": {"unet": 1000}, "vae": None, "images": 1, "calibration_prompts": 2, "machine": CPU}
    options |= {"recorded": Recorded(None, config, "cpu")} | changes
    return stage_costs(config, unet, layer_specs(unet) if specs is None else specs, **options)


def test_seconds_are_work_over_rates():
    assert Rates(flops=10, writing=4, origin="").seconds(ForwardCost(20, 10, 4, 4, 99)) == 3.4 + 1


def test_rates_of_cards_and_cores():
    half, single = (Machine("cuda", 2, CARDS["a100"]).rates(dtype) for dtype in ("bfloat16", "float32"))
    assert half.flops == REACHED * 312e12 and single.flops == REACHED * 19.5e12 and half.writing == 2.04e12
    assert all("estimate" in rates.origin and "A100" in rates.origin for rates in (half, single))
    two = Machine("cpu", 2)
    assert two.rates("float16").flops == two.rates("float32").flops == 2 * CORE
    assert two.rates("float32", threads=1).flops == CORE


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA GeForce RTX 4090", "4090"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA T4", None),
    ],
)
def test_the_gpu_that_is_here_is_known_by_its_name(name, found, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    machine = machine_of("cuda", threads=1)
    assert machine.card == CARDS.get(found)
    assert (machine.rates("float16") is None) == ("plan_for" in machine.silence) == (found is None)


def test_the_cards_are_those_of_the_option():
    assert tuple(CARDS) == PLAN_CARDS
    assert machine_of("cuda", threads=1, wanted="4090").card.memory == 24e9


def test_flops_of_second_moments():
    whole = second_moment_cost(12, None, (2, 50, 12), samples=6, limit=None)
    assert whole.flops == 2 * 6 * 50 * 12**2
    assert second_moment_cost(12, None, (2, 50, 12), samples=6, limit=30).flops == pytest.approx(2 * 30 * 12**2)
    assert second_moment_cost(12, None, (2, 50, 12), samples=6, limit=1000).flops == whole.flops
    conv = ConvGeometry((3, 3), (1, 1), (1, 1), (1, 1), 1)
    inputs, total = torch.empty(2, 4, 16, 16, device="meta"), torch.empty(36, 36, device="meta")
    really = measure(lambda: add_second_moment(total, inputs, conv))
    assert second_moment_cost(36, conv, (2, 4, 16, 16), samples=6, limit=None).flops == 3 * really.flops
    assert really.flops == 2 * 2 * 4**2 * products_of_pixels(16)
    assert second_moment_cost(36, conv, (2, 4, 4, 4), samples=6, limit=None).flops == 2 * 6 * 4**2 * 36**2


def products_of_pixels(size):
    """Outer products of an image for a 3×3 kernel: for every displacement those of the common window, then strips."""
    taps = list(itertools.product(range(3), range(3)))
    seen = defaultdict(list)
    for a, b in itertools.combinations_with_replacement(taps, 2):
        seen[b[0] - a[0], b[1] - a[1]].append(a)
    total = 0
    for first in seen.values():
        height, width = (size - max(tap[i] for tap in first) + min(tap[i] for tap in first) for i in (0, 1))
        total += height * width + len(first) * (size**2 - height * width)
    return total


def test_guidance_takes_two_samples():
    unet = small_unet()
    assert [guidance_factor(unet, scale) for scale in (0.0, 1.0, 5.0)] == [1, 1, 2]


def sdxl_config(**quantize):
    return Config(
        model=ModelConfig(builtin="tiny", dtype="float16", sampler=SamplerConfig(steps=50, guidance=5.0)),
        calibration=CalibrationConfig(n=256, batch_size=4),
        quantize=OPTIONS[quantize.get("kind", "none")](**quantize),
        evaluate=EvaluateConfig(metrics=["paired"], batch_size=4),
    )


def sdxl_costs(machine=CPU, **quantize):
    options = {"parts": {"unet": 2_567_463_684}, "images": 5000, "calibration_prompts": 256, "machine": machine}
    return {stage.name: stage for stage in costs(sdxl_config(**quantize), sdxl_unet(), **options)}


def test_sdxl_as_a_whole():
    stages = sdxl_costs(kind="trellis", bits=3, tokens_per_call=4096)
    assert list(stages) == ["calibrate", "quantize", "teacher_images", "images", "evaluate"]
    forward = 6.76e12 / CORE + 5.39e9 / 1e10
    assert stages["calibrate"].seconds == pytest.approx(256 * 50 * 2 * forward, rel=0.01)
    assert stages["images"].seconds == pytest.approx(5000 * 50 * 2 * forward, rel=0.01)
    assert all(stage.origin.startswith("estimate") for stage in stages.values())
    weights = 2 * 2_567_463_684
    assert weights + 8 * 0.15e9 < stages["calibrate"].memory.host < weights + 8 * 0.2e9 + 0.8e9
    assert stages["quantize"].memory.host > weights + 6 * 23040**2  # a Hessian of the widest layer, and its factor
    assert "7 passes" in stages["quantize"].note and "at least" in stages["quantize"].note
    assert stages["quantize"].seconds > 7 * 256 * 4 * 2 * forward


def test_a_student_samples_all_steps_for_every_group():
    options = {"kind": "trellis", "bits": 3.0, "allocation": "sensitivity", "tokens_per_call": 512}
    teacher, student = (sdxl_costs(**options, hessian_from=source) for source in ("teacher", "student"))
    assert student["quantize"].seconds > 8 * teacher["quantize"].seconds  # 50 steps instead of 4
    assert student["sensitivity"].seconds == teacher["sensitivity"].seconds  # nothing is quantized yet


def made(store, name, label, config, make=lambda directory: None, *, device="cpu", seconds):
    """A finished stage that took so long."""
    directory = store.ensure(Stage(name, 1, label, config), make, environment={"device": device})
    content = json.loads((directory / "manifest.json").read_text())
    write_sealed(
        directory / "manifest.json", {k: v for k, v in content.items() if k != "sha256"} | {"seconds": seconds}
    )


SAMPLED = {"sampler": {"steps": 50, "guidance": 5.0, "size": None}, "dtype": "float16"}


def test_sampling_is_scaled_from_what_was_recorded_of_the_model(tmp_path):
    store, config = Store(tmp_path), sdxl_config()
    found = Recorded(store, config, "cpu")
    assert found.sampling() is None
    made(store, "calibrate", "tiny-builtin-8", SAMPLED, seconds=800.0)
    made(store, "calibrate", "other-builtin-1", SAMPLED, seconds=9e9)
    made(store, "calibrate", "tiny-builtin-1", SAMPLED | {"dtype": "float32"}, seconds=9e9)
    made(store, "calibrate", "tiny-builtin-2", SAMPLED, device="cuda", seconds=9e9)
    assert found.sampling().seconds == 2.0
    calibrate, quantize, *_, images, evaluate = costs(
        sdxl_config(kind="gptq", bits=4), small_unet().to("meta"), images=4, recorded=found
    )
    assert calibrate.seconds == 2 * 50 * 2.0 and images.seconds == 4 * 50 * 2.0
    assert calibrate.origin.startswith("recorded here in calibrate/tiny-builtin-8")
    assert evaluate.origin == "estimate" and quantize.origin.startswith("estimate")
    recorded = SAMPLED | {"along": "teacher", "sampler_steps": [10, 20]}
    made(store, "trajectories", "tiny-teacher-3", recorded, seconds=270.0)
    assert found.sampling().seconds == 3.0  # the slowest


def test_stages_to_come_are_told_of_by_those_like_them_with_another_seed(tmp_path):
    store, config = Store(tmp_path), compose("+experiment=tiny_vq3")
    graph = build_stages(config, cache=store.hashes)
    kinds, seconds = missing_stages([(config, graph)], store, device="cpu")
    assert sorted(kinds.values()).count("generate") == 2 and {"calibrate", "quantize"} <= set(kinds.values())
    assert seconds == {}
    calibrate, quantize = graph.quantization.calibrate, graph.quantization.quantize
    made(store, "calibrate", calibrate.label, calibrate.config | {"noise_seed": 7}, seconds=128 * 20 * 0.1)
    made(store, "quantize", quantize.label, quantize.config | {"seed": 7}, seconds=5.0)
    made(store, "quantize", quantize.label, quantize.config | {"seed": 7, "beam_size": 99}, seconds=9e9)
    found = missing_stages([(config, graph)], store, device="cpu")[1]
    assert found == {
        calibrate.fingerprint: 256.0, quantize.fingerprint: 5.0,
        graph.images.fingerprint: pytest.approx(512 * 20 * 0.1),
        graph.teacher_images.fingerprint: pytest.approx(512 * 20 * 0.1),
    }  # fmt: skip
    assert missing_stages([(config, graph)], store, device="cuda")[1] == {}


def test_encoding_is_scaled_by_weights_from_layers_of_the_same_options(tmp_path):
    store, config = Store(tmp_path), sdxl_config(kind="gptq", bits=4)
    layers = [{"shape": [10, 20], "seconds": 3.0}, {"shape": [10, 10], "seconds": 1.5}]

    def make(directory):
        (directory / "layers.json").write_text(json.dumps({"quantized": layers}))

    options = config.quantize.settings() | {"damping": 0.3}
    made(store, "quantize", "small-gptq4", options, make, seconds=9.0)
    made(store, "quantize", "small-gptq3", options | {"bits": 3}, make, seconds=9.0)
    rate = Recorded(store, config, "cuda").encoding()
    assert rate.seconds == 4.5 / 300 and "quantize/small-gptq4" in rate.origin
    assert Recorded(store, sdxl_config(kind="gptq", bits=2), "cpu").encoding() is None
    assert Recorded(None, config, "cpu").encoding() is None
    unet = small_unet().to("meta")
    specs = layer_specs(unet)
    recorded = Recorded(store, config, "cpu")
    found = costs(config, unet, specs, calibration_prompts=0, machine=Machine("cpu", 3), recorded=recorded)[1]
    seconds = [spec.size * rate.seconds for spec in specs]
    assert duration(max(sum(seconds) / 3, max(seconds))) in found.note and "recorded here" in found.note


def test_training_is_scaled_by_samples_of_the_same_width_and_precision(tmp_path):
    store, config = Store(tmp_path), sdxl_config(kind="gptq", bits=4)
    options = {"steps": 10, "batch_size": 4, "precision": "float32"}
    made(store, "finetune", "tiny-gptq4-finetuned", options, seconds=80.0)
    made(store, "finetune", "tiny-gptq3-finetuned", options, seconds=9e9)
    made(store, "finetune", "tiny-gptq4-blocks-finetuned", options | {"precision": "bfloat16"}, seconds=9e9)
    made(store, "tune_blocks", "tiny-gptq4-blocks", {"block_steps": 5, "block_batch_size": 2}, seconds=30.0)
    found = Recorded(store, config, "cpu")
    assert found.training("finetune").seconds == 2.0 and found.training("tune_blocks").seconds == 3.0


def test_the_least_that_encoding_takes():
    assert least_encoding_flops((30, 12), GptqConfig()) == 2 * 30 * 12**2 + 12**3 / 3
    assert least_encoding_flops((30, 12), RtnConfig(clip="mse")) == 2 * 30 * 12


def test_training_sdxls_blocks():
    """The largest block's row: a residual unit of up_blocks.2 reads 960 channels of 128 × 128 and gives 320."""
    found = sdxl_costs(kind="adaround", bits=4, iterations=20_000, batch_size=32)["quantize"]
    row = 2 * (960 + 320) * 128**2  # fp16; the time embedding's 1,280 numbers beside it
    rows = 256 * 4 * 2
    assert rows * row == 80 << 30
    assert "113 blocks, 20,000 steps of 32 rows each, on 2,048 rows" in found.note
    assert "80 GiB up to three times" in found.note
    gpu = sdxl_costs(Machine("cuda", 1, CARDS["a100"]), kind="adaround", bits=4, batch_size=32)["quantize"]
    assert gpu.memory.host < 24 << 30  # the rest on disk
    forward = 6.76e12 / CORE + 5.39e9 / 1e10
    passes = 113 * rows + 3 * 20_000 * 32 + 2 * rows
    assert found.seconds == pytest.approx(passes * forward, rel=0.01)
    some = sdxl_costs(kind="adaround", bits=4, iterations=20_000, batch_size=32, samples=512)["quantize"]
    assert "on 512 rows" in some.note and "20 GiB up to three times" in some.note


def test_a_students_hessians_keep_to_a_memory_budget():
    config, found = sdxl_config(kind="gptq", bits=4, hessian_from="student", tokens_per_call=512), {}
    options = {"parts": {"unet": 2_567_463_684}, "images": 0, "calibration_prompts": 256}
    for budget in (4.0, 16.0):
        own = dataclasses.replace(config, memory_budget_gb=budget)
        stages = costs(own, sdxl_unet(), machine=Machine("cuda", 1, CARDS["4090"]), **options)
        found[budget] = next(stage for stage in stages if stage.name == "quantize")
    assert "7 passes" in found[16.0].note and "11 passes" in found[4.0].note
    weights, forward = 2 * 2_567_463_684, 8 * 0.2e9
    assert found[4.0].memory.device < weights + forward + 4 * 2**30 + 1.3e9 < found[16.0].memory.device
    assert found[4.0].seconds > 1.3 * found[16.0].seconds


def test_calls_that_wait_between_layers_take_memory_in_place_of_passes():
    config, found = sdxl_config(kind="gptq", bits=4, hessian_from="both", tokens_per_call=512), {}
    options = {"parts": {"unet": 2_567_463_684}, "images": 0, "calibration_prompts": 16}
    for budget in (0.001, 4.0, 1000.0):
        own = dataclasses.replace(config, memory_budget_gb=budget)
        stages = costs(own, sdxl_unet(), machine=Machine("cuda", 1, CARDS["h100"]), **options)
        found[budget] = next(stage for stage in stages if stage.name == "quantize")
    none, some, every = found.values()
    assert "in 561 passes" in none.note and "in 561 passes" in some.note and "in 1 pass," in every.note
    assert none.memory.device < some.memory.device <= none.memory.device + 4 * 2**30 < every.memory.device
    assert every.seconds < some.seconds < none.seconds


def test_what_is_not_estimated_says_so():
    unet = small_unet().to("meta")
    unet.register_to_config(addition_embed_type="image")
    found = costs(sdxl_config(), unet, [])
    assert [stage.name for stage in found] == ["images", "evaluate"]
    assert all(stage.seconds is None and "UNet2DConditionModel" in stage.note for stage in found)


def test_a_gpu_without_a_data_sheet_has_memory_but_no_time():
    found = costs(sdxl_config(kind="gptq", bits=4), small_unet().to("meta"), machine=Machine("cuda", 1))
    assert all(stage.memory.host > 0 for stage in found)
    assert [stage.seconds for stage in found[:-1]] == [None] * 4
    assert all("plan_for" in stage.note for stage in found[:-1])


def test_two_digits():
    said = [duration(s) for s in (0.51, 41.3, 150, 7000, 3600 * 30, 86400 * 12.4)]
    assert said == ["0.5 s", "41 s", "2.5 min", "1.9 h", "30 h", "12 days"]
    assert gibibytes(1.26 * 2**30) == "1.3 GiB"


def test_images_are_sampled_in_full_batches_and_in_steps_of_their_own():
    """9 images in batches of 4 are 12, each in 10 of the model's 50 steps."""
    unet, config = small_unet().to("meta"), sdxl_config(kind="gptq", bits=4)

    def seconds(images, steps):
        config.evaluate.steps = steps
        return {stage.name: stage.seconds for stage in costs(config, unet, images=images)}

    once, own, whole = seconds(4, None), seconds(9, 10), seconds(12, None)
    for name in ("teacher_images", "images"):
        assert whole[name] == pytest.approx(3 * once[name])
        assert own[name] == pytest.approx(whole[name] * 10 / 50)
    assert own["calibrate"] == whole["calibrate"]


def test_scoring_is_timed_where_there_are_originals_and_says_which_networks_are_not():
    config = sdxl_config()
    config.evaluate.metrics = ["paired", "clip_h14"]
    found = costs(config, small_unet().to("meta"), [], images=8)[-1]
    assert found.seconds == 0 and found.note == "without the networks of clip_h14"
