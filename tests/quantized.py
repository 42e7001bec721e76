"""Small quantized U-Nets that tests share, one per kind of weight."""

import torch
from safetensors.torch import save as to_bytes
from torch import nn
from unets import small_unet

from vqdm.codecs import additive, rtn, trellis
from vqdm.codecs.trellis_table import load_table
from vqdm.hub.checkpoint import layer_groups, stored_with_metadata
from vqdm.hub.quantizer import attach
from vqdm.models.specs import layer_specs, weight_to_matrix
from vqdm.seeds import torch_generator
from vqdm.weights.layers import swap
from vqdm.weights.trellis import TrellisTable

KINDS = ("rtn", "additive", "shared", "trellis")
SMALL = {"num_codebooks": 2, "codebook_bits": 4, "group_size": 8}


def quantized_unet(kind: str, **changes):
    """Every layer that can be, quantized; a model that diffusers saves as such."""
    unet = small_unet(**changes)
    specs = layer_specs(unet, min_size=16)
    matrices = {spec.name: weight_to_matrix(unet.get_submodule(spec.name).weight.detach()) for spec in specs}
    shared = None
    if kind == "shared":
        shared = additive.train_shared_codebooks(matrices.values(), generator=torch_generator(0, "shared"), **SMALL)
    if kind == "trellis":
        shared = TrellisTable.from_values(load_table())
    for spec in specs:
        matrix, identity = matrices[spec.name], torch.eye(spec.shape[1])
        if kind == "rtn":
            weight = rtn.encode(matrix, bits=3)
        elif kind == "trellis":
            weight = trellis.encode(matrix, identity, bits=6.0, table=shared)
        else:
            generator = torch_generator(0, "encode", spec.name)
            weight = additive.encode(matrix, identity, generator=generator, shared=shared, **SMALL)
        swap(unet, spec, weight)
    attach(torch.nn.Module.float(torch.nn.Module.half(unet)).eval().requires_grad_(False))
    return unet


def checkpoint_bytes(denoiser: nn.Module) -> bytes:
    """A whole denoiser, or a part of one, as one file's content."""
    stored, metadata = stored_with_metadata(denoiser.state_dict(), layer_groups(denoiser))
    return to_bytes(stored, {"format": "pt"} | metadata)
