import csv
from collections import Counter
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel, PixArtTransformer2DModel, SD3Transformer2DModel
from torch import nn
from torch.overrides import TorchFunctionMode
from unets import sdxl_unet, small_unet

from vqdm.errors import UserError
from vqdm.models.specs import layer_specs, matrix_to_weight, skipped_specs, spec_of, weight_to_matrix

SHAPES = Path(__file__).parents[3] / "shared/docs/sdxl_layers.csv"


@pytest.fixture(scope="module")
def sdxl():
    return sdxl_unet()


def test_paper_selects_771_layers_of_sdxl_and_leaves_23(sdxl):
    specs = layer_specs(sdxl)
    assert len(specs) == 771
    assert Counter(spec.kind for spec in specs) == {"linear": 722, "conv": 49}
    assert sum(spec.size for spec in specs) == 2_540_953_600
    assert sum(p.numel() for p in sdxl.parameters()) == 2_567_463_684
    blocks = Counter(".".join(spec.name.split(".")[: 1 if spec.name.startswith("mid") else 2]) for spec in specs)
    assert sorted(blocks.values()) == sorted([5, 50, 209, 106, 316, 76, 9])
    skipped = skipped_specs(sdxl)
    assert len(skipped) == 23
    reasons = {spec.name: reason for spec, reason in skipped}
    assert sum("time_emb_proj" in name for name in reasons) == 17
    assert {"conv_in", "conv_out", "time_embedding.linear_1", "add_embedding.linear_2"} <= set(reasons)


@pytest.mark.skipif(not SHAPES.exists(), reason=f"the table of SDXL's shapes is not at {SHAPES}")
def test_shapes_agree_with_the_table(sdxl):
    def row_of(spec):
        kernel = spec.conv.kernel[0] if spec.conv else 1
        return spec.shape[0], spec.shape[1] // kernel**2, kernel

    expected = Counter()
    with SHAPES.open() as file:
        for row in csv.DictReader(file):
            expected[int(row["out"]), int(row["in"]), int(row["k"])] += int(row["count"])
    assert Counter(map(row_of, layer_specs(sdxl))) == expected


class Joined(TorchFunctionMode):
    """Keeps the channels of both pictures that torch.cat joins."""

    def __init__(self):
        super().__init__()
        self.channels = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.cat and args[0][0].ndim == 4:
            self.channels.append([picture.shape[1] for picture in args[0]])
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["SDXL", "small", "three units, no mid block"])
def test_shortcuts_are_split_where_the_unet_joins(name, sdxl):
    if name == "SDXL":
        unet, size, text, more = sdxl, 16, 2048, {"text_embeds": (1, 1280), "time_ids": (1, 6)}
    else:
        changes = {} if name == "small" else {"layers_per_block": 2, "mid_block_type": None}
        unet, size, text, more = small_unet(**changes).to("meta"), 8, 32, {}
    added = {key: torch.empty(shape, device="meta") for key, shape in more.items()}
    with torch.no_grad(), Joined() as joined:
        latents, captions = (torch.empty(shape, device="meta") for shape in ((1, 4, size, size), (1, 5, text)))
        unet(latents, torch.empty((), device="meta"), captions, added_cond_kwargs=added)
    specs = [spec for spec in layer_specs(unet) if spec.split is not None]
    assert [[spec.split, spec.shape[1] - spec.split] for spec in specs] == joined.channels
    assert [spec.name for spec in specs] == [
        f"{name}.conv_shortcut"
        for name, unit in unet.named_modules()
        if name.startswith("up_blocks") and type(unit).__name__ == "ResnetBlock2D"
    ]
    if name == "SDXL":
        expected = [(1280, 1280), (1280, 1280), (1280, 640), (1280, 640), (640, 640), (640, 320)]
        assert list(map(tuple, joined.channels)) == [*expected, (640, 320), (320, 320), (320, 320)]


