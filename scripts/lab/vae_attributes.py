"""What a world's VAE keeps: PSNR of reconstructions, and attributes that the attribute network still finds in them.

python scripts/lab/vae_attributes.py models/small [--n 512]

Of validation scenes, which nothing was trained on. Printed for renders and for their reconstructions: the share of
every attribute that is found, and the mean; last the share that reconstructions keep of what is found in renders.
"""

import argparse
from pathlib import Path

from vqdm.runs.command_line import run_script

import torch
from diffusers import AutoencoderKL

from vqdm.stages.tiny_train.vae import reconstruction_psnr
from vqdm.tiny.attributes import targets_of
from vqdm.tiny.data import SceneSet
from vqdm.tiny.evaluator import TinyWorld


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", type=Path, help="directory with vae/, and the world's evaluators in it or beside it")
    parser.add_argument("--n", type=int, default=512)
    options = parser.parse_args()
    beside = options.parts.parent.glob(f"{options.parts.name}_evaluators")
    (evaluators,) = [*options.parts.glob("*_evaluators"), *beside]
    judge = TinyWorld(evaluators)
    vae = AutoencoderKL.from_pretrained(options.parts / "vae")
    scenes = SceneSet(seed=0, split="validation", n=options.n, world=judge.world)
    renders, targets = scenes.images(torch.arange(options.n)), targets_of(scenes.scenes, world=judge.world)
    made = [vae.decode(vae.encode(part).latent_dist.mean).sample.clamp(-1, 1) for part in renders.split(64)]
    print(f"PSNR of reconstructions: {reconstruction_psnr(vae, renders):.2f} dB")
    means = {}
    for name, images in (("renders", renders), ("reconstructions", torch.cat(made))):
        shares = {}
        for attribute, logits in judge.net.logits(judge.net(images)).items():
            asked = targets[attribute] >= 0
            right = logits.argmax(-1) == targets[attribute]
            shares[attribute] = float(right[asked].float().mean())
        means[name] = sum(shares.values()) / len(shares)
        print(f"{name}: {means[name]:.4f}  " + "  ".join(f"{key} {value:.3f}" for key, value in shares.items()))
    print(f"kept: {means['reconstructions'] / means['renders']:.4f}")


if __name__ == "__main__":
    run_script(main)
