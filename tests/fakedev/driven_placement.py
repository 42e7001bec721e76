"""A pipeline on the fake device: the denoiser stays there, all other parts only visit it.

python -m pytest tests/fakedev/driven_placement.py    (in a process of its own)
"""

import fake_device
import numpy as np
import pytest
import torch

from vqdm.config.options import ModelConfig, SamplerConfig, TrajectoriesConfig
from vqdm.models.loader import denoiser_of, load_pipeline, sample
from vqdm.prompts import load_prompts
from vqdm.seeds import torch_generator
from vqdm.stages.trajectories import _latents

fake_device.register()
DEVICE = fake_device.NAME
CONFIG = ModelConfig(builtin="tiny", sampler=SamplerConfig(steps=2))


@pytest.fixture(scope="module")
def pipeline():
    return load_pipeline(CONFIG, device=DEVICE)


def places(pipeline):
    modules = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    return {name: next(part.parameters()).device.type for name, part in modules.items()}


def image(pipeline):
    draws = [torch_generator(0, "image", str(i)) for i in range(2)]
    return sample(pipeline, ["a red disc", "two"], sampler=CONFIG.sampler, generators=draws, output="np")


AT_REST = {"text_encoder": "cpu", "text_encoder_2": "cpu", "unet": DEVICE, "vae": "cpu"}


def test_images_are_the_cpus_and_visitors_leave(pipeline):
    assert places(pipeline) == AT_REST
    weights = sum(tensor.nbytes for tensor in denoiser_of(pipeline).state_dict().values())
    seen, decoded = [], []
    hooks = [denoiser_of(pipeline).register_forward_hook(lambda *_: seen.append(places(pipeline)))]
    hooks.append(pipeline.vae.decoder.register_forward_hook(lambda *_: decoded.append(places(pipeline))))
    found = image(pipeline)
    for hook in hooks:
        hook.remove()
    assert seen == [AT_REST] * 2 and decoded == [AT_REST | {"vae": DEVICE}]
    assert places(pipeline) == AT_REST
    fake_device.reset()
    assert weights <= fake_device.counts()["held"] < 1.1 * weights
    assert np.allclose(found, image(load_pipeline(CONFIG, device="cpu")), atol=1e-5)


def test_latents_of_images_too(pipeline):
    prompts = load_prompts(source="tiny", n=2, split="train").prompts
    config = TrajectoriesConfig(source="tiny", along="data")
    found, wanted = (
        _latents(which, prompts, config, size=32) for which in (pipeline, load_pipeline(CONFIG, device="cpu"))
    )
    assert torch.allclose(found, wanted, atol=1e-5) and places(pipeline) == AT_REST
