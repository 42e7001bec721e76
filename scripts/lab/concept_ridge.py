"""The ridge's penalty and the power that the factors keep, chosen for concept edits on captions that no table scores.

python scripts/lab/concept_ridge.py [--prompts 48]

tiny in full precision, captions of its world's validation split. Printed for each pair: the rank of the text states'
change, the shares of captions with red whose thing is blue after the edit (hit) and of captions without red in which
everything is right (rest), and dB of the latter's images to those before the edit. One
caption of 48 is .021: among these penalties and powers nothing is told apart.
"""

import argparse

from vqdm.runs.command_line import run_script

import torch

from vqdm.config.options import ModelConfig
from vqdm.metrics.probes.concepts import Concepts, make_adapters
from vqdm.models.loader import load_pipeline
from vqdm.models.shipped import evaluators_directory
from vqdm.prompts import load_prompts
from vqdm.tiny.scenes import TINY

PENALTIES, POWERS = (0.1, 1.0, 10.0), (0.9, 0.95, 0.99)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=48)
    options = parser.parse_args()
    torch.set_num_threads(1)
    pipeline = load_pipeline(ModelConfig(builtin="tiny"), device="cpu")
    prompts = [[p.id, p.text] for p in load_prompts(source="tiny", split="validation", n=options.prompts).prompts]
    probe = Concepts(pipeline, TINY, evaluators_directory(None), guidance=3.0)
    unedited = probe.unedited(prompts)
    print("| penalty | power | rank | hit | rest | rest dB |\n|---|---|---|---|---|---|")
    for penalty in PENALTIES:
        for power in POWERS:
            probe.adapters = make_adapters(probe.drawn.asked, TINY, penalty=penalty, power=power)
            found = {name: float(column.mean()) for name, column in probe.edited(prompts, unedited).items()}
            hit, rest, psnr = (found[f"concept_{name}"] for name in ("hit", "rest", "rest_psnr"))
            print(
                f"| {penalty} | {power} | {len(probe.adapters[0][1])} | {hit:.3f} | {rest:.3f} | {psnr:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    run_script(main)
