"""Rates, seconds and stages: invariants, and SDXL as a whole, on the meta device."""

import dataclasses
import json

import pytest
import torch
from unets import sdxl_unet, small_unet

from vqdm.calibration.hessian import add_second_moment
from vqdm.codecs import additive_kernels
from vqdm.config.codecs import OPTIONS, AdaroundConfig, AdditiveConfig, GptqConfig, TrellisConfig
from vqdm.config.options import CalibrationConfig, Config, EvaluateConfig, ModelConfig, SamplerConfig
from vqdm.models.specs import ConvGeometry, LayerSpec, layer_specs
from vqdm.stages.plan import cost, encoding
from vqdm.stages.plan.cost import guidance_factor, second_moment_cost, stage_costs
from vqdm.stages.plan.encoding import (
    CodecSpeed,
    encode_seconds,
    is_compiled,
    layer_seconds,
    probe_codec,
    reference_speed,
)
from vqdm.stages.plan.forward import ForwardCost, measure
from vqdm.stages.plan.probe import Hardware, Speeds, probe_hardware
from vqdm.stages.plan.stage import duration, gibibytes

SPEEDS = Speeds(1e11, 1e11, 1e11, 1e10, 1e11)
HARDWARE = Hardware(SPEEDS, SPEEDS, worker_matmul=1e11, worker_cholesky=5e10)
TRELLIS = TrellisConfig(bits=3)
ADDITIVE = AdditiveConfig(bits=3, group_size=8)
GPTQ = GptqConfig(bits=4)


def test_seconds_are_work_over_rates():
    speeds = Speeds(matmul=10, convolution=5, attention=2, writing=4, fp32_matmul=1)
    assert speeds.seconds(ForwardCost(20, 10, 4, 4, 99)) == 2 + 2 + 2 + 1


def test_rates_are_measured_once(tmp_path):
    file = tmp_path / "cache" / "probe.json"
    options = {"device": "cpu", "dtype": "float32", "threads": 1, "workers": 1, "cache": file}
    first = probe_hardware(**options)
    assert min(*dataclasses.astuple(first.sampling), first.worker_matmul, first.worker_cholesky) > 1e7
    content = file.read_bytes()
    assert probe_hardware(**options) == first
    assert file.read_bytes() == content
    speed = probe_codec(GPTQ, first, workers=1, cache=file)
    assert speed.origin == "measured"
    assert probe_codec(GPTQ, first, workers=1, cache=file) == speed
    assert len(json.loads(file.read_text())) == 2
    assert probe_codec(AdaroundConfig(), first, workers=1, cache=file) is None


def test_a_broken_cache_is_made_anew(tmp_path):
    file = tmp_path / "probe.json"
    file.write_text("[1, 2")
    probe_codec(GPTQ, HARDWARE, workers=1, cache=file)
    assert len(json.loads(file.read_text())) == 1


def test_codecs_that_are_not_compiled_take_the_reference(tmp_path, monkeypatch):
    class Stats:
        cache_path = str(tmp_path)

    class Kernel:
        stats = Stats

    monkeypatch.setattr(additive_kernels, "search_groups", Kernel)
    assert not is_compiled(TRELLIS) and not is_compiled(ADDITIVE) and is_compiled(GPTQ)
    speed = probe_codec(TRELLIS, HARDWARE, workers=1, cache=tmp_path / "probe.json")
    assert speed.origin == "reference machine"
    assert not (tmp_path / "probe.json").exists()  # so that it is measured as soon as it can be
    (tmp_path / "viterbi._search_column-1.py311.1.nbc").touch()
    assert is_compiled(TRELLIS) and not is_compiled(ADDITIVE)


def test_the_reference_follows_the_matrix_rate():
    faster = dataclasses.replace(HARDWARE, worker_matmul=2 * HARDWARE.worker_matmul)
    for config in (TRELLIS, ADDITIVE):
        slow, fast = (reference_speed(config, hardware) for hardware in (HARDWARE, faster))
        assert slow.weight == pytest.approx(2 * fast.weight)
    wider = dataclasses.replace(ADDITIVE, beam_size=16)
    assert reference_speed(wider, HARDWARE).weight > 1.5 * reference_speed(ADDITIVE, HARDWARE).weight