TRANSFORMERS = {  # class, what its real models differ in from the class's defaults, layers, share of adaptive norms
    "PixArt": (PixArtTransformer2DModel, {"caption_channels": 4096, "out_channels": 8}, 280, 0.0),
    "SD3.5": (
        SD3Transformer2DModel,
        {
            "num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "pos_embed_max_size": 192,
            "qk_norm": "rms_norm",
        },
        529,
        0.33,
    ),
    "FLUX": (FluxTransformer2DModel, {"guidance_embeds": True}, 494, 0.27),
}  # fmt: skip


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_of_a_transformer_every_linear_inside_the_blocks_is_selected_and_nothing_else(name):
    kind, settings, count, norms = TRANSFORMERS[name]
    with torch.device("meta"):
        transformer = kind(**settings)
    blocks = [f"{stack}.{i}" for stack, inner in transformer.named_children() if isinstance(inner, nn.ModuleList)
              for i in range(len(inner))]  # fmt: skip
    linears = [n for block in blocks for n, m in transformer.get_submodule(block).named_modules(prefix=block)
               if isinstance(m, nn.Linear)]  # fmt: skip
    specs = layer_specs(transformer)
    assert [spec.name for spec in specs] == linears and len(linears) == count
    total = sum(parameter.numel() for parameter in transformer.parameters())
    assert sum(spec.size for spec in specs) > 0.97 * total
    assert sum(spec.size for spec in specs if "norm" in spec.name) / total == pytest.approx(norms, abs=0.005)
    assert all(reason == "the pattern does not select it" for _, reason in skipped_specs(transformer))


def test_order_is_the_modules(sdxl):
    names = [name for name, _ in sdxl.named_modules()]
    found = [names.index(spec.name) for spec in layer_specs(sdxl)]
    assert found == sorted(found)


def test_every_linear_and_convolution_is_either_selected_or_has_a_reason():
    unet = small_unet()
    unet.down_blocks[0].add_module("conv9", nn.Conv2d(16, 16, 3, groups=4))
    unet.down_blocks[0].add_module("conv8", nn.Conv2d(16, 16, 3, padding=1, padding_mode="circular"))
    unet.down_blocks[0].add_module("conv7", nn.Conv2d(8, 16, 3))
    specs, skipped = layer_specs(unet), skipped_specs(unet)
    layers = [name for name, module in unet.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    assert sorted([s.name for s in specs] + [s.name for s, _ in skipped]) == sorted(layers)
    reasons = {spec.name: reason for spec, reason in skipped}
    assert "4 groups" in reasons["down_blocks.0.conv9"]
    assert "circular" in reasons["down_blocks.0.conv8"]
    assert "is 8, below 16" in reasons["down_blocks.0.conv7"]
    assert "pattern" in reasons["conv_in"]


def test_pattern_and_least_size_are_the_callers():
    unet = small_unet()
    assert [spec.name for spec in layer_specs(unet, pattern="^conv_in$", min_size=4)] == ["conv_in"]
    assert layer_specs(unet, pattern="^conv_in$") == []
    with pytest.raises(UserError, match="no regular expression"):
        layer_specs(unet, pattern="(")


def test_convolution_as_a_matrix_has_channels_last():
    conv = nn.Conv2d(5, 7, (3, 2), stride=2, padding=(1, 0), dilation=(1, 2))
    spec, matrix = spec_of("c", conv), weight_to_matrix(conv.weight)
    assert spec.shape == tuple(matrix.shape) == (7, 30)
    for o, c, y, x in ((0, 0, 0, 0), (3, 4, 2, 1), (6, 1, 1, 0)):
        assert matrix[o, (y * 2 + x) * 5 + c] == conv.weight[o, c, y, x]
    back = matrix_to_weight(matrix, spec)
    assert torch.equal(back, conv.weight) and back.stride() == conv.weight.stride()
    # The matrix multiplies unfolded patches with their channels last.
    picture = torch.randn(2, 5, 9, 8)
    patches = nn.functional.unfold(picture, (3, 2), dilation=(1, 2), padding=(1, 0), stride=2)
    patches = patches.view(2, 5, 6, -1).transpose(1, 2).reshape(2, 30, -1)
    expected = conv(picture) - conv.bias[:, None, None]
    assert torch.allclose((matrix @ patches).view_as(expected), expected, atol=1e-5)


def test_pointwise_convolution_keeps_its_layout():
    conv = nn.Conv2d(5, 7, 1)
    back = matrix_to_weight(weight_to_matrix(conv.weight), spec_of("c", conv))
    assert torch.equal(back, conv.weight) and back.stride() == conv.weight.stride()


def test_linear_is_its_matrix():
    linear = nn.Linear(6, 4)
    assert weight_to_matrix(linear.weight) is linear.weight
    assert matrix_to_weight(linear.weight, spec_of("l", linear)) is linear.weight
