"""A cache changes what is asked for and nothing else: not the next image, not full calls, not another sampler."""

import copy

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from unets import small_unet

import vqdm
from vqdm.acceleration.branch_cache import Schedule, StoredCache, add_cache, cache_of, predicted
from vqdm.acceleration.features import CorrectionSums, FeatureTap, ReuseCosts, corrections
from vqdm.config.options import ModelConfig, SamplerConfig
from vqdm.errors import UserError
from vqdm.models.loader import load_pipeline, sample
from vqdm.seeds import torch_generator

STEPS = 8
SAMPLER = SamplerConfig(steps=STEPS, guidance=3.0)
CAPTIONS = ["a red circle left of a blue square", "two green triangles", "a yellow star"]


@pytest.fixture(scope="module")
def pipeline():
    return load_pipeline(ModelConfig(builtin="tiny", sampler=SAMPLER), device="cpu")


@pytest.fixture(autouse=True)
def plain(request):
    yield
    if "pipeline" in request.fixturenames:
        vqdm.disable_cache(request.getfixturevalue("pipeline"))


def latents(pipeline, captions=CAPTIONS, *, steps=STEPS, seed=0):
    generators = [torch_generator(seed, "test", caption) for caption in captions]
    sampler = SamplerConfig(steps=steps, guidance=3.0)
    return sample(pipeline, captions, sampler=sampler, generators=generators, output="latent")


def schedule(calls=STEPS, **changes):
    options = {"full": tuple(range(0, calls, 2)), "depth": 1, "predict": "reuse"} | changes
    return Schedule("DDIMScheduler", calls, tuple(float(calls - i) for i in range(calls)), **options)


def test_all_calls_full_give_identical_images(pipeline):
    plain = latents(pipeline)
    vqdm.enable_cache(pipeline, steps=STEPS, interval=1)
    assert torch.equal(latents(pipeline), plain)
    vqdm.disable_cache(pipeline)
    assert torch.equal(latents(pipeline), plain)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("predict", ["reuse", "linear"])
def test_two_images_in_a_row_are_those_of_two_fresh_caches(pipeline, depth, predict):
    options = {"steps": STEPS, "interval": 3, "depth": depth, "predict": predict}
    vqdm.enable_cache(pipeline, **options)
    row = [latents(pipeline, [caption]) for caption in CAPTIONS]
    for caption, first in zip(CAPTIONS, row, strict=True):
        vqdm.enable_cache(pipeline, **options)
        assert torch.equal(latents(pipeline, [caption]), first)
    assert not torch.equal(row[0], row[1])


def test_a_sampling_that_stopped_half_way_leaves_nothing_behind(pipeline):
    vqdm.enable_cache(pipeline, steps=STEPS, interval=3)
    whole = latents(pipeline, CAPTIONS[:1])

    def stop(pipe, step, timestep, tensors):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipeline(CAPTIONS[1], num_inference_steps=STEPS, callback_on_step_end=stop)
    assert torch.equal(latents(pipeline, CAPTIONS[:1]), whole)


def test_a_batch_gives_what_its_images_give_alone(pipeline):
    vqdm.enable_cache(pipeline, steps=STEPS, interval=2)
    together = latents(pipeline)
    alone = torch.cat([latents(pipeline, [caption]) for caption in CAPTIONS])
    assert torch.allclose(together, alone, atol=2e-4)


