"""Edits by inversion and by region: the world's truth, DDIM's way in closed form, and the pipeline's own sampling."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from tiny_world import FEW, run

from vqdm.config.options import ModelConfig
from vqdm.errors import UserError
from vqdm.metrics.families import FAMILIES
from vqdm.metrics.probes.asked import Asked
from vqdm.metrics.probes.edits import Edits, cells_of, draw_edit, psnr_where
from vqdm.metrics.probes.inversion import Ddim
from vqdm.models.loader import load_pipeline
from vqdm.models.shipped import evaluators_directory
from vqdm.prompts import load_prompts
from vqdm.tiny.attributes import as_seen, fidelity
from vqdm.tiny.captions import requested
from vqdm.tiny.scenes import TINY, UNSEEN_PAIRS

PROMPTS = load_prompts(source="tiny", split="test", n=24).prompts
STEPS = 5


@pytest.fixture(scope="module")
def pipeline():
    return load_pipeline(ModelConfig(builtin="tiny"), device="cpu")


def test_an_edit_asks_for_one_other_colour_that_the_world_shows():
    for prompt in PROMPTS:
        edit = draw_edit(prompt.id, prompt.text, TINY)
        changed = [a != b for a, b in zip(edit.scene.things, edit.edited.things, strict=True)]
        assert changed == [slot == edit.slot for slot in range(len(changed))]
        old = edit.scene.things[edit.slot].colour
        assert dataclasses.replace(edit.edited.things[edit.slot], colour=old) == edit.scene.things[edit.slot]
        assert not {thing.pair for thing in edit.edited.things} & UNSEEN_PAIRS
        assert draw_edit(prompt.id, prompt.text, TINY) == edit


def test_the_truth_is_what_the_other_caption_asks_for_and_the_picture_what_the_first_does():
    for prompt in PROMPTS:
        edit = draw_edit(prompt.id, prompt.text, TINY)
        for caption, scene, other in (
            (edit.caption, edit.scene, edit.edited),
            (edit.asked, edit.edited, edit.scene),
        ):
            tallies = [fidelity(requested(caption), as_seen(one)) for one in (scene, other)]
            right, wrong = ([found == asked for found, asked in tally.values()] for tally in tallies)
            assert all(right) and not all(wrong)


def ddim() -> Ddim:
    return Ddim(DDIMScheduler(beta_schedule="scaled_linear", set_alpha_to_one=False, steps_offset=1), steps=STEPS)


def latents(seed: int) -> torch.Tensor:
    return torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_constant_noise_leads_up_by_ddims_closed_form_and_back():
    """x_t / √ᾱ_t = x_0 / √ᾱ_0 + (σ_t − σ_0) ε with σ = √((1 − ᾱ) / ᾱ)."""
    way, start, noise = ddim(), latents(0), latents(1)
    kept = way.invert(start, lambda x, timestep: noise)
    alphas = way.down.alphas_cumprod[[0, *reversed(way.down.timesteps.tolist())]].double()
    sigmas = ((1 - alphas) / alphas).sqrt()
    assert len(kept) == STEPS + 1
    for level, found in enumerate(kept):
        expected = alphas[level].sqrt() * (start / alphas[0].sqrt() + (sigmas[level] - sigmas[0]) * noise)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)  # diffusers' alphas are float32
        torch.testing.assert_close(way.sample(kept, lambda x, timestep: noise, start=level), start)


def test_outside_the_mask_the_kept_latent_comes_back_exactly():
    way = ddim()
    kept = way.invert(latents(0), lambda x, timestep: x.sin())
    mask = torch.zeros(2, 1, 3, 3, dtype=torch.bool)
    mask[0, 0, 0, 1] = mask[1, 0, 2] = True
    there = mask.expand_as(kept[0])
    edited = way.sample(kept, lambda x, timestep: x.cos(), start=4, mask=mask)
    assert torch.equal(edited[~there], kept[0][~there])
    whole = way.sample(kept, lambda x, timestep: x.cos(), start=4)
    assert torch.equal(edited[there], whole[there])  # as this noise looks at no neighbour
    assert not torch.equal(whole[~there], kept[0][~there])


@pytest.mark.parametrize("guidance", [0.0, 3.0])
@torch.no_grad()
def test_the_way_down_is_the_pipelines_own(pipeline, guidance):
    captions = [prompt.text for prompt in PROMPTS[:2]]
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    asked = {"num_inference_steps": 3, "guidance_scale": guidance, "latents": noise}
    expected = pipeline(captions, **asked, output_type="latent").images
    way = Ddim(pipeline.scheduler, steps=3)
    found = way.sample([noise] * 4, Asked(pipeline, "edits").noise_with(captions, guidance), start=3)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    pictures = Asked(pipeline, "edits").pictures(found)
    saved = (pipeline(captions, **asked, output_type="np").images * 255).round()
    assert np.abs(pictures - saved).max() <= 1


def test_cells_hold_a_changed_pixel_and_psnr_is_over_the_mask():
    changed = np.zeros((1, 8, 8), bool)
    changed[0, 3, 4] = True
    assert cells_of(changed, 4).tolist() == [[[False, True], [False, False]]]
    truth = np.zeros((1, 8, 8, 3), np.uint8)
    pictures = truth.copy()
    pictures[0, 3, 4] = 51  # a fifth of 255
    assert psnr_where(changed, pictures, truth).tolist() == pytest.approx([20 * np.log10(5)])
    assert psnr_where(~changed, pictures, truth).tolist() == pytest.approx([58.92], abs=0.01)


def test_tiny_edits_a_few_pictures(pipeline):
    found = Edits(pipeline, TINY, evaluators_directory(None), guidance=3.0).columns(
        [[p.id, p.text] for p in PROMPTS[:8]]
    )
    assert set(found) == set(FAMILIES["edits"].metrics)
    assert all(column.shape == (8,) and column.isfinite().all() for column in found.values())
    assert float(found["edit_success"].mean()) >= 0.75
    assert float(found["reconstruction_psnr"].mean()) >= 44


def test_a_pipeline_of_another_kind_is_refused():
    with pytest.raises(UserError, match="edits asks an SDXL pipeline"):
        Edits(SimpleNamespace(scheduler=DDIMScheduler()), TINY, evaluators_directory(None), guidance=3.0)


@pytest.mark.slow
def test_a_run_has_edits_among_its_scores(tmp_path):
    done = run("+experiment=tiny_codec", "quantize=rtn4", "evaluate.metrics=[edits]", f"results_dir={tmp_path}", *FEW)
    assert done.returncode == 0, done.stderr
    assert "edit exact" in done.stdout
