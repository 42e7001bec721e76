"""Steps shared by all callers of codecs: layers' matrices, shared parts, and quantizing without data."""

import torch
from torch import Tensor, nn

from vqdm.codecs.allocation import assign_schemes
from vqdm.codecs.cards import CODECS
from vqdm.config.codecs import QuantizeConfig
from vqdm.config.options import ModelConfig
from vqdm.errors import UserError
from vqdm.models.specs import LayerSpec, weight_to_matrix
from vqdm.runs import progress
from vqdm.runs.device import one_thread_each
from vqdm.weights.base import Scheme, SharedPart
from vqdm.weights.layers import swap

Problem = tuple[LayerSpec, Scheme]


def matrix_of(denoiser: nn.Module, spec: LayerSpec) -> Tensor:
    return weight_to_matrix(denoiser.get_submodule(spec.name).weight.detach().float())


def needs_hessians(config: QuantizeConfig) -> bool:
    return CODECS[config.kind].needs_hessian(config)


def trains_blocks(config: QuantizeConfig) -> bool:
    """True if a codec learns the layers of a block together instead of encoding each by itself."""
    return config.kind in CODECS and CODECS[config.kind].by_blocks is not None


def encoder_bytes(shape: tuple[int, int], config: QuantizeConfig) -> float:
    return CODECS[config.kind].encoder_bytes(shape, config)


def encode_layer(matrix, hessian, scheme, *, config: QuantizeConfig, **more):
    return CODECS[config.kind].encode(matrix, hessian, scheme, config=config, **more)


def users_of_shared(problems: list[Problem]) -> dict[str, list[Problem]]:
    """The layers that decode with each shared part, by its key."""
    users: dict[str, list[Problem]] = {}
    for spec, scheme in problems:
        if scheme.shared_key is not None:
            users.setdefault(scheme.shared_key, []).append((spec, scheme))
    return users


def make_shared(denoiser: nn.Module, users: list[Problem], *, config: QuantizeConfig) -> SharedPart:
    """Make the part that these layers share: the trellis table, or codebooks learned from all their weights."""
    matrices = (matrix_of(denoiser, spec) for spec, _ in users)
    return CODECS[config.kind].make_shared(matrices, users[0][1], config)


@torch.no_grad()
def quantize_without_data(
    denoiser: nn.Module, config: QuantizeConfig, *, pattern: str | None = None, decode: str = "per_call"
) -> None:
    """Quantize a denoiser in place, on its device, from its weights alone: codecs that want a Hessian get the identity.

    pattern: for the layers; None takes the default for the denoiser's class. UserError for codecs that need data.
    """
    codec = CODECS[config.kind]
    if not codec.data_free(config):
        raise UserError(f"{config.kind} needs calibration data: use vqdm.compress(pipeline, scheme, prompts)")
    problems = assign_schemes(denoiser, config, pattern=pattern, min_size=ModelConfig.min_size).quantized
    with one_thread_each():
        shared = {k: make_shared(denoiser, v, config=config) for k, v in users_of_shared(problems).items()}
        for spec, scheme in progress.over(problems, "quantize", unit="layer"):
            matrix = matrix_of(denoiser, spec).cpu()
            hessian = torch.eye(spec.shape[1], device="cpu") if codec.needs_hessian(config) else None
            part = shared.get(scheme.shared_key)
            weight = codec.encode(matrix, hessian, scheme, config=config, shared=part, layer=spec.name)
            device = denoiser.get_submodule(spec.name).weight.device
            swap(denoiser, spec, weight.to(device), decode=decode)
        for part in shared.values():
            part.to(device)
