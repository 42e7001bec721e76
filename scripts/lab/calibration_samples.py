"""The number of samples that is enough: each tiny layer's error on a population with a Hessian from a part of it.

python scripts/lab/calibration_samples.py [--model tiny] [--bits 3] [--prompts 256] [--layers 24]

The population is every sampling step of `--prompts` calibration prompts, as in the paper's recipe; it is scored on the
same number of other prompts, all steps. Printed: the mean over layers of the trellis codec's relative output error
there, and its ratio to that with the whole population's Hessian. Writes results/tables/calibration_samples.csv.
"""

import argparse
import dataclasses
import sys
import tempfile
from pathlib import Path

from vqdm.runs.command_line import run_script

import numpy as np
import pandas as pd
import torch
from hydra import compose, initialize_config_dir
from tqdm import tqdm

from vqdm.calibration.collect import drive_teacher
from vqdm.calibration.hessian import HessianRecorder
from vqdm.codecs import trellis
from vqdm.codecs.trellis_table import load_table
from vqdm.config.compose import register_schemas, to_config
from vqdm.models.loader import denoiser_of, load_pipeline
from vqdm.models.specs import layer_specs
from vqdm.prompts import load_prompts
from vqdm.stages.calibrate import calibrate
from vqdm.stages.quantize import matrix_of
from vqdm.weights.trellis import TrellisTable
from vqdm.weights.trellis_format import side_bits

ROOT = Path(__file__).resolve().parents[2]
PARTS = [  # prompts, steps, tokens of each call (None: all)
    (8, 4, None), (16, 4, None), (32, 4, None), (64, 1, None), (64, 4, None), (64, 4, 64), (128, 4, None),
    (256, 1, None), (256, 4, None), (256, 4, 64), (256, 20, None),
]  # fmt: skip


def hessians_of(config, specs, *, prompts: int, steps: int, tokens: int | None, order: str, batch: int = 8):
    """Hessians by layer, from the teacher's calls at `steps` evenly spread sampling steps of `prompts` prompts."""
    settings = dataclasses.replace(config.calibration, recorded_steps=steps, batch_size=batch)
    listed = load_prompts(source="tiny", split=order, n=prompts)
    pipeline = load_pipeline(config.model, device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        calibrate(Path(folder), pipeline, listed, config=settings, sampler=config.model.sampler)
        with HessianRecorder(denoiser_of(pipeline), specs, tokens_per_call=tokens) as recorder:
            drive_teacher(denoiser_of(pipeline), Path(folder), device="cpu")(recorder)
    return recorder.hessians()


def errors_of(denoiser, specs, hessians, scored, *, bits: float) -> np.ndarray:
    """Relative output error of every layer on the Hessians `scored`, at `bits` per weight for codes."""
    table, found = TrellisTable.from_values(load_table()), []
    for spec in specs:
        matrix = matrix_of(denoiser, spec)
        layer_bits = bits + side_bits(spec.shape)
        weight = trellis.encode(matrix, hessians[spec.name], bits=layer_bits, table=table, damping=0.01)
        decoded = weight().detach().float()
        scale = trellis.output_error(matrix, torch.zeros_like(matrix), scored[spec.name])
        found.append(trellis.output_error(matrix, decoded, scored[spec.name]) / scale)
    return np.array(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--bits", type=float, default=3.0)
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--layers", type=int, default=24, help="evenly spread over the model (default: 24)")
    parser.add_argument("--results", type=Path, default=Path("results"))
    options = parser.parse_args()
    register_schemas()
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        config = to_config(compose("config", [f"model={options.model}", "calibration=tiny"]))
    denoiser = denoiser_of(load_pipeline(config.model, device="cpu"))
    every = layer_specs(denoiser, pattern=config.model.layers, min_size=config.model.min_size)
    specs = every[:: max(1, len(every) // options.layers)]
    steps = config.model.sampler.steps
    scored = hessians_of(config, specs, prompts=options.prompts, steps=steps, tokens=None, order="validation")
    rows = []
    for prompts, taken, tokens in tqdm([p for p in PARTS if p[0] <= options.prompts], desc="parts", file=sys.stderr):
        part = hessians_of(config, specs, prompts=prompts, steps=taken, tokens=tokens, order="train")
        errors = errors_of(denoiser, specs, part, scored, bits=options.bits)
        rows.append({"prompts": prompts, "steps": taken, "tokens_per_call": tokens or "all", "errors": errors})
    whole = rows[-1]["errors"]
    for row in rows:
        errors = row.pop("errors")
        row |= {"error": errors.mean(), "ratio": np.exp(np.log(errors / whole).mean()), "worst": (errors / whole).max()}
    table = pd.DataFrame(rows)
    file = options.results / "tables" / "calibration_samples.csv"
    file.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(file, index=False, float_format="%.6g")
    print(table.to_string(index=False, float_format=lambda value: f"{value:.5g}"))
    print(f"wrote {file}")


if __name__ == "__main__":
    run_script(main)
