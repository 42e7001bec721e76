import copy
import itertools

import pytest
import torch
from torch import nn
from unets import small_unet

from vqdm.calibration import blocks
from vqdm.calibration.blocks import Block, block_loss, blocks_of, record_block
from vqdm.calibration.recording import Recorder
from vqdm.codecs import rtn
from vqdm.codecs.adaround import ADAROUND, SoftRounding, drawn_rows, quantize_blocks, reconstruct_block
from vqdm.config.codecs import AdaroundConfig
from vqdm.errors import UserError
from vqdm.models.specs import layer_specs, spec_of, weight_to_matrix
from vqdm.seeds import torch_generator
from vqdm.weights.layers import swap
from vqdm.weights.scalar import ScalarScheme

SHORT = {"bits": 3, "iterations": 40, "batch_size": 8}


def one_layer(*, inputs, outputs, seed, samples=256, noise=1.0):
    """A denoiser of one Linear, its block, and what a call records: inputs that are somewhat correlated."""
    generator = torch_generator(seed, "layer")
    host = nn.Module()
    host.layer = nn.Linear(inputs, outputs)
    host.forward = lambda sample, return_dict=True: (host.layer(sample),)
    for parameter in host.requires_grad_(False).parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    common = torch.randn(samples, 1, generator=generator)
    sample = common + noise * torch.randn(samples, inputs, generator=generator)
    block = Block("layer", (spec_of("layer", host.layer),))
    return host, block, record_block(host, "layer", [{"sample": sample}])


def least_error(weight, grid, inputs):
    """Σ of squared output errors of the best of all 2^n roundings, up or down, row by row."""
    scales, zeros = grid.scales.detach(), grid.zeros.detach()
    largest, total = 2**grid.scheme.bits - 1, 0.0
    ups = torch.tensor(list(itertools.product((0, 1), repeat=weight.shape[1])))
    for row, scale, zero in zip(weight, scales.float(), zeros.float(), strict=True):
        codes = (torch.floor(row / scale) + ups + zero).clamp(0, largest)
        total += float((((codes - zero) * scale - row) @ inputs.T).square().sum(1).min())
    return total


@torch.no_grad()
@pytest.mark.parametrize(("shape", "seed"), [((12, 1), 0), ((12, 1), 1), ((6, 2), 2), ((6, 2), 3), ((4, 3), 4)])
def test_nearly_the_best_of_all_roundings_where_those_can_be_tried(shape, seed):
    host, block, data = one_layer(inputs=shape[0], outputs=shape[1], seed=seed)
    weights, report = reconstruct_block(
        host, block, data, data.output, bits=3, iterations=600, batch_size=32, generator=torch_generator(seed, "g")
    )
    (sample,), _ = data.take(slice(None), device=torch.device("cpu"))
    best = least_error(host.layer.weight, weights["layer"], sample)
    best /= data.output.numel() * float(data.output.var(correction=0))
    assert report.learned <= 1.02 * best
    assert report.learned >= 0.99 * best  # scales times codes are rounded to fp16


@torch.no_grad()
@pytest.mark.parametrize("parts", ["whole rows", "groups", "split"])
def test_soft_rounding_starts_at_the_weight_and_ends_on_the_grid(parts):
    matrix = torch.randn(12, 24, generator=torch_generator(0, "matrix"))
    grid = rtn.encode(matrix, bits=3, group_size=8 if parts == "groups" else None)
    group = torch.arange(24) // (8 if parts == "groups" else 24)
    if parts == "split":
        grid, group = rtn.encode_split(matrix, 9, bits=3), (torch.arange(24) >= 9).long()
    soft = SoftRounding(matrix, grid)
    scales, zeros = (t[:, group].float() for t in (grid.scales, grid.zeros))
    inside = (matrix >= -zeros * scales) & (matrix <= (7 - zeros) * scales)
    assert 0.8 < float(inside.float().mean()) < 1  # the grid clips some
    assert torch.allclose(soft()[inside], matrix[inside], atol=1e-3)
    assert torch.equal(soft.hardened().unpacked_codes(), grid.unpacked_codes())
    for sign, rounded in ((-1, torch.floor), (1, lambda x: torch.floor(x) + 1)):
        soft.logits.copy_(torch.full((12, 24), 9.0 * sign))
        codes = (rounded(matrix / scales) + zeros).clamp(0, 7)
        assert torch.allclose(soft(), (codes - zeros) * scales, atol=1e-6)
        assert torch.equal(soft.hardened().unpacked_codes(), codes.int())
        assert float(soft.undecided(20.0)) == 0
    assert soft.hardened().scheme == grid.scheme


