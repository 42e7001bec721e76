"""At which timesteps a denoiser of a world needs which words of its captions.

python scripts/lab/caption_timesteps.py small models/small [--unet unet] [--n 96]

In every caption of a validation scene one word of an attribute is replaced by another one of its kind. Printed for
timesteps from clean to noise: the loss as it is trained (min-SNR-5), and by how much, × 10⁻⁴, it is larger with the
wrong word. Where that is most, a draw of the timestep teaches most about the words.
"""

import argparse
from pathlib import Path

from vqdm.runs.command_line import run_script

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from vqdm.stages.tiny_train.text import token_ids
from vqdm.stages.tiny_train.unet import SCHEDULE, conditions, encode_text, load_unet
from vqdm.tiny.data import SceneSet
from vqdm.tiny.world import World
from vqdm.tiny.worlds import WORLDS


def _words(world: World) -> dict[str, list[str]]:
    textures = [word for words in world.texture_words.values() for word in words]
    return {"shape": [*world.shapes], "colour": [*world.colours], "texture": textures}


def _mistaken(captions: list[str], words: list[str], rng: np.random.Generator) -> tuple[list[int], list[str]]:
    """The places of captions that have one of the words, and those captions with another one instead of the first."""
    places, changed = [], []
    for place, caption in enumerate(captions):
        parts = caption.split()
        found = [i for i, part in enumerate(parts) if part in words]
        if found:
            parts[found[0]] = str(rng.choice([word for word in words if word != parts[found[0]]]))
            places.append(place)
            changed.append(" ".join(parts))
    return places, changed


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("world", choices=[*WORLDS])
    parser.add_argument("parts", type=Path, help="directory with vae/, tokenizer/, text_encoder/, text_encoder_2/")
    parser.add_argument("--unet", default="unet", help="the denoiser's folder in there")
    parser.add_argument("--n", type=int, default=96, help="scenes")
    options = parser.parse_args()
    world, parts = WORLDS[options.world], options.parts
    tokenizer = CLIPTokenizer.from_pretrained(parts / "tokenizer")
    encoders = [
        CLIPTextModel.from_pretrained(parts / "text_encoder").float(),
        CLIPTextModelWithProjection.from_pretrained(parts / "text_encoder_2").float(),
    ]
    unet = load_unet(parts / options.unet, world).float().eval()
    scenes = SceneSet(seed=0, split="validation", n=options.n, world=world)
    vae = AutoencoderKL.from_pretrained(parts / "vae").float()
    clean = vae.encode(scenes.images(torch.arange(options.n))).latent_dist.mean
    read = encode_text(*encoders, token_ids(tokenizer, scenes.captions))
    rng = np.random.default_rng(0)
    wrong = {}
    for kind, words in _words(world).items():
        places, captions = _mistaken(scenes.captions, words, rng)
        if places:
            wrong[kind] = (places, encode_text(*encoders, token_ids(tokenizer, captions)))
    alphas = DDIMScheduler(**SCHEDULE).alphas_cumprod
    for timestep in range(25, len(alphas), 50):
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(timestep))
        level = alphas[timestep]
        noisy = level.sqrt() * clean + (1 - level).sqrt() * noise
        weight = min(1.0, 5 * float((1 - level) / level))

        def losses(places, text, pooled, *, noisy=noisy, noise=noise, timestep=timestep, weight=weight):
            times = torch.full((len(places),), timestep)
            made = unet(noisy[places], times, text, added_cond_kwargs=conditions(unet, pooled)).sample
            return weight * (made - noise[places]).square().mean((1, 2, 3))

        right = losses([*range(options.n)], *read)
        costs = {kind: float((losses(at, *text) - right[at]).mean()) for kind, (at, text) in wrong.items()}
        print(
            f"{timestep:4d}  SNR {float(level / (1 - level)):8.4f}  loss {float(right.mean()):.4f}  ",
            *(f"{kind} {1e4 * cost:8.2f} " for kind, cost in costs.items()),
        )


if __name__ == "__main__":
    run_script(main)
