"""The question whether targets corrected for what earlier layers did are worth it, as GPTAQ has them for GPTQ.

python scripts/lab/corrected_targets.py [--bits 3] [--seeds 0 1 2] [--n 512] [--strength 0 1] [--calibration 128]

GPTAQ (Li et al. 2025, arXiv 2504.02692) asks that a layer gives what the full-precision layer gives for ITS input x,
when it reads x̃, the input behind the layers that are quantized already: min ‖W x − Q x̃‖². With H̃ = E[x̃ x̃ᵀ] and
C = E[x x̃ᵀ] that is the usual problem, with the Hessian H̃, for the target W + α W (C − H̃) (H̃ + λ)⁻¹. α (strength) is 1
for all of it and 0 for none: then Hessians alone are those of the partly quantized denoiser. Both read the teacher's
recorded calls, and go on layer by layer, those together that read one input: layers of a group that each correct the
same error would correct it several times.

Each run is one of run.py's, on images of the same captions and noise, in a results folder of its own for each strength;
killed, the same command goes on. Printed: PSNR to full precision, and the paired difference to today's codes.
"""

import argparse
import contextlib
import copy
import functools
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

from vqdm.runs.command_line import run_script

import numpy as np
import pandas as pd
import torch
from hydra import compose, initialize_config_dir
from torch import Tensor, nn

from vqdm.calibration.calls import recorded_calls
from vqdm.calibration.collect import execution_groups
from vqdm.calibration.hessian import _patches, _rows
from vqdm.calibration.recording import play_back
from vqdm.codecs.allocation import Assignment
from vqdm.codecs.encode import matrix_of
from vqdm.config.compose import register_schemas, to_config
from vqdm.models.specs import LayerSpec
from vqdm.pipeline import run
from vqdm.report.experiments import _other_seed
from vqdm.runs.device import one_thread_each
from vqdm.runs.store import read_item
from vqdm.stages import quantize
from vqdm.stages.layout import IMAGES_FILE

ROOT = Path(__file__).resolve().parents[2]
DAMPING = 0.01  # λ, relative to the mean of the diagonal


class _Enough(Exception):
    """Every layer of the group has read its input."""


class _Inputs:
    """Context that keeps what some layers read in a call, which it ends when the last of them has read."""

    def __init__(self, denoiser: nn.Module, specs: list[LayerSpec]):
        self.denoiser, self.specs, self.read = denoiser, specs, {}
        self.hooks: list = []

    def __enter__(self):
        for spec in self.specs:
            layer = self.denoiser.get_submodule(spec.name)
            self.hooks.append(layer.register_forward_pre_hook(functools.partial(self._keep, spec), with_kwargs=True))
        return self

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()

    def _keep(self, spec: LayerSpec, _layer, args: tuple, kwargs: dict) -> None:
        self.read[spec.name] = args[0] if args else next(iter(kwargs.values()))
        if len(self.read) == len(self.specs):
            raise _Enough

    def of_call(self, call) -> dict[str, Tensor]:
        self.read = {}
        with contextlib.suppress(_Enough):
            play_back(self.denoiser, call, device="cpu")
        return self.read


def tokens(inputs: Tensor, spec: LayerSpec) -> Iterator[Tensor]:
    return _rows(inputs, None) if spec.conv is None else _patches(inputs, spec.conv, None)


def steps(denoiser: nn.Module, specs: list[LayerSpec], calibration: Path) -> list[list[LayerSpec]]:
    """The layers in the order in which they run, those together that read one tensor one after the other."""
    order = [spec for group in execution_groups(denoiser, specs, calibration) for spec in group]
    with _Inputs(denoiser, order) as inputs:
        read = inputs.of_call(next(recorded_calls(calibration)))
    return [list(layers) for _, layers in itertools.groupby(order, key=lambda spec: id(read[spec.name]))]


