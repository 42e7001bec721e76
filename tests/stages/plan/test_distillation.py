"""The plan of distillation: counts in closed form, memory against a training that really runs."""

import dataclasses
from functools import cache, partial

import pytest
import torch
from composed import compose
from diffusers import UNet2DConditionModel
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from unets import SMALL

from vqdm.calibration.recording import OUTPUT, record_call
from vqdm.config.options import FinetuneConfig
from vqdm.distillation.end_to_end import Distillation
from vqdm.distillation.trajectories import Trajectories, pack
from vqdm.models.loader import denoiser_on_meta
from vqdm.seeds import torch_generator
from vqdm.stages.plan.cost import stage_costs, stage_names
from vqdm.stages.plan.counts import training_counts, trajectory_counts
from vqdm.stages.plan.forward import denoiser_inputs, measure_denoiser
from vqdm.stages.plan.layers import assignment_of
from vqdm.stages.plan.rates import CARDS, REACHED, Machine
from vqdm.stages.plan.recorded import Recorded
from vqdm.stages.plan.training import Autocast, measure_step, prepare_student
from vqdm.weights.layers import quantized_layers, swap_empty

CPU = Machine("cpu", 1)
TINY = ("+experiment=tiny_codec", "quantize=vq3")
ROWS_EACH = 2  # both halves of guidance
ESTIMATED: dict[str, tuple] = {}  # by configuration: a second each


composed = cache(compose)  # nobody changes them


def counted(finetune=None, **changes):
    config = composed("+experiment=sdxl_vq3", "finetune=paper")
    own = dataclasses.replace(config.finetune.trajectories, **changes)
    config = dataclasses.replace(
        config, finetune=dataclasses.replace(config.finetune, trajectories=own, **(finetune or {}))
    )
    prompts = own.n + own.validation
    options = {"prompts": prompts, "guided": 2}
    return trajectory_counts(config, **options), training_counts(config, **options)


def test_the_papers_recipe_in_numbers():
    recorded, trained = counted()
    assert (recorded.prompts, recorded.rows, recorded.samples) == (528, 528 * 50 * 2, 528 * 50)
    assert (trained.steps, trained.samples, trained.rows, trained.parts) == (1600, 102_400, 204_800, 102_400)
    assert trained.samples == 4 * 512 * 50  # four epochs
    assert trained.validations == 33 and trained.validation_rows == 33 * 256 * 2
    assert trained.shown_images == 33 * 4 and trained.shown_rows == 33 * 4 * 50 * 2
    others = trained.validation_rows + trained.shown_rows
    assert trained.forwards(checkpointing=False) == 3 * 204_800 + others
    assert trained.forwards(checkpointing=True) == 4 * 204_800 + others


def test_what_is_sampled_and_what_is_kept():
    recorded, _ = counted(sampler_steps=[10, 25], recorded_steps=20)
    assert recorded.rows == 528 * 35 * 2 and recorded.samples == 528 * 30 and recorded.captions == 528 * 2
    recorded, _ = counted(along="data")
    assert recorded.rows == (2 * 512 + 16) * 50 * 2 and recorded.encoded == 512
    recorded, trained = counted(along="student")
    assert recorded.prompts == 16 and recorded.rows == 16 * 50 * 2
    rounds, captions = 32, 64  # 50 steps of 64 samples each; 50 samples of a caption
    assert trained.own_rows == trained.teacher_rows == rounds * captions * 50 * 2


def test_the_teacher_runs_along_for_its_features():
    _, without = counted()
    _, with_features = counted({"feature_weight": 0.1})
    assert without.teacher_rows == 0 and with_features.teacher_rows == 204_800


def test_the_last_step_is_always_validated():
    counts = [counted({"steps": steps})[1].validations for steps in (50, 99, 100, 101)]
    assert counts == [2, 3, 3, 4]


def test_stages_are_those_of_the_graph():
    assert stage_names(composed(*TINY, "finetune=both"))[:5] == [
        "calibrate",
        "quantize",
        "tune_blocks",
        "trajectories",
        "finetune",
    ]
    assert "finetune" not in stage_names(composed(*TINY, "finetune=blocks"))
    assert stage_names(compose("+experiment=tiny_fp")) == ["images", "evaluate"]


def tiny_student(*overrides):
    config = composed(*TINY, *overrides)
    denoiser = denoiser_on_meta(config.model)
    return swap_empty(denoiser, assigned(denoiser, config).quantized)


def assigned(denoiser, config):
    return assignment_of(denoiser, config.quantize, pattern=config.model.layers, min_size=config.model.min_size)


