"""How visible the words of a thing are in what a world's text encoders hand to its denoiser.

python scripts/lab/word_shares.py small models/small [--n 1200]

At the last word of every thing in captions of validation scenes, for both encoders' penultimate states joined: the
share of what differs between things that each attribute makes (variance between its words), and how often a linear
reading of half of the things, by ridge regression, names it in the other half.
"""

import argparse
from pathlib import Path

from vqdm.runs.command_line import run_script

import torch
import torch.nn.functional as F
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from vqdm.stages.tiny_train.text import token_ids
from vqdm.stages.tiny_train.unet import encode_text
from vqdm.stages.tiny_train.words import SaidThings
from vqdm.tiny.captions import caption_of
from vqdm.tiny.scenes import draw_scenes
from vqdm.tiny.worlds import WORLDS


def between(states: torch.Tensor, classes: torch.Tensor) -> float:
    """Variance between the means of the classes, as a share of all that of states [things, width]."""
    parts = (states[classes == one] for one in classes.unique())
    spread = sum(len(part) * (part.mean(0) - states.mean(0)).square().sum() for part in parts)
    return float(spread / (states - states.mean(0)).square().sum())


def read(states: torch.Tensor, classes: torch.Tensor, *, ridge: float = 30.0) -> float:
    """Share of the second half of things whose class a linear reading of the first half names."""
    states, half = (states - states.mean(0)) / (states.std(0) + 1e-6), len(states) // 2
    known, wanted = states[:half], F.one_hot(classes).float()
    moment = known.T @ known + ridge * torch.eye(states.shape[1])
    weights = torch.linalg.solve(moment, known.T @ (wanted[:half] - wanted[:half].mean(0)))
    named = (states[half:] @ weights + wanted[:half].mean(0)).argmax(1)
    return float((named == classes[half:]).float().mean())


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("world", choices=[*WORLDS])
    parser.add_argument("parts", type=Path, help="directory with tokenizer/, text_encoder/, text_encoder_2/")
    parser.add_argument("--n", type=int, default=1200, help="captions")
    options = parser.parse_args()
    world = WORLDS[options.world]
    tokenizer = CLIPTokenizer.from_pretrained(options.parts / "tokenizer")
    first = CLIPTextModel.from_pretrained(options.parts / "text_encoder").float()
    second = CLIPTextModelWithProjection.from_pretrained(options.parts / "text_encoder_2").float()
    scenes = enumerate(draw_scenes(0, "validation", range(options.n), world=world))
    captions = [caption_of(s, seed=0, split="validation", index=i, world=world) for i, s in scenes]
    text, _ = encode_text(first, second, token_ids(tokenizer, captions))
    row, token, classes = SaidThings(captions, world).of(torch.arange(options.n))
    states = text[row, token]
    everything = text.flatten(0, 1).var(0).sum()
    print(f"{len(states)} things; their states' variance is {states.var(0).sum() / everything:.3f} of all states'")
    for name, wanted in classes.items():
        share, named = between(states, wanted), read(states, wanted)
        print(f"{name:8s} {share:.4f} of it; named {named:.3f}")


if __name__ == "__main__":
    run_script(main)
