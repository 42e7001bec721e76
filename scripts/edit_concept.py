"""Write an edit of what a model reads in captions as a LoRA, which diffusers' load_lora_weights takes beside it.

python scripts/edit_concept.py tiny my_edit
python scripts/edit_concept.py my_model_3bit my_edit --captions edit.jsonl [--rank 12] [--ridge 1]

The first argument is a shipped model or a pipeline directory of SDXL's kind, compressed or not; an edit made on either
serves the other. A line of the file is {"caption": "a red circle", "as": "a blue circle"}, whose caption is to act as
the other, or {"caption": "a green ring"}, one of those that are to act as before: some hundred of each, as differently
worded as they will be. Without a file red becomes blue, with captions of the tiny world.

Nothing is trained. The change of keys, values and pooled text is solved for by ridge regression and cut to --rank
singular values of each layer, by default as many as keep 95 % of the squares in every one. Writes
my_edit/pytorch_lora_weights.safetensors, in fp16.
"""

import argparse
import sys
from pathlib import Path

from vqdm.runs.command_line import run_script

from vqdm.config.options import ModelConfig
from vqdm.errors import UserError
from vqdm.metrics.probes.asked import Asked
from vqdm.metrics.probes.closed_form import (
    RIDGE,
    Rewriting,
    changes_of_states,
    changes_of_weights,
    lora_layers,
    rank_with,
)
from vqdm.metrics.probes.concepts import rewriting
from vqdm.models.loader import denoiser_of, load_pipeline
from vqdm.prompts.text_files import decode, fault, is_text, json_lines, read_bytes
from vqdm.stages.graph.student import start_directory
from vqdm.tiny.scenes import TINY
from vqdm.weights.bits import count_bits

POWER = 0.95  # as in the probe
FILE = "pytorch_lora_weights.safetensors"


def read_rewriting(path: Path) -> Rewriting:
    """The captions of a file; UserError for its first bad line, or if it has no edit or nothing to keep."""
    found = Rewriting([], [], [])
    for line, row in json_lines(decode(read_bytes(path), path.name), path.name):
        where = f"{path.name} line {line}"
        if strange := [key for key in row if key not in ("caption", "as")]:
            raise fault(where, f"unknown key {strange[0]!r}", "keys are caption and as")
        for key in ("caption", *(("as",) if "as" in row else ())):
            if not is_text(row.get(key)) or not row[key].strip():
                raise fault(where, f"{key} is no text", "write it in double quotes")
        if "as" in row:
            found.captions.append(row["caption"])
            found.instead.append(row["as"])
        else:
            found.kept.append(row["caption"])
    for name, captions, cure in (("edit", found.captions, "with as"), ("caption to keep", found.kept, "without as")):
        if not captions:
            raise fault(path.name, f"holds no {name}", f"add lines {cure}")
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a shipped model or a pipeline directory")
    parser.add_argument("output", type=Path, help="the directory to write the file in")
    parser.add_argument("--captions", type=Path, help="a JSONL file of captions")
    parser.add_argument("--rank", type=int, help="singular values of each layer to keep")
    parser.add_argument("--ridge", type=float, default=RIDGE, help="λ of the regression, 1 by default")
    options = parser.parse_args(arguments)
    try:
        print(edit_concept(options))
    except UserError as error:
        sys.exit(f"error: {error}")


def edit_concept(options: argparse.Namespace) -> str:
    """Write the file; returns what it holds, in words. UserError for what cannot be edited."""
    if options.rank is not None and options.rank < 1:
        raise UserError(f"--rank {options.rank} must be at least 1")
    if not 0 < options.ridge < float("inf"):
        raise UserError(f"--ridge {options.ridge} must be above 0 and finite")
    if (options.output / FILE).exists():
        raise UserError(f"{options.output / FILE} exists already; give another place")
    asked_for = rewriting(TINY) if options.captions is None else read_rewriting(options.captions)
    model = ModelConfig(path=str(start_directory(options.model)), dtype="float32")
    pipeline = load_pipeline(model, device="cpu")
    asked = Asked(pipeline, "a concept edit")
    changes = changes_of_weights(pipeline.unet, *changes_of_states(asked, asked_for, penalty=options.ridge))
    rank = rank_with(changes, power=POWER) if options.rank is None else options.rank
    layers = lora_layers(changes, rank=rank)
    if not all(tensor.isfinite().all() for tensor in layers.values()):
        raise UserError("the edit is not finite in fp16: give a larger --ridge, or check the captions")
    type(pipeline).save_lora_weights(options.output, unet_lora_layers=layers)
    bits = count_bits(denoiser_of(pipeline))
    held = 16 * sum(tensor.numel() for tensor in layers.values()) / (8 * bits.bytes / bits.bits_per_weight)
    return (
        f"wrote {options.output / FILE}: rank {rank}, {len(changes)} layers; bits per weight of the U-Net "
        f"{bits.bits_per_weight:.2f} + {held:.2f}"
    )


if __name__ == "__main__":
    run_script(main)
