"""The recovery of words: candidates by the world's rules, and errors of a model whose errors are known."""

import functools
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler
from tiny_world import FEW, run

from vqdm.errors import UserError
from vqdm.metrics.probes.recovery import Recovery, other_captions
from vqdm.prompts import load_prompts
from vqdm.tiny.captions import requested
from vqdm.tiny.scenes import TINY, UNSEEN_PAIRS

PROMPTS = load_prompts(source="tiny", split="test", n=12).prompts


@pytest.mark.parametrize("kind", ["colour", "shape"])
def test_one_word_is_another_and_nothing_else_changes(kind):
    for prompt in PROMPTS:
        first = requested(prompt.text)
        said = [(thing.shape, thing.colour) for thing in first.things]
        for text in other_captions(prompt.text, kind, TINY):
            other = requested(text)
            found = [(thing.shape, thing.colour) for thing in other.things]
            assert sum(a != b for a, b in zip(said, found, strict=True)) == 1
            assert not UNSEEN_PAIRS & set(found)
            assert (other.layout, other.background, other.pattern) == (first.layout, first.background, first.pattern)
            assert " a orange" not in f" {text}" and " an red" not in f" {text}"


def test_every_other_word_that_can_be_is_there():
    assert other_captions("an orange circle", "colour", TINY) == [
        f"a {word} circle" for word in ("red", "yellow", "green", "blue", "white", "black")
    ]  # no purple circle was ever shown
    assert other_captions("a tiny red ring above a blue square", "shape", TINY) == [
        f"a tiny red {word} above a blue square" for word in ("circle", "square", "triangle", "cross")
    ]


class KnownXL:
    """A pipeline of latents that are zero, whose noise is off by 0.1 with the right caption, by 0.3 up with others."""

    scheduler, vae_scale_factor = DDIMScheduler(), 1
    text_encoder = text_encoder_2 = None

    def __init__(self, right: str):
        self.right, self.told = right, 0
        zero = SimpleNamespace(mode=lambda: torch.zeros(1, 4, 2, 2))
        self.vae = SimpleNamespace(
            encode=lambda pixels: SimpleNamespace(latent_dist=zero),
            config=SimpleNamespace(scaling_factor=1.0),
            dtype=torch.float32,
        )
        self.components = {}
        self.unet = functools.partial(self._predict)  # which can have a device
        self.unet.device, self.unet.dtype = "cpu", torch.float32

    def encode_prompt(self, *, prompt: list[str], **_):
        self.told = len(prompt)
        off = torch.tensor([0.1 if text == self.right else 0.3 + 0.01 * i for i, text in enumerate(prompt)])
        return off[:, None, None], None, torch.zeros(len(prompt), 1), None

    def _predict(self, noisy, timestep, text, *, added_cond_kwargs):
        kept = self.scheduler.alphas_cumprod[timestep]
        return SimpleNamespace(sample=noisy / (1 - kept).sqrt() + text[..., None])


def test_gaps_are_those_of_a_model_whose_errors_are_known(monkeypatch):
    import contextlib

    monkeypatch.setattr("vqdm.metrics.probes.asked.visits", lambda pipeline: contextlib.nullcontext())
    prompt = PROMPTS[0]
    found = Recovery(KnownXL(prompt.text), TINY).columns([[prompt.id, prompt.text]])
    colours = len(other_captions(prompt.text, "colour", TINY))
    expected = {"error": 0.01, "gap_colour": 0.31**2 - 0.01, "gap_shape": (0.31 + 0.01 * colours) ** 2 - 0.01}
    for name, value in expected.items():
        assert float(found[name]) == pytest.approx(value, rel=1e-4), name
    assert float(found["right_colour"]) == float(found["right_shape"]) == 1


def test_a_pipeline_of_another_kind_is_refused():
    with pytest.raises(UserError, match="recovery asks an SDXL pipeline"):
        Recovery(SimpleNamespace(scheduler=DDIMScheduler()), TINY)


@pytest.mark.slow
def test_fewer_bits_leave_words_worth_less(tmp_path):
    scores = "evaluate.metrics=[recovery]"
    for row in ("quantize=none", "quantize=rtn4", "quantize=rtn quantize.bits=2"):
        done = run("+experiment=tiny_codec", *row.split(), scores, f"results_dir={tmp_path}", *FEW)
        assert done.returncode == 0, done.stderr
        assert "recovery" in done.stdout
