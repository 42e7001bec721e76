"""What only a GPU can show; skipped where torch sees none, with that reason.

python -m pytest -m gpu tests/test_gpu.py
"""

import copy

import numpy as np
import pytest
import torch
from quantized import KINDS, quantized_unet
from random_weights import random_weight, trellis_weight

from vqdm.config.options import ModelConfig, SamplerConfig
from vqdm.models.loader import load_pipeline, sample
from vqdm.runs.usage import Usage
from vqdm.seeds import torch_generator
from vqdm.weights.additive import AdditiveScheme
from vqdm.weights.layers import quantized_layers
from vqdm.weights.scalar import ScalarScheme

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason=f"torch {torch.__version__} sees no GPU"),
]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WEIGHTS = {
    "trellis": lambda dtype: trellis_weight(96, [0, 4, 5, 8, 13, 16, 24] * 19, dtype=dtype),
    "additive": lambda dtype: random_weight(AdditiveScheme(num_codebooks=3), (80, 136), dtype=dtype),
    "scalar": lambda dtype: random_weight(ScalarScheme(codec="rtn", bits=4), (80, 130), dtype=dtype),
}
INPUTS = (torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.randn(2, 5, 32))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", WEIGHTS)
@torch.no_grad()
def test_weights_decode_to_the_cpus_numbers(kind, dtype):
    weight = WEIGHTS[kind](dtype)
    wanted = weight()
    found = weight.to("cuda")().cpu()
    assert found.dtype == dtype and torch.equal(found, wanted)  # 0 equals −0


@pytest.mark.parametrize("decode", ["per_call", "cached"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_quantized_denoiser_gives_what_it_does_on_the_cpu(kind, decode):
    unet = quantized_unet(kind)
    there = copy.deepcopy(unet).to("cuda")
    for layer in quantized_layers(there).values():
        layer.decode = decode
    found, wanted = there(*(tensor.cuda() for tensor in INPUTS)).sample.cpu(), unet(*INPUTS).sample
    assert float((found - wanted).norm() / wanted.norm()) < 2e-3  # TF32 in convolutions


def test_images_are_the_cpus_and_visitors_leave_the_device():
    config = ModelConfig(builtin="tiny", sampler=SamplerConfig(steps=2))

    def images(device):
        pipeline = load_pipeline(config, device=device)
        draws = [torch_generator(0, "image", str(i)) for i in range(2)]
        return pipeline, sample(pipeline, ["a", "b"], sampler=config.sampler, generators=draws, output="np")

    usage = Usage()
    (pipeline, found), (_, wanted) = images("cuda"), images("cpu")
    assert np.abs(found - wanted).max() < 0.02
    assert {pipeline.text_encoder.device.type, pipeline.vae.device.type} == {"cpu"}
    weights = sum(tensor.nbytes for tensor in pipeline.unet.state_dict().values())
    assert usage.so_far()["peak_memory_bytes"]["device"] > weights


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_the_cpus(kind):
    found = []
    for device in ("cpu", "cuda"):
        unet = quantized_unet(kind).to(device).requires_grad_()
        unet(*(tensor.to(device) for tensor in INPUTS)).sample.square().mean().backward()
        found.append({name: parameter.grad for name, parameter in unet.named_parameters()})
    cpu, gpu = found
    assert {name for name in cpu if cpu[name] is None} == {name for name in gpu if gpu[name] is None}
    for name, wanted in cpu.items():
        if wanted is not None:
            assert float((gpu[name].cpu() - wanted).norm()) < 1e-2 * float(wanted.norm()) + 1e-6, name
