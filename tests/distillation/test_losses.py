"""Losses of distillation against loops and closed forms."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from tiny_students import student, teacher, trajectories
from torch import nn

from vqdm.calibration.recording import play
from vqdm.distillation.losses import block_outputs, feature_errors, squared_errors, timestep_weights
from vqdm.errors import UserError
from vqdm.seeds import torch_generator


def gaussian(*shape, seed=0):
    return torch.randn(shape, generator=torch_generator(seed, "test"))


def scheduler(kind):
    return DDIMScheduler(prediction_type=kind, beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("limit", [1.0, 5.0])
def test_min_snr_weighs_the_error_of_the_clean_image(kind, limit):
    """Hang et al.: the loss of x₀ weighed by min(SNR, γ), whatever the network predicts; so x₀'s error is solved for.

    x_t = a x + b ε with a² + b² = 1. An error e of ε is −b/a e of x, one of v = a ε − b x is −b e, one of x is e.
    """
    times = torch.tensor([0, 1, 10, 300, 500, 731, 998, 999])
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    for time, weight in zip(
        times.tolist(), timestep_weights(times, scheduler(kind), weighting="min_snr", limit=limit), strict=True
    ):
        level = float((1 - betas[: time + 1]).prod())
        a, b = level**0.5, (1 - level) ** 0.5
        of_clean = {"epsilon": b / a, "v_prediction": b, "sample": 1.0}[kind]
        assert float(weight) == pytest.approx(min(a**2 / b**2, limit) * of_clean**2, rel=2e-4)


def test_uniform_weights_ask_for_no_schedule():
    assert timestep_weights(torch.tensor([3, 4]), None, weighting="uniform", limit=5.0).tolist() == [1, 1]
    with pytest.raises(UserError, match="weighting=uniform"):
        timestep_weights(torch.tensor([3.0]), FlowMatchEulerDiscreteScheduler(), weighting="min_snr", limit=5.0)


@pytest.mark.parametrize("rows_each", [1, 2])
def test_squared_errors_are_each_samples_own(rows_each):
    prediction, target = gaussian(6, 4, 3, 5), gaussian(6, 4, 3, 5, seed=1)
    expected = []
    for first in range(0, 6, rows_each):
        wrong = [
            float(p - t) ** 2
            for row in range(first, first + rows_each)
            for p, t in zip(prediction[row].flatten(), target[row].flatten(), strict=True)
        ]
        expected.append(sum(wrong) / len(wrong))
    for p, t in ((prediction, target), (prediction.to(memory_format=torch.channels_last), target)):
        assert squared_errors(p, t, rows_each=rows_each).tolist() == pytest.approx(expected, rel=1e-5)
    rough = squared_errors(prediction.bfloat16(), target, rows_each=rows_each)
    assert rough.dtype == torch.float32 and rough.tolist() == pytest.approx(expected, rel=2e-2)


def test_guided_errors_are_of_what_sampling_goes_by():
    prediction, target = gaussian(4, 4, 3), gaussian(4, 4, 3, seed=1)
    guided = [(without + 3.5 * (text - without)) for without, text in (prediction[:2], prediction[2:])]
    wanted = [(without + 3.5 * (text - without)) for without, text in (target[:2], target[2:])]
    expected = [float((a - b).square().mean()) for a, b in zip(guided, wanted, strict=True)]
    assert squared_errors(prediction, target, rows_each=2, guidance=3.5).tolist() == pytest.approx(expected, rel=1e-4)
    alone = squared_errors(prediction, target, rows_each=1, guidance=3.5)
    assert torch.equal(alone, squared_errors(prediction, target, rows_each=1))


def test_feature_errors_know_no_scale():
    target = {"a": gaussian(4, 7, 3), "b": gaussian(4, 2, 2, 2, seed=1)}
    same = feature_errors(target, target, rows_each=2)
    assert same.tolist() == [0, 0]
    wrong = {name: value + 0.1 * gaussian(*value.shape, seed=2) for name, value in target.items()}
    errors = feature_errors(wrong, target, rows_each=2)
    factors = {"a": 1000.0, "b": 0.01}
    scaled = [{name: factors[name] * value for name, value in values.items()} for values in (wrong, target)]
    assert torch.allclose(feature_errors(*scaled, rows_each=2), errors, rtol=1e-4)
    own = [float(((wrong[n] - target[n])[2:] ** 2).mean() / target[n][2:].var(correction=0)) for n in target]
    assert float(errors[1]) == pytest.approx(sum(own) / 2, rel=1e-4)


def test_feature_errors_of_a_sample_do_not_depend_on_the_others():
    target, wrong = {"a": gaussian(6, 7)}, {"a": gaussian(6, 7, seed=1)}
    whole = feature_errors(wrong, target, rows_each=2)
    for i in range(3):
        own = slice(2 * i, 2 * i + 2)
        (alone,) = feature_errors({"a": wrong["a"][own]}, {"a": target["a"][own]}, rows_each=2)
        assert float(alone) == pytest.approx(float(whole[i]), rel=1e-5)


def hooks(denoiser):
    return sum(len(module._forward_hooks) for module in denoiser.modules())


def test_block_outputs_are_seen_and_hooks_removed(tmp_path):
    own, batch = student(), trajectories(tmp_path).batch([0, 5], device="cpu")
    before = hooks(own)
    with torch.no_grad(), block_outputs(own, teacher()) as (first, second):
        assert hooks(own) > before
        play(own, batch.arguments)
        play(teacher(), batch.arguments)
        seen, others = first.take(), second.take()
        assert seen.keys() == others.keys() and "mid_block.resnets.1" in seen and len(seen) == 18
        assert not first.take(), "each forward is taken once"
        inputs = {}
        unit = own.mid_block.resnets[1]
        handle = unit.register_forward_pre_hook(lambda _m, args: inputs.update(args=args))
        play(own, batch.arguments)
        handle.remove()
        assert torch.equal(unit(*inputs["args"]), first.take()["mid_block.resnets.1"])
    assert hooks(own) == before
    with pytest.raises(RuntimeError), block_outputs(own):
        raise RuntimeError
    assert hooks(own) == before


def test_block_outputs_give_the_same_gradients_under_checkpointing(tmp_path):
    batch, found = trajectories(tmp_path).batch([0, 5], device="cpu"), []
    for checkpointing in (False, True):
        own = student()
        scales = [p.requires_grad_(True) for name, p in own.named_parameters() if name.endswith("weight.scales")]
        if checkpointing:
            own.enable_gradient_checkpointing()
        with block_outputs(own, teacher()) as watched:
            play(own, batch.arguments)
            with torch.no_grad():
                play(teacher(), batch.arguments)
            errors = feature_errors(*(outputs.take() for outputs in watched), rows_each=batch.rows_each)
        errors.sum().backward()
        found.append((errors.detach(), [scale.grad for scale in scales if scale.grad is not None]))
    (plain, gradients), (again, checkpointed) = found
    assert torch.allclose(plain, again, rtol=1e-5) and len(gradients) == len(checkpointed) == 12
    for one, other in zip(gradients, checkpointed, strict=True):
        assert float((one - other).norm()) <= 1e-5 * float(one.norm())


def test_a_denoiser_without_known_blocks_says_so():
    with pytest.raises(UserError, match="feature_weight"), block_outputs(nn.Linear(2, 2)):
        pass


def test_odd_timesteps_are_rounded_down():
    """Euler's samplers have them between the training's."""
    noise = SimpleNamespace(prediction_type="epsilon")
    own = SimpleNamespace(alphas_cumprod=torch.tensor([0.9, 0.5, 0.1]), config=noise)
    weights = timestep_weights(torch.tensor([1.9, 2.0]), own, weighting="min_snr", limit=0.5)
    assert weights.tolist() == pytest.approx([0.5, 1.0])
