"""Bits, errors and CPU seconds of every codec, layer by layer, on one thread, beside rate-distortion bounds.

python scripts/bench_codecs.py                                  synthetic layers at 2, 3, 4 bits, in a few minutes
python scripts/bench_codecs.py --model tiny --all               and every layer of the tiny model
python scripts/bench_codecs.py --layers linear640,conv320 --codec trellis gptq --bits 3 --json OUT.json

Writes results/tables/bench_codecs.csv and .md, or, with --json, that file only; every record as soon as it is there.
bits: 8 · stored bytes ÷ weights, scales and codebooks included; the trellis table, 8 KiB for a whole model, is not.
relative_output_error: tr(ΔW H ΔWᵀ) ÷ tr(W H Wᵀ), H the Hessian that was encoded with; heldout_error: the same with that
of other data; weight_mse: ‖ΔW‖² ÷ ‖W‖². db_over_bound: above reverse water-filling at `bits`, for independent Gaussian
weights with the layer's row and column variances (weights with more structure may go below); db_over_gaussian: above
2^(−2R) at the bits R of the codes alone, meant for gaussian640, whose Hessian is the identity.
Seconds are of the CPU, for encoding alone, after compilation.
"""

import argparse
import json
import math
import shlex
import sys
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from vqdm.runs.command_line import run_script

import codec_layers
import pandas as pd
import torch
from codec_layers import Layer, quadratic
from torch import Tensor
from tqdm import tqdm

from vqdm.codecs import additive, gptq, rtn, trellis
from vqdm.codecs.trellis_table import load_table
from vqdm.errors import UserError
from vqdm.runs.files import atomic_write, write_json
from vqdm.seeds import torch_generator
from vqdm.weights.base import QuantizedWeight
from vqdm.weights.bits import tensor_bytes
from vqdm.weights.trellis import TrellisTable, TrellisWeight
from vqdm.weights.trellis_format import HIGHEST_RATE, LOWEST_RATE, side_bits

CODECS = {  # as the command line calls them: kind, and options beside bits
    "rtn": ("rtn", {}),
    "rtn-g64": ("rtn", {"group_size": 64}),
    "gptq": ("gptq", {}),
    "gptq-g64": ("gptq", {"group_size": 64}),
    "additive": ("additive", {}),
    "additive-inputs": ("additive", {"input_scales": True}),
    "additive-paper": ("additive", {"recipe": "paper"}),
    "trellis": ("trellis", {}),
}
DEFAULT_CODECS = ("rtn", "rtn-g64", "gptq", "gptq-g64", "additive", "trellis")
DIGITS = {
    "asked_bits": "g",
    "bits": ".3f",
    "relative_output_error": ".5f",
    "heldout_error": ".5f",
    "weight_mse": ".5f",
    "cpu_seconds": ".2f",
    "db_over_bound": ".2f",
    "db_over_gaussian": ".2f",
    "error_ratio": ".3f",
    "time_ratio": ".5f",
}
NOTE = (
    "bits: all that is stored for the layer; the trellis table, 8 KiB for a whole model, is not counted. "
    "Errors are relative; seconds are of one CPU thread after compilation."
)


@dataclass(frozen=True)
class Settings:
    """What codecs take beside bits; damping: None is each codec's own."""

    beam_size: int = 8
    damping: float | None = None
    code_bits: bool = False  # trellis: bits are those of the codes alone
    seed: int = 0


@cache
def trellis_table() -> TrellisTable:
    return TrellisTable.from_values(load_table())


def encode(
    codec: str, weight: Tensor, hessian: Tensor, bits: float, settings: Settings, *, layer: str = ""
) -> QuantizedWeight:
    """One of CODECS. bits: of a code; additive: codebooks of 8 bits for groups of 8; trellis: of everything."""
    kind, options = CODECS[codec]
    if kind == "rtn":
        return rtn.encode(weight, hessian, bits=int(bits), layer=layer, **options)
    own = {} if settings.damping is None else {"damping": settings.damping}
    options = options | own | {"layer": layer}
    if kind == "gptq":
        return gptq.encode(weight, hessian, bits=int(bits), **options)
    if kind == "trellis":
        side = side_bits(tuple(weight.shape)) if settings.code_bits else 0.0
        return trellis.encode(weight, hessian, bits=bits + side, table=trellis_table(), row_exponent=1.0, **options)
    generator = torch_generator(settings.seed, "benchmark codec", layer)
    return additive.encode(
        weight, hessian, num_codebooks=int(bits), generator=generator, beam_size=settings.beam_size, **options
    )