@pytest.mark.parametrize("beta", [2.0, 6.5, 20.0])
def test_the_regulariser_is_that_of_the_paper(beta):
    matrix = torch.randn(6, 8, generator=torch_generator(0, "matrix"))
    soft = SoftRounding(matrix, rtn.encode(matrix, bits=2))
    soft()
    soft.undecided(beta).backward()
    logits = soft.logits.detach().double().requires_grad_()
    h = (torch.sigmoid(logits) * 1.2 - 0.1).clamp(0, 1)
    expected = (1 - (2 * h - 1).abs() ** beta).sum()
    expected.backward()
    assert float(soft.undecided(beta).detach()) == pytest.approx(float(expected.detach()), rel=1e-4)
    assert torch.allclose(soft.logits.grad.double(), logits.grad, atol=1e-4)


@pytest.fixture(scope="module")
def unet():
    return small_unet()


@pytest.fixture(scope="module")
def calls(unet):
    generator = torch_generator(0, "calls")
    with torch.no_grad(), Recorder(unet, steps={0, 1}) as recorder:
        for time in (700, 200):
            latents = torch.randn(8, 4, 8, 8, generator=generator)
            unet(latents, torch.tensor(time), torch.randn(8, 5, 32, generator=generator))
    return recorder.calls


def block_called(unet, calls, name):
    return next(block for block in blocks_of(unet, layer_specs(unet), calls[0]) if block.name == name)


@torch.no_grad()
@pytest.mark.parametrize("name", ["resnets.0", "attentions.0.transformer_blocks.0", "attentions.0.proj_in"])
def test_a_block_is_learned_as_a_whole_and_better_than_rounded(unet, calls, name):
    block = block_called(unet, calls, f"up_blocks.0.{name}")
    data, before = record_block(unet, block.name, calls), copy.deepcopy(unet.state_dict())
    weights, report = reconstruct_block(
        unet, block, data, data.output, generator=torch_generator(0, "g"), **{**SHORT, "iterations": 150}
    )
    assert all(torch.equal(before[key], value) for key, value in unet.state_dict().items())
    assert weights.keys() == {spec.name for spec in block.specs}
    assert report.kept == "learned" and report.learned < 0.7 * report.nearest
    losses = {}
    for kind in ("learned", "nearest"):
        changed, moved = copy.deepcopy(unet), 0
        for spec in block.specs:
            nearest = rtn.encode(weight_to_matrix(unet.get_submodule(spec.name).weight), bits=3)
            assert weights[spec.name].scheme == ScalarScheme(codec="adaround", bits=3)
            assert torch.equal(weights[spec.name].scales, nearest.scales)
            steps = (weights[spec.name].unpacked_codes() - nearest.unpacked_codes()).abs()
            assert int(steps.max()) == 1
            moved += int(steps.sum())
            swap(changed, spec, nearest if kind == "nearest" else weights[spec.name])
        losses[kind] = block_loss(changed.get_submodule(block.name), data, data.output)
    assert losses == pytest.approx({"learned": report.learned, "nearest": report.nearest}, rel=1e-3)
    assert report.moved == pytest.approx(moved / sum(spec.size for spec in block.specs))


