"""The reader that was written from docs/format.md alone gives the weights that vqdm computes with, bit for bit."""

import ast
import json
from pathlib import Path

import format_reader
import pytest
import torch
from diffusers import UNet2DConditionModel
from format_reader import FormatError, fingerprint, read
from quantized import KINDS, checkpoint_bytes, quantized_unet
from safetensors.torch import load_file
from torch import nn

from vqdm.acceleration.activations import input_quantizers
from vqdm.acceleration.operators import removed_operators
from vqdm.acceleration.stored_cache import CACHE_NAME
from vqdm.models.specs import spec_of
from vqdm.seeds import torch_generator
from vqdm.weights.additive import AdditiveScheme
from vqdm.weights.base import Scheme
from vqdm.weights.bitpack import pack
from vqdm.weights.layers import quantized_layers, swap
from vqdm.weights.low_rank import LowRankScheme
from vqdm.weights.registry import empty_shared, empty_weight
from vqdm.weights.scalar import ScalarScheme
from vqdm.weights.trellis import TrellisScheme
from vqdm.weights.trellis_format import BYTE, RATE_BITS, WIDE, column_bits, columns_bytes, side_bytes

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
GOLDEN_KINDS = sorted(folder.name for folder in GOLDEN.iterdir())
WEIGHTS = "diffusion_pytorch_model.safetensors"
TINY = {
    "block_out_channels": (16,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "mid_block_type": None,
    "up_block_types": ("UpBlock2D",),
}
SCHEMES = [
    *(ScalarScheme(bits=bits, group_size=size) for bits, size in ((1, None), (3, 8), (5, 24), (7, None), (8, 3))),
    ScalarScheme(codec="gptq", bits=3, group_size=6),
    *(ScalarScheme(codec="adaround", bits=bits, split=split) for bits, split in ((2, 1), (3, 9), (5, 23))),
    *(AdditiveScheme(num_codebooks=m, codebook_bits=width) for m, width in ((1, 5), (2, 11), (3, 1), (4, 7), (1, 16))),
    AdditiveScheme(num_codebooks=2, codebook_bits=5, group_size=6, out_group_size=2, input_scales=True),
    AdditiveScheme(num_codebooks=3, codebook_bits=9, group_size=3, out_group_size=8),
    AdditiveScheme(num_codebooks=2, codebook_bits=6, group_size=4, input_scales=True, shared="codebooks"),
    AdditiveScheme(num_codebooks=2, codebook_bits=3, group_size=12, out_group_size=2, shared="own_name"),
    LowRankScheme(codec="gptq", rank=1, base=ScalarScheme(codec="gptq", bits=4, group_size=8)),
    LowRankScheme(codec="svdquant", rank=5, input_scales=True, base=ScalarScheme(bits=3)),
    LowRankScheme(
        codec="additive",
        rank=2,
        base=AdditiveScheme(num_codebooks=2, codebook_bits=6, group_size=4, shared="codebooks"),
    ),
]


def differing(model: nn.Module, weights: dict) -> list[str]:
    """The quantized layers whose fp32 weight is another than the reader's."""
    layers = quantized_layers(model)
    assert set(layers) == set(weights)
    with torch.no_grad():
        decoded = {name: layer.decoded(torch.float32) for name, layer in layers.items()}
    return [name for name in layers if not torch.equal(decoded[name], torch.from_numpy(weights[name]))]


def drawn_model(scheme: Scheme, shapes: dict[str, nn.Module], *, fill=None) -> nn.Module:
    """Layers with drawn codes and scales; fill: draws the codes of a weight that not all bytes are codes of."""
    model = nn.ModuleDict(shapes)
    shared, generator = empty_shared(scheme), torch_generator(0, scheme.name)
    for name, layer in shapes.items():
        spec = spec_of(name, layer)
        weight = empty_weight(scheme, spec.shape, shared)
        weight.codes.random_(0, 256, generator=generator)
        if fill is not None:
            fill(weight, generator)
        for parameter in (*weight.parameters(), *(shared.parameters() if shared else ())):
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
        swap(model, spec, weight)
    return model.float()


def read_model(model: nn.Module, tmp_path: Path) -> dict:
    path = tmp_path / "model.safetensors"
    path.write_bytes(checkpoint_bytes(model))
    return read(path)


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: f"{scheme.codec}-{scheme.name}")
def test_linear_and_convolution_of_every_scheme(scheme, tmp_path):
    shapes = {"linear": nn.Linear(24, 40, bias=False), "conv": nn.Conv2d(24, 16, (2, 3), bias=False)}
    model = drawn_model(scheme, shapes)
    assert not differing(model, read_model(model, tmp_path))


@pytest.mark.parametrize("out", [16, 33, 320, 321, 650])
def test_trellis_of_every_rate_and_length(out, tmp_path):
    rates = torch.tensor([0, *range(4, 25), 0, 24, 5])
    needed = int(column_bits(out, rates).sum()) + 8 * side_bytes((out, len(rates)), WIDE)

    def fill(weight, generator):
        order = rates[torch.randperm(len(rates), generator=generator)]
        packed = pack((order - 3).clamp(min=0), RATE_BITS)
        weight.codes[: columns_bytes(len(rates), WIDE)] = packed

    scheme = TrellisScheme(bits=(needed + 40) / (out * len(rates)))
    model = drawn_model(scheme, {"a": nn.Linear(len(rates), out), "b": nn.Conv2d(5, out, (1, 5))}, fill=fill)
    assert not differing(model, read_model(model, tmp_path))


