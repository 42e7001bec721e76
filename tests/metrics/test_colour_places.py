"""The search for where a colour sits: restored layers against closed forms, and all of them against their own run."""

import pytest
import torch
from torch import nn

from vqdm.config.options import ModelConfig
from vqdm.metrics.families import FAMILIES
from vqdm.metrics.probes.asked import Asked
from vqdm.metrics.probes.places import GROUPS, Places, layers_of, restored
from vqdm.models.loader import load_pipeline
from vqdm.models.shipped import evaluators_directory
from vqdm.prompts import load_prompts
from vqdm.tiny.scenes import TINY

CAPTIONS = (
    ["a red circle", "a blue ring above a green square"],
    ["a green circle", "a white ring above a green square"],
)


def test_a_run_takes_its_groups_outputs_from_the_first_run_and_no_others():
    """y = W₂ W₁ x with W₁ restored is W₂ W₁ x₀; with W₂ restored it is W₂ W₁ x₀, too; else it is the run's own."""
    first, second = nn.Linear(3, 3), nn.Linear(3, 2)
    x = torch.randn(2, 4, 5, 3, generator=torch.Generator().manual_seed(0))  # guidance, runs, pictures
    with restored([[], [], [first], [second]], pictures=5):
        inner = first(x.flatten(0, 2))
        found = second(inner).unflatten(0, (2, 4, 5))
    inner = inner.unflatten(0, (2, 4, 5))
    torch.testing.assert_close(inner[:, [0, 1, 3]], first(x)[:, [0, 1, 3]])
    torch.testing.assert_close(inner[:, 2], first(x)[:, 0])
    own = second(first(x))
    torch.testing.assert_close(found[:, :2], own[:, :2])
    torch.testing.assert_close(found[:, 2], own[:, 0])
    torch.testing.assert_close(found[:, 3], own[:, 0])
    torch.testing.assert_close(second(first(x)), own)  # nothing is left behind


@pytest.fixture(scope="module")
def pipeline():
    return load_pipeline(ModelConfig(builtin="tiny"), device="cpu")


@torch.no_grad()
def test_all_groups_restored_are_the_other_caption_and_none_is_ones_own(pipeline):
    def together(*names: str) -> list[nn.Module]:
        return [layer for name in names for layer in layers_of(pipeline, name)]

    whole = [
        together(*GROUPS),
        together("keys", "pooled"),  # all ways of the text into the U-Net
        together("keys_down", "keys_mid", "keys_up", "pooled"),
        together("words", "text_attention", "text_mlp"),  # all of the text encoders
    ]
    said, asked = CAPTIONS
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    model, runs = Asked(pipeline, "places"), 2 + len(whole)
    with restored([[], [], *whole], pictures=2):
        found = model.noise_with(said + asked * (runs - 1), 3.0)(latents.repeat(runs, 1, 1, 1), 501).chunk(runs)
    expected = model.noise_with(said, 3.0)(latents, 501)
    other = model.noise_with(asked, 3.0)(latents, 501)
    assert not torch.allclose(expected, other, atol=1e-2)
    torch.testing.assert_close(found[1], other, rtol=1e-4, atol=1e-4)
    for run in (found[0], *found[2:]):
        torch.testing.assert_close(run, expected, rtol=1e-4, atol=1e-4)


def test_every_group_has_layers_and_a_column(pipeline):
    prompt = load_prompts(source="tiny", split="test", n=1).prompts[0]
    probe = Places(pipeline, TINY, evaluators_directory(None), guidance=3.0)
    assert all(probe.groups.values())
    found = probe.columns([[prompt.id, prompt.text]])
    assert set(found) == set(FAMILIES["places"].metrics)
    assert float(found["place_said"]) == float(found["place_keys"]) == 1 and float(found["place_none"]) == 0
