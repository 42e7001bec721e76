"""Count what decoding costs a GPU in one call of SDXL's U-Net, without a GPU: launches, and bytes read and written.

    python scripts/count_decode.py [--json counts.json] [--codecs trellis3 3x8g8 rtn4] [--model sdxl]

All layers that are quantized are decoded once in fp16 on torch's meta device, where operators give shapes and compute
nothing. Every operator that returns new memory counts as a launch, and as the bytes of the tensors that it takes and
returns; the decoding operator, one Triton kernel on a GPU, is one of them. Places of columns are found before, as they
are on a GPU by the first call. Beside it "torch path": what a GPU without triton does. JSON:
{codec: {"launches": …, "bytes_per_weight": …, "torch_path": {"launches": …, "bytes_per_weight": …}}}.
"""

import argparse
import json
import sys
from pathlib import Path

from vqdm.runs.command_line import run_script

import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vqdm.codecs.cards import CODECS as CARDS
from vqdm.config.codecs import parse_scheme
from vqdm.errors import UserError
from vqdm.models.shipped import builtin_directory, shipped_configs
from vqdm.models.single_file import component_on_meta
from vqdm.models.specs import layer_specs
from vqdm.runs.files import atomic_write
from vqdm.weights import ops
from vqdm.weights.base import Scheme
from vqdm.weights.layers import quantized_layers, swap_empty

CODECS = ("trellis3", "3x8g8", "rtn4")
NO_LAUNCH = ("aten.empty", "aten.detach", "aten.alias", "aten.lift_fresh", "aten._unsafe_view")


class Counter(TorchDispatchMode):
    """Adds up the launches and bytes of what is called inside."""

    def __init__(self):
        super().__init__()
        self.launches = self.bytes = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        found = function(*arguments, **(options or {}))
        if not function.is_view and not str(function).startswith(NO_LAUNCH):
            self.launches += 1
            self.bytes += sum(_bytes(one) for one in tree_leaves((arguments, options, found)))
        return found


def _bytes(value) -> int:
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0


def unet_on_meta(model: str) -> nn.Module:
    """The U-Net of a model by its name: shapes, no weights."""
    directory = shipped_configs(model) if model.startswith("sdxl") else builtin_directory(model)
    return component_on_meta(directory / "unet")


def quantized_on_meta(model: str, codec: str) -> nn.Module:
    """The same with empty codes of a codec, by its short name, and floats in fp16."""
    unet, options = unet_on_meta(model), parse_scheme(codec)
    specs = layer_specs(unet)
    schemes = CARDS[options.kind].schemes(specs, options)
    swap_empty(unet, [(spec, schemes[spec.name]) for spec in specs if isinstance(schemes[spec.name], Scheme)])
    return nn.Module.half(unet)


@torch.no_grad()
def count(unet: nn.Module) -> dict[str, float]:
    """Decode every quantized layer's weight once: launches, and bytes per weight (fractional)."""
    layers = list(quantized_layers(unet).values())
    for layer in layers:
        layer.decoded(torch.float16)  # finds the places of columns
    with Counter() as counter:
        for layer in layers:
            layer.decoded(torch.float16)
    weights = sum(layer.spec.size for layer in layers)
    return {"launches": counter.launches, "bytes_per_weight": round(counter.bytes / weights, 3)}


def compare(model: str, codec: str) -> dict:
    """Counts by operators, and by torch."""
    unet, before = quantized_on_meta(model, codec), ops.enabled
    try:
        ops.enabled = True
        found = count(unet)
        ops.enabled = False
        return found | {"torch_path": count(unet)}
    finally:
        ops.enabled = before


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--codecs", nargs="+", default=list(CODECS), metavar="NAME", help="default: %(default)s")
    parser.add_argument("--model", default="sdxl", help="sdxl, or a model that is shipped, as tiny")
    options = parser.parse_args(arguments)
    try:
        counts = {codec: compare(options.model, codec) for codec in options.codecs}
    except UserError as error:
        sys.exit(f"error: {error}")
    rows = [
        {"codec": codec, "launches": row["launches"], "bytes per weight": row["bytes_per_weight"],
         "launches, torch path": row["torch_path"]["launches"],
         "bytes per weight, torch path": row["torch_path"]["bytes_per_weight"]}
        for codec, row in counts.items()
    ]  # fmt: skip
    print(pd.DataFrame(rows).to_markdown(index=False))
    if options.json:
        atomic_write(options.json, json.dumps(counts, indent=1).encode())


if __name__ == "__main__":
    run_script(main)
