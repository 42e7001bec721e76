"""From a configuration to quantized weights: which codec encodes a layer, and what many layers share."""

import torch
from torch import Tensor, nn
from tqdm import tqdm

from vqdm.codecs import additive, gptq, rtn, trellis
from vqdm.codecs.additive_fast import SAMPLES
from vqdm.codecs.allocation import assign_schemes
from vqdm.codecs.kmeans import CHUNK as DISTANCES
from vqdm.codecs.trellis_table import load_table
from vqdm.config.options import ModelConfig, QuantizeConfig
from vqdm.errors import UserError
from vqdm.models.specs import LayerSpec, weight_to_matrix
from vqdm.runs.device import one_thread_each
from vqdm.seeds import torch_generator
from vqdm.weights.additive import AdditiveScheme
from vqdm.weights.base import QuantizedWeight, Scheme, SharedPart
from vqdm.weights.layers import swap
from vqdm.weights.trellis import TrellisTable

Problem = tuple[LayerSpec, Scheme]


def matrix_of(denoiser: nn.Module, spec: LayerSpec) -> Tensor:
    return weight_to_matrix(denoiser.get_submodule(spec.name).weight.detach().float())


def needs_hessians(config: QuantizeConfig) -> bool:
    return config.kind in ("gptq", "additive", "trellis") or (config.kind == "rtn" and config.clip == "hessian")


def encode_layer(
    matrix: Tensor,
    hessian: Tensor | None,
    scheme: Scheme,
    *,
    config: QuantizeConfig,
    shared: SharedPart | None,
    layer: str,
) -> QuantizedWeight:
    """One layer by the codec of `config`; all that a codec draws is seeded by the layer's name."""
    scalar = {"clip": config.clip, "group_size": config.group_size, "layer": layer}
    if config.kind == "rtn":
        return rtn.encode(matrix, hessian, bits=scheme.bits, **scalar)
    if config.kind == "gptq":
        return gptq.encode(
            matrix, hessian, bits=scheme.bits, act_order=config.act_order, damping=config.damping, **scalar
        )
    if config.kind == "trellis":
        return trellis.encode(
            matrix, hessian, bits=scheme.bits, table=shared, damping=config.damping,
            row_exponent=config.row_exponent, layer=layer,
        )  # fmt: skip
    return additive.encode(
        matrix,
        hessian,
        num_codebooks=scheme.num_codebooks,
        codebook_bits=scheme.codebook_bits,
        group_size=scheme.group_size,
        input_scales=scheme.input_scales,
        shared=shared,
        shared_key=scheme.shared,
        recipe=config.recipe,
        beam_size=config.beam_size,
        damping=config.damping,
        generator=torch_generator(config.seed, "encode", layer),
        layer=layer,
    )


def encoder_bytes(shape: tuple[int, int], config: QuantizeConfig) -> float:
    """What one worker holds while it encodes a layer, beside the Hessian that it is given, but with the matrix.

    Copies of the Hessian (square) and of the matrix (full), both fp32, by the code and as measured in
    tests/stages/plan/test_memory.py. Trellis: a Hessian and its factor, then the factor and bit positions
    as int64. GPTQ: three of the Hessian while it is put in order, then the factor, columns, errors and grids. Additive:
    six while errors' coupling is made, then three and the running products, or k-means' distances.
    """
    square, full = 4 * shape[1] ** 2, 4 * shape[0] * shape[1]
    distances = 4 * min(DISTANCES, SAMPLES << config.codebook_bits)
    if config.kind == "trellis":
        return full + max(2 * square, square + 27 * full)
    if config.kind == "gptq":
        return full + max(3 * square, square + 5.3 * full)
    if config.kind == "rtn":  # 1.75: of the check that all of a Hessian is finite
        return full + (max(1.75 * square, 5.1 * full) if config.clip == "hessian" else 2.7 * full)
    if config.recipe == "paper":
        tables = 4 * shape[1] * round(config.bits * config.group_size / config.codebook_bits) << config.codebook_bits
        return full + square + max(8 * full, 4 * DISTANCES + 5 * full) + 2 * tables
    return full + max(6 * square + 2.75 * full, 3 * square + 8.25 * full, 2 * square + 3.6 * full + distances)


def users_of_shared(problems: list[Problem]) -> dict[str, list[Problem]]:
    """The layers that decode with each shared part, by its key."""
    users: dict[str, list[Problem]] = {}
    for spec, scheme in problems:
        if scheme.shared_key is not None:
            users.setdefault(scheme.shared_key, []).append((spec, scheme))
    return users


def make_shared(denoiser: nn.Module, users: list[Problem], *, config: QuantizeConfig) -> SharedPart:
    """What these layers share: the trellis table, or codebooks learned from all their weights."""
    scheme = users[0][1]
    if not isinstance(scheme, AdditiveScheme):
        return TrellisTable.from_values(load_table())
    return additive.train_shared_codebooks(
        (matrix_of(denoiser, spec) for spec, _ in users),
        num_codebooks=scheme.num_codebooks,
        codebook_bits=scheme.codebook_bits,
        group_size=scheme.group_size,
        generator=torch_generator(config.seed, "codebooks", scheme.shared_key),
    )


DATA_FREE = ("rtn", "trellis", "additive")


@torch.no_grad()
def quantize_without_data(
    denoiser: nn.Module, config: QuantizeConfig, *, pattern: str | None = None, decode: str = "per_call"
) -> None:
    """Quantize a denoiser in place, on its device, by its weights alone: codecs that want a Hessian get the identity.

    pattern: of the layers; None is the one that goes with the denoiser's class. UserError for codecs that need data.
    """
    if config.kind not in DATA_FREE or config.clip == "hessian" or config.allocation != "uniform":
        raise UserError(f"{config.kind} needs calibration data: use vqdm.compress(pipeline, scheme, prompts)")
    problems = assign_schemes(denoiser, config, pattern=pattern, min_size=ModelConfig.min_size).quantized
    with one_thread_each():
        shared = {k: make_shared(denoiser, v, config=config) for k, v in users_of_shared(problems).items()}
        for spec, scheme in tqdm(problems, desc="quantize", unit="layer"):
            matrix = matrix_of(denoiser, spec).cpu()
            hessian = torch.eye(spec.shape[1]) if config.kind != "rtn" else None
            part = shared.get(scheme.shared_key)
            weight = encode_layer(matrix, hessian, scheme, config=config, shared=part, layer=spec.name)
            device = denoiser.get_submodule(spec.name).weight.device
            swap(denoiser, spec, weight.to(device), decode=decode)
        for part in shared.values():
            part.to(device)
