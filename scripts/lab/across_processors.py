"""Find where processors part: a model's Hessians, codebooks and codes with this one's kernels and with others.

python scripts/lab/across_processors.py [--model tiny] [--schemes gptq4 vq3 trellis3] [--layers 118] [--prompts 16]

The other kernels are those of a processor without AVX-512 and of MKL's common path, forced by environment variables in
a process of their own. First each process collects the Hessians of the layers' inputs; then both encode with the very
same Hessians, the first one's. Printed: the share of bytes, codes and layers that are the same, and by how much
Hessians differ. VQ is encoded with codebooks of the whole model, as in the demo.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from vqdm.runs.command_line import run_script

import torch
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file, save_file

from vqdm.calibration.collect import collect, drive_teacher
from vqdm.codecs.allocation import assign_schemes
from vqdm.codecs.encode import encode_layer, make_shared, matrix_of, users_of_shared
from vqdm.config.codecs import parse_scheme
from vqdm.config.compose import register_schemas, to_config
from vqdm.models.loader import denoiser_of, load_pipeline
from vqdm.prompts import load_prompts
from vqdm.runs.device import one_thread_each
from vqdm.stages.calibrate import calibrate

ROOT = Path(__file__).resolve().parents[2]
OTHER = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_CBWR": "COMPATIBLE",  # on AMD, MKL ignores MKL_ENABLE_INSTRUCTIONS
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "NUMBA_CPU_NAME": "haswell",
    "NUMBA_CPU_FEATURES": "",
}
KERNELS = {"here": {}, "other": OTHER}


def pipeline_of(options):
    register_schemas()
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        config = to_config(compose("config", [f"model={options.model}", "calibration=tiny"]))
    return config, load_pipeline(config.model, device="cpu")


def scheme_of(name: str):
    config = parse_scheme(name)
    if config.kind == "additive":
        config.codebooks = "model"
    return config


def collect_hessians(options) -> dict[str, torch.Tensor]:
    config, pipeline = pipeline_of(options)
    denoiser = denoiser_of(pipeline)
    assignment = assign_schemes(
        denoiser, scheme_of("gptq4"), pattern=config.model.layers, min_size=config.model.min_size
    )
    with tempfile.TemporaryDirectory() as folder:
        prompts = load_prompts(source="tiny", split="train", n=options.prompts)
        calibrate(Path(folder), pipeline, prompts, config=config.calibration, sampler=config.model.sampler)
        drive = drive_teacher(denoiser, Path(folder), device="cpu")
        found = collect(denoiser, assignment.specs, drive, config=scheme_of("gptq4"))
    return {name: hessian.contiguous().clone() for name, hessian in found.items()}


def encode(name: str, hessians: dict[str, torch.Tensor], options) -> dict[str, torch.Tensor]:
    """All tensors of the shared parts and of the encoded layers, by "layer/tensor"."""
    config, pipeline = pipeline_of(options)
    denoiser, scheme = denoiser_of(pipeline), scheme_of(name)
    problems = assign_schemes(denoiser, scheme, pattern=config.model.layers, min_size=config.model.min_size).quantized
    found: dict[str, torch.Tensor] = {}
    with one_thread_each(), torch.no_grad():
        users = users_of_shared(problems)
        shared = {key: make_shared(denoiser, own, config=scheme) for key, own in users.items()}
        for key, part in shared.items():
            found |= {f"shared {key}/{tensor}": value for tensor, value in part.state_dict().items()}
        for spec, of_layer in problems[:: max(1, len(problems) // options.layers)]:
            weight = encode_layer(
                matrix_of(denoiser, spec), hessians[spec.name], of_layer, config=scheme,
                shared=shared.get(of_layer.shared_key), layer=spec.name,
            )  # fmt: skip
            found |= {f"{spec.name}/{tensor}": value for tensor, value in weight.state_dict().items()}
    return {key: value.detach().contiguous().clone() for key, value in found.items()}


def work(options) -> None:
    """The child's part: one step, with the kernels that its environment chose."""
    if options.step == "hessians":
        save_file(collect_hessians(options), options.out)
    else:
        save_file(encode(options.step, load_file(options.hessians), options), options.out)


def both(step: str, folder: Path, options) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The result of a step with either set of kernels."""
    made = []
    for kernels, variables in KERNELS.items():
        out = folder / f"{step}-{kernels}.safetensors"
        child = [sys.executable, __file__, "--step", step, "--out", str(out)]
        child += ["--hessians", str(folder / "hessians-here.safetensors"), "--model", options.model]
        child += ["--layers", str(options.layers), "--prompts", str(options.prompts)]
        subprocess.run(child, env=os.environ | {"OMP_NUM_THREADS": "1"} | variables, check=True)
        made.append(load_file(out))
    return tuple(made)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--schemes", nargs="+", default=["gptq4", "vq3", "trellis3"])
    parser.add_argument("--layers", type=int, default=1000, help="about so many, evenly spread")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--step", help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    parser.add_argument("--hessians", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        work(options)
        return
    with tempfile.TemporaryDirectory() as folder:
        here, other = both("hessians", Path(folder), options)
        apart = {name: float((here[name] - other[name]).norm() / here[name].norm()) for name in here}
        equal = sum(torch.equal(here[name], other[name]) for name in here)
        print(f"Hessians: {equal} of {len(here)} are the same; relative difference up to {max(apart.values()):.1e}")
        for scheme in options.schemes:
            report(scheme, *both(scheme, Path(folder), options))


def report(scheme: str, here: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """One line for each kind of tensor: how many layers have the same, and which share of its elements."""
    for kind in dict.fromkeys(key.partition("/")[2] if not key.startswith("shared") else key for key in here):
        keys = [key for key in here if key == kind or (key.endswith(f"/{kind}") and not key.startswith("shared"))]
        same = sum(torch.equal(here[key], other[key]) for key in keys)
        elements = sum(int((here[key] == other[key]).sum()) for key in keys)
        total = sum(here[key].numel() for key in keys)
        print(
            f"{scheme}: {kind}: the same in {same} of {len(keys)}; {elements / total:.2%} of all elements", flush=True
        )


if __name__ == "__main__":
    run_script(main)