@pytest.mark.parametrize("fine", [0, 1])
@pytest.mark.parametrize("out", [16, 33, 250])
def test_trellis_of_byte_columns_of_every_rate_and_scale(out, fine, tmp_path):
    rates, scales = torch.arange(96) % 12, torch.arange(96) % 16  # every pair
    needed = int(column_bits(out, torch.where(rates > 0, 2 * rates + 2, 0)).sum()) + 8 * side_bytes((out, 96), BYTE)

    def fill(weight, generator):
        weight.codes[:97] = torch.cat([torch.tensor([fine]), scales << 4 | rates])

    scheme = TrellisScheme(bits=(needed + 40) / (out * 96), side=BYTE)
    model = drawn_model(scheme, {"a": nn.Linear(96, out), "b": nn.Conv2d(16, out, (2, 3))}, fill=fill)
    assert not differing(model, read_model(model, tmp_path))


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_unet_of_every_kind(kind, tmp_path):
    unet = quantized_unet(kind, **TINY)
    unet.save_pretrained(tmp_path, max_shard_size="15KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 1
    assert not differing(unet, read(*shards))
    with pytest.raises(FormatError, match="checksums"):
        read(shards[0])


def test_there_is_a_golden_checkpoint_of_every_codec():
    kinds = {"rtn", "gptq", "adaround", "adaround_split", "additive", "shared", "trellis", "trellis_byte"}
    assert set(GOLDEN_KINDS) >= kinds | {"beside", "low_rank", "rounded"}
    assert sum(file.stat().st_size for file in GOLDEN.rglob("*") if file.is_file()) < 480_000


@pytest.mark.parametrize("kind", GOLDEN_KINDS)
def test_golden_checkpoints_decode_to_the_recorded_bits(kind):
    recorded = json.loads((GOLDEN / kind / "decoded.json").read_text())
    weights = read(GOLDEN / kind / WEIGHTS)
    assert {name: fingerprint(weight) for name, weight in weights.items()} == recorded
    loaded = UNet2DConditionModel.from_pretrained(GOLDEN / kind)
    assert not differing(loaded, weights)
    assert loaded.conv_in.weight.abs().sum() > 0


def test_a_golden_checkpoint_has_what_is_beside_the_codes():
    """Operators that are gone, grids of the layers' inputs and a cache, as they were saved."""
    loaded, saved = UNet2DConditionModel.from_pretrained(GOLDEN / "rounded"), load_file(GOLDEN / "rounded" / WEIGHTS)
    assert removed_operators(loaded) == ["down_blocks.0.attentions.0.transformer_blocks.0.attn2"]
    assert loaded._modules[CACHE_NAME].schedule.full == (0, 2, 5)
    quantizers = input_quantizers(loaded)
    assert set(quantizers) == set(quantized_layers(loaded)) and len(quantizers) > 5
    for name, quantizer in quantizers.items():
        read_grid = {part: saved[f"{name}.inputs.{part}"] for part in ("scale", "zero", "group")}
        assert all(torch.equal(quantizer.get_buffer(part).to(grid), grid) for part, grid in read_grid.items())
        values = quantizer.scale[quantizer.group.long()] * 63 + quantizer.zero[quantizer.group.long()]  # the highest
        shaped = values[None, :, None, None] if quantizer.conv else values[None]
        assert torch.allclose(quantizer(2 * shaped.abs() + 9), shaped)


@pytest.mark.parametrize("kind", GOLDEN_KINDS)
def test_golden_checkpoints_saved_once_more_hold_the_same(kind, tmp_path):
    loaded = UNet2DConditionModel.from_pretrained(GOLDEN / kind)
    loaded.save_pretrained(tmp_path)
    ours, theirs = (format_reader.load(folder / WEIGHTS) for folder in (tmp_path, GOLDEN / kind))
    assert ours == theirs


def test_a_golden_checkpoint_computes():
    loaded = UNet2DConditionModel.from_pretrained(GOLDEN / "trellis")
    with torch.no_grad():
        noise = loaded(torch.ones(1, 1, 8, 8), torch.tensor([3]), torch.ones(1, 5, 16)).sample
    assert noise.isfinite().all() and noise.std() > 0


def test_the_reader_finds_damage_and_other_versions(tmp_path):
    content = bytearray((GOLDEN / "rtn" / WEIGHTS).read_bytes())
    path = tmp_path / "model.safetensors"
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(FormatError, match="does not match its checksum"):
        read(path)
    path.write_bytes(content.replace(rb"{\"version\":1", rb"{\"version\":9"))
    with pytest.raises(FormatError, match="version 9"):
        read(path)


def test_the_reader_knows_nothing_of_vqdm():
    tree = ast.parse(Path(format_reader.__file__).read_text())
    names = {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert names == {"hashlib", "json", "math", "struct", "pathlib", "numpy"}
