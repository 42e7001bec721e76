"""PixArt, SD3 and FLUX on the way that U-Nets take: loaded, sampled, recorded, quantized."""

import dataclasses
import math
import shutil
from pathlib import Path

import pytest
import torch
from denoisers import SIZE, tiny_flux, tiny_pixart, tiny_sd3
from diffusers.models.embeddings import CombinedTimestepTextProjEmbeddings

from vqdm.api import compress
from vqdm.calibration.blocks import blocks_of
from vqdm.calibration.calls import recorded_calls, token_limit
from vqdm.calibration.collect import collect, drive_teacher, execution_groups
from vqdm.calibration.hessian import shrunk
from vqdm.calibration.recording import OUTPUT, play_back
from vqdm.codecs import gptq
from vqdm.codecs.allocation import assign_schemes, planned_bits
from vqdm.config.codecs import OPTIONS, GptqConfig, RtnConfig, parse_scheme
from vqdm.config.options import (
    PAPER_PATTERN,
    TRANSFORMER_PATTERN,
    CalibrationConfig,
    Config,
    EvaluateConfig,
    ModelConfig,
    PromptsConfig,
    RescaleConfig,
    SamplerConfig,
)
from vqdm.errors import UserError
from vqdm.hub.checkpoint import checkpoint_size
from vqdm.models.loader import denoiser_of, denoiser_on_meta, load_pipeline, sample
from vqdm.models.specs import layer_specs
from vqdm.prompts import load_prompts
from vqdm.seeds import torch_generator
from vqdm.stages.calibrate import calibrate
from vqdm.stages.graph.experiment import build_graph
from vqdm.stages.quantize import quantize
from vqdm.weights.layers import quantized_layers, swap_empty

KINDS = {"pixart": (tiny_pixart, "dpm_solver"), "sd3": (tiny_sd3, "native"), "flux": (tiny_flux, "native")}
TEXTS = ["a large red circle", "two small blue squares"]
CALIBRATION = CalibrationConfig(source="tiny", n=4, batch_size=2, recorded_steps=2)


@dataclasses.dataclass
class Made:
    """A tiny model, its calibration, and what its denoiser gave while that was recorded."""

    kind: str
    model: ModelConfig
    calibration: Path
    summary: dict
    outputs: list[torch.Tensor]

    def pipeline(self):
        return load_pipeline(self.model, device="cpu")


@pytest.fixture(scope="module", params=KINDS)
def made(request, tmp_path_factory):
    build, scheduler = KINDS[request.param]
    sampler = SamplerConfig(scheduler=scheduler, steps=2, guidance=3.0, size=SIZE)
    directory = build(tmp_path_factory.mktemp(request.param))
    model = ModelConfig(name=request.param, path=str(directory), sampler=sampler)
    pipeline, calibration = load_pipeline(model, device="cpu"), tmp_path_factory.mktemp("calibrate")
    outputs: list[torch.Tensor] = []
    hook = denoiser_of(pipeline).register_forward_hook(lambda _m, _a, output: outputs.append(output[0].clone()))
    prompts = load_prompts(source="tiny", n=CALIBRATION.n, split="train")
    summary = calibrate(calibration, pipeline, prompts, config=CALIBRATION, sampler=sampler)
    hook.remove()
    return Made(request.param, model, calibration, summary, outputs)


def images(pipeline, sampler, *, seeds=(0, 1), output="pt"):
    generators = [torch_generator(seed, "image", 0) for seed in seeds]
    return sample(pipeline, TEXTS, sampler=sampler, generators=generators, output=output)


def test_every_image_has_its_own_prompt_and_noise(made):
    pipeline = made.pipeline()
    both = images(pipeline, made.model.sampler)
    assert both.shape == (2, 3, SIZE, SIZE) and both.isfinite().all()
    assert torch.equal(both, images(pipeline, made.model.sampler))
    other = images(pipeline, made.model.sampler, seeds=(0, 2))
    assert torch.equal(both[0], other[0]) and not torch.equal(both[1], other[1])
    pictures = images(pipeline, made.model.sampler, output="pil")
    assert [picture.size for picture in pictures] == [(SIZE, SIZE)] * 2


