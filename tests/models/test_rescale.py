import pytest
import torch
from unets import output, small_unet

from vqdm.models.rescale import rescale_
from vqdm.models.specs import layer_specs, weight_to_matrix


def kurtosis(unet):
    """Mean over layers of E w⁴ / (E w²)²: 3 for Gaussian weights, more with outliers."""
    matrices = [weight_to_matrix(unet.get_submodule(spec.name).weight).double() for spec in layer_specs(unet)]
    return float(sum(m.pow(4).mean() / m.pow(2).mean() ** 2 for m in matrices) / len(matrices))


@pytest.mark.parametrize("linear_projection", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-10)])
def test_outputs_stay_and_weights_grow_outliers(dtype, tolerance, linear_projection):
    unet = small_unet(use_linear_projection=linear_projection).to(dtype)
    before, evenness = output(unet, dtype=dtype), kurtosis(unet)
    count = rescale_(unet, sigma=1.0, seed=0)
    after = output(unet, dtype=dtype)
    assert float((after - before).norm() / before.norm()) < tolerance
    assert kurtosis(unet) > 1.5 * evenness
    transformers, blocks = 4, 4  # 1 down, 1 middle, 2 up
    assert count == transformers + blocks * (3 + 2 + 2 + 1)


def test_every_rescaled_layer_changes_and_no_other():
    unet, same = small_unet(), small_unet()
    rescale_(unet, sigma=0.5, seed=0)
    changed = {n for n, p in unet.named_parameters() if not torch.equal(p, same.get_parameter(n))}
    assert changed == {
        name
        for name, _ in same.named_parameters()
        if "attentions" in name and "proj_out" not in name and not name.endswith(("net.2.bias", "to_out.0.bias"))
        and not name.endswith("proj_in.bias")
    }  # fmt: skip


def test_sigma_0_changes_no_bit():
    unet, same = small_unet().half(), small_unet().half()
    assert rescale_(unet, sigma=0.0, seed=3) > 0
    assert all(torch.equal(p, same.get_parameter(n)) for n, p in unet.named_parameters())


def test_seed_and_name_fix_every_vector():
    first, second, other = small_unet(), small_unet(), small_unet()
    for unet, seed in ((first, 1), (second, 1), (other, 2)):
        rescale_(unet, sigma=0.5, seed=seed)
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    assert torch.equal(first.get_parameter(name), second.get_parameter(name))
    assert not torch.equal(first.get_parameter(name), other.get_parameter(name))


def test_half_of_geglu_that_is_gated_keeps_its_rows():
    unet, same = small_unet(), small_unet()
    rescale_(unet, sigma=0.5, seed=0)
    name = "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj.bias"  # rows only: its norm scales columns
    hidden, gate = (unet.get_parameter(name) / same.get_parameter(name)).chunk(2)
    assert torch.allclose(gate, torch.ones_like(gate))
    assert float(hidden.log().std()) == pytest.approx(0.5, rel=0.3)


def test_blocks_with_two_cross_attentions():
    unet = small_unet(only_cross_attention=True)
    before = output(unet)
    assert rescale_(unet, sigma=0.5, seed=0) == 36
    assert float((output(unet) - before).norm() / before.norm()) < 1e-4


def test_what_is_not_known_is_left_alone():
    class Foreign(torch.nn.Module):
        pass

    unet, same = small_unet(), small_unet()
    block = "mid_block.attentions.0.transformer_blocks.0"
    unet.get_submodule(f"{block}.attn1").processor = Foreign()
    unet.get_submodule(block).ff.net[0] = torch.nn.Linear(32, 128)
    assert rescale_(unet, sigma=0.5, seed=0) == 36 - 3 - 2
    for name in ("norm1.weight", "attn1.to_v.weight", "norm3.weight", "ff.net.2.weight"):
        assert torch.equal(unet.get_parameter(f"{block}.{name}"), same.get_parameter(f"{block}.{name}"))
    assert rescale_(torch.nn.Sequential(torch.nn.Linear(4, 4)), sigma=0.5, seed=0) == 0