def estimated(config: FinetuneConfig, *, teacher=None):
    """Bytes of a training beside the student, as a plan adds them up, and the cost of a step."""
    key = str((config, teacher is None))
    if key not in ESTIMATED:
        ESTIMATED[key] = _estimated(config, teacher=teacher)
    return ESTIMATED[key]


def _estimated(config: FinetuneConfig, *, teacher):
    micro = config.micro_batch_size or config.batch_size
    student = prepare_student(tiny_student(), config)
    step = measure_step(
        student,
        config,
        rows=ROWS_EACH * micro,
        rows_each=ROWS_EACH,
        size=None,
        device="cpu",
        accumulates=micro < config.batch_size,
        teacher=teacher,
    )
    update = (1 + config.relative_rate) * 4 * student.trained
    always = 4 * student.drifting + 8 * student.trained + student.units
    return always + max(step.step, update), step


def really(config: FinetuneConfig, directory, *, has_teacher=False) -> int:
    """The most that torch's allocator holds beside the student and its inputs, by its own profiler."""
    student = _filled(tiny_student())
    teacher = _filled(denoiser_on_meta(composed(*TINY).model)) if has_teacher else None
    samples = _trajectories(student, directory, captions=config.batch_size)
    training = Distillation(student, lambda step: samples, samples, config, 3.0, None, teacher=teacher)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(profile_memory=True, activities=activities) as profiler:
        training.run(directory)
    events = profiler.profiler.kineto_results.events()
    sizes = torch.tensor([event.nbytes() for event in events if event.name() == "[memory]"])
    return int(sizes.cumsum(0).max())


def _filled(model: nn.Module) -> nn.Module:
    model = nn.Module.to(model.to_empty(device="cpu"), torch.float32).eval().requires_grad_(False)
    draw = torch_generator(0, "plan")
    for parameter in model.parameters():
        parameter.normal_(0, 0.02, generator=draw)
    for buffer in model.buffers():
        buffer.zero_()
    return model


def _trajectories(denoiser, directory, *, captions: int) -> Trajectories:
    arguments = denoiser_inputs(denoiser, batch=ROWS_EACH * captions)
    calls = []
    for timestep in (0.0, 500.0):
        changed = {"sample": arguments["sample"] + timestep, "timestep": torch.tensor(timestep)}
        call = record_call(denoiser, (), arguments | changed)
        calls.append(call | {OUTPUT: torch.zeros_like(call["sample"])})
    (directory / "samples.safetensors").write_bytes(pack(calls, captions=captions))
    return Trajectories([directory / "samples.safetensors"])


SETTINGS = {
    "plain": {},
    "checkpointing": {"checkpointing": True},
    "bfloat16": {"checkpointing": True, "precision": "bfloat16", "micro_batch_size": 2},
    "codes": {"checkpointing": True, "tune_codes": True},
    "features": {"feature_weight": 0.1},
}


def settings(name: str, **changes) -> FinetuneConfig:
    options = {"steps": 2, "batch_size": 4, "validation_samples": 1, "learning_rate": 1e-3}
    return FinetuneConfig(**(options | SETTINGS[name] | changes))


@pytest.mark.parametrize("name", SETTINGS)
def test_memory_is_what_a_training_takes(name, tmp_path):
    has_teacher = name == "features"
    teacher = denoiser_on_meta(composed(*TINY).model) if has_teacher else None
    found, _ = estimated(settings(name), teacher=teacher)
    assert found == pytest.approx(really(settings(name), tmp_path, has_teacher=has_teacher), rel=0.2)


def test_memory_goes_as_it_should():
    plain, checkpointing, codes = (estimated(settings(name))[0] for name in ("plain", "checkpointing", "codes"))
    assert checkpointing < plain and checkpointing < codes
    more, fewer = (estimated(settings("plain", batch_size=size))[1].step for size in (4, 2))
    assert fewer < more < 2 * fewer  # weights are decoded once for all rows


def test_autocast_is_torchs_own():
    """Of every module's output the dtype, on meta as on tensors that torch takes for a CPU's."""

    def dtypes(unet, context) -> dict[str, torch.dtype]:
        found = {}

        def keep(name, _module, _args, output):
            found[name] = (output[0] if isinstance(output, tuple) else output).dtype

        for name, module in unet.named_modules():
            module.register_forward_hook(partial(keep, name))
        with torch.no_grad(), context:
            unet(**denoiser_inputs(unet, batch=2), return_dict=False)
        return found

    with torch.device("meta"):
        found = dtypes(UNet2DConditionModel(**SMALL), Autocast("bfloat16", device="cpu"))
    with FakeTensorMode():
        wanted = dtypes(UNet2DConditionModel(**SMALL), torch.autocast("cpu", torch.bfloat16))
    assert found == wanted and set(found.values()) == {torch.float32, torch.bfloat16}


