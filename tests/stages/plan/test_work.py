"""Work of an image against torch's own counter on real calls, and what a plan says of it."""

import dataclasses

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from tiny_world import run
from torch.utils.flop_counter import FlopCounterMode

import vqdm
from vqdm.acceleration.branch_cache import cache_of
from vqdm.config.acceleration import ActivationsConfig, CacheConfig
from vqdm.config.few_step import FewStepConfig
from vqdm.config.options import Config, EvaluateConfig, ModelConfig, SamplerConfig
from vqdm.models.loader import denoiser_on_meta, load_pipeline
from vqdm.models.specs import layer_specs
from vqdm.stages.graph.acceleration import tells_work
from vqdm.stages.plan.forward import denoiser_inputs
from vqdm.stages.plan.work import work_of

TINY = Config(model=ModelConfig(builtin="tiny"))


def work(*, removed=(), weights=None, **changes):
    return work_of(dataclasses.replace(TINY, **changes), weights=weights or {}, removed=list(removed))


@pytest.mark.parametrize("depth", [1, 2])
def test_a_cached_call_takes_what_torch_counts(depth):
    pipeline = load_pipeline(TINY.model, device="cpu")
    pipeline.unet.set_attn_processor(AttnProcessor())  # whose products torch counts
    vqdm.enable_cache(pipeline, steps=20, interval=2, depth=depth)
    arguments, counts = denoiser_inputs(pipeline.unet, batch=1), []
    for timestep in cache_of(pipeline.unet).schedule.timesteps[:2]:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            pipeline.unet(**arguments | {"timestep": timestep})
        counts.append(counter.get_total_flops() / 2)
    found = work(cache=CacheConfig(kind="branch", depth=depth))
    assert (found.calls, found.full_calls) == (20, 10)
    assert found.macs == 10 * sum(counts)
    assert found.cached_call == pytest.approx(counts[1] / counts[0])
    assert found.relative_macs == pytest.approx(0.5 * (1 + counts[1] / counts[0]))


def test_fewer_steps_and_removed_operators_take_less():
    assert work(evaluate=EvaluateConfig(steps=10, original_steps=20)).relative_macs == 0.5
    whole, pruned = work(), work(removed=["up_blocks.0.attentions.0", "mid_block.resnets.0"])
    assert whole.relative_macs == 1 and pruned.relative_macs < 0.97
    sampled = dataclasses.replace(TINY.model, sampler=SamplerConfig(steps=50))
    cached = work(model=sampled, cache=CacheConfig(kind="branch", interval=3))
    assert (cached.calls, cached.full_calls) == (50, 17)


def test_bit_operations_count_both_factors():
    names = [spec.name for spec in layer_specs(denoiser_on_meta(TINY.model))]
    assert work().relative_bit_operations == 1
    only = work(weights=dict.fromkeys(names, 4.0))
    share = work(activations=ActivationsConfig(kind="dynamic", bits=4)).quantized_inputs
    assert only.relative_bit_operations == pytest.approx(1 - share * 12 / 16)
    both = work(weights=dict.fromkeys(names, 4.0), activations=ActivationsConfig(kind="dynamic", bits=8))
    assert both.relative_bit_operations == pytest.approx(1 - share * (1 - 4 * 8 / 256))


def test_work_is_told_beside_other_steps_though_there_are_none_fewer():
    asked = dataclasses.replace(TINY, evaluate=EvaluateConfig(original_steps=20))
    assert tells_work(asked) and not tells_work(TINY)
    assert tells_work(dataclasses.replace(TINY, cache=CacheConfig(kind="branch")))
    taught = FewStepConfig(kind="dmd", originals="teacher")
    assert not tells_work(dataclasses.replace(asked, few_step=taught))


def test_a_plan_says_the_work_and_no_time_of_what_is_simulated(tmp_path):
    on = ("prune=ld10", "activations=a8", "cache=taylor2")
    done = run("+experiment=tiny_trellis3", *on, "plan=true", "tracker=none", f"results_dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith(("prune:", "activations:", "cache:", "work"))]
    assert [line.split(":")[0] for line in lines] == ["prune", "activations", "cache", "work of an image"]
    assert "which operators go is scored first" in lines[0] and "simulated, no faster" in lines[1]
    assert "time not estimated; activations are simulated" in next(
        x for x in done.stdout.splitlines() if "  images" in x
    )
    assert "20 calls, 10 full; a cached call takes 4.4% of a full one's" in lines[2] and "at most 0.522" in lines[3]
