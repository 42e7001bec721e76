import math

import pytest
import torch
from unets import sdxl_unet, small_unet

from vqdm.codecs.allocation import assign_schemes, planned_bits
from vqdm.codecs.bit_budget import TABLE_BITS, allocate, uniform_bits
from vqdm.config.codecs import AdditiveConfig, TrellisConfig
from vqdm.config.options import PAPER_PATTERN
from vqdm.errors import UserError
from vqdm.hub.checkpoint import checkpoint_size
from vqdm.models.specs import LayerSpec, group_of, layer_specs
from vqdm.weights.bits import count_bits
from vqdm.weights.layers import swap_empty
from vqdm.weights.trellis_format import FEWEST_OUTPUTS, side_bytes

OPTIONS = {"pattern": r"to_|ff|conv|proj", "min_size": 8}


def layers(*shapes):
    return [LayerSpec(f"layer{i}", "linear", shape) for i, shape in enumerate(shapes)]


def code_bits(spec, bits):
    return bits - 8 * side_bytes(spec.shape) / spec.size


@pytest.mark.parametrize("bits", [2.0, 3.0, 3.7, 4.0])
def test_a_trellis_takes_at_most_its_bits_over_sdxl_and_nearly_all_of_them(bits):
    counts = planned_bits(sdxl_unet(), TrellisConfig(bits=bits), pattern=PAPER_PATTERN, min_size=16)
    assert bits - 1e-4 < counts.bits_quantized <= bits


def test_uniform_bits_are_uniform_for_codes():
    specs = layers((64, 64), (320, 1024), (16, 4096))
    bits = uniform_bits(specs, 3.4)
    assert len({round(code_bits(spec, bits[spec.name]), 9) for spec in specs}) == 1
    total = sum(bits[spec.name] * spec.size for spec in specs) + TABLE_BITS
    assert total == pytest.approx(3.4 * sum(spec.size for spec in specs))


def test_layers_too_narrow_for_a_trellis_take_scalar_codes_and_all_bits_are_kept():
    unet = small_unet()
    specs = layer_specs(unet, **(OPTIONS | {"min_size": 1}))
    narrow = [spec.name for spec in specs if spec.shape[0] < 16]
    assert FEWEST_OUTPUTS == TrellisConfig.fewest_outputs == 16
    assignment = assign_schemes(unet, TrellisConfig(bits=6), **(OPTIONS | {"min_size": 1}))
    assert narrow and narrow == [spec.name for spec, scheme in assignment.quantized if scheme.name == "gptq8"]
    assert len(assignment.quantized) == len(specs)
    assert assignment.exceptions("trellis").startswith(f"not in trellis codes: {narrow[0]} takes gptq8")
    counts = planned_bits(unet, TrellisConfig(bits=6), **(OPTIONS | {"min_size": 1}))
    assert 6 - 1e-2 < counts.bits_quantized <= 6


def test_what_no_code_makes_smaller_stays_in_16_bit_with_the_reason():
    model = torch.nn.Sequential(torch.nn.Linear(4, 2), torch.nn.Linear(64, 512), torch.nn.Linear(1, 300))
    assignment = assign_schemes(model, TrellisConfig(), pattern=".", min_size=1)
    assert [spec.name for spec in assignment.specs] == ["1"]
    assert "0 stays in 16 bit (2 outputs are too few" in assignment.exceptions("trellis")
    assert "2 stays in 16 bit (its scales and rates alone" in assignment.exceptions("trellis")
    assert assign_schemes(model, TrellisConfig(), pattern="1", min_size=16).exceptions("trellis") is None


def test_narrow_layers_that_take_all_bits_are_refused():
    with pytest.raises(UserError, match=r"quantize.bits=3 is less than layers of fewer than 16 outputs take"):
        assign_schemes(torch.nn.Sequential(torch.nn.Linear(64, 8)), TrellisConfig(), pattern=".", min_size=1)


def test_too_few_bits_are_refused_before_any_work():
    with pytest.raises(UserError, match=r"quantize.bits=1 is less than"):
        uniform_bits(layers((64, 64)), 1.0)
    with pytest.raises(UserError, match=r"quantize.bits=1 is less than"):
        allocate(layers((64, 64)), {"layer0": {2.5: 1.0, 4.0: 0.1}}, 1.0)