def tiny_costs(*overrides, machine=CPU):
    config = composed(*TINY, *overrides)
    denoiser = denoiser_on_meta(config.model)
    numbers = sum(parameter.numel() for parameter in denoiser.parameters())
    own = config.finetune.trajectories
    found = stage_costs(
        config,
        denoiser,
        assigned(denoiser, config).specs,
        parts={"unet": numbers, "vae": 1000},
        vae=None,
        images=16,
        calibration_prompts=4,
        machine=machine,
        recorded=Recorded(None, config, machine.device),
        student=tiny_student(*overrides),
        finetune_prompts=own.n + own.validation,
    )
    return {stage.name: stage for stage in found}, numbers


def test_the_stages_costs():
    stages, numbers = tiny_costs("finetune=both")
    assert list(stages) == [
        "calibrate",
        "quantize",
        "tune_blocks",
        "trajectories",
        "finetune",
        "teacher_images",
        "images",
        "evaluate",
    ]
    finetune, recorded = stages["finetune"], stages["trajectories"]
    assert "100 steps of 32 = 3,200 samples, 6,400 rows" in finetune.note
    assert all(words in finetune.note for words in ("cached", "resident", "GPU-hours", "estimate", "H100"))
    cached, resident = (finetune.detail["bytes"][name] for name in ("cached", "resident"))
    assert sum(resident.values()) - sum(cached.values()) == 4 * numbers
    assert finetune.memory.host == sum(cached.values()) + (700 << 20) and finetune.memory.device == 0
    assert finetune.seconds > recorded.seconds > 0 and stages["tune_blocks"].seconds > 0
    assert stages["tune_blocks"].detail["blocks"] == 36
    own = denoiser_on_meta(composed(*TINY).model).config
    once = (
        77 * own.cross_attention_dim + own.projection_class_embeddings_input_dim - 6 * own.addition_time_embed_dim + 6
    )
    each = 2 * own.in_channels * own.sample_size**2  # latents, and what the teacher gives
    assert recorded.detail["samples"] == 144 * 20
    assert recorded.detail["disk_bytes"] == 4 * 2 * (144 * 20 * each + 144 * once)


def test_a_teacher_that_runs_along_is_resident_and_shares_what_is_frozen():
    frozen = [f"finetune.train.{kind}=false" for kind in ("biases", "norms", "rest")]
    stages, numbers = tiny_costs("finetune=end_to_end", "finetune.trajectories.along=student", *frozen)
    parts = stages["finetune"].detail["bytes"]["resident"]
    assert stages["finetune"].memory.host == sum(parts.values()) + (700 << 20)
    student = tiny_student()
    names = [f"{name}.bias" for name, layer in quantized_layers(student).items() if layer.bias is not None]
    assert parts["teacher, less what is shared"] < 4 * numbers - sum(
        4 * student.get_parameter(name).numel() for name in names
    )


def test_a_named_card_need_not_be_here():
    """Its seconds are the work over its data sheet's rates; another's without one has memory and hours, but no time."""
    own = ("finetune=both", "finetune.precision=bfloat16")
    fast, unknown = (tiny_costs(*own, machine=Machine("cuda", 1, card))[0] for card in (CARDS["a100"], None))
    for name in ("tune_blocks", "trajectories", "finetune"):
        assert fast[name].seconds > 0 and "A100" in fast[name].origin
        assert unknown[name].seconds is None and "plan_for" in unknown[name].note
        assert unknown[name].memory == fast[name].memory and fast[name].memory.device > 0
    detail = fast["finetune"].detail
    assert detail["gpu_hours"] == pytest.approx((fast["finetune"].seconds + fast["trajectories"].seconds) / 3600)
    assert "H100" in unknown["finetune"].detail["gpu_hours_from"]
    assert unknown["finetune"].detail["gpu_hours"] > unknown["trajectories"].detail["gpu_hours"] > 0
    rows, cost = fast["trajectories"].detail["rows"], sample_cost()
    rates = Machine("cuda", 1, CARDS["a100"]).rates("float32")
    assert rates.flops == REACHED * 19.5e12
    assert fast["trajectories"].seconds == pytest.approx(
        rows * (cost.flops / rates.flops + cost.written_bytes / 2.04e12)
    )


def sample_cost():
    config = composed(*TINY)
    denoiser = denoiser_on_meta(config.model)
    return measure_denoiser(denoiser, [], size=config.model.sampler.size).sample
