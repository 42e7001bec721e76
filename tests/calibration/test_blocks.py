import copy

import pytest
import torch
from torch import nn
from torch.optim import Adam
from unets import small_unet

from vqdm.calibration.blocks import (
    Block,
    block_loss,
    blocks_of,
    execution_order,
    reconstruct,
    record_block,
    relative_squared_error,
)
from vqdm.calibration.recording import Recorder, play_back
from vqdm.errors import UserError
from vqdm.models.specs import layer_specs, spec_of
from vqdm.seeds import torch_generator

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def unet():
    return small_unet()


@torch.no_grad()
def record(unet, *, counts=(2, 3), seed=0):
    """Recorded calls, one with each of `counts` samples."""
    generator = torch_generator(seed, "calls")
    with Recorder(unet, steps=set(range(len(counts)))) as recorder:
        for i, count in enumerate(counts):
            latents = torch.randn(count, 4, 8, 8, generator=generator)
            text = torch.randn(count, 5, 32, generator=generator)
            unet(latents, torch.tensor(700 - 100 * i), text)
    return recorder.calls


def test_a_unet_runs_its_middle_before_its_way_up(unet):
    names = [name for name, _ in unet.named_children()]
    assert names.index("up_blocks") < names.index("mid_block")
    layers = [spec.name for spec in layer_specs(unet)]
    order = execution_order(unet, record(unet)[0], layers)
    assert sorted(order) == sorted(layers)
    assert [part for part, before in zip(order, ["", *order], strict=False) if part[:3] != before[:3]] == [
        "down_blocks.0.resnets.0.conv1", "mid_block.resnets.0.conv1", "up_blocks.0.resnets.0.conv1",
    ]  # fmt: skip
    inner = [n for n in order if n.startswith("down_blocks.1.attentions.0")]
    assert inner[0].endswith("proj_in") and inner[-1].endswith("proj_out")


def test_every_layer_is_in_one_block(unet):
    specs = layer_specs(unet)
    blocks = blocks_of(unet, specs, record(unet)[0])
    assert sorted(spec.name for block in blocks for spec in block.specs) == sorted(spec.name for spec in specs)
    kinds = {type(unet.get_submodule(block.name)).__name__ for block in blocks}
    assert kinds == {"ResnetBlock2D", "BasicTransformerBlock", "Linear", "Conv2d"}
    for block in blocks:
        assert all(spec.name == block.name or spec.name.startswith(block.name + ".") for spec in block.specs)
        if type(unet.get_submodule(block.name)).__name__ in ("Linear", "Conv2d"):
            assert [spec.name for spec in block.specs] == [block.name]
            assert not any(part in block.name for part in ("resnets", "transformer_blocks"))
    names = [block.name for block in blocks]
    assert names.index("mid_block.resnets.1") < names.index("up_blocks.0.resnets.0")


class Nested(nn.Module):
    """A residual unit, by name, in another one, and a layer that never runs."""

    def __init__(self):
        super().__init__()
        self.inner = type("ResnetBlock2D", (nn.Sequential,), {})(nn.Linear(16, 16))
        self.outer = type("BasicTransformerBlock", (nn.Sequential,), {})(nn.Linear(16, 16), self.inner)
        del self.inner
        self.idle = nn.Linear(16, 16)

    def forward(self, sample, return_dict=True):
        return (self.outer(sample),)


def test_the_innermost_unit_counts_and_idle_layers_are_refused():
    denoiser, call = Nested(), {"sample": torch.ones(2, 16)}
    outer, inner = (spec_of(name, denoiser.get_submodule(name)) for name in ("outer.0", "outer.1.0"))
    assert blocks_of(denoiser, [inner, outer], call) == [Block("outer", (outer,)), Block("outer.1", (inner,))]
    with pytest.raises(UserError, match="never run layer idle"):
        blocks_of(denoiser, [spec_of("idle", denoiser.idle)], call)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["resnets.0", "attentions.0.transformer_blocks.0", "attentions.0.proj_in"])
def test_a_block_alone_gives_what_was_recorded(unet, kind):
    calls, name = record(unet), f"down_blocks.1.{kind}"
    data = record_block(unet, name, calls)
    assert len(data) == 5
    args, kwargs = data.take(torch.tensor([4, 0]), device=CPU)
    assert torch.allclose(unet.get_submodule(name)(*args, **kwargs), data.output[[4, 0]], atol=1e-5)
    outputs = []
    hook = unet.get_submodule(name).register_forward_hook(lambda _module, _args, output: outputs.append(output))
    for call in calls:
        play_back(unet, call, device="cpu")
    hook.remove()
    assert torch.equal(torch.cat(outputs), data.output)


@torch.no_grad()
def test_recording_stops_after_the_block_and_leaves_no_hooks(unet):
    ran = []
    hook = unet.up_blocks[0].register_forward_pre_hook(lambda *_: ran.append("up"))
    record_block(unet, "mid_block.resnets.0", record(unet))
    hook.remove()
    assert ran == ["up", "up"]  # once per call when it was recorded, never when it was played back
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in unet.modules())
    with pytest.raises(ValueError, match="no calls"):
        record_block(unet, "mid_block.resnets.0", [])


class Choosy(nn.Module):
    """A block that takes everything that an argument can be."""

    def forward(self, hidden, scale, mask=None, *, extra, mode):
        hidden.add_(1)  # what is recorded is from before
        return hidden * scale * extra["weights"][0] + extra["table"].sum() + (mask is None) + (mode == "a")


