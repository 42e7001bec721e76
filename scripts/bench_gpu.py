"""What decoding costs on a GPU, in parts of a few minutes; each writes a JSON with device, versions and rows.

    python scripts/bench_gpu.py decode --json decode.json                  # bandwidth of every kernel against a copy
    python scripts/bench_gpu.py step --json step.json                      # one call of SDXL's U-Net at 1024²
    python scripts/bench_gpu.py peers --json peers.json                    # the same of other libraries
    python scripts/bench_gpu.py step --model tiny --size 64 --device cpu   # a dry run: the numbers mean nothing

    TRITON_INTERPRET=1 python scripts/bench_gpu.py decode --model tiny --device cpu    # the kernels, too

Weights and codes are random, which decodes and multiplies in the same time; medians of --repeat rounds after one that
is not counted. decode: `ms` is a kernel's own time, of a CUDA graph of --calls calls; `eager_ms` that of a call from
Python. `gb_s` counts packed bytes read and the weight written, `of_copy` is its ratio to copying 256 MiB; `equal`
compares bits with the CPU's; a last row per codec is all layers of the model. step: ways are bf16 (eager),
bf16_compiled, per_call, cached, torch_path (without kernels) and per_call_compiled; GiB are resident weights and the
peak of a call. The prompt's embedding is the same tensor in every round, as in sampling. Rows are written as they come.
"""

import argparse
import contextlib
import gc
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

from vqdm.runs.command_line import run_script

import torch
from bench_layers import random_weight
from count_decode import quantized_on_meta, unet_on_meta
from torch import Tensor, nn

from vqdm.config.codecs import PeerConfig
from vqdm.errors import NotRunHere, UserError
from vqdm.hub.peers import load_by_peer, quantize_by_peer
from vqdm.hub.pipelines import set_decode
from vqdm.runs.files import atomic_write
from vqdm.runs.provenance import git_state, installed_version, versions
from vqdm.seeds import torch_generator
from vqdm.weights import ops
from vqdm.weights.base import QuantizedWeight
from vqdm.weights.layers import quantized_layers
from vqdm.weights.trellis_codes import locate
from vqdm.weights.trellis_format import BYTE

CODECS = ("trellis3", "3x8g8", "rtn4")
WAYS = ("bf16", "bf16_compiled", "per_call", "cached", "torch_path", "per_call_compiled")
PEERS = {"sdnq": "uint4", "bitsandbytes": "nf4", "torchao": "int4"}
COPIED, GIB = 1 << 28, 1 << 30


class Bench:
    """A device with its clock and its memory."""

    def __init__(self, name: str, repeat: int):
        if name == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda, but torch sees no GPU: for a dry run give --device cpu --model tiny")
        self.name, self.repeat, self.on_gpu = name, repeat, name == "cuda"

    def wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def seconds(self, call: Callable[[], object]) -> float:
        """Time of one call, from the GPU's start to its end."""
        self.wait()
        began = time.perf_counter()
        call()
        self.wait()
        return time.perf_counter() - began

    def median(self, call: Callable[[], object]) -> float:
        call()
        return median(self.seconds(call) for _ in range(self.repeat))

    def kernel_seconds(self, call: Callable[[], object], calls: int) -> float:
        """Time of one call without what Python takes to launch it: calls are recorded and replayed."""
        if not self.on_gpu:
            return self.median(call)
        call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(calls):
                call()
        return self.median(graph.replay) / calls

    def gib(self) -> float | None:
        """Allocated now; None on a CPU."""
        return round(torch.cuda.memory_allocated() / GIB, 3) if self.on_gpu else None

    def peak_gib(self, call: Callable[[], object]) -> float | None:
        if not self.on_gpu:
            return None
        torch.cuda.reset_peak_memory_stats()
        call()
        return round(torch.cuda.max_memory_allocated() / GIB, 3)

    def clear(self) -> None:
        """Free what the last model took."""
        torch._dynamo.reset()
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()

    def describe(self) -> dict:
        """Device, driver's capability, versions and commit."""
        shown = torch.cuda.get_device_name() if self.on_gpu else "cpu: a dry run, whose times mean nothing"
        found = {
            "device": shown,
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
            "triton": installed_version("triton"),
        }
        return found | {"versions": versions(), "git": git_state(), "kernels": ops.enabled and ops.HAS_TRITON}


def packed_bytes(weight: QuantizedWeight) -> int:
    return sum(t.numel() * t.element_size() for t in (*weight.parameters(), *weight.buffers()))


# decode


