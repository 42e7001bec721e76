"""AdaRound against GPTQ and nearest rounding, block by block, on the same inputs and grids' widths.

python scripts/lab/block_losses.py [--model tiny] [--bits 4] [--blocks 3] [--iterations 2000] [--prompts 64] [--steps 8]

Blocks are evenly spread over the denoiser and get their full-precision inputs. The loss is the relative squared error
of the output, on the recorded calls and on as many other prompts. GPTQ takes its Hessians from the same inputs.
"""

import argparse
import dataclasses
import tempfile
from pathlib import Path

from vqdm.runs.command_line import run_script

import pandas as pd
import torch
from hydra import compose, initialize_config_dir
from tqdm import tqdm

from vqdm.calibration.blocks import block_loss, blocks_of, record_block
from vqdm.calibration.calls import recorded_calls
from vqdm.calibration.hessian import HessianRecorder
from vqdm.calibration.recording import Call, play_back
from vqdm.codecs import gptq
from vqdm.codecs.adaround import reconstruct_block
from vqdm.config.compose import register_schemas, to_config
from vqdm.models.loader import denoiser_of, load_pipeline
from vqdm.models.specs import layer_specs
from vqdm.prompts import load_prompts
from vqdm.seeds import torch_generator
from vqdm.stages.calibrate import calibrate
from vqdm.stages.quantize import matrix_of
from vqdm.weights.layers import swap

ROOT = Path(__file__).resolve().parents[2]


def calls_of(config, *, split: str, prompts: int, steps: int) -> list[Call]:
    """Recorded calls of the full-precision denoiser."""
    settings = dataclasses.replace(config.calibration, recorded_steps=steps)
    with tempfile.TemporaryDirectory() as folder:
        pipeline = load_pipeline(config.model, device="cpu")
        listed = load_prompts(source="tiny", split=split, n=prompts)
        calibrate(Path(folder), pipeline, listed, config=settings, sampler=config.model.sampler)
        return list(recorded_calls(Path(folder)))


def gptq_weights(denoiser, block, calls: list[Call], *, bits: int, clip: str) -> dict:
    with HessianRecorder(denoiser, block.specs) as recorder:
        for call in calls:
            play_back(denoiser, call, device="cpu")
    hessians = recorder.hessians()
    return {
        spec.name: gptq.encode(matrix_of(denoiser, spec), hessians[spec.name], bits=bits, clip=clip, damping=0.001)
        for spec in block.specs
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    for name, value in {"bits": 4, "blocks": 3, "iterations": 2000, "prompts": 64, "steps": 8}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    register_schemas()
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        config = to_config(compose("config", [f"model={options.model}", "calibration=tiny"]))
    calls, others = (
        calls_of(config, split=split, prompts=options.prompts, steps=options.steps) for split in ("train", "validation")
    )
    denoiser = denoiser_of(load_pipeline(config.model, device="cpu"))
    specs = layer_specs(denoiser, pattern=config.model.layers, min_size=config.model.min_size)
    blocks = [block for block in blocks_of(denoiser, specs, calls[0]) if len(block.specs) > 1]
    rows = []
    for block in tqdm(blocks[:: max(1, len(blocks) // options.blocks)][: options.blocks], desc="blocks"):
        data, held_out = (record_block(denoiser, block.name, part) for part in (calls, others))
        learned, report = reconstruct_block(
            denoiser,
            block,
            data,
            data.output,
            bits=options.bits,
            iterations=options.iterations,
            batch_size=16,
            generator=torch_generator(0, "adaround", block.name),
        )
        methods = {
            f"GPTQ {clip}": gptq_weights(denoiser, block, calls, bits=options.bits, clip=clip)
            for clip in ("mse", "hessian")
        }
        rows.append({"block": block.name, "method": "nearest", "loss": report.nearest})
        for method, weights in (methods | {"AdaRound": learned}).items():
            student = denoiser_of(load_pipeline(config.model, device="cpu"))
            for spec in block.specs:
                swap(student, spec, weights[spec.name], decode="cached")
            module = student.get_submodule(block.name)
            with torch.no_grad():
                losses = {"loss": block_loss(module, data, data.output)}
                losses["held_out"] = block_loss(module, held_out, held_out.output)
            rows.append({"block": block.name, "method": method, **losses})
    print(pd.DataFrame(rows).to_string(index=False, float_format=lambda value: f"{value:.5f}"))


if __name__ == "__main__":
    run_script(main)
