import pytest
import torch
from unets import sdxl_unet, small_unet

from vqdm.models.specs import layer_specs
from vqdm.weights.additive import AdditiveScheme
from vqdm.weights.bits import count_bits
from vqdm.weights.layers import swap_empty
from vqdm.weights.scalar import ScalarScheme

SDXL_PARAMETERS, SDXL_WEIGHTS = 2_567_463_684, 2_540_953_600


def quantized(unet, scheme, specs=None):
    return swap_empty(unet, [(spec, scheme) for spec in specs or layer_specs(unet)])


@pytest.fixture(scope="module")
def sdxl():
    unet = sdxl_unet()
    return unet, layer_specs(unet)


@pytest.mark.parametrize(("count", "paper", "all_counted"), [(4, 4.153, 4.173), (3, 3.154, 3.173), (2, 2.154, 2.173)])
def test_sdxl_counts_are_those_of_the_paper_facts(sdxl, count, paper, all_counted):
    bits = count_bits(quantized(sdxl[0], AdditiveScheme(num_codebooks=count), sdxl[1]))
    assert bits.bits_as_in_paper == pytest.approx(paper, abs=5e-4)
    assert bits.bits_per_weight == pytest.approx(all_counted, abs=1e-3)
    assert bits.bytes == pytest.approx({4: 1339e6, 3: 1018e6, 2: 698e6}[count], abs=0.6e6)


def test_sdxl_scalar_counts_in_closed_form(sdxl):
    bits = count_bits(quantized(sdxl[0], ScalarScheme(bits=4), sdxl[1]))
    rows = sum(spec.shape[0] for spec in sdxl[1])
    assert bits.bits_quantized == pytest.approx((4 * SDXL_WEIGHTS + 32 * rows) / SDXL_WEIGHTS)
    others = SDXL_PARAMETERS - SDXL_WEIGHTS
    assert bits.bits_per_weight == pytest.approx((4 * SDXL_WEIGHTS + 32 * rows + 16 * others) / SDXL_PARAMETERS)
    assert 4 < bits.bits_as_in_paper < bits.bits_per_weight


def test_unquantized_denoiser_has_16_bits():
    unet = small_unet()
    bits = count_bits(unet)
    assert (bits.bits_per_weight, bits.bits_quantized) == (16, 16)
    assert bits.bytes == 2 * sum(p.numel() for p in unet.parameters())
    assert bits.to_dict()["bytes"] == bits.bytes


def test_shared_codebooks_count_once():
    own = count_bits(quantized(small_unet(), AdditiveScheme(num_codebooks=2, codebook_bits=4)))
    unet = small_unet()
    specs = layer_specs(unet)
    shared = count_bits(quantized(unet, AdditiveScheme(num_codebooks=2, codebook_bits=4, shared="codebooks")))
    codebooks = 2 * 16 * 8 * 2
    assert own.bytes - shared.bytes == (len(specs) - 1) * codebooks
    weights = sum(spec.size for spec in specs)
    assert own.bits_quantized - shared.bits_quantized == pytest.approx(8 * (len(specs) - 1) * codebooks / weights)
    parameters = sum(p.numel() for p in small_unet().parameters())
    saved = 8 * (len(specs) - 1) * codebooks / parameters
    assert own.bits_as_in_paper - shared.bits_as_in_paper == pytest.approx(saved)


@pytest.mark.parametrize(
    "scheme", [ScalarScheme(bits=3, group_size=8), AdditiveScheme(num_codebooks=3, shared="codebooks")]
)
def test_the_plan_is_the_real_thing(scheme):
    real = quantized(small_unet(), scheme)
    bits = count_bits(real)
    assert count_bits(quantized(small_unet().to("meta"), scheme)) == bits
    assert bits.bytes == sum(t.numel() * t.element_size() for t in real.half().state_dict().values())
    assert count_bits(real.float()) == bits


def test_nothing_has_no_bits():
    with pytest.raises(ValueError, match="without parameters"):
        count_bits(torch.nn.Identity())