@torch.no_grad()
def decode(options: argparse.Namespace, bench: Bench) -> Iterator[dict]:
    """A row per codec and shape, and one for all layers of the model."""
    size = COPIED if bench.on_gpu else COPIED >> 12
    source, target = (torch.zeros(size, dtype=torch.uint8, device=bench.name) for _ in "ab")
    copied = 2 * size / bench.median(lambda: target.copy_(source)) / 1e9
    yield {"codec": "copy", "gb_s": round(copied, 1)}
    for codec in options.codecs:
        layers = list(quantized_layers(quantized_on_meta(options.model, codec)).values())
        draw, made = torch_generator(0, "benchmark of a GPU", codec), {}
        for layer in layers:
            key = layer.weight.scheme, layer.spec.shape
            made[key] = made.get(key) or random_weight(*key, draw)
        by_size = sorted(made.values(), key=lambda weight: -math.prod(weight.shape))
        expected = [weight() for weight in by_size[: options.shapes]]
        for part in {part for weight in by_size for part in (weight, *weight.shared)}:
            part.to(bench.name)
        for weight, known in zip(by_size, expected, strict=False):
            row = {"codec": codec, "shape": "x".join(map(str, weight.shape))}
            yield row | _decode_row(_call_of(weight), known, _moved(weight), bench, copied, options.calls)
        if options.all_layers:
            weights = [made[layer.weight.scheme, layer.spec.shape] for layer in layers]
            call, moved = _one_after_the_other([_call_of(weight) for weight in weights]), sum(map(_moved, weights))
            row = {"codec": codec, "shape": f"all {len(layers)} layers"}
            yield row | _decode_row(call, None, moved, bench, copied, 1)


def _one_after_the_other(calls: list[Callable]) -> Callable[[], None]:
    """All calls as one, which keeps no output."""

    def run() -> None:
        for call in calls:
            call()

    return run