def test_no_size_is_the_models_own(made):
    pipeline = made.pipeline()
    if made.kind == "flux":  # has no size in its files: diffusers takes 128 latents for every FLUX, too many for a test
        pipeline.default_sample_size = SIZE // 2
    assert images(pipeline, dataclasses.replace(made.model.sampler, size=None)).shape[-2:] == (SIZE, SIZE)


def test_native_keeps_the_schedule_to_the_number(made):
    from diffusers import DiffusionPipeline

    theirs = DiffusionPipeline.from_pretrained(made.model.path, use_safetensors=True)
    sampler = dataclasses.replace(made.model.sampler, scheduler="native")
    ours = load_pipeline(dataclasses.replace(made.model, sampler=sampler), device="cpu")
    assert type(ours.scheduler) is type(theirs.scheduler)
    assert dict(ours.scheduler.config) == dict(theirs.scheduler.config)


@pytest.mark.parametrize("scheduler", ["ddim", "euler", "euler_ancestral", "dpm_solver"])
def test_flow_matching_refuses_samplers_of_diffusion(made, scheduler):
    model = dataclasses.replace(made.model, sampler=dataclasses.replace(made.model.sampler, scheduler=scheduler))
    if made.kind == "pixart":
        assert images(load_pipeline(model, device="cpu"), model.sampler).isfinite().all()
    else:
        with pytest.raises(UserError, match=f"scheduler={scheduler} .*give model.sampler.scheduler=native"):
            load_pipeline(model, device="cpu")


def test_settings_without_effect_are_refused(made):
    sampler = dataclasses.replace(made.model.sampler, scheduler="native", timestep_spacing="trailing")
    model = dataclasses.replace(made.model, sampler=sampler)
    if made.kind == "pixart":
        assert load_pipeline(model, device="cpu").scheduler.config.timestep_spacing == "trailing"
    else:
        with pytest.raises(UserError, match="FlowMatchEulerDiscreteScheduler has no such setting"):
            load_pipeline(model, device="cpu")
    with pytest.raises(UserError, match="nothing to rescale"):
        load_pipeline(dataclasses.replace(made.model, rescale=RescaleConfig(sigma=0.5)), device="cpu")


def test_recorded_calls_play_back_to_the_bit(made):
    calls = list(recorded_calls(made.calibration))
    assert len(calls) == len(made.outputs) == 4  # all of two batches at two steps
    denoiser = denoiser_of(made.pipeline())
    for call, output in zip(calls, made.outputs, strict=True):
        assert torch.equal(call[OUTPUT], output)
        assert torch.equal(play_back(denoiser, call, device="cpu"), output)


def test_prompts_are_counted_by_what_the_pipeline_reads(made):
    pipeline = made.pipeline()
    assert token_limit(pipeline) == {"pixart": 300, "sd3": 24, "flux": 24}[made.kind]
    assert made.summary["tokens"]["prompts"] == 4
    assert made.summary["tokens"]["unknown"] == made.summary["tokens"]["truncated_tokens"] == 0


JOINT = ["to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out.0", "to_add_out"]
SELF = [*JOINT[:3], "to_out.0"]
FF = ["net.0.proj", "net.2"]
NORMS = {"norm1": ["linear"], "norm1_context": ["linear"]}
LAYERS = {
    ("pixart", "transformer_blocks.1"): {"attn1": SELF, "attn2": SELF, "ff": FF},
    ("sd3", "transformer_blocks.0"): NORMS | {"attn": JOINT, "attn2": SELF, "ff": FF, "ff_context": FF},
    ("sd3", "transformer_blocks.1"): NORMS | {"attn": JOINT[:-1], "ff": FF},  # the last: its text goes no further
    ("flux", "transformer_blocks.0"): NORMS | {"attn": JOINT, "ff": FF, "ff_context": FF},
    ("flux", "single_transformer_blocks.0"): {"norm": ["linear"], "attn": JOINT[:3], "": ["proj_mlp", "proj_out"]},
}


def test_layers_of_a_block(made):
    found = {spec.name for spec in layer_specs(denoiser_of(made.pipeline()))}
    for (kind, block), expected in LAYERS.items():
        if kind == made.kind:
            names = {".".join(filter(None, (block, part, n))) for part, inner in expected.items() for n in inner}
            assert {name for name in found if name.startswith(f"{block}.")} == names
    assert not any(name.startswith(("proj_out", "norm_out", "time_text", "context", "x_emb")) for name in found)