@torch.no_grad()
def pair_moments(
    teacher: nn.Module, student: nn.Module, specs: list[LayerSpec], calibration: Path
) -> dict[str, tuple[Tensor, Tensor]]:
    """Per layer H̃ = E[x̃ x̃ᵀ] and C = E[x x̃ᵀ], x of the teacher and x̃ of the student; layers of one input share them."""
    sums: dict[str, list] = {}
    with one_thread_each(), _Inputs(teacher, specs) as wanted, _Inputs(student, specs) as found:
        for call in recorded_calls(calibration):
            clean, own = wanted.of_call(call), found.of_call(call)
            made: dict[tuple, list] = {}
            for spec in specs:
                key = (id(own[spec.name]), spec.conv)
                if key not in made:
                    made[key] = [0.0, 0.0, 0]
                    pairs = zip(tokens(clean[spec.name], spec), tokens(own[spec.name], spec), strict=True)
                    for x, y in pairs:
                        made[key] = [made[key][0] + y.T @ y, made[key][1] + x.T @ y, made[key][2] + len(y)]
                total = sums.setdefault(spec.name, [0.0, 0.0, 0])
                sums[spec.name] = [a + b for a, b in zip(total, made[key], strict=True)]
    return {name: (moment / count, cross / count) for name, (moment, cross, count) in sums.items()}


def corrected(matrix: Tensor, moment: Tensor, cross: Tensor, strength: float) -> Tensor:
    damped = moment + DAMPING * moment.diagonal().mean() * torch.eye(len(moment))
    return matrix + strength * torch.linalg.solve(damped, (matrix @ (cross - moment)).T).T


def by_groups(encoder, assignment: Assignment, calibration: Path, *_, strength: float, progress, **__) -> None:
    """The stage's own way, group after group, but with moments of pairs and corrected targets."""
    student, schemes = encoder.denoiser, {spec.name: scheme for spec, scheme in assignment.quantized}
    teacher = copy.deepcopy(student)
    for group in steps(teacher, assignment.specs, calibration):
        missing = [spec for spec in group if read_item(encoder.directory, spec.name) is None]
        progress.skip([spec for spec in group if spec not in missing])
        moments = pair_moments(teacher, student, group, calibration) if missing else {}
        for spec in missing:
            matrix, scheme = matrix_of(student, spec), schemes[spec.name]
            target = corrected(matrix, *moments[spec.name], strength)
            weight = encoder.codec.encode(
                target,
                moments[spec.name][0],
                scheme,
                config=encoder.config,
                shared=encoder.shared.get(scheme.shared_key),
                layer=spec.name,
            )
            progress.show(encoder.store(spec, weight, matrix, moments[spec.name][0]))
        quantize._take_in(encoder, group)


def scores(arguments: list[str], name: str, seed: int, results: Path) -> pd.DataFrame:
    """Scores of every image of one run."""
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        own = [*arguments, f"name={name}", f"results_dir={results}", "tracker=none", "threads=1", *_other_seed(seed)]
        record = run(to_config(compose("config", own)))
    return pd.read_csv(results / record["directories"]["evaluate"] / IMAGES_FILE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--quantize", default="trellis")
    parser.add_argument("--bits", type=float, default=3)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--strength", nargs="+", type=float, default=[0, 1])
    parser.add_argument("--n", type=int, default=512)
    parser.add_argument("--calibration", type=int, default=128, help="prompts")
    parser.add_argument("--results", type=Path, default=ROOT / "results" / "lab" / "corrected")
    options = parser.parse_args()
    register_schemas()
    what = ["+experiment=tiny_codec", f"model={options.model}", f"quantize={options.quantize}"]
    what += [f"quantize.bits={options.bits:g}", f"evaluate.prompts.n={options.n}"]
    what += [f"calibration.n={options.calibration}"]
    usual, gains = quantize._by_groups, {strength: [] for strength in options.strength}
    for seed in options.seeds:
        quantize._by_groups = usual
        plain = scores(what, f"plain_{seed}", seed, options.results / "plain")["psnr_to_fp"]
        print(f"seed {seed}: today's codes {plain.mean():.2f} dB", flush=True)
        for strength in options.strength:
            quantize._by_groups = functools.partial(by_groups, strength=strength)
            own = scores(what, f"strength{strength:g}_{seed}", seed, options.results / f"strength{strength:g}")
            gain = own["psnr_to_fp"] - plain
            gains[strength].append(gain.mean())
            error = gain.std() / len(gain) ** 0.5
            print(f"seed {seed}: strength {strength:g}: {gain.mean():+.2f} ± {error:.2f} dB paired", flush=True)
    for strength, found in gains.items():
        spread = np.std(found, ddof=1) if len(found) > 1 else float("nan")
        print(f"strength {strength:g}: {np.mean(found):+.2f} dB, {spread:.2f} between {len(found)} calibration seeds")
    sys.stdout.flush()


if __name__ == "__main__":
    run_script(main)