class _Slow:
    """DeepCache written out for tiny's U-Net: diffusers' forward, with the deep part taken from the last full call."""

    def __init__(self, unet):
        self.unet, self.feature = unet, None

    @torch.no_grad()
    def __call__(self, full, sample, timestep, text, added):
        unet = self.unet
        emb = unet.time_embedding(unet.get_time_embed(sample=sample, timestep=timestep))
        emb = emb + unet.get_aug_embed(emb=emb, encoder_hidden_states=text, added_cond_kwargs=added)
        hidden = unet.conv_in(sample)
        last = unet.up_blocks[-1]
        if full:
            skips, x = [hidden], hidden
            for block in unet.down_blocks:
                extra = {"encoder_hidden_states": text} if hasattr(block, "attentions") else {}
                x, more = block(hidden_states=x, temb=emb, **extra)
                skips += more
            x = unet.mid_block(x, emb, encoder_hidden_states=text)
            for block in unet.up_blocks[:-1]:
                mine, skips = skips[-len(block.resnets) :], skips[: -len(block.resnets)]
                extra = {"encoder_hidden_states": text} if hasattr(block, "attentions") else {}
                x = block(hidden_states=x, temb=emb, res_hidden_states_tuple=tuple(mine), **extra)
            self.feature = last.resnets[0](torch.cat([x, skips[1]], 1), emb)
        x = last.resnets[1](torch.cat([self.feature, hidden], 1), emb)
        return unet.conv_out(unet.conv_act(unet.conv_norm_out(x)))


def test_reuse_is_deepcache_written_out(pipeline):
    unet, generator = pipeline.unet, torch.Generator().manual_seed(0)
    slow, own = _Slow(copy.deepcopy(unet)), schedule()
    text = torch.randn(2, 16, unet.config.cross_attention_dim, generator=generator)
    added = {"text_embeds": torch.randn(2, 128, generator=generator), "time_ids": torch.full((2, 6), 32.0)}
    add_cache(unet, StoredCache(own))
    for call, timestep in enumerate(own.timesteps):
        noisy = torch.randn(2, 4, 8, 8, generator=generator)
        expected = slow(call in own.full, noisy, timestep, text, added)
        with torch.no_grad():
            found = unet(noisy, timestep, text, added_cond_kwargs=added).sample
        assert torch.allclose(found, expected, atol=1e-5), call


def test_skips_that_a_deeper_branch_reads_are_its_own():
    """With three units in the last up block, depth 2 reads the first unit's skip and not a placeholder."""
    unet, own = _frozen_time(small_unet(layers_per_block=2)), schedule(full=(0, 4))
    noisy, text = torch.ones(1, 4, 8, 8), torch.ones(1, 5, 32)
    for depth in (1, 2, 3):
        add_cache(unet, StoredCache(schedule(full=(0, 4), depth=depth)))
        with torch.no_grad():
            outputs = [unet(noisy, timestep, text).sample for timestep in own.timesteps]
        assert all(torch.allclose(output, outputs[0], atol=1e-5) for output in outputs), depth


def _frozen_time(unet):
    """A U-Net whose calls are the same at all timesteps, so that every reused feature is exact."""
    unet.time_embedding.register_forward_hook(lambda module, args, output: torch.zeros_like(output))
    return unet


def test_a_cached_call_runs_the_shallow_layers_only(pipeline):
    ran = []
    hooks = [
        module.register_forward_pre_hook(lambda *_, name=name: ran.append(name))
        for name, module in pipeline.unet.named_modules()
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))
    ]
    vqdm.enable_cache(pipeline, steps=STEPS, interval=2)
    cache, by_call = cache_of(pipeline.unet), {}

    def note(*_):
        by_call[cache.call] = set(ran)
        ran.clear()

    hooks.append(pipeline.unet.register_forward_hook(note))
    latents(pipeline, CAPTIONS[:1])
    for hook in hooks:
        hook.remove()
    shallow = {name for name in by_call[1] if not name.startswith(("time", "add"))}
    parts = ("conv1", "conv2", "conv_shortcut", "time_emb_proj")
    assert shallow == {"conv_in", "conv_out", *(f"up_blocks.2.resnets.1.{part}" for part in parts)}
    assert by_call[1] == by_call[7] and by_call[0] == by_call[6] > by_call[1]


