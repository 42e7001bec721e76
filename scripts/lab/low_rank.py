"""The question whether a low-rank branch pays at equal bits, layer by layer and without images.

python scripts/lab/low_rank.py [--model tiny] [--layers linear640 …] [--rounds 1 2 4]

Per codec and bits, for each rank: the mean of true bits, and the geometric mean of the held-out output error in dB over
the same codec without a branch. Trellis codes are coded at equal bits in all; scalar codes keep their width, and what a
branch costs is counted at 6.02 dB a bit in the last column.
"""

import argparse
import dataclasses
import math
import sys
from pathlib import Path

from vqdm.runs.command_line import run_script

import torch
from torch import Tensor

from vqdm.codecs import low_rank
from vqdm.codecs.cards import CODECS
from vqdm.config.codecs import GptqConfig, QuantizeConfig, SvdquantConfig, TrellisConfig
from vqdm.models.specs import LayerSpec
from vqdm.runs.device import one_thread_each
from vqdm.weights.base import Scheme
from vqdm.weights.bits import tensor_bytes
from vqdm.weights.low_rank import LowRankScheme, branch_bits
from vqdm.weights.scalar import ScalarScheme
from vqdm.weights.trellis import TrellisScheme

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from codec_layers import MODELS, Layer, find_layers, model_layers, model_specs, quadratic

CODES = {
    "trellis 2": TrellisConfig(bits=2),
    "trellis 2.5": TrellisConfig(bits=2.5),
    "trellis 3": TrellisConfig(bits=3),
    "GPTQ 3": GptqConfig(bits=3),
    "GPTQ 4": GptqConfig(bits=4),
    "SVDQuant 4, smoothed": SvdquantConfig(bits=4),
}


def _scheme(spec: LayerSpec, config: QuantizeConfig) -> Scheme | None:
    """Schemes of the codec, but every layer by itself, without a share of the trellis table; None without room."""
    scales = config.smoothing > 0
    branch = branch_bits(spec.shape, config.low_rank, input_scales=scales) if config.low_rank else 0.0
    if 2 * branch > config.bits:
        return None
    if isinstance(config, TrellisConfig):
        base = TrellisScheme.of_layer(spec.shape, config.bits - branch)
    else:
        base = ScalarScheme(codec="gptq", bits=int(config.bits))
    if not config.low_rank:
        return base
    return LowRankScheme(codec=config.kind, rank=config.low_rank, input_scales=scales, base=base)


def measure(layer: Layer, config: QuantizeConfig) -> tuple[float, float] | None:
    """(bits, held-out error relative to the output's power); None where the branch has no room."""
    codec = CODECS[config.kind]
    spec = LayerSpec(name=layer.name, kind="linear", shape=tuple(layer.weight.shape))
    scheme = _scheme(spec, config)
    if scheme is None:
        return None
    shared = None if scheme.shared_key is None else codec.make_shared([layer.weight], scheme, config)
    weight = codec.encode(layer.weight, layer.hessian, scheme, config=config, shared=shared, layer=layer.name)
    with torch.no_grad():
        change: Tensor = weight().float() - layer.weight
    bits = 8 * tensor_bytes(weight.state_dict(keep_vars=True).values()) / layer.weight.numel()
    return bits, quadratic(change, layer.heldout_hessian) / quadratic(layer.weight, layer.heldout_hessian)


def decibels(pairs: list[tuple[float, float]]) -> float:
    return 10 * sum(math.log10(one / other) for one, other in pairs) / len(pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS)
    parser.add_argument("--layers", nargs="*", default=[])
    parser.add_argument("--file", type=Path, help="a Python file that makes the layers")
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--rounds", nargs="+", type=int, default=[low_rank.ROUNDS])
    parser.add_argument("--codes", nargs="+", choices=CODES, default=list(CODES))
    options = parser.parse_args()
    if options.model is None:
        layers = list(find_layers(options.layers, file=options.file, model=None, all_layers=False, seed=0)[1])
    else:
        layers = list(model_layers(MODELS[options.model], model_specs(MODELS[options.model], all_layers=False)))
    print("| codes | rank | rounds | layers | bits | bits without | dB | dB, bits counted |\n" + "|---" * 8 + "|")
    with one_thread_each():
        for name in options.codes:
            plain = dataclasses.replace(CODES[name], low_rank=0, smoothing=0)
            plain = GptqConfig(bits=plain.bits) if plain.kind == "svdquant" else plain
            without = [measure(layer, plain) for layer in layers]
            for rank in options.ranks:
                for low_rank.ROUNDS in options.rounds:
                    config = dataclasses.replace(CODES[name], low_rank=rank)
                    beside = [measure(layer, config) for layer in layers]
                    both = [(a, b) for a, b in zip(without, beside, strict=True) if a is not None and b is not None]
                    if not both:
                        continue
                    bits, others = (sum(pair[i][0] for pair in both) / len(both) for i in (1, 0))
                    gain = decibels([(a[1], b[1]) for a, b in both])
                    fair = gain - 6.02 * (bits - others)
                    cells = (name, rank, low_rank.ROUNDS, len(both), f"{bits:.3f}", f"{others:.3f}", f"{gain:+.2f}")
                    print("| " + " | ".join(map(str, cells)) + f" | {fair:+.2f} |", flush=True)


if __name__ == "__main__":
    run_script(main)