def test_groups_are_the_blocks_in_the_order_in_which_they_run(made):
    denoiser = denoiser_of(made.pipeline())
    specs = layer_specs(denoiser)
    groups = execution_groups(denoiser, specs, made.calibration)
    expected = ["transformer_blocks.0", "transformer_blocks.1"]
    if made.kind == "flux":
        expected = ["transformer_blocks.0", "single_transformer_blocks.0"]
    assert [".".join(group[0].name.split(".")[:2]) for group in groups] == expected
    assert sorted(spec.name for group in groups for spec in group) == sorted(spec.name for spec in specs)
    blocks = blocks_of(denoiser, specs, next(recorded_calls(made.calibration)))
    assert (len(blocks) == 2) == (made.kind == "pixart")  # a block that gives two tensors counts layer by layer


def test_hessians_are_those_of_the_inputs(made):
    """Against the plain mean of x xᵀ over all recorded calls."""
    denoiser = denoiser_of(made.pipeline())
    specs = {spec.name: spec for spec in layer_specs(denoiser)}
    block = "single_transformer_blocks.0" if made.kind == "flux" else "transformer_blocks.0"
    name = f"{block}.proj_out" if made.kind == "flux" else f"{block}.ff.net.2"
    chosen = [specs[name], *([specs[f"{block}.norm1.linear"]] if made.kind == "sd3" else [])]
    rows: dict[str, list] = {spec.name: [] for spec in chosen}
    for spec in chosen:
        denoiser.get_submodule(spec.name).register_forward_pre_hook(
            lambda _m, args, found=rows[spec.name]: found.append(args[0].flatten(0, -2).double())
        )
    drive = drive_teacher(denoiser, made.calibration, device="cpu")
    found = collect(denoiser, chosen, drive, config=GptqConfig())
    for spec in chosen:
        tokens = torch.cat(rows[spec.name])
        expected = tokens.T @ tokens / len(tokens)
        if spec.name.endswith("norm1.linear"):  # 16 tokens, and as many more as it has inputs, alike all round
            width = spec.shape[1]
            everywhere = torch.eye(width) * expected.diagonal().mean()
            expected = (len(tokens) * expected + width * everywhere) / (len(tokens) + width)
        assert torch.allclose(found[spec.name].double(), expected, rtol=1e-4, atol=1e-4 * float(expected.max()))


def quantized(made, directory, **options) -> dict:
    pipeline = made.pipeline()
    summary = quantize(
        directory, pipeline, made.calibration, config=OPTIONS[options["kind"]](**options), model=made.model,
        calibration_config=CALIBRATION, device="cpu",
    )  # fmt: skip
    assert images(pipeline, made.model.sampler).isfinite().all()
    return summary


QUANTIZERS = {
    "rtn8": {"kind": "rtn", "bits": 8},
    "rtn3": {"kind": "rtn", "bits": 3},
    "trellis4": {"kind": "trellis", "bits": 4},
    "additive2": {"kind": "additive", "bits": 2, "group_size": 8, "codebook_bits": 4},
    "adaround3": {"kind": "adaround", "bits": 3, "iterations": 3},
}


def test_fewer_bits_do_more_harm_and_cost_what_the_plan_says(made, tmp_path):
    errors = {}
    for name, options in QUANTIZERS.items():
        (tmp_path / name).mkdir()
        summary = quantized(made, tmp_path / name, **options)
        errors[name] = summary["relative_output_error"]
        plan = planned_bits(
            denoiser_on_meta(made.model), OPTIONS[options["kind"]](**options), pattern=None, min_size=16
        )
        assert plan.bits_per_weight == pytest.approx(summary["bits_per_weight"], abs=1e-12)
    assert 0 < errors["rtn8"] < 1e-4
    assert errors["rtn8"] < errors["trellis4"] < errors["additive2"] < errors["rtn3"] < 0.05
    assert errors["adaround3"] < 0.05