def warm_up(codec: str, bits: float, settings: Settings) -> None:
    """Have everything compiled that encoding at these settings runs."""
    if CODECS[codec][0] == "trellis":
        warm_trellis()
        return
    draw = torch_generator(0, "warm-up")
    inputs = torch.randn(512, 128, generator=draw)
    encode(codec, torch.randn(64, 128, generator=draw), inputs.T @ inputs / 512, bits, settings)


@cache
def warm_trellis() -> None:
    """Encode columns whose powers are such that water-filling gives them all rates there are."""
    rates = torch.arange(LOWEST_RATE, HIGHEST_RATE + 1).repeat_interleave(2) / 4
    weight = torch.randn(320, len(rates), generator=torch_generator(0, "warm-up")) * 2**rates
    bits = float(rates.mean()) + side_bits(tuple(weight.shape))
    trellis.encode(
        weight,
        torch.eye(len(rates)),
        bits=bits,
        table=trellis_table(),
        row_exponent=1.0,
    )


def reverse_water_filling(rows: Tensor, directions: Tensor, bits: float) -> float:
    """The least share of the power Σ v that `bits` per component leave of Gaussians of variances v = rows ⊗ directions.

    Cover and Thomas 10.3.3: component by component, min(v, θ) is left, for ½ log2(v / θ) bits where v > θ.
    """
    count = len(rows) * len(directions)
    directions = directions[directions > 0].double().sort(descending=True).values
    logs, row_logs = directions.log2(), rows[rows > 0].double().log2()
    sums = torch.cat([torch.zeros(1, dtype=torch.float64), logs.cumsum(0)])
    small = torch.cat([directions.flip(0).cumsum(0).flip(0), torch.zeros(1, dtype=torch.float64)])

    def at(level: float) -> tuple[float, float]:
        """Bits per component and power left, for θ = 2^level; of every row the first `above` directions exceed it."""
        relative = level - row_logs
        above = torch.searchsorted(-logs, -relative)
        rate = (sums[above] - above * relative).sum() / (2 * count)
        return float(rate), float((2**row_logs * small[above]).sum()) + 2**level * int(above.sum())

    high = float(row_logs.max() + logs[0])
    low = float(row_logs.min() + logs[-1]) - 2 * bits * count / (len(row_logs) * len(logs))
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if at(middle)[0] > bits else (low, middle)
    return at(high)[1] / float((2**row_logs).sum() * directions.sum())


def measure(layer: Layer, codec: str, bits: float, settings: Settings) -> dict:
    """One record. UserError where the codec cannot hold the layer."""
    began = time.process_time()
    quantized = encode(codec, layer.weight, layer.hessian, bits, settings, layer=layer.name)
    seconds = time.process_time() - began
    change = layer.weight.double() - quantized().detach().double()
    output, heldout, power = layer.powers
    error = quadratic(change, layer.hessian) / output
    stored = 8 * tensor_bytes(quantized.state_dict(keep_vars=True).values()) / change.numel()
    codes = quantized.stream if isinstance(quantized, TrellisWeight) else quantized.codes
    code_bits = 8 * codes.numel() / change.numel()
    return {
        "layer": layer.name,
        "shape": "x".join(map(str, layer.weight.shape)),
        "codec": codec,
        "asked_bits": bits,
        "bits": stored,
        "relative_output_error": error,
        "heldout_error": quadratic(change, layer.heldout_hessian) / heldout,
        "weight_mse": float(change.square().sum()) / power,
        "cpu_seconds": seconds,
        "code_bits": code_bits,
        "db_over_bound": decibels(error / reverse_water_filling(*layer.variances, stored)),
        "db_over_gaussian": decibels(error * 4**code_bits),
    }


