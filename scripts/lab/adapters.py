"""One compressed base with several adapters beside it: what each makes of it in one step, and the bits of both files.

python scripts/lab/adapters.py [--base results/stages/quantize/<name>] --adapter hipa=<few_step stage>/adapter
    [--concept <directory of scripts/edit_concept.py tiny>] [--n 128]

Rows: the base alone in 20 guided steps and in one; then in one step, with `turbo`, the difference of tiny_turbo from
tiny as a LoRA by singular values (which stands for LCM-LoRA), and with every adapter given. Without --base the base is
full precision. --concept: a row for a file that makes red blue, in 20 guided steps: hit is the share of captions with
red whose thing is blue, rest that of captions without red in which everything is right. Writes
results/tables/adapters.csv, and turbo's file beside it.
"""

import argparse
from pathlib import Path

from vqdm.runs.command_line import run_script

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save_file

from vqdm.config.options import ModelConfig, SamplerConfig
from vqdm.hub.pipelines import load_denoiser
from vqdm.metrics.probes.closed_form import low_rank
from vqdm.metrics.probes.concepts import Concepts
from vqdm.metrics.tiny_world import image_scores
from vqdm.models.loader import denoiser_of, load_pipeline, sample
from vqdm.models.samplers import set_sampler
from vqdm.models.shipped import evaluators_directory
from vqdm.prompts import load_prompts
from vqdm.seeds import torch_generator
from vqdm.tiny.evaluator import TinyWorld
from vqdm.tiny.scenes import TINY
from vqdm.weights.bits import count_bits

ONE = SamplerConfig("ddim", 1, 0.0, timestep_spacing="trailing")
MANY = SamplerConfig("ddim", 20, 3.0)
BATCH = 32
FILE = "pytorch_lora_weights.safetensors"


def difference(rank: int) -> dict[str, torch.Tensor]:
    """tiny_turbo less tiny as a LoRA of that rank: B A ≈ ΔW, by the largest singular values of every matrix."""
    one, other = (
        denoiser_of(load_pipeline(ModelConfig(builtin=name), device="cpu")) for name in ("tiny_turbo", "tiny")
    )
    layers = {}
    for name, module in one.named_modules():
        if not isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            continue
        delta = module.weight - other.get_submodule(name).weight
        down, up = low_rank(delta.flatten(1), rank)
        if delta.ndim == 4:
            down, up = down.view(rank, *delta.shape[1:]), up[..., None, None]
        layers |= {f"unet.{name}.lora_A.weight": down, f"unet.{name}.lora_B.weight": up}
    return {name: tensor.detach().half().contiguous() for name, tensor in layers.items()}


def scores(pipeline, prompts, sampler: SamplerConfig, world: TinyWorld) -> dict[str, str]:
    """Fidelity and all right of the captions' images, ± one standard error."""
    set_sampler(pipeline, sampler)
    captions, images = [prompt.text for prompt in prompts], []
    for start in range(0, len(prompts), BATCH):
        own = prompts[start : start + BATCH]
        draws = [torch_generator(0, "image", prompt.id) for prompt in own]
        made = sample(pipeline, [prompt.text for prompt in own], sampler=sampler, generators=draws)
        images += [np.asarray(image) for image in made]
    found = image_scores(world.columns(images, captions), None, captions=captions, reference={})
    return {name: in_words(found[name]) for name in ("fidelity", "all_right")}


def concept_scores(pipeline, prompts, place: Path) -> dict[str, str]:
    """What a file that makes red blue does, ± one standard error; the pipeline is as before afterwards."""
    set_sampler(pipeline, MANY)
    probe = Concepts(pipeline, TINY, evaluators_directory(None), guidance=MANY.guidance)
    probe.adapters = []  # the file stands in their place
    listed = [[prompt.id, prompt.text] for prompt in prompts]
    unedited = probe.unedited(listed)
    pipeline.load_lora_weights(place, weight_name=FILE, adapter_name="concept")
    found = probe.edited(listed, unedited)
    pipeline.unload_lora_weights()
    return {name: in_words(found[f"concept_{name}"].numpy()) for name in ("hit", "rest")}


def in_words(values: np.ndarray) -> str:
    return f"{values.mean():.3f} ± {values.std(ddof=1) / len(values) ** 0.5:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path)
    parser.add_argument("--adapter", action="append", default=[])
    parser.add_argument("--concept", type=Path)
    parser.add_argument("--results", type=Path, default=Path("results"))
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--n", type=int, default=128)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    tables = asked.results / "tables"
    (tables / "turbo").mkdir(parents=True, exist_ok=True)
    save_file(difference(asked.rank), tables / "turbo" / FILE)
    places = {"turbo": tables / "turbo"} | dict(named.split("=", 1) for named in asked.adapter)
    denoiser = None if asked.base is None else load_denoiser(asked.base / "denoiser", dtype=torch.float32)
    pipeline = load_pipeline(ModelConfig(builtin="tiny", sampler=MANY), device="cpu", denoiser=denoiser)
    bits, world = count_bits(denoiser_of(pipeline)), TinyWorld(evaluators_directory(None))
    prompts = load_prompts(source="tiny", split="test", n=asked.n).prompts
    parameters = 8 * bits.bytes / bits.bits_per_weight
    own = {"adapter": "none", "bits of base + adapter": f"{bits.bits_per_weight:.2f}"}
    rows = [own | {"calls": 40} | scores(pipeline, prompts, MANY, world), own | {"calls": 1}]
    rows[1] |= scores(pipeline, prompts, ONE, world)

    def row(name: str, place: Path, calls: int) -> dict:
        held = 16 * sum(tensor.numel() for tensor in load_file(Path(place) / FILE).values()) / parameters
        return {"adapter": name, "bits of base + adapter": f"{bits.bits_per_weight:.2f} + {held:.2f}", "calls": calls}

    for name, place in places.items():
        pipeline.load_lora_weights(place, weight_name=FILE, adapter_name=name)
        rows.append(row(name, place, 1) | scores(pipeline, prompts, ONE, world))
        pipeline.unload_lora_weights()
    if asked.concept is not None:
        rows.append(row("concept", asked.concept, 40) | concept_scores(pipeline, prompts, asked.concept))
    again = scores(pipeline, prompts, ONE, world)
    if any(rows[1][key] != value for key, value in again.items()):
        raise RuntimeError(f"without adapters the base gives {again}, and gave {rows[1]} before")
    frame = pd.DataFrame(rows)
    frame.to_csv(tables / "adapters.csv", index=False)
    print(frame.to_string(index=False))


if __name__ == "__main__":
    run_script(main)