@pytest.mark.parametrize("scheme", ["rtn4", "trellis4"])
def test_compressed_saved_loaded_and_sampled(made, scheme, tmp_path):
    from diffusers import DiffusionPipeline

    pipeline, planned = made.pipeline(), denoiser_on_meta(made.model)
    config = parse_scheme(scheme)
    swap_empty(planned, assign_schemes(planned, config, pattern=None, min_size=16).quantized)
    compress(pipeline, config, TEXTS, steps=2, size=SIZE, batch_size=2, recorded_steps=1)
    pipeline.save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    ours, theirs = denoiser_of(pipeline), denoiser_of(again)
    assert quantized_layers(theirs).keys() == quantized_layers(ours).keys()
    assert all(torch.equal(tensor, theirs.state_dict()[name]) for name, tensor in ours.state_dict().items())
    before, after = (images(p, made.model.sampler, output="np") for p in (pipeline, again))
    assert abs(before - after).max() <= 1 / 255
    file = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"
    assert file.stat().st_size == checkpoint_size(planned).total


def test_students_hessians_come_from_the_same_loop(made, tmp_path):
    assert quantized(made, tmp_path, kind="gptq", bits=4, hessian_from="student")["relative_output_error"] < 0.01


def test_a_pattern_that_finds_nothing_is_refused(made):
    with pytest.raises(UserError, match=r"model.layers=up_blocks selects no layer of \w+Transformer2DModel"):
        assign_schemes(denoiser_on_meta(made.model), RtnConfig(), pattern="up_blocks", min_size=16)


def layers_in_graph(tmp_path, **model) -> str:
    prompts = PromptsConfig(source="tiny", n=2, split="test")
    config = Config(
        model=ModelConfig(**model), calibration=CALIBRATION, quantize=RtnConfig(),
        evaluate=EvaluateConfig(prompts=prompts, metrics=["paired"]),
    )  # fmt: skip
    return build_graph(config, cache=tmp_path / "hashes.json").quantization.quantize.config["layers"]


def test_fingerprints_take_the_pattern_of_the_model(made, tmp_path):
    assert layers_in_graph(tmp_path, path=made.model.path) == TRANSFORMER_PATTERN
    assert layers_in_graph(tmp_path, path=made.model.path, layers="ff") == "ff"
    assert layers_in_graph(tmp_path, builtin="tiny") == PAPER_PATTERN
    assert layers_in_graph(tmp_path, hub_id="nobody/nothing", revision="0") == PAPER_PATTERN


def test_a_damaged_pipeline_is_one_line(made, tmp_path):
    broken = shutil.copytree(made.model.path, tmp_path / "broken")
    (broken / "scheduler" / "scheduler_config.json").write_text("{")
    with pytest.raises(UserError, match=r"scheduler_config\.json is not JSON"):
        load_pipeline(dataclasses.replace(made.model, path=str(broken)), device="cpu")


@torch.no_grad()
def test_a_shrunk_hessian_serves_timesteps_that_were_not_recorded():
    """An adaptive norm's linear at 3 bits, on four timesteps of few images; judged on all timesteps."""
    width, generator = 128, torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        embed = CombinedTimestepTextProjEmbeddings(width, 64)
    for parameter in embed.parameters():
        if parameter.ndim == 2:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 1.5 / math.sqrt(parameter.shape[1]))
    weight = torch.randn(3 * width, width, generator=generator)

    def tokens(times, images):
        times = torch.tensor(times * images)
        return torch.nn.functional.silu(embed(times, torch.randn(len(times), 64, generator=generator)))

    def error(hessian):
        change = gptq.encode(weight, hessian, bits=3, act_order=True, damping=0.01, clip="mse", layer="x")() - weight
        return float((everywhere @ change.T).square().sum() / (everywhere @ weight.T).square().sum())

    everywhere = tokens([float(t) for t in range(0, 1000, 7)], 2)
    for images_ in (8, 32, 128):
        seen = tokens([125.0, 375.0, 625.0, 875.0], images_)
        hessian = seen.T @ seen / len(seen)
        found = shrunk(hessian, len(seen))
        assert torch.trace(found) == pytest.approx(torch.trace(hessian).item(), rel=1e-5)
        assert error(found) < min(0.97 * error(hessian), 0.8 * error(torch.eye(width)))
