"""The quantize and sensitivity stages on a few layers of the shipped tiny model."""

import copy
import dataclasses
import json
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from vqdm.calibration.calls import recorded_calls, recorded_positions
from vqdm.calibration.collect import collect, execution_groups, teacher_groups
from vqdm.calibration.recording import play
from vqdm.codecs.allocation import assign_schemes, read_harm
from vqdm.config.codecs import OPTIONS, AdaroundConfig, RtnConfig, TrellisConfig
from vqdm.config.options import CalibrationConfig, ModelConfig, SamplerConfig
from vqdm.errors import UserError
from vqdm.models.loader import denoiser_of, load_pipeline
from vqdm.prompts import load_prompts
from vqdm.stages.calibrate import calibrate
from vqdm.stages.finished import output_error
from vqdm.stages.plan.layers import plan_denoiser
from vqdm.stages.quantize import Encoder, quantize
from vqdm.stages.sensitivity import sensitivity
from vqdm.weights.layers import quantized_layers

# one block early, one in the middle, one late: to_q, to_k and to_v read one tensor, conv2 is a convolution
LAYERS = r"(down_blocks\.1|mid_block|up_blocks\.1).*(resnets\.0\.conv2|attentions\.0.*attn1\.to_(q|k|v))$"
MODEL = ModelConfig(builtin="tiny", layers=LAYERS, sampler=SamplerConfig(steps=3))
CALIBRATION = CalibrationConfig(source="tiny", n=4, batch_size=2, recorded_steps=3)


@pytest.fixture(scope="module")
def calibration(tmp_path_factory):
    directory = tmp_path_factory.mktemp("calibrate")
    prompts = load_prompts(source="tiny", n=CALIBRATION.n, split="train")
    calibrate(directory, load_pipeline(MODEL, device="cpu"), prompts, config=CALIBRATION, sampler=MODEL.sampler)
    return directory


def run(directory, calibration, *, room=1 << 30, **options):
    """The quantized denoiser's tensors and the stage's summary."""
    summary = quantize(
        directory, load_pipeline(MODEL, device="cpu"), calibration, config=OPTIONS[options["kind"]](**options),
        model=MODEL, calibration_config=CALIBRATION, device="cpu", hessian_room=room,
    )  # fmt: skip
    return load_file(directory / "denoiser" / "diffusion_pytorch_model.safetensors"), summary


def codes(tensors, part=""):
    return {name: tensor for name, tensor in tensors.items() if name.endswith(".codes") and name.startswith(part)}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


