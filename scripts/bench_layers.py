"""The cost of decoding a layer's weight: quantized layers beside dense ones with the same weight, on one thread.

python scripts/bench_layers.py [--repeat 15] [--tokens 1 77 1024 4096] [--device cpu] [--results results]

Layers: Linear 1280 → 1280, and Conv2d 320 → 320 of 3 × 3 on latents of as many positions as tokens (4096: 64 × 64), in
trellis codes of 3 bits and additive ones of 3x8g8; codes are random, for decoding takes the same time for all. fp32 on
a CPU, fp16 on a GPU. decode: per_call, in every forward, or cached, once. ms: medians of --repeat rounds, in each of
which the dense layer, per_call and cached take turns; ratio: to the dense layer in the same round, the median of these.
decode_ns: per weight, to the tensor that the layer computes with, which for the convolution is one more permutation.
Prints a table and writes results/tables/bench_layers.csv.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from vqdm.runs.command_line import run_script

import pandas as pd
import torch
from torch import Generator, Tensor, nn

from vqdm.codecs.trellis_table import load_table
from vqdm.errors import UserError
from vqdm.models.specs import spec_of
from vqdm.runs.device import resolve_device
from vqdm.runs.files import atomic_write
from vqdm.seeds import torch_generator
from vqdm.weights.additive import AdditiveScheme
from vqdm.weights.base import QuantizedWeight, Scheme
from vqdm.weights.bitpack import pack
from vqdm.weights.layers import DECODE_MODES, QuantizedConv2d, QuantizedLinear
from vqdm.weights.registry import empty_weight
from vqdm.weights.trellis import TrellisScheme, TrellisTable, TrellisWeight
from vqdm.weights.trellis_format import BYTE, LOWEST_RATE, RATE_BITS, column_bits

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear 1280": lambda: nn.Linear(1280, 1280, device="meta"),
    "conv 320, 3×3": lambda: nn.Conv2d(320, 320, 3, padding=1, device="meta"),
}
SCHEMES = (TrellisScheme(bits=3), AdditiveScheme(num_codebooks=3))
TOKENS = (1, 77, 1024, 4096)


def random_weight(scheme: Scheme, shape: tuple[int, int], draw: Generator) -> QuantizedWeight:
    """A weight with random codes and scales, fp16."""
    weight = empty_weight(scheme, shape, TrellisTable.from_values(load_table()) if scheme.kind == "trellis" else None)
    weight.codes.random_(0, 256, generator=draw)
    for parameter in weight.parameters():
        parameter.data.copy_(torch.rand(parameter.shape, generator=draw) / math.sqrt(shape[1]))
    if scheme.kind == "trellis":
        rates = random_rates(weight, draw)
        if scheme.side == BYTE:
            weight.columns[0] = 0
            weight.columns[1:] = weight.columns[1:] & 240 | (rates // 2 - 1)
        else:
            weight.columns.copy_(pack(rates - LOWEST_RATE + 1, RATE_BITS))
    return weight


def random_rates(weight: TrellisWeight, draw: Generator) -> Tensor:
    """Quarter bits of every column, int64 [in], that fill the stream but for less than a step of the highest."""
    (out, inputs), room = weight.shape, 8 * len(weight.stream)
    middle = 4 * room // (out * inputs)
    rates = torch.randint(max(LOWEST_RATE, middle - 4), middle + 7, (inputs,), generator=draw)
    while int(column_bits(out, rates).sum()) > room:
        rates[rates.argmax()] -= 1
    return rates


def random_input(layer: nn.Module, tokens: int, draw: Generator) -> Tensor:
    """Random input [1, tokens, in], or [1, in, height, width] with height · width = tokens, as square as possible."""
    if isinstance(layer, nn.Linear):
        return torch.randn(1, tokens, layer.in_features, generator=draw)
    height = max(n for n in range(1, math.isqrt(tokens) + 1) if tokens % n == 0)
    return torch.randn(1, layer.in_channels, height, tokens // height, generator=draw)


def milliseconds(
    calls: dict[str, Callable[[], object]], repeat: int, *, synchronize: Callable[[], None]
) -> dict[str, list[float]]:
    """Time every call in every round, in which they take turns; a first round is not counted."""
    taken = {name: [] for name in calls}
    for turn in range(repeat + 1):
        for name, call in calls.items():
            synchronize()
            start = time.perf_counter()
            call()
            synchronize()
            if turn:
                taken[name].append(1e3 * (time.perf_counter() - start))
    return taken


def trio(name: str, scheme: Scheme, draw: Generator, *, device: str, dtype: torch.dtype) -> dict[str, nn.Module]:
    """The layer with one weight: quantized in both decode modes, by their names, and "dense"."""
    dense = LAYERS[name]()
    spec = spec_of(name, dense)
    weight = random_weight(scheme, spec.shape, draw).to(device=device, dtype=dtype)
    for shared in weight.shared:
        shared.to(device=device, dtype=dtype)
    kind = QuantizedLinear if spec.conv is None else QuantizedConv2d
    bias = nn.Parameter(torch.zeros(spec.shape[0], device=device, dtype=dtype))
    layers = {mode: kind(weight, bias, spec, decode=mode) for mode in DECODE_MODES}
    dense.weight, dense.bias = nn.Parameter(layers["per_call"].decoded(dtype).detach()), bias
    return {"dense": dense, **layers}


@torch.no_grad()
def measure(name: str, scheme: Scheme, tokens: list[int], *, repeat: int, device: str) -> list[dict]:
    """A row for each number of tokens and each way to decode."""
    dtype = torch.float16 if device == "cuda" else torch.float32
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    draw = torch_generator(0, "benchmark of layers", name)
    layers = trio(name, scheme, draw, device=device, dtype=dtype)
    size = math.prod(layers["per_call"].weight.shape)
    decode = milliseconds({"decode": lambda: layers["per_call"].decoded(dtype)}, repeat, synchronize=synchronize)
    nanoseconds = 1e6 * median(decode["decode"]) / size
    rows = []
    for count in tokens:
        inputs = random_input(layers["dense"], count, draw).to(device, dtype)
        calls = {key: lambda layer=layer, inputs=inputs: layer(inputs) for key, layer in layers.items()}
        taken = milliseconds(calls, repeat, synchronize=synchronize)
        for mode in DECODE_MODES:
            ratio = median(part / whole for part, whole in zip(taken[mode], taken["dense"], strict=True))
            row = {"layer": name, "scheme": scheme.name, "decode": mode, "tokens": count}
            row |= {"dense_ms": round(median(taken["dense"]), 3), "quantized_ms": round(median(taken[mode]), 3)}
            row |= {"ratio": round(ratio, 3), "decode_ns": round(nanoseconds, 3)}
            rows.append(row | {"device": device, "dtype": str(dtype).removeprefix("torch.")})
    return rows


def run(options: argparse.Namespace) -> None:
    if min(*options.tokens, options.repeat) < 1:
        raise UserError("--tokens and --repeat must be 1 or more")
    device = resolve_device(options.device, threads=1)
    rows = []
    for name in LAYERS:
        for scheme in SCHEMES:
            rows += measure(name, scheme, options.tokens, repeat=options.repeat, device=device.name)
    table = pd.DataFrame(rows)
    atomic_write(options.results / "tables" / "bench_layers.csv", table.to_csv(index=False).encode())
    print(f"{device}; medians of {options.repeat}\n\n{table.to_markdown(index=False)}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--repeat", type=int, default=15, metavar="N", help="rounds; default %(default)s")
    add("--tokens", type=int, nargs="+", default=list(TOKENS), metavar="N", help="inputs of a call; default 1 … 4096")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU where there is one")
    add("--results", type=Path, default=Path("results"))
    options = parser.parse_args(arguments)
    try:
        run(options)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    run_script(main)