def _harm(specs, strength):
    """Harm by the law of high rates, 2^(−2 R): what `allocate` expects."""
    return {
        spec.name: {side + at: s * 2 ** (-2 * at) for at in (2.0, 3.5)}
        for spec, s in zip(specs, strength, strict=True)
        for side in [8 * side_bytes(spec.shape) / spec.size]
    }


def test_bits_go_where_they_save_most():
    specs = layers((256, 256), (256, 256), (512, 512))
    strength = (1.0, 2.0**-4, 4.0)
    bits = allocate(specs, _harm(specs, strength), 3.2)
    codes = [code_bits(spec, bits[spec.name]) for spec in specs]
    # reverse water-filling in closed form: R = c + ½ log2(harm per weight), over all layers alike
    levels = [c - 0.5 * math.log2(s / spec.size) for c, s, spec in zip(codes, strength, specs, strict=True)]
    step = 8 / min(spec.size for spec in specs)  # of a byte, the smallest there is
    assert max(levels) - min(levels) <= step * (1 + 1e-9)
    total = sum(bits[spec.name] * spec.size for spec in specs) + TABLE_BITS
    assert total <= 3.2 * sum(spec.size for spec in specs) * (1 + 1e-12)
    assert 3.2 * sum(spec.size for spec in specs) - total < 8  # whole bytes


def test_no_layer_gets_more_than_the_highest_rate_or_less_than_half_a_bit():
    specs = layers((256, 256), (256, 256))
    bits = allocate(specs, _harm(specs, (1.0, 1e-12)), 4.0)
    codes = [code_bits(spec, bits[spec.name]) for spec in specs]
    assert codes[0] == pytest.approx(6.0) and 0.5 <= codes[1] < 2


def test_sensitivity_takes_the_same_bytes_as_the_plan():
    config = TrellisConfig(bits=5, allocation="sensitivity")
    unet = small_unet()
    specs = [spec for spec in layer_specs(unet, **OPTIONS) if spec.shape[0] >= 16]
    harm = _harm(specs, [2.0 ** -(i % 5) for i in range(len(specs))])
    swap_empty(unet, assign_schemes(unet, config, harm=harm, **OPTIONS).quantized)
    counts = count_bits(unet)
    plan = planned_bits(small_unet(), config, **OPTIONS)
    assert counts.bits_quantized <= 5
    assert counts == plan
    planned = swap_empty(small_unet().to("meta"), assign_schemes(small_unet(), config, **OPTIONS).quantized)
    assert checkpoint_size(unet) == checkpoint_size(planned)
    assert len({len(tensor) for tensor in unet.state_dict().values() if tensor.dtype == torch.uint8}) > 10


@pytest.mark.parametrize(
    ("layer", "group"),
    [
        ("down_blocks.1.attentions.0.proj_in", "down_blocks.1"),
        ("mid_block.resnets.0.conv1", "mid_block"),
        ("up_blocks.2.resnets.1.conv2", "up_blocks.2"),
        ("transformer_blocks.11.ff.net.2", "transformer_blocks.11"),
        ("head", "head"),
    ],
)
def test_groups_are_those_of_the_paper(layer, group):
    assert group_of(layer) == group


def test_sdxl_has_the_seven_groups_of_the_paper():
    groups: dict[str, int] = {}
    for spec in layer_specs(sdxl_unet()):
        groups[group_of(spec.name)] = groups.get(group_of(spec.name), 0) + 1
    assert groups == {
        "down_blocks.0": 5, "down_blocks.1": 50, "down_blocks.2": 209, "mid_block": 106,
        "up_blocks.0": 316, "up_blocks.1": 76, "up_blocks.2": 9,
    }  # fmt: skip


def test_shared_codebooks_by_block_have_the_groups_keys():
    config = AdditiveConfig(bits=2, group_size=8, codebooks="block")
    assigned = assign_schemes(small_unet(), config, **OPTIONS).quantized
    for spec, scheme in assigned:
        assert scheme.shared_key == f"codebooks_{group_of(spec.name).replace('.', '_')}"
    assert len({scheme.shared_key for _, scheme in assigned}) > 1