def decibels(ratio: float) -> float:
    return 10 * math.log10(max(ratio, 1e-30))


@dataclass(frozen=True)
class Reference:
    """Recorded results of another code on the same layers. method: may name {bits}; speed: of this core by that one."""

    results: dict[tuple[str, str], dict]  # by layer and method
    method: str
    speed: float

    @classmethod
    def read(cls, file: Path, method: str, gflops: float) -> "Reference":
        """UserError unless the file holds the method. Measures this core."""
        try:
            rows = json.loads(file.read_text())["results"]
            results = {(row["layer"], row["method"]): row for row in rows if row.get("alpha") is None}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"--reference {file} is no file of recorded results: {error!r}") from error
        known = sorted({name for _, name in results})
        if not any(method.replace("{bits}", str(bits)) in known for bits in range(1, 9)):
            raise UserError(f"--reference-method: {file.name} has no {method}; it has {', '.join(known)}")
        return cls(results, method, matmul_gflops() / gflops)

    def columns(self, record: dict) -> dict:
        """This record's error and seconds, on the reference's core, as parts of the reference's; {} if it has none."""
        method = self.method.replace("{bits}", str(round(record["asked_bits"])))
        found = self.results.get((record["layer"], method))
        if found is None:
            return {}
        return {
            "reference": method,
            "reference_bits": found["bits"],
            "error_ratio": record["relative_output_error"] / found["relative_output_error"],
            "time_ratio": record["cpu_seconds"] * self.speed / found["cpu_seconds"],
            "core_speed": self.speed,
        }


def matmul_gflops(size: int = 2048, repeats: int = 5) -> float:
    """The best fp32 rate of one thread on this machine, in GFLOP/s."""
    matrix = torch.randn(size, size, generator=torch_generator(0, "matmul"))
    seconds = []
    for _ in range(repeats):
        began = time.process_time()
        matrix @ matrix
        seconds.append(time.process_time() - began)
    return 2 * size**3 / min(seconds) / 1e9


def line_of(record: dict) -> str:
    line = (
        f"{record['layer']:<12} {record['codec']:<16} {record['bits']:6.3f} bits  "
        f"error {record['relative_output_error']:.5f}, held out {record['heldout_error']:.5f}, "
        f"weight {record['weight_mse']:.5f}; {record['cpu_seconds']:7.2f} s; "
        f"{record['db_over_bound']:5.2f} dB over the bound"
    )
    if "error_ratio" in record:
        line += f"; {record['error_ratio']:.3f} of the reference's error, {record['time_ratio']:.5f} of its time"
    return line


def to_markdown(records: list[dict], command: str) -> str:
    from tabulate import tabulate

    columns = ["layer", "codec", *(name for name in DIGITS if any(name in record for record in records))]
    rows = [[_cell(record, name) for name in columns] for record in records]
    return f"{tabulate(rows, columns, tablefmt='github', disable_numparse=True)}\n\n{NOTE}\n\n`{command}`\n"


def _cell(record: dict, name: str) -> str:
    if name not in record:
        return "–"
    return f"{record[name]:{DIGITS[name]}}" if name in DIGITS else record[name]


@dataclass(frozen=True)
class Output:
    """Destination of records: one JSON file, or a table under `results`."""

    results: Path
    json_file: Path | None
    command: str

    def write(self, records: list[dict]) -> None:
        if self.json_file is not None:
            write_json(self.json_file, records)
            return
        tables = self.results / "tables"
        atomic_write(tables / "bench_codecs.csv", pd.DataFrame(records).to_csv(index=False).encode())
        atomic_write(tables / "bench_codecs.md", to_markdown(records, self.command).encode())


def words(given: list[str] | None) -> list[str]:
    """The words of an option that takes some, apart by blanks or commas."""
    return [word for part in given or [] for word in part.split(",") if word]