KINDS = {
    "rtn": {"kind": "rtn", "bits": 3, "clip": "hessian"},
    "gptq": {"kind": "gptq", "bits": 3},
    "trellis": {"kind": "trellis", "bits": 4},
    "additive": {"kind": "additive", "bits": 2, "group_size": 8, "codebook_bits": 4, "codebooks": "block"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_codes_do_not_depend_on_the_number_of_threads(kind, calibration, tmp_path):
    threads, made = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            (tmp_path / str(count)).mkdir()
            made.append(run(tmp_path / str(count), calibration, **KINDS[kind])[0])
    finally:
        torch.set_num_threads(threads)
    assert same(*made)


@pytest.mark.parametrize("source", ["student", "both"])
def test_a_stopped_run_goes_on_to_the_same_weights(source, calibration, tmp_path):
    whole, _ = run(tmp_path, calibration, **KINDS["trellis"], hessian_from=source)
    stopped = sorted((tmp_path / "items").glob("mid_block*.json")) + sorted(
        (tmp_path / "items").glob("up_blocks*.json")
    )
    for sidecar in stopped[1:]:  # one layer of the group in the middle was done
        sidecar.unlink()
    again, _ = run(tmp_path, calibration, **KINDS["trellis"], hessian_from=source)
    assert same(whole, again)


def test_the_memory_of_a_students_hessians_changes_no_weight(calibration, tmp_path, monkeypatch):
    made, passes = {}, []
    monkeypatch.setattr("vqdm.stages.quantize.collect", lambda *a, **more: passes.append(1) or collect(*a, **more))
    for room in (1 << 30, 1):
        passes.clear()
        (tmp_path / str(room)).mkdir()
        options = {"kind": "gptq", "bits": 3, "hessian_from": "student", "tokens_per_call": 16}
        made[room] = run(tmp_path / str(room), calibration, room=room, **options)[0]
        assert len(passes) == (3 if room > 1 else len([n for n in made[room] if n.endswith(".codes")]))
    assert same(made[1], made[1 << 30])


def test_calls_that_wait_between_layers_give_the_weights_of_calls_made_anew(calibration, tmp_path, monkeypatch):
    made, read = {}, []
    monkeypatch.setattr(
        "vqdm.calibration.pairs.play", lambda denoiser, arguments: read.append(1) or play(denoiser, arguments)
    )
    options = {"kind": "gptq", "bits": 3, "hessian_from": "both", "tokens_per_call": 16}
    for room in (1 << 30, 1):
        read.clear()
        (tmp_path / str(room)).mkdir()
        made[room] = run(tmp_path / str(room), calibration, room=room, **options)[0]
        assert (len(read) == 1) == (room > 1)  # one call tells what layers read together
    assert same(made[1], made[1 << 30])


def test_the_students_hessians_are_its_own(calibration, tmp_path):
    """The first group sees what the teacher does, later ones what the quantized ones before them make of it."""
    made = {}
    for source in ("teacher", "student"):
        (tmp_path / source).mkdir()
        made[source] = codes(run(tmp_path / source, calibration, kind="gptq", bits=2, hessian_from=source)[0])
    first = {name for name in made["teacher"] if name.startswith("down_blocks")}
    assert first and all(torch.equal(made["teacher"][name], made["student"][name]) for name in first)
    assert not same(made["teacher"], made["student"])


def test_targets_corrected_for_earlier_layers_give_outputs_nearer_to_the_originals(calibration, tmp_path):
    options = {"kind": "gptq", "bits": 2, "hessian_from": "both", "tokens_per_call": 64}
    errors = {}
    for source in ("teacher", "both"):
        (tmp_path / source).mkdir()
        summary = run(tmp_path / source, calibration, **(options | {"hessian_from": source}))[1]
        errors[source] = summary["relative_output_error"]
    assert errors["both"] < 0.97 * errors["teacher"]


def test_adaround_goes_on_where_it_stopped(calibration, tmp_path):
    options = {"kind": "adaround", "bits": 3, "iterations": 15, "batch_size": 4}
    whole, _ = run(tmp_path, calibration, **options)
    sidecars = sorted((tmp_path / "items").glob("up_blocks*.json"))
    for sidecar in sidecars:
        sidecar.unlink()
    again, _ = run(tmp_path, calibration, **options)
    assert sidecars and same(whole, again)
    layers = json.loads((tmp_path / "layers.json").read_text())["quantized"]
    assert all(layer["learned"] >= 0 and layer["kept"] in ("learned", "nearest") for layer in layers)


def test_split_shortcuts_go_all_the_way(calibration, tmp_path):
    """Planned, written and loaded again, on some of the recorded rows."""
    model = dataclasses.replace(MODEL, layers=r"up_blocks\.1\.resnets\.0\.conv(1|_shortcut)$")
    config = AdaroundConfig(bits=3, iterations=15, batch_size=4, split_shortcuts=True, samples=10)
    pipeline = load_pipeline(model, device="cpu")
    hidden = denoiser_of(pipeline).up_blocks[0].resnets[-1].out_channels
    meta = copy.deepcopy(denoiser_of(pipeline)).to("meta")
    planned = plan_denoiser(meta, assign_schemes(meta, config, pattern=model.layers, min_size=model.min_size))
    options = {"model": model, "calibration_config": CALIBRATION, "device": "cpu"}
    quantize(tmp_path, pipeline, calibration, config=config, **options)
    file = tmp_path / "denoiser" / "diffusion_pytorch_model.safetensors"
    assert file.stat().st_size == planned.bytes
    loaded = UNet2DConditionModel.from_pretrained(tmp_path / "denoiser")
    schemes = {name.rpartition(".")[2]: layer.weight.scheme for name, layer in quantized_layers(loaded).items()}
    assert {name: scheme.split for name, scheme in schemes.items()} == {"conv1": None, "conv_shortcut": hidden}
    made = denoiser_of(pipeline)
    for name, layer in quantized_layers(loaded).items():
        assert torch.equal(layer.decoded(torch.float32), made.get_submodule(name).decoded(torch.float32))
    (tmp_path / "more").mkdir()
    with pytest.raises(UserError, match=r"quantize\.samples=1000 of"):
        more = dataclasses.replace(config, samples=1000)
        quantize(tmp_path / "more", load_pipeline(model, device="cpu"), calibration, config=more, **options)


def test_records_tell_errors_and_true_bits(calibration, tmp_path):
    _, summary = run(tmp_path, calibration, **KINDS["trellis"])
    layers = json.loads((tmp_path / "layers.json").read_text())
    weights = sum(np.prod(layer["shape"]) for layer in layers["quantized"])
    own = sum(layer["bits"] * np.prod(layer["shape"]) for layer in layers["quantized"])
    table = 16 * 4096
    assert (own + table) / weights == pytest.approx(summary["bits_quantized"])
    assert summary["bits_quantized"] <= 4
    assert all(0 < layer["relative_output_error"] < 0.1 for layer in layers["quantized"])
    assert 0 < summary["relative_output_error"] < 0.1


def test_layers_that_fail_name_themselves(calibration, tmp_path):
    pipeline = load_pipeline(MODEL, device="cpu")
    denoiser_of(pipeline).mid_block.resnets[0].conv2.weight.data[0, 0, 0, 0] = torch.nan
    with pytest.raises(UserError, match=r"mid_block\.resnets\.0\.conv2"):
        quantize(
            tmp_path, pipeline, calibration, config=RtnConfig(bits=4), model=MODEL,
            calibration_config=CALIBRATION, device="cpu",
        )  # fmt: skip


def test_groups_follow_the_order_of_execution(calibration, monkeypatch):
    from vqdm.calibration import collect as hessians
    from vqdm.models.specs import layer_specs

    denoiser = denoiser_of(load_pipeline(MODEL, device="cpu"))
    specs = layer_specs(denoiser, pattern=LAYERS)
    groups = execution_groups(denoiser, specs, calibration)
    firsts = [group[0].name.split(".")[0] for group in groups]
    assert firsts == ["down_blocks", "mid_block", "up_blocks"]
    assert sorted(s.name for group in groups for s in group) == sorted(s.name for s in specs)
    assert len(teacher_groups(groups)) == 1
    monkeypatch.setattr(hessians, "TEACHER_BYTES", 1)
    assert [group[0].name for group in teacher_groups(groups)] == [s.name for group in groups for s in group]


def test_the_error_by_timestep_adds_up_to_the_error(calibration, tmp_path):
    """Each timestep weighs by the power of the original's outputs at it; steps of the sampler are those recorded."""
    _, summary = run(tmp_path, calibration, kind="rtn", bits=3)
    errors = json.loads((tmp_path / "errors.json").read_text())
    power: dict[float, float] = {}
    for call in recorded_calls(calibration):
        timestep = float(call["timestep"].flatten()[0])
        power[timestep] = power.get(timestep, 0.0) + float(call["output"].double().square().sum())
    assert errors["timesteps"] == sorted(power) and len(power) == 3
    parts = zip(errors["timesteps"], errors["relative_output_errors"], strict=True)
    total = sum(error * power[timestep] for timestep, error in parts) / sum(power.values())
    assert total == pytest.approx(summary["relative_output_error"], rel=1e-9)


def test_sensitivity_is_the_output_error_of_one_layer_alone(calibration, tmp_path):
    pipeline = load_pipeline(MODEL, device="cpu")
    denoiser = denoiser_of(pipeline)
    before = {name: tensor.clone() for name, tensor in denoiser.state_dict().items()}
    config = TrellisConfig(bits=3, allocation="sensitivity")
    (tmp_path / "harm").mkdir()
    sensitivity(tmp_path / "harm", pipeline, calibration, config=config, model=MODEL, device="cpu")
    assert same(before, denoiser.state_dict())
    harm = read_harm(tmp_path / "harm")
    assert all(points[min(points)] > points[max(points)] > 0 for points in harm.values())
    name = "up_blocks.1.resnets.0.conv2"
    alone = ModelConfig(**{**MODEL.__dict__, "layers": name.replace(".", r"\.") + "$"})
    bits = min(harm[name])
    (tmp_path / "alone").mkdir()
    size = int(np.prod(before[f"{name}.weight"].shape))
    quantize(
        tmp_path / "alone", pipeline, calibration,
        config=TrellisConfig(bits=bits + 16 * 4096 / size), model=alone,
        calibration_config=CALIBRATION, device="cpu",
    )  # fmt: skip
    calls = list(recorded_calls(calibration))
    calls = calls[len(calls) // 4 // 2 :: max(1, len(calls) // 4)][:4]
    assert harm[name][bits] == pytest.approx(output_error(denoiser, calls, "cpu"), rel=0.05)


def test_normal_timesteps_are_those_of_ptq4dm():
    config = CalibrationConfig(timesteps="normal", recorded_steps=1)
    levels = [1 - (min(recorded_positions(config, 1000, f"{i:06d}")) + 0.5) / 1000 for i in range(3000)]
    # N(0.4, 0.4) cut to (0, 1]
    import scipy.stats

    expected = scipy.stats.truncnorm(-1, 1.5, loc=0.4, scale=0.4)
    assert scipy.stats.kstest(levels, expected.cdf).pvalue > 1e-3
    assert recorded_positions(config, 1000, "x") == recorded_positions(config, 1000, "x")
    several = CalibrationConfig(timesteps="normal", recorded_steps=4)
    assert len(recorded_positions(several, 20, "x")) == 4
    assert recorded_positions(several, 3, "x") == {0, 1, 2}


def test_a_stop_does_not_wait_for_the_layers_at_work(tmp_path):
    """Each takes up to a minute; what is at work then goes down with the process."""
    started, release = threading.Event(), threading.Event()

    class Slow(Encoder):
        config, codec = None, SimpleNamespace(encoder_bytes=lambda shape, config: 1)

        def __init__(self):
            """Nothing to encode with."""

        def encode(self, problem, hessian, target=None):
            started.set()
            release.wait(60)
            return {}

    def stop(*_, **__):
        assert started.wait(20)
        raise KeyboardInterrupt

    problems = [(SimpleNamespace(name=str(i), shape=(1, 1), size=1), None) for i in range(3)]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("vqdm.stages.quantize.concurrent.futures.as_completed", stop)
        Slow().encode_all(problems, {}, workers=1, layers=SimpleNamespace(begin=lambda spec: None))
    assert not release.is_set(), "it came back while a layer was at work"
    release.set()
