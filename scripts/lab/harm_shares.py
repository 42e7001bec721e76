"""Which layers make the harm of few bits: why bits by sensitivity gain what they gain.

python scripts/lab/harm_shares.py results/stages/sensitivity/small-… models/small/unet [--bits 2]

Reads what the sensitivity stage measured: the squared error of the denoiser's output, relative to the output, with one
layer alone in few bits. Prints the layers of most harm, in how few weights half and nine tenths of all harm lie, what
the quieter half of the weights makes of it, and what each kind of layer and each block make beside their share of the
weights.
"""

import argparse
import itertools
import re
from pathlib import Path

from vqdm.runs.command_line import run_script

import numpy as np
from diffusers import UNet2DConditionModel

from vqdm.codecs.allocation import read_harm

KINDS = (
    "conv_in",
    "conv_out",
    "time_embedding",
    "add_embedding",
    "time_emb_proj",
    "conv_shortcut",
    "attn1",
    "attn2",
    "ff",
)
KINDS += ("proj_in", "proj_out", "downsamplers", "upsamplers", "conv1", "conv2")  # the first that a name holds


def kind_of(name: str) -> str:
    return next((kind for kind in KINDS if kind in name), "other")


def block_of(name: str) -> str:
    return re.sub(r"\.(?!\d).*", "", name)  # up_blocks.0, mid_block


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sensitivity", type=Path, help="directory of the stage, with harm.json")
    parser.add_argument("unet", type=Path, help="directory of the U-Net, for the sizes of its layers")
    parser.add_argument("--bits", type=float, default=2.0, help="the measured rate next to this one is taken")
    parser.add_argument("--shown", type=int, default=12, help="layers to print")
    options = parser.parse_args()
    measured = read_harm(options.sensitivity)
    unet = UNet2DConditionModel.from_pretrained(options.unet)
    weights = {name: unet.get_submodule(name).weight.numel() for name in measured}
    harm = {name: points[min(points, key=lambda bits: abs(bits - options.bits))] for name, points in measured.items()}
    all_weights, all_harm = sum(weights.values()), sum(harm.values())
    order = sorted(harm, key=lambda name: -harm[name] / weights[name])  # most harm per weight first
    for name in sorted(harm, key=harm.get, reverse=True)[: options.shown]:
        shares = harm[name] / all_harm, weights[name] / all_weights
        print(f"{name:<64} {harm[name]:9.2e}, of harm {shares[0]:6.1%}, of weights {shares[1]:6.1%}")
    held = np.cumsum([weights[name] for name in order]) / all_weights
    made = np.cumsum([harm[name] for name in order]) / all_harm
    for share in (0.5, 0.9, 0.99):
        print(f"{share:.0%} of all harm lies in {held[np.searchsorted(made, share)]:.1%} of the weights")
    print(f"the quieter half of the weights makes {1 - made[np.searchsorted(held, 0.5)]:.2%} of all harm")
    for group in (kind_of, block_of):
        for found, own in itertools.groupby(sorted(harm, key=group), group):
            names = list(own)
            parts = sum(harm[n] for n in names) / all_harm, sum(weights[n] for n in names) / all_weights
            print(f"{found:<16} {len(names):3d} layers, of harm {parts[0]:6.2%}, of weights {parts[1]:6.2%}")


if __name__ == "__main__":
    run_script(main)