def parse_bits(given: list[str], codecs: list[str], settings: Settings) -> list[float]:
    """UserError for what is no number of bits, or not one of a codec's."""
    try:
        bits = [float(word) for word in given]
    except ValueError as error:
        raise UserError(f"--bits: {error}") from error
    for number in bits:
        if not 0 < number <= 8:
            raise UserError(f"--bits {number:g}: give numbers above 0 and at most 8")
        whole = [codec for codec in codecs if CODECS[codec][0] != "trellis"]
        if whole and number != int(number):
            raise UserError(f"--bits {number:g}: {whole[0]} takes whole bits; give them, or only --codec trellis")
    return bits


def run(options: argparse.Namespace, command: str) -> None:
    codecs = words(options.codec) or list(DEFAULT_CODECS)
    unknown = [codec for codec in codecs if codec not in CODECS]
    if unknown:
        raise UserError(f"--codec: there is no {unknown[0]!r}; there are {', '.join(CODECS)}")
    settings = Settings(options.beam, options.damping, options.code_bits, options.seed)
    bits = parse_bits(words(options.bits), codecs, settings)
    count, layers = codec_layers.find_layers(
        words(options.layers), file=options.layers_from, model=options.model, all_layers=options.all, seed=options.seed
    )
    reference = None
    if options.reference is not None:
        reference = Reference.read(options.reference, options.reference_method, options.reference_gflops)
    output, records = Output(options.results, options.json, command), []
    problems = [(codec, number) for codec in codecs for number in bits]
    with tqdm(total=count * len(problems), desc="compile", unit="record") as progress:
        for codec, number in problems:
            warm_up(codec, number, settings)
        progress.set_description("make layers")
        progress.refresh()
        for layer in layers:
            progress.set_description(layer.name[-24:])
            for codec, number in problems:
                try:
                    record = measure(layer, codec, number, settings)
                except UserError as error:  # such as a group size that does not divide
                    tqdm.write(f"left out: {layer.name}, {codec}, {number:g} bits: {error}", file=sys.stderr)
                else:
                    records.append(record | (reference.columns(record) if reference else {}))
                    output.write(records)
                    tqdm.write(line_of(records[-1]))
                    sys.stdout.flush()
                progress.update()
    if not records:
        raise UserError("no codec could hold any layer at these bits")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = made.add_argument
    add("--codec", nargs="+", metavar="NAME", help=f"of {', '.join(CODECS)}; default: {' '.join(DEFAULT_CODECS)}")
    add(
        "--bits",
        nargs="+",
        default=["2", "3", "4"],
        help="additive: codebooks of 8 bits for groups of 8; default 2 3 4",
    )
    add("--layers", nargs="+", metavar="NAME", help=f"of {', '.join(codec_layers.SYNTHETIC)}, the file or the model")
    add("--layers-from", type=Path, metavar="FILE", help="a Python file with make_layer(name, seed); it is executed")
    add("--model", help=f"measure layers of this model too: {', '.join(codec_layers.MODELS)}")
    add("--all", action="store_true", help="all layers of the model, not one of each frequent shape")
    add("--seed", type=int, default=0, help="of synthetic layers and of what codecs draw")
    add("--beam", type=int, default=Settings.beam_size, help="additive: hypotheses kept; default %(default)s")
    add("--damping", type=float, help="added to Hessians, of the mean; default: the codec's own")
    add("--code-bits", action="store_true", help="trellis: --bits are of the codes alone, side information is on top")
    add("--json", type=Path, metavar="OUT", help="write a list of records here, and no table")
    add("--results", type=Path, default=Path("results"))
    add("--reference", type=Path, metavar="FILE", help="JSON with another code's results on the same layers and seed")
    add("--reference-method", default="official-M{bits}x8g8o1-beam8", help="which of them; default %(default)s")
    add("--reference-gflops", type=float, default=83.0, help="fp32 matmul of its core; default %(default)s")
    return made


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser().parse_args(arguments)
    torch.set_num_threads(1)
    try:
        run(options, shlex.join(["python", "scripts/bench_codecs.py", *arguments]))
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    run_script(main)