class Host(nn.Module):
    def __init__(self, power=0):
        super().__init__()
        self.block, self.scale, self.power = Choosy(), nn.Parameter(torch.ones(1)), power

    def forward(self, sample, timestep, return_dict=True):
        table = torch.arange(7.0) * timestep**self.power
        extra = {"weights": [sample[:, :1] + timestep, None], "table": table}
        return (self.block(sample.clone(), self.scale.detach()[None], None, extra=extra, mode="a"),)


@torch.no_grad()
def test_nested_arguments_survive_and_rows_for_all_count_for_each():
    host = Host()
    calls = [{"sample": torch.randn(n, 3), "timestep": torch.tensor(float(n))} for n in (2, 4)]
    data = record_block(host, "block", calls)
    (hidden, scale, mask), kwargs = data.take(slice(1, 4), device=CPU)
    assert torch.equal(hidden, torch.cat([c["sample"] for c in calls])[1:4])
    assert scale.shape == (3, 1) and mask is None and kwargs["mode"] == "a"
    assert kwargs["extra"]["table"].shape == (7,) and kwargs["extra"]["weights"][1] is None
    assert torch.equal(kwargs["extra"]["weights"][0], hidden[:, :1] + torch.tensor([[2.0], [4], [4]]))
    args, kwargs = data.take(slice(None), device=CPU)
    assert torch.equal(host.block(*args, **kwargs), data.output)
    with pytest.raises(ValueError, match="block block takes an argument"):
        record_block(Host(power=1), "block", calls)


def linear_block(*, samples=96, seed=0):
    """A Linear whose inputs and wanted outputs another Linear made: (module, data, targets, the other's matrix)."""
    generator = torch_generator(seed, "linear")
    host = nn.Module()
    host.block = nn.Linear(16, 8, bias=True)
    host.forward = lambda sample, return_dict=True: (host.block(sample),)
    for parameter in host.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    inputs = torch.randn(samples, 16, generator=generator)
    wanted = torch.randn(8, 16, generator=generator)
    data = record_block(host, "block", [{"sample": part} for part in inputs.split(40)])
    return host.block, data, inputs @ wanted.T, wanted


def test_reconstruction_finds_what_made_the_targets():
    module, data, targets, wanted = linear_block()
    module.bias.requires_grad_(False)
    bias, seen = module.bias.clone(), []
    losses = reconstruct(
        module, data, targets + bias.detach(), Adam([module.weight], lr=0.05),
        steps=450, batch_size=32, generator=torch_generator(0, "r"),
        progress=lambda step, loss: seen.append((step, loss)),
    )  # fmt: skip
    assert torch.allclose(module.weight, wanted, atol=1e-2)
    assert torch.equal(module.bias, bias)
    assert (module.weight.requires_grad, module.bias.requires_grad) == (True, False)
    assert module.weight.grad is None and module.bias.grad is None
    assert len(losses) == 450 and float(losses[-1]) < 1e-4 < float(losses[0])
    assert [step for step, _ in seen] == [100, 200, 300, 400, 450]
    assert seen[1][1] == pytest.approx(float(losses[100:200].mean()))


def test_groups_regularisers_and_losses_of_ones_own():
    module, data, targets, _ = linear_block()
    module.requires_grad_(False)
    groups = [{"params": [module.weight], "lr": 0.0}, {"params": [module.bias], "lr": 0.05}]
    weight, steps = module.weight.clone(), []

    def regulariser(step):
        steps.append(step)
        return module.bias.square().sum()

    reconstruct(
        module, data, targets, Adam(groups),
        steps=300, batch_size=32, generator=torch_generator(0, "r"),
        loss=lambda output, target: 0 * output.sum(), regulariser=regulariser,
    )  # fmt: skip
    assert torch.equal(module.weight, weight) and float(module.bias.abs().max()) < 1e-2
    assert steps == list(range(300))
    assert not module.weight.requires_grad and not module.bias.requires_grad


def test_every_sample_comes_once_in_a_pass_and_the_generator_decides():
    module, data, targets, _ = linear_block(samples=90)
    seen = []
    loss = relative_squared_error(targets)

    def note(output, target):
        seen.append(target)
        return loss(output, target)

    trained = []
    for seed in (0, 0, 1):
        copied = copy.deepcopy(module)
        generator = torch_generator(seed, "r")
        optimizer = Adam([copied.weight])
        reconstruct(copied, data, targets, optimizer, steps=6, batch_size=30, generator=generator, loss=note)
        trained.append(copied.weight)
    assert torch.equal(trained[0], trained[1]) and not torch.equal(trained[0], trained[2])
    for first in (0, 3):
        one_pass = torch.cat(seen[first : first + 3])
        assert torch.equal(one_pass.sort(0).values, targets.sort(0).values)


@torch.no_grad()
def test_the_loss_on_all_data_is_relative_to_the_targets_variance():
    module, data, targets, _ = linear_block()
    error = data.output - targets
    expected = float(error.square().mean() / targets.var(correction=0))
    assert block_loss(module, data, targets, batch_size=36) == pytest.approx(expected, rel=1e-5)
    assert float(relative_squared_error(targets)(targets.mean().expand_as(targets), targets)) == pytest.approx(1)
    assert block_loss(module, data, 3 * targets + 2) != pytest.approx(expected)
    assert block_loss(module, data, data.output) < 1e-12
    assert block_loss(module, data, torch.zeros_like(targets)) > 1e6  # a constant target: no division by 0


def test_a_loss_that_is_not_finite_is_an_error_with_the_blocks_name():
    module, data, targets, _ = linear_block()
    targets[3] = float("nan")
    with pytest.raises(UserError, match=r"block mid\.7 is nan within 100 steps"):
        reconstruct(
            module, data, targets, Adam([module.weight]),
            steps=200, batch_size=32, generator=torch_generator(0, "r"), name="mid.7",
        )  # fmt: skip
    assert module.weight.requires_grad and module.weight.grad is None
