"""Operators that go: the model without one is the model in which its branch adds nothing; what is chosen and saved."""

import itertools
import json

import pytest
import torch
from diffusers import UNet2DConditionModel
from quantized import quantized_unet
from torch import nn
from unets import output, sdxl_unet, small_unet

from vqdm.acceleration.operators import choose, inside, operators, remove, removed_operators
from vqdm.errors import UserError
from vqdm.hub.checkpoint import checkpoint_size
from vqdm.hub.config import VQDMConfig
from vqdm.hub.pipelines import load_denoiser, save_denoiser
from vqdm.models.specs import shortcut_splits
from vqdm.stages.prune import moments_apart

BLOCK = "down_blocks.1.attentions.0.transformer_blocks.0"


def silenced(unet, name):
    """The same by weights: the last layer of the operator's branch gives zeros."""
    module = unet.get_submodule(name)
    last = {"ResnetBlock2D": "conv2", "Transformer2DModel": "proj_out", "Attention": "to_out.0", "FeedForward": "net.2"}
    layer = module.get_submodule(last[type(module).__name__])
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return unet


@pytest.mark.parametrize("name", list(operators(small_unet())))
def test_a_removed_operator_adds_nothing(name):
    found = remove(small_unet(), [name])
    assert torch.allclose(output(found), output(silenced(small_unet(), name)), atol=1e-5)
    assert removed_operators(found) == [name]
    assert all(parameter.numel() for parameter in found.get_submodule(name).parameters())


def test_removing_all_that_add_nothing_changes_nothing():
    unet = small_unet()
    names = [name for name in operators(unet) if not inside(name, operators(unet))][1::2]
    for name in names:
        silenced(unet, name)
    plain = output(unet)
    assert torch.allclose(output(remove(unet, names)), plain, atol=1e-5) and len(names) > 3


def test_operators_of_sdxl_are_those_that_papers_count():
    found = operators(sdxl_unet())
    kinds = [name.rsplit(".", 1)[-1] for name in found]
    assert len(found) == 238
    assert {kind: kinds.count(kind) for kind in ("attn1", "attn2", "ff")} == {"attn1": 70, "attn2": 70, "ff": 70}
    assert round(sum(size for name, size in found.items() if name.endswith(".ff")) / 1e6) == 1230


def test_removing_everything_keeps_the_shapes():
    unet = small_unet()
    whole = [name for name in operators(unet) if not inside(name, operators(unet))]
    remove(unet, whole)
    assert output(unet).shape == (2, 4, 8, 8) and not operators(unet)
    assert shortcut_splits(unet).keys() == {
        name for name in shortcut_splits(small_unet()) if hasattr(unet.get_submodule(name), "weight")
    }


@pytest.mark.parametrize("name", ["conv_in", f"{BLOCK}.norm1", "down_blocks.9", BLOCK])
def test_what_is_no_operator_is_refused(name):
    with pytest.raises(UserError, match=f"{name} is no operator"):
        remove(small_unet(), [name])
    with pytest.raises(UserError, match="no operator"):
        remove(small_unet(), [f"{BLOCK}.ff", f"{BLOCK}.ff"])


def test_the_choice_is_the_shortest_beginning_that_suffices():
    weights = {"a": 10, "a.x": 4, "a.y": 5, "b": 20, "c": 3}
    scores = {"a.x": 1.0, "a": 2.0, "a.y": 3.0, "c": 4.0, "b": 5.0}
    assert choose(scores, weights, least=4) == ["a.x"]
    assert choose(scores, weights, least=5) == ["a"]  # takes the place of its part
    assert choose(scores, weights, least=11) == ["a", "c"]  # a.y is gone with a
    assert choose(scores, weights, least=33) == ["a", "b", "c"]
    with pytest.raises(UserError, match="all operators have 33"):
        choose(scores, weights, least=34)
    for order in itertools.permutations(scores):
        assert choose({name: scores[name] for name in order}, weights, least=11) == ["a", "c"]


def test_moments_apart_is_ld_pruners_score():
    z, other = torch.randn(2, 6, 4, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    expected = (z.mean(0) - other.mean(0)).square().sum().sqrt() + (z.std(0) - other.std(0)).square().sum().sqrt()
    assert moments_apart(z, other) == pytest.approx(expected.item())
    assert moments_apart(z, z[torch.randperm(6)]) == pytest.approx(0, abs=1e-12)  # it sees moments only


def pruned_unet():
    unet = small_unet()
    names = [f"{BLOCK}.attn2", "mid_block.resnets.1", "up_blocks.0.attentions.1", "down_blocks.1.resnets.0"]
    return remove(unet, names)


def test_a_pruned_model_in_full_precision_is_saved_and_loaded(tmp_path):
    unet = pruned_unet()
    size = checkpoint_size(unet).total
    assert save_denoiser(unet, tmp_path, metrics={}) == size
    said = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert said["version"] == 3 and said["removed"] == removed_operators(unet) and said["groups"] == []
    loaded = load_denoiser(tmp_path, dtype=torch.float32)
    assert removed_operators(loaded) == removed_operators(unet)
    assert torch.equal(output(loaded), output(unet))
    with pytest.raises(UserError, match="operators are gone"):
        loaded.dequantize()


def test_a_pruned_and_quantized_model_is_saved_and_loaded(tmp_path):
    unet = remove(quantized_unet("rtn"), [f"{BLOCK}.ff", "mid_block.attentions.0"])
    save_denoiser(unet, tmp_path, metrics={})
    loaded = UNet2DConditionModel.from_pretrained(tmp_path)
    assert torch.equal(output(loaded), output(unet))
    assert "mid_block.attentions.0" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("removed", ["ff", [3], [f"{BLOCK}.ff"] * 2, {"a": 1}])
def test_damaged_names_are_refused(removed):
    with pytest.raises(UserError):
        VQDMConfig(groups=[], removed=removed)


def test_another_list_than_the_files_is_refused(tmp_path):
    save_denoiser(pruned_unet(), tmp_path, metrics={})
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["removed"].pop()
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="other removed operators"):
        load_denoiser(tmp_path, dtype=torch.float32)
