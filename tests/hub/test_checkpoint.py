"""A quantized denoiser survives its file, and a file that is not what it says is refused by name."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from unets import output, small_unet

from vqdm.bits import count_bits
from vqdm.codecs import additive, rtn
from vqdm.errors import UserError
from vqdm.hub import denoiser_bytes, load_quantized_, quantized_weights
from vqdm.layers import swap
from vqdm.models.specs import layer_specs, weight_to_matrix
from vqdm.seeds import torch_generator

SMALL = {"num_codebooks": 2, "codebook_bits": 4, "group_size": 8}


def quantized(kind: str):
    """A small U-Net with every layer quantized, its float tensors rounded to 16 bit as in the file."""
    unet = small_unet()
    specs = layer_specs(unet, min_size=16)
    matrices = {spec.name: weight_to_matrix(unet.get_submodule(spec.name).weight.detach()) for spec in specs}
    shared = None
    if kind == "shared":
        shared = additive.train_shared_codebooks(matrices.values(), generator=torch_generator(0, "shared"), **SMALL)
    for spec in specs:
        if kind == "rtn":
            weight = rtn.encode(matrices[spec.name], bits=3)
        else:
            generator = torch_generator(0, "encode", spec.name)
            identity = torch.eye(spec.shape[1])
            weight = additive.encode(matrices[spec.name], identity, generator=generator, shared=shared, **SMALL)
        swap(unet, spec, weight)
    return torch.nn.Module.float(torch.nn.Module.half(unet)).eval().requires_grad_(False)


@pytest.mark.parametrize("kind", ["rtn", "layer", "shared"])
def test_what_is_loaded_is_what_was_saved(kind, tmp_path):
    unet = quantized(kind)
    content = denoiser_bytes(unet)
    (tmp_path / "denoiser.safetensors").write_bytes(content)
    loaded = small_unet()
    load_quantized_(loaded, tmp_path / "denoiser.safetensors")
    assert {n: w.scheme for n, w in quantized_weights(loaded).items()} == {
        n: w.scheme for n, w in quantized_weights(unet).items()
    }
    ours, theirs = unet.state_dict(), loaded.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert torch.equal(output(unet), output(loaded))
    header = int.from_bytes(content[:8], "little") + 8
    assert count_bits(unet).bytes == len(content) - header


def _altered(tmp_path, change) -> str:
    """A saved denoiser whose tensors and metadata went through `change`."""
    path = tmp_path / "denoiser.safetensors"
    path.write_bytes(denoiser_bytes(quantized("rtn")))
    header = json.loads(path.read_bytes()[8 : 8 + int.from_bytes(path.read_bytes()[:8], "little")])
    tensors, metadata = load_file(path), header["__metadata__"]
    change(tensors, metadata)
    save_file(tensors, path, metadata)
    return path


def _rename_scheme(tensors, metadata):
    about = json.loads(metadata["vqdm"])
    about["schemes"]["somewhere.else"] = about["schemes"].pop(next(iter(about["schemes"])))
    metadata["vqdm"] = json.dumps(about)


def _other_version(tensors, metadata):
    metadata["vqdm"] = json.dumps(json.loads(metadata["vqdm"]) | {"version": 99})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors, metadata: tensors.pop("conv_in.weight"), "lacks the tensor conv_in.weight"),
        (lambda tensors, metadata: tensors.update(more=torch.zeros(1)), "unknown tensor more"),
        (_other_version, "version 99"),
        (lambda tensors, metadata: metadata.update(vqdm="{"), "does not say what it holds"),
        (lambda tensors, metadata: metadata.pop("vqdm"), "does not say what it holds"),
        (_rename_scheme, "somewhere.else"),
    ],
)
def test_an_altered_file_is_refused_by_name(change, said, tmp_path):
    path = _altered(tmp_path, change)
    with pytest.raises(UserError, match=said):
        load_quantized_(small_unet(), path)


def test_a_truncated_file_is_refused_by_name(tmp_path):
    path = tmp_path / "denoiser.safetensors"
    path.write_bytes(denoiser_bytes(quantized("rtn"))[:-100])
    with pytest.raises(UserError, match=r"denoiser\.safetensors cannot be read"):
        load_quantized_(small_unet(), path)


def test_full_precision_has_a_file_too(tmp_path):
    unet = small_unet()
    path = tmp_path / "denoiser.safetensors"
    path.write_bytes(denoiser_bytes(unet))
    loaded = copy.deepcopy(unet)
    load_quantized_(loaded, path)
    assert torch.allclose(output(unet), output(loaded), atol=2e-2)
