"""The size that is foretold is the size on disk, and a file that is not what it says is refused by name."""

import json

import pytest
import torch
from quantized import KINDS, checkpoint_bytes, quantized_unet
from safetensors.torch import load_file, save_file
from torch import nn
from unets import small_unet

from vqdm.errors import UserError
from vqdm.hub.checkpoint import checkpoint_size, checksum, layer_groups, read_contents
from vqdm.models.specs import layer_specs
from vqdm.weights.additive import AdditiveScheme
from vqdm.weights.bits import count_bits
from vqdm.weights.layers import swap_empty
from vqdm.weights.scalar import ScalarScheme
from vqdm.weights.trellis import TrellisScheme


@pytest.fixture(scope="module")
def unets():
    return {kind: quantized_unet(kind) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_the_foretold_size_is_that_of_the_file(unets, kind, tmp_path):
    unet = unets[kind]
    unet.save_pretrained(tmp_path)
    size = checkpoint_size(unet)
    assert size.total == (tmp_path / "diffusion_pytorch_model.safetensors").stat().st_size
    assert size.total == len(checkpoint_bytes(unet))
    assert size.tensors == count_bits(unet).bytes


SCHEMES = [
    *(ScalarScheme(bits=bits) for bits in range(1, 9)),
    ScalarScheme(codec="gptq", bits=3, group_size=8),
    *(AdditiveScheme(num_codebooks=1, codebook_bits=width) for width in (1, 5, 8, 11, 16)),
    AdditiveScheme(num_codebooks=2, codebook_bits=6, input_scales=True, shared="codebooks"),
    *(TrellisScheme(bits=bits) for bits in (4.0, 5.75, 7.3)),
]


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_the_plan_on_meta_foretells_the_file_of_every_codec_and_width(scheme):
    def swapped(unet):
        return swap_empty(unet, [(spec, scheme) for spec in layer_specs(unet)])

    planned = checkpoint_size(swapped(small_unet().to("meta")))
    assert planned.total == len(checkpoint_bytes(swapped(small_unet())))


def test_mixed_dtypes_are_foretold_too():
    unet = small_unet().to(torch.bfloat16)
    unet.register_buffer("count", torch.tensor(3))
    swap_empty(unet, [(spec, ScalarScheme(bits=4)) for spec in layer_specs(unet)])
    assert checkpoint_size(unet).total == len(checkpoint_bytes(unet))


def test_the_size_does_not_depend_on_how_bits_are_allotted():
    sizes = set()
    for step in (0, 3, 40):
        unet = small_unet()
        specs = [spec for spec in layer_specs(unet) if spec.shape == (32, 32)]
        bits = [(8 * 700 + 8 * step * (1 if i % 2 else -1)) / 1024 for i in range(len(specs) // 2 * 2)]
        swap_empty(unet, [(spec, TrellisScheme(bits=b)) for spec, b in zip(specs, bits, strict=False)])
        content = checkpoint_bytes(unet)
        assert checkpoint_size(unet).total == len(content)
        sizes.add(len(content))
    assert len(sizes) == 1


def test_a_block_of_sdxl_at_full_shapes(tmp_path):
    from diffusers.models.resnet import ResnetBlock2D
    from diffusers.models.transformers.transformer_2d import Transformer2DModel

    block = nn.ModuleDict(
        {
            "resnet": ResnetBlock2D(in_channels=960, out_channels=640, temb_channels=1280),
            "attention": Transformer2DModel(
                10, 64, in_channels=640, num_layers=2, cross_attention_dim=2048, use_linear_projection=True
            ),
        }
    ).half()
    specs = layer_specs(block, pattern=r"(to_(q|k|v|out.0)|net\.(0\.proj|2)|conv(\d+|_shortcut)?|proj_(in|out))$")
    assert len(specs) == 2 * 10 + 2 + 3
    swap_empty(block, [(spec, TrellisScheme(bits=3.0)) for spec in specs])
    (tmp_path / "block.safetensors").write_bytes(checkpoint_bytes(block))
    assert checkpoint_size(block).total == (tmp_path / "block.safetensors").stat().st_size
    weights = sum(spec.size for spec in specs)
    assert weights > 20_000_000
    assert count_bits(block).bits_quantized == pytest.approx(3.0 + 16 * 4096 / weights, abs=1e-5)


def test_the_groups_name_scheme_and_original_shape(unets):
    group = next(group for group in layer_groups(unets["rtn"]) if len(group.shape) == 4)
    assert group.shape == small_unet().get_submodule(group.layers[0]).weight.shape
    assert group.from_dict(json.loads(json.dumps(group.to_dict()))) == group


def test_a_checksum_is_of_name_type_shape_and_bytes():
    tensor = torch.arange(4, dtype=torch.uint8)
    others = [("b", tensor), ("a", tensor.view(2, 2)), ("a", tensor.flip(0)), ("a", tensor.view(torch.float16))]
    sums = {checksum("a", tensor), *(checksum(*other) for other in others)}
    assert len(sums) == 5


def test_numbers_beyond_fp16_are_refused_by_name():
    unet = small_unet()
    unet.conv_in.weight.data[0, 0, 0, 0] = 1e6
    with pytest.raises(UserError, match=r"conv_in\.weight has numbers beyond fp16"):
        checkpoint_bytes(unet)


def _altered(tmp_path, content: bytes, change):
    """The file after its tensors and its metadata went through `change`."""
    path = tmp_path / "altered.safetensors"
    path.write_bytes(content)
    metadata = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
    tensors, about = load_file(path), json.loads(metadata["vqdm"])
    change(tensors, about)
    save_file(tensors, path, {"vqdm": json.dumps(about)})
    return path


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors, about: tensors.pop("conv_in.weight"), "lacks the tensor conv_in.weight"),
        (lambda tensors, about: tensors.update(more=torch.zeros(1)), "unknown tensor more"),
        (lambda tensors, about: about.update(version=99), "version 99"),
        (lambda tensors, about: about.pop("groups"), "does not say what it holds"),
        (lambda tensors, about: about["groups"].pop(), "name other quantized layers"),
        (lambda tensors, about: tensors["conv_in.weight"].add_(1), "tensor conv_in.weight is not as it was saved"),
        (lambda tensors, about: about.update(checksums=about["checksums"][16:]), "checksums for"),
    ],
)
def test_an_altered_file_is_refused_by_name(unets, change, said, tmp_path):
    unet = unets["rtn"]
    path = _altered(tmp_path, checkpoint_bytes(unet), change)
    with pytest.raises(UserError, match=said):
        _check(path, unet)


def _check(path, unet):
    contents = read_contents([path])
    contents.check_groups(layer_groups(unet))
    contents.check_names(unet.state_dict())
    contents.check_tensors(load_file(path))


def test_an_unaltered_file_passes_and_a_truncated_or_strange_one_does_not(unets, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(checkpoint_bytes(unets["rtn"]))
    _check(path, unets["rtn"])
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"model\.safetensors cannot be read"):
        read_contents([path])
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="no vqdm file"):
        read_contents([path])


def test_shards_of_two_checkpoints_are_refused(unets, tmp_path):
    for kind in ("rtn", "additive"):
        (tmp_path / kind).write_bytes(checkpoint_bytes(unets[kind]))
    with pytest.raises(UserError, match="different checkpoints"):
        read_contents([tmp_path / "rtn", tmp_path / "additive"])