@pytest.mark.parametrize(
    ("shape", "seconds"),
    [((1280, 1280), 1.16), ((640, 2560), 1.65), ((320, 2880), 1.09), ((1280, 23040), 114.8), ((10240, 1280), 11.1)],
)
def test_trellis_seconds_of_the_reference_machine(shape, seconds):
    """CPU seconds of `python scripts/bench_sdxl_layers.py --workers 2`, on the machine of encoding.REFERENCE."""
    hardware = Hardware(SPEEDS, SPEEDS, worker_matmul=encoding.REFERENCE.matmul, worker_cholesky=5e10)
    found = layer_seconds(shape, hardware, reference_speed(TRELLIS, hardware), config=TRELLIS)
    assert seconds / 1.5 < found < seconds * 1.5


def test_encoding_is_shared_by_workers_but_no_layer_is():
    speed = CodecSpeed(1e-6, 0.0, 0.0, "measured")
    one = encode_seconds([(640, 640)] * 4, HARDWARE, speed, config=GPTQ, workers=1)
    assert encode_seconds([(640, 640)] * 4, HARDWARE, speed, config=GPTQ, workers=2) == pytest.approx(one / 2)
    assert encode_seconds([(640, 640)] * 4, HARDWARE, speed, config=GPTQ, workers=9) == pytest.approx(one / 4)
    assert encode_seconds([], HARDWARE, speed, config=GPTQ, workers=2) == 0


def test_flops_of_second_moments():
    linear = LayerSpec("a", "linear", (5, 12))
    whole = second_moment_cost(linear, (2, 50, 12), samples=6, limit=None)
    assert whole.flops == 2 * 6 * 50 * 12**2
    assert second_moment_cost(linear, (2, 50, 12), samples=6, limit=30).flops == pytest.approx(2 * 30 * 12**2)
    assert second_moment_cost(linear, (2, 50, 12), samples=6, limit=1000).flops == whole.flops
    conv = LayerSpec("b", "conv", (5, 36), ConvGeometry((3, 3), (1, 1), (1, 1), (1, 1), 1))
    inputs, total = torch.empty(2, 4, 16, 16, device="meta"), torch.empty(36, 36, device="meta")
    really = measure(lambda: add_second_moment(total, inputs, conv.conv))
    assert second_moment_cost(conv, (2, 4, 16, 16), samples=6, limit=None).flops == 3 * really.flops
    assert second_moment_cost(conv, (2, 4, 4, 4), samples=6, limit=None).flops == 2 * 6 * 4**2 * 36**2


def test_guidance_takes_two_samples():
    unet = small_unet()
    assert [guidance_factor(unet, scale) for scale in (0.0, 1.0, 5.0)] == [1, 1, 2]


def sdxl_config(**quantize):
    return Config(
        model=ModelConfig(builtin="tiny", dtype="float16", sampler=SamplerConfig(steps=50, guidance=5.0)),
        calibration=CalibrationConfig(n=256, batch_size=4),
        quantize=OPTIONS[quantize["kind"]](**quantize),
        evaluate=EvaluateConfig(metrics=["paired"], batch_size=4),
    )


def sdxl_costs(monkeypatch, tmp_path, **quantize):
    monkeypatch.setattr(cost, "probe_hardware", lambda **_: HARDWARE)
    unet = sdxl_unet()
    options = {"parts": {"unet": 2_567_463_684}, "vae": None, "images": 5000, "calibration_prompts": 256}
    found = stage_costs(
        sdxl_config(**quantize), unet, layer_specs(unet), **options, device="cpu", threads=1, cache=tmp_path / "p.json"
    )
    return {stage.name: stage for stage in found}


def test_sdxl_as_a_whole(monkeypatch, tmp_path):
    monkeypatch.setattr(cost, "probe_codec", lambda *_, **__: CodecSpeed(6e-7, 8e-5, 0.0, "measured"))
    stages = sdxl_costs(monkeypatch, tmp_path, kind="trellis", bits=3, tokens_per_call=4096)
    assert list(stages) == ["calibrate", "quantize", "teacher_images", "images", "evaluate"]
    forward = 6.76e12 / 1e11 + 5.39e9 / 1e10
    assert stages["calibrate"].seconds == pytest.approx(256 * 50 * 2 * forward, rel=0.01)
    assert stages["images"].seconds == pytest.approx(5000 * 50 * 2 * forward, rel=0.01)
    weights = 2 * 2_567_463_684
    assert weights + 8 * 0.15e9 < stages["calibrate"].memory.host < weights + 8 * 0.2e9 + 0.8e9
    assert stages["quantize"].memory.host > weights + 6 * 23040**2  # a Hessian of the widest layer, and its factor
    assert "7 passes" in stages["quantize"].note
    recorded = 256 * 4 * 2 * forward
    assert stages["quantize"].seconds > 7 * recorded