@torch.no_grad()
def test_what_was_learned_badly_gives_way_to_nearest_rounding():
    host, block, data = one_layer(inputs=32, outputs=16, seed=0)
    options = {"bits": 4, "iterations": 30, "batch_size": 4, "generator": torch_generator(0, "g")}
    weights, report = reconstruct_block(host, block, data, data.output, learning_rate=300.0, warmup=1.0, **options)
    nearest = rtn.encode(host.layer.weight, bits=4)
    assert report.kept == "nearest" and report.learned > report.nearest
    assert torch.equal(weights["layer"].unpacked_codes(), nearest.unpacked_codes())
    assert weights["layer"].scheme.name == "adaround4"


@torch.no_grad()
def test_half_precision_groups_and_errors_with_names(unet, calls):
    host, block, data = one_layer(inputs=32, outputs=16, seed=0)
    half = copy.deepcopy(host).to(torch.bfloat16)
    options = {**SHORT, "generator": torch_generator(0, "g")}
    weights, report = reconstruct_block(half, block, data, data.output.bfloat16(), group_size=8, **options)
    assert weights["layer"].scheme.name == "adaround3g8" and report.learned <= report.nearest
    assert half.layer.weight.dtype == torch.bfloat16
    with pytest.raises(UserError, match="group_size 7 does not divide in_features 32 of layer layer"):
        reconstruct_block(host, block, data, data.output, group_size=7, **options)
    with pytest.raises(UserError, match="loss of block layer is nan"):
        reconstruct_block(host, block, data, data.output * float("nan"), **options)


@torch.no_grad()
def test_a_run_that_was_cut_off_goes_on_to_the_same_weights(unet, calls):
    specs = [spec for spec in layer_specs(unet) if spec.name.startswith(("down_blocks.0", "mid_block.resnets"))]
    options = {"seed": 5, **SHORT}
    student, kept = copy.deepcopy(unet), {}
    for block, weights, report in quantize_blocks(student, unet, specs, lambda: calls, **options):
        assert report is not None
        kept[block.name] = weights
        assert all(student.get_submodule(name).weight is weight for name, weight in weights.items())
    assert list(kept) == [
        "down_blocks.0.resnets.0", "down_blocks.0.downsamplers.0.conv", "mid_block.resnets.0", "mid_block.resnets.1",
    ]  # fmt: skip
    resumed, reports = copy.deepcopy(unet), {}
    stored = {name: copy.deepcopy(kept[name]) for name in list(kept)[:2]}
    for block, weights, report in quantize_blocks(
        resumed, unet, specs, lambda: calls, stored=lambda block: stored.get(block.name), **options
    ):
        reports[block.name] = report
        for name, weight in weights.items():
            assert torch.equal(weight.codes, kept[block.name][name].codes), name
    assert [report is None for report in reports.values()] == [True, True, False, False]
    other = quantize_blocks(copy.deepcopy(unet), unet, specs, lambda: calls, **{**options, "seed": 6})
    name = "down_blocks.0.resnets.0.conv1"
    assert not torch.equal(next(other)[1][name].codes, kept["down_blocks.0.resnets.0"][name].codes)


@torch.no_grad()
def test_a_block_learns_on_the_students_inputs_and_the_teachers_outputs(unet, calls):
    specs = [spec for spec in layer_specs(unet) if spec.name.startswith(("down_blocks.0.resnets", "mid_block.res"))]
    student, reports = copy.deepcopy(unet), {}
    for block, _, report in quantize_blocks(student, unet, specs, lambda: calls, seed=0, **SHORT):
        inputs = record_block(student, block.name, calls)
        targets = record_block(unet, block.name, calls).output
        assert block_loss(student.get_submodule(block.name), inputs, targets) == pytest.approx(report.learned, rel=1e-3)
        reports[block.name] = report
    assert len(reports) == 3


