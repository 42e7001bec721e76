"""Attention's scores on their grids, by written-out formulas; with fine ones the U-Net is as it was."""

import math

import pytest
import torch
from unets import output, small_unet

from vqdm.acceleration.scores import ScoreQuantizer, attentions, quantize_scores, rounded_scores
from vqdm.errors import UserError


def drawn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).softmax(-1)


def by_formula(score, largest, grid):
    if grid == "uniform":
        return largest * round(score / largest * 15) / 15
    return largest * 2.0 ** -min(15, round(-math.log2(score / largest)))


@pytest.mark.parametrize("grid", ["uniform", "log"])
@pytest.mark.parametrize("kept", [0, 1])
def test_scores_are_rounded_by_their_images_largest(grid, kept):
    scores = drawn(2, 3, 4, 5)
    found = rounded_scores(scores, bits=4, grid=grid, kept=kept)
    assert torch.equal(found[..., :kept], scores[..., :kept])
    for one, other in zip(scores, found, strict=True):
        rest = one[..., kept:].flatten().tolist()
        expected = [by_formula(score, max(rest), grid) for score in rest]
        assert torch.allclose(other[..., kept:].flatten(), torch.tensor(expected), atol=1e-6)
        assert torch.equal(rounded_scores(one[None], bits=4, grid=grid, kept=kept)[0], other)


@pytest.mark.parametrize("grid", ["uniform", "log"])
def test_zeros_stay_near_zero(grid):
    scores = torch.zeros(1, 1, 2, 3)
    assert rounded_scores(scores, bits=4, grid=grid, kept=0).abs().max() < 1e-30
    scores[..., 0] = 1
    found = rounded_scores(scores, bits=4, grid=grid, kept=0)
    assert torch.equal(found[..., 0], scores[..., 0]) and found[..., 1:].max() <= 2.0**-15


def test_a_unet_with_scores_as_they_are_gives_what_it_gave(monkeypatch):
    unet = small_unet()
    plain = output(unet)
    quantize_scores(unet, bits=8, grid="uniform", bos=True)
    seen = []

    def noted(scores, *, kept: int, **_):
        seen.append((kept, scores.shape[-1]))
        return scores

    monkeypatch.setattr("vqdm.acceleration.scores.rounded_scores", noted)
    assert torch.allclose(output(unet), plain, atol=1e-5)
    assert len(seen) == 2 * len(unet_blocks(unet)) and {keys for first, keys in seen if first} == {5}  # the text's


def unet_blocks(unet):
    return [name for name, module in unet.named_modules() if type(module).__name__ == "BasicTransformerBlock"]


def test_fewer_bits_change_more():
    plain, changes = output(small_unet()), []
    for bits in (8, 4, 2):
        unet = small_unet()
        quantize_scores(unet, bits=bits, grid="uniform", bos=False)
        assert all(
            isinstance(module.processor, ScoreQuantizer) for module in unet.modules() if hasattr(module, "processor")
        )
        changes.append((output(unet) - plain).norm().item())
    assert 0 < changes[0] < changes[1] < changes[2]


def test_other_attention_is_refused():
    unet = small_unet()
    quantize_scores(unet, bits=8, grid="uniform", bos=True)
    with pytest.raises(UserError, match="for U-Nets' attention"):
        attentions(unet)  # is rounded already
    with pytest.raises(UserError, match="Linear has another"):
        attentions(torch.nn.Linear(2, 2))