def test_another_number_of_steps_is_refused_and_leaves_nothing_behind(pipeline):
    vqdm.enable_cache(pipeline, steps=STEPS, interval=2)
    with pytest.raises(UserError, match="the cache is for 8 calls of DDIMScheduler"):
        latents(pipeline, steps=9)
    assert latents(pipeline).isfinite().all()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"steps": 4}, "at least 8 calls"),
        ({"steps": 8, "depth": 3}, "cache.depth=3 of at most 2"),
        ({"steps": 8, "schedule": "dynamic"}, "schedule='dynamic' is not one of uniform, quadratic"),
        ({"steps": 8, "predict": "cubic"}, "predict='cubic'"),
        ({"steps": 8, "interval": 0}, "interval=0"),
    ],
)
def test_what_cannot_be_cached_is_refused(pipeline, options, said):
    with pytest.raises(UserError, match=said):
        vqdm.enable_cache(pipeline, **options)
    assert cache_of(pipeline.unet) is None


def test_gradients_and_control_images_are_refused():
    unet = small_unet()
    add_cache(unet, StoredCache(schedule()))
    noisy, text = torch.ones(1, 4, 8, 8), torch.ones(1, 5, 32)
    with pytest.raises(UserError, match="no_grad"):
        unet(noisy, 8.0, text)
    with torch.no_grad(), pytest.raises(UserError, match="mid_block_additional_residual"):
        unet(noisy, 8.0, text, mid_block_additional_residual=noisy)


def test_a_line_through_two_features():
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 8.0])
    assert torch.equal(predicted([(2, a), (4, b)], 5), torch.tensor([4.0, 11.0]))
    assert predicted([(2, a)], 5) is a


def test_corrections_are_numpys_least_squares():
    generator, own = torch.Generator().manual_seed(0), schedule(predict="linear", full=(0, 3, 6))
    features = torch.randn(8, 5, 4, 3, 3, generator=generator) + torch.arange(8.0)[:, None, None, None, None]
    found = []
    for batch in features.split(2, dim=1):  # in two parts and a rest
        sums = CorrectionSums(own)
        for call in range(8):
            sums.take(call, batch[call])
        found.append(sums.sums)
    scales, shifts = corrections(sum(found))
    for call in (1, 2, 4, 5, 7):
        kept = [(source, features[source]) for source in own.sources(call)]
        guess = predicted(kept, call)
        for channel in range(4):
            x = guess[:, channel].flatten().double().numpy()
            design = np.stack([x, np.ones_like(x)], 1)
            (scale, shift), *_ = np.linalg.lstsq(design, features[call][:, channel].flatten().double().numpy())
            assert scales[call, channel].item() == pytest.approx(scale)
            assert shifts[call, channel].item() == pytest.approx(shift)
    assert (scales[[0, 3, 6]] == 1).all() and (shifts[[0, 3, 6]] == 0).all()


def test_costs_are_mean_differences():
    features, costs = torch.randn(5, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0)), ReuseCosts(5, 3)
    for call, feature in enumerate(features):
        costs.take(call, feature)
    for start in range(5):
        for call in range(5):
            near = 0 < call - start < 3
            expected = (features[call] - features[start]).abs().mean().item() if near else 0.0
            assert costs.costs[start][call] == pytest.approx(expected)


def test_the_tap_sees_what_the_cache_keeps(pipeline):
    seen = {}
    vqdm.enable_cache(pipeline, steps=STEPS, interval=1)
    with FeatureTap(pipeline.unet, 1, lambda call, feature: seen.update({call: feature})):
        latents(pipeline, CAPTIONS[:1])
    assert list(seen) == list(range(STEPS))
    kept = cache_of(pipeline.unet).features
    assert [call for call, _ in kept] == [6, 7] and all(torch.equal(feature, seen[call]) for call, feature in kept)


def test_full_calls_cost_what_the_plain_model_costs():
    unet, own = small_unet(), schedule()
    noisy, text = torch.ones(1, 4, 8, 8), torch.ones(1, 5, 32)

    def flops():
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            unet(noisy, own.timesteps[0], text)
        return counter.get_total_flops()

    plain = flops()
    add_cache(unet, StoredCache(own))
    assert flops() == plain