def test_rows_on_disk_give_the_same_weights(unet, calls, tmp_path, monkeypatch):
    """Bit for bit, and no file is left."""
    specs = [spec for spec in layer_specs(unet) if spec.name.startswith("mid_block")]

    def codes(**more):
        made = quantize_blocks(copy.deepcopy(unet), unet, specs, lambda: calls, seed=0, **SHORT, **more)
        return {name: weight.unpacked_codes() for _, weights, _ in made for name, weight in weights.items()}

    in_memory = codes()
    monkeypatch.setattr(blocks, "CALL_IN_MEMORY", 0)
    monkeypatch.setattr(blocks, "IN_MEMORY", 0)
    data = record_block(unet, "mid_block.resnets.0", calls, directory=tmp_path)
    assert torch.equal(data.output, record_block(unet, "mid_block.resnets.0", calls).output)
    on_disk = codes(directory=tmp_path)
    assert in_memory.keys() == on_disk.keys() and in_memory
    assert all(torch.equal(in_memory[name], on_disk[name]) for name in in_memory)
    assert not list(tmp_path.iterdir())


def test_the_variance_of_many_targets_is_the_same_in_parts(monkeypatch):
    targets = 3 + torch.randn(50, 7, generator=torch_generator(0, "targets"))
    whole = blocks._variance(targets)
    monkeypatch.setattr(blocks, "LARGE", 0)
    assert blocks._variance(targets) == pytest.approx(whole, rel=1e-6)


@torch.no_grad()
def test_split_shortcuts_have_two_grids_and_less_error(unet, calls):
    changed = copy.deepcopy(unet)
    name = "up_blocks.0.resnets.0.conv_shortcut"
    changed.get_submodule(name).weight[:, 32:] *= 10  # the skip connection's
    block = block_called(changed, calls, "up_blocks.0.resnets.0")
    data = record_block(changed, block.name, calls)
    found = {}
    for split in (False, True):
        weights, report = reconstruct_block(
            changed, block, data, data.output, split_shortcuts=split, generator=torch_generator(0, "g"), **SHORT
        )
        found[split] = report
        others = {key: weight.scheme for key, weight in weights.items() if key != name}
        assert set(others.values()) == {ScalarScheme(codec="adaround", bits=3)}
        assert weights[name].scheme == ScalarScheme(codec="adaround", bits=3, split=32 if split else None)
    assert found[True].nearest < found[False].nearest and found[True].learned < found[False].learned


@torch.no_grad()
def test_samples_are_rows_of_all_calls_without_replacement(unet, calls):
    specs = [spec for spec in layer_specs(unet) if spec.name.startswith("mid_block.resnets")]
    total = sum(len(call["output"]) for call in calls)
    rows = drawn_rows(calls, 5, seed=0)
    assert sum(map(len, rows)) == 5 and all(len(set(part.tolist())) == len(part) for part in rows)
    chosen = torch.cat([part + 8 * i for i, part in enumerate(rows)])
    whole = record_block(unet, "mid_block.resnets.0", calls)
    some = record_block(unet, "mid_block.resnets.0", calls, rows=rows)
    assert torch.allclose(some.output, whole.output[chosen]) and len(some) == 5
    ((picture, time), _), ((all_pictures, all_times), _) = (
        data.take(slice(None), device=torch.device("cpu")) for data in (some, whole)
    )
    assert torch.equal(picture, all_pictures[chosen]) and torch.equal(time, all_times[chosen])

    def codes(samples):
        made = quantize_blocks(copy.deepcopy(unet), unet, specs, lambda: calls, seed=0, samples=samples, **SHORT)
        return torch.cat([weight.codes for _, weights, _ in made for weight in weights.values()])

    assert torch.equal(codes(total), codes(None)) and not torch.equal(codes(5), codes(None))
    with pytest.raises(UserError, match=f"quantize.samples={total + 1} of {total} recorded rows"):
        codes(total + 1)


def test_what_cannot_be_split_is_refused(unet):
    config = AdaroundConfig(split_shortcuts=True)
    down = [spec for spec in layer_specs(unet) if spec.name.startswith("down_blocks")]
    with pytest.raises(UserError, match="no layer to quantize joins a hidden state and a skip connection"):
        ADAROUND.schemes(down, config)
    with pytest.raises(UserError, match=r"leave quantize\.group_size=8 out"):
        AdaroundConfig(split_shortcuts=True, group_size=8).check()