def test_a_student_samples_all_steps_for_every_group(monkeypatch, tmp_path):
    monkeypatch.setattr(cost, "probe_codec", lambda *_, **__: CodecSpeed(6e-8, 8e-5, 0.0, "measured"))
    teacher, student = (
        sdxl_costs(monkeypatch, tmp_path, kind="gptq", bits=4, tokens_per_call=512, hessian_from=source)["quantize"]
        for source in ("teacher", "student")
    )
    assert student.seconds > 8 * teacher.seconds  # 50 steps instead of 4


def test_what_is_not_estimated_says_so(monkeypatch, tmp_path):
    assert "AdaRound" in sdxl_costs(monkeypatch, tmp_path, kind="adaround", bits=4)["quantize"].note
    unet = small_unet().to("meta")
    unet.register_to_config(addition_embed_type="image")
    found = stage_costs(
        sdxl_config(), unet, [], parts={"unet": 1}, vae=None, images=1, calibration_prompts=0, device="cpu", threads=1,
        cache=tmp_path / "p.json",
    )  # fmt: skip
    assert [stage.name for stage in found] == ["images", "evaluate"]
    assert all(stage.seconds is None and "UNet2DConditionModel" in stage.note for stage in found)


def test_a_gpu_that_is_not_here_has_memory_but_no_time(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    unet = small_unet().to("meta")
    options = {"parts": {"unet": 1000}, "vae": None, "images": 1, "calibration_prompts": 2, "threads": 1}
    config, cache = sdxl_config(kind="gptq", bits=4), tmp_path / "p.json"
    found = stage_costs(config, unet, layer_specs(unet), **options, device="cuda", cache=cache)
    assert all(stage.memory.host > 0 for stage in found)
    assert [stage.seconds for stage in found[:-1]] == [None] * 4
    assert all("no GPU" in stage.note for stage in found[:-1])


def test_two_digits():
    said = [duration(s) for s in (0.51, 41.3, 150, 7000, 3600 * 30, 86400 * 12.4)]
    assert said == ["0.5 s", "41 s", "2.5 min", "1.9 h", "30 h", "12 days"]
    assert gibibytes(1.26 * 2**30) == "1.3 GiB"


def test_images_are_sampled_in_full_batches_and_in_steps_of_their_own(monkeypatch, tmp_path):
    """9 images in batches of 4 are 12, each in 10 of the model's 50 steps."""
    monkeypatch.setattr(cost, "probe_hardware", lambda **_: HARDWARE)
    monkeypatch.setattr(cost, "probe_codec", lambda *_, **__: None)
    unet, config = small_unet().to("meta"), sdxl_config(kind="gptq", bits=4)
    options = {"parts": {"unet": 1000}, "vae": None, "calibration_prompts": 2, "threads": 1, "device": "cpu"}

    def seconds(images, steps):
        config.evaluate.steps = steps
        found = stage_costs(config, unet, layer_specs(unet), images=images, **options, cache=tmp_path / "p.json")
        return {stage.name: stage.seconds for stage in found}

    once, own, whole = seconds(4, None), seconds(9, 10), seconds(12, None)
    for name in ("teacher_images", "images"):
        assert whole[name] == pytest.approx(3 * once[name])
        assert own[name] == pytest.approx(whole[name] * 10 / 50)
    assert own["calibrate"] == whole["calibrate"]


def test_scoring_is_timed_where_there_are_originals_and_says_which_networks_are_not(monkeypatch, tmp_path):
    monkeypatch.setattr(cost, "probe_hardware", lambda **_: HARDWARE)
    monkeypatch.setattr(cost, "probe_codec", lambda *_, **__: None)
    unet = small_unet().to("meta")
    options = {"parts": {"unet": 1000}, "vae": None, "images": 8, "calibration_prompts": 2, "threads": 1}
    config = sdxl_config()
    config.evaluate.metrics = ["paired", "clip_h14"]
    found = stage_costs(config, unet, [], **options, device="cpu", cache=tmp_path / "p.json")[-1]
    assert found.seconds == 0 and found.note == "without the networks of clip_h14"
