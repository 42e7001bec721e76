"""The floors and ceilings beside the tiny model's scores: what real renders, the VAE and wrong captions reach.

python scripts/lab/tiny_floors.py [--n 2000] [--model vqdm/models/tiny] [--evaluators vqdm/models/tiny_evaluators]
"""

import argparse
import json
from pathlib import Path

from vqdm.runs.command_line import run_script

import numpy as np
import torch

from vqdm.config.options import ModelConfig
from vqdm.metrics.extractors import make_extractor
from vqdm.metrics.resampling import Resamples, mean_and_error
from vqdm.metrics.scores import score
from vqdm.metrics.tiny_world import fidelity_scores
from vqdm.models.loader import load_pipeline
from vqdm.seeds import numpy_generator
from vqdm.stages.tiny_train.vae import reconstruction_psnr
from vqdm.tiny.attributes import as_seen, seen_by
from vqdm.tiny.data import SceneSet
from vqdm.tiny.evaluator import TinyWorld, load_reference, to_tensor

SHOWN = ("fid", "kid", "cmmd", "clip_score", "fidelity", "all_right")


def reconstruct(vae, images: np.ndarray) -> np.ndarray:
    """uint8 images through the VAE and back."""
    batches = [vae.decode(vae.encode(to_tensor(part)).latent_dist.mean).sample for part in np.array_split(images, 16)]
    pixels = (torch.cat(batches).clamp(-1, 1) + 1) * 127.5
    return pixels.round().byte().permute(0, 2, 3, 1).numpy()


def look(extractor, images: np.ndarray, captions: list[str]) -> dict[str, torch.Tensor]:
    """Columns of all images, looked at 100 at a time."""
    parts = [
        extractor.columns(list(images[start : start + 100]), captions[start : start + 100])
        for start in range(0, len(images), 100)
    ]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def scores_of(columns: dict[str, torch.Tensor], captions: list[str], reference: dict) -> dict[str, dict]:
    resamples = Resamples(len(captions), count=20)
    found = score("tiny", columns, None, captions=captions, reference=reference, resamples=resamples)
    return {name: mean_and_error(values) for name, values in found.images.items()} | found.sets


@torch.no_grad()
def main() -> None:
    package = Path(__file__).resolve().parents[2] / "vqdm" / "models"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=2000)
    parser.add_argument("--model", type=Path, default=package / "tiny")
    parser.add_argument("--evaluators", type=Path, default=package / "tiny_evaluators")
    options = parser.parse_args()
    extractor = make_extractor("tiny", [options.evaluators], device="cpu")
    world = TinyWorld(options.evaluators).world
    scenes = SceneSet(seed=0, split="test", n=options.n, world=world)
    reference = load_reference(options.evaluators)
    vae = load_pipeline(ModelConfig(path=str(options.model)), device="cpu").vae
    order = numpy_generator(0, "shuffled captions").permutation(options.n)
    shuffled = [scenes.captions[i] for i in order]
    rendered = look(extractor, scenes.pixels, scenes.captions)
    reconstructed = look(extractor, reconstruct(vae, scenes.pixels), scenes.captions)
    rows = {
        "real renders": scores_of(rendered, scenes.captions, reference),
        "VAE reconstructions": scores_of(reconstructed, scenes.captions, reference),
        "real renders, captions shuffled": scores_of(look(extractor, scenes.pixels, shuffled), shuffled, reference),
        "perfect attribute network": fidelity_scores(
            scenes.captions, [as_seen(s, world=world) for s in scenes.scenes], world=world
        ),
    }
    print("| images |" + "".join(f" {name} |" for name in SHOWN) + "\n|---" + "|---" * len(SHOWN) + "|")
    for name, scores in rows.items():
        cells = (f"{scores[m]['value']:.4f} ± {scores[m]['se']:.4f}" if m in scores else "–" for m in SHOWN)
        print(f"| {name} |" + "".join(f" {cell} |" for cell in cells))
    seen = seen_by(rendered["labels"], world=world)
    exact = np.mean([one == as_seen(scene, world=world) for one, scene in zip(seen, scenes.scenes, strict=True)])
    about = {"n": options.n, "attribute_net_exact": round(float(exact), 4)}
    about["vae_psnr_db"] = round(reconstruction_psnr(vae, scenes.images(torch.arange(options.n))), 2)
    train = set(SceneSet(seed=0, split="train", n=150_000, world=world).captions)
    about["captions_seen_verbatim_in_training"] = round(float(np.mean([c in train for c in scenes.captions])), 4)
    print(json.dumps(about))


if __name__ == "__main__":
    run_script(main)
