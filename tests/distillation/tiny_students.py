"""A few layers of the shipped tiny model quantized at about 2 bits, and trajectories to train them on."""

import copy
import functools
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from vqdm.calibration.recording import Call, Recorder
from vqdm.codecs import additive, rtn, trellis
from vqdm.codecs.trellis_table import load_table
from vqdm.config.options import FinetuneConfig, ModelConfig, SamplerConfig, TrainedConfig
from vqdm.distillation.trajectories import Trajectories, pack
from vqdm.models.loader import denoiser_of, load_pipeline, sample
from vqdm.models.specs import layer_specs, weight_to_matrix
from vqdm.seeds import torch_generator
from vqdm.weights.layers import swap
from vqdm.weights.trellis import TrellisTable
from vqdm.weights.trellis_format import side_bits

# one block early, one in the middle, one late: to_q, to_k and to_v read one tensor, conv2 is a convolution
LAYERS = r"(down_blocks\.1|mid_block|up_blocks\.1).*(resnets\.0\.conv2|attentions\.0.*attn1\.to_(q|k|v))$"
TEXTS = ("a large red circle", "two small blue squares", "a green triangle above a red square", "a yellow circle")
FEW = TrainedConfig(biases=False, norms=False, rest=False)  # what quantization added
QUICK = {"batch_size": 3, "check_every": 2, "validation_samples": 4, "warmup": 0, "learning_rate": 2e-3, "train": FEW}


@functools.cache
def pipeline(steps: int = 3):
    """The shipped tiny model, not to be changed."""
    return load_pipeline(ModelConfig(builtin="tiny", sampler=SamplerConfig(steps=steps)), device="cpu")


def teacher() -> nn.Module:
    return denoiser_of(pipeline())


@functools.cache
def _student() -> nn.Module:
    student = copy.deepcopy(teacher())
    table = TrellisTable.from_values(load_table())
    for spec in layer_specs(student, pattern=LAYERS):
        matrix = weight_to_matrix(student.get_submodule(spec.name).weight.detach())
        identity = torch.eye(matrix.shape[1])
        if spec.name.endswith("to_q"):
            weight = rtn.encode(matrix, bits=2)
        elif spec.name.endswith("conv2"):
            weight = trellis.encode(matrix, identity, bits=2 + side_bits(matrix.shape), table=table)
        else:
            weight = additive.encode(
                matrix, identity, num_codebooks=2, codebook_bits=4, group_size=4,
                generator=torch_generator(0, "encode", spec.name),
            )  # fmt: skip
        swap(student, spec, weight)
    return student.float().eval().requires_grad_(False)


def student() -> nn.Module:
    """A copy: the convolutions are trellis codes, to_q scalar, to_k and to_v additive; fp32, to be trained."""
    return copy.deepcopy(_student())


@functools.cache
def recorded(steps: int = 3, texts: Sequence[str] = TEXTS, *, guidance: float = 3.0) -> list[Call]:
    """The teacher's calls at all steps of sampling some captions at once."""
    sampler = SamplerConfig(steps=steps, guidance=guidance)
    generators = [torch_generator(0, "noise", text) for text in texts]
    with Recorder(teacher(), steps=set(range(steps))) as recorder:
        sample(pipeline(), list(texts), sampler=sampler, generators=generators, output="latent")
    return recorder.calls


def trajectories(directory: Path, *, steps: int = 3, texts: Sequence[str] = TEXTS, guidance=3.0) -> Trajectories:
    """Of one file, written there."""
    path = directory / f"{steps:03d}.safetensors"
    path.write_bytes(pack(recorded(steps, texts, guidance=guidance), captions=len(texts)))
    return Trajectories([path])


def config(**changes) -> FinetuneConfig:
    return FinetuneConfig(**(QUICK | changes))