def _call_of(weight: QuantizedWeight) -> Callable[[], Tensor]:
    """What decodes a weight: itself, or under Triton's interpreter the kernel, which a CPU would not take."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return weight
    from vqdm.weights import triton_kernels as kernels

    kind, codes, shape, scales = weight.scheme.kind, weight.codes, weight.shape, weight.scales
    if kind == "trellis":
        starts, rates = locate(codes, shape, weight.scheme.side)
        options = {"table": weight.shared[0](), "scales": scales, "shape": shape, "byte": weight.scheme.side == BYTE}
        return lambda: kernels.decode_trellis(codes, starts, rates, **options)
    width = weight.code_width
    if kind == "scalar":
        options = {"scales": scales, "zeros": weight.zeros, "shape": shape, "split": weight.scheme.split}
        return lambda: kernels.decode_scalar(codes, width, **options)
    options = {"scales": scales, "input_scales": weight.input_scales, "shape": shape}
    return lambda: kernels.decode_additive(codes, width, weight.effective_codebooks(), **options)


def _decode_row(
    call: Callable, expected: Tensor | None, moved: int, bench: Bench, copied: float, calls: int
) -> dict[str, object]:
    first = round(bench.seconds(call), 3)
    equal = {} if expected is None else {"equal": torch.equal(call().cpu(), expected)}
    taken = bench.kernel_seconds(call, calls)
    speed = moved / taken / 1e9
    found = {"ms": round(1e3 * taken, 4), "eager_ms": round(1e3 * bench.median(call), 4), "gb_s": round(speed, 1)}
    return equal | found | {"of_copy": round(speed / copied, 3), "first_call_s": first}


def _moved(weight: QuantizedWeight) -> int:
    """Bytes read and written: packed ones, and the weight in 16 bit."""
    return packed_bytes(weight) + 2 * math.prod(weight.shape)


# step


def full_unet(model: str, device: str) -> nn.Module:
    """A U-Net with random weights in bfloat16."""
    unet = unet_on_meta(model).to(torch.bfloat16).to_empty(device=device).eval().requires_grad_(False)
    draw = torch.Generator(device).manual_seed(0)
    for parameter in unet.parameters():
        fan = math.prod(parameter.shape[1:]) if parameter.ndim > 1 else 1
        parameter.normal_(0, 1 / math.sqrt(fan) if parameter.ndim > 1 else 0.02, generator=draw)
    return unet


def quantized_unet(model: str, codec: str, device: str) -> nn.Module:
    """The same with random codes; layers of one shape have the same ones."""
    unet = quantized_on_meta(model, codec).to(torch.bfloat16).to_empty(device=device).eval().requires_grad_(False)
    draw, made, on_device = torch_generator(0, "benchmark of a GPU", codec), {}, torch.Generator(device).manual_seed(0)
    layers = quantized_layers(unet)
    coded = {id(t) for layer in layers.values() for t in (*layer.weight.parameters(), *layer.weight.buffers())}
    for parameter in unet.parameters():
        if id(parameter) not in coded:
            parameter.normal_(0, 0.02, generator=on_device)
    for layer in layers.values():
        key = layer.weight.scheme, layer.weight.shape
        if key not in made:
            made[key] = random_weight(*key, draw)
        layer.weight.load_state_dict(made[key].state_dict())
        for mine, drawn in zip(layer.weight.shared, made[key].shared, strict=True):
            mine.load_state_dict(drawn.state_dict())
    return unet


def inputs_of(unet: nn.Module, batch: int, size: int, device: str) -> dict:
    """Random inputs of a call; size: side of the images, of which the latents have an eighth."""
    config, draw = unet.config, torch.Generator(device).manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.bfloat16, device=device, generator=draw)

    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    return {
        "sample": randn(batch, config.in_channels, size // 8, size // 8),
        "timestep": torch.tensor(500, device=device),
        "encoder_hidden_states": randn(batch, 77, config.cross_attention_dim),
        "added_cond_kwargs": {"text_embeds": randn(batch, pooled), "time_ids": randn(batch, 6)},
    }


@torch.no_grad()
def step(options: argparse.Namespace, bench: Bench) -> Iterator[dict]:
    """A row per way and batch size, with ratios to the ways of bf16 that came before."""
    full: dict[tuple, float] = {}
    quantized = None
    for way in options.ways:
        with _kernels(ops.enabled and way != "torch_path"):
            if way.startswith("bf16"):
                unet = full_unet(options.model, bench.name)
            else:
                quantized = quantized or quantized_unet(options.model, options.codecs[0], bench.name)
                set_decode(quantized, "cached" if way == "cached" else "per_call")
                unet = quantized.eval()  # which drops what was cached before
            for row in _step_rows(unet, way, options, bench):
                if way.startswith("bf16"):
                    full[way, row["batch"]] = row["ms"]
                ratios = {f"to_{name}": round(row["ms"] / ms, 3) for (name, n), ms in full.items() if n == row["batch"]}
                yield row | ratios
        del unet
        bench.clear()


@contextlib.contextmanager
def _kernels(enabled: bool) -> Iterator[None]:
    before, ops.enabled = ops.enabled, enabled
    try:
        yield
    finally:
        ops.enabled = before


def _step_rows(unet: nn.Module, way: str, options: argparse.Namespace, bench: Bench) -> Iterator[dict]:
    resident = bench.gib()
    run = torch.compile(unet) if way.endswith("compiled") else unet
    for batch in options.batches:
        inputs = inputs_of(unet, batch, options.size, bench.name)

        def call(inputs=inputs):
            return run(**inputs).sample

        row = {"way": way, "batch": batch, "size": options.size, "first_call_s": round(bench.seconds(call), 2)}
        row |= {"ms": round(1e3 * bench.median(call), 3), "resident_gib": resident}
        yield row | {"peak_gib": bench.peak_gib(call)}


# peers


@torch.no_grad()
def peers(options: argparse.Namespace, bench: Bench) -> Iterator[dict]:
    """The rows of `step` for other libraries, as diffusers loads them; one that is not installed says so."""
    for library in options.libraries:
        config = PeerConfig(library=library, weights=PEERS[library])
        try:
            with tempfile.TemporaryDirectory(dir=options.scratch) as place:
                made, full = Path(place) / "made", Path(place) / "full"
                quantize_by_peer(full_unet(options.model, bench.name), made, full=full, config=config)
                unet = load_by_peer(made, dtype=torch.bfloat16, config=config)
            unet.to(bench.name)
            yield from _step_rows(unet, config.name, options, bench)
            del unet
        except NotRunHere as error:
            yield {"way": config.name, "not_run": str(error)}
        bench.clear()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("decode", "step", "peers"))
    add = parser.add_argument
    add("--json", type=Path, required=True, metavar="FILE")
    add("--model", default="sdxl", help="sdxl, or a model that is shipped, as tiny")
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--codecs", nargs="+", default=list(CODECS), metavar="NAME", help="step: of the first; default: %(default)s")
    add("--repeat", type=int, default=20, metavar="N", help="rounds; default %(default)s")
    add("--calls", type=int, default=20, metavar="N", help="decode: calls in a graph; default %(default)s")
    add("--shapes", type=int, default=6, metavar="N", help="decode: of the largest shapes; default %(default)s")
    add("--all-layers", action=argparse.BooleanOptionalAction, default=True, help="decode: the last row")
    add("--ways", nargs="+", choices=WAYS, default=list(WAYS[:-1]), help="step: default all but the last")
    add("--batches", type=int, nargs="+", default=[1, 2, 8], metavar="N", help="default 1 2 8")
    add("--size", type=int, default=1024, metavar="PIXELS", help="side of the images; default %(default)s")
    add("--libraries", nargs="+", choices=tuple(PEERS), default=list(PEERS), help="peers: default all")
    add("--scratch", type=Path, help="peers: a place for 10 GB; default that of temporary files")
    options = parser.parse_args(arguments)
    try:
        bench, rows = Bench(options.device, options.repeat), []
        described = {"what": options.what, "model": options.model} | bench.describe()
        for row in {"decode": decode, "step": step, "peers": peers}[options.what](options, bench):
            rows.append(row)
            print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
            atomic_write(options.json, json.dumps(described | {"rows": rows}, indent=1).encode())
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    run_script(main)
