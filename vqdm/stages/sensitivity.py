"""Sensitivity: the change in the denoiser's output when one layer alone is quantized, measured for all budgets."""

import copy
import statistics
from pathlib import Path

import torch
from torch import nn

from vqdm.calibration.calls import recorded_calls
from vqdm.calibration.collect import collect, drive_teacher, execution_groups, teacher_groups
from vqdm.calibration.recording import Call
from vqdm.codecs.cards import CODECS
from vqdm.codecs.encode import make_shared, matrix_of
from vqdm.config.codecs import QuantizeConfig
from vqdm.config.options import ModelConfig
from vqdm.models.loader import denoiser_of
from vqdm.models.specs import LayerSpec, layer_specs
from vqdm.runs import progress
from vqdm.runs.device import one_thread_each
from vqdm.runs.files import write_json
from vqdm.runs.items import read_item, write_item
from vqdm.stages.finished import output_error
from vqdm.weights.base import SHARED_NAME, SharedPart
from vqdm.weights.layers import replace_layer, swap

CODE_BITS = (2.0, 3.5)  # per weight, without scales and rates; log error is nearly linear between them and around
CALLS = 4  # number of evenly spread recorded calls by which a layer is judged


def sensitivity(
    directory: Path, pipeline, calibration: Path, *, config: QuantizeConfig, model: ModelConfig, device: str
) -> dict:
    """Fill the stage's directory with `harm.json`: layer -> {bits: relative squared error of the denoiser's output}."""
    denoiser, scheme_at = denoiser_of(pipeline), CODECS[config.kind].scheme_at
    specs = [
        spec
        for spec in layer_specs(denoiser, pattern=model.layers, min_size=model.min_size)
        if scheme_at(spec, CODE_BITS[0]) is not None
    ]
    calls = list(recorded_calls(calibration))
    calls = calls[len(calls) // CALLS // 2 :: max(1, len(calls) // CALLS)][:CALLS]
    harm: dict[str, dict[float, float]] = {}
    shared = make_shared(denoiser, [(spec, scheme_at(spec, CODE_BITS[0])) for spec in specs], config=config)
    sizes = {spec.name: spec.size for spec in specs}
    mean = sum(sizes.values()) / len(sizes)  # the denoiser runs for every layer alike, the encoder by its weights
    with progress.bar("sensitivity", 2 * sum(sizes.values()), count=len(specs), unit="layer") as bar:
        for group in teacher_groups(execution_groups(denoiser, specs, calibration)):
            hessians: dict[str, torch.Tensor] = {}
            if any(read_item(directory, spec.name) is None for spec in group):
                hessians = collect(denoiser, group, drive_teacher(denoiser, calibration, device=device), config=config)
            for spec in group:
                record = read_item(directory, spec.name)
                count = bar.add if record is None else bar.skip
                if record is None:
                    record = _harm_of(
                        denoiser, spec, hessians[spec.name], calls, shared=shared, config=config, device=device
                    )
                    write_item(directory, spec.name, {}, record)
                harm[spec.name] = record["harm"]
                count(sizes[spec.name] + mean)
    write_json(directory / "harm.json", harm)
    return {"layers": len(harm), "median_harm": {bits: _median(harm, i) for i, bits in enumerate(CODE_BITS)}}


def _median(harm: dict, index: int) -> float:
    return statistics.median(list(points.values())[index] for points in harm.values())


def _harm_of(
    denoiser: nn.Module,
    spec: LayerSpec,
    hessian: torch.Tensor,
    calls: list[Call],
    *,
    shared: SharedPart,
    config: QuantizeConfig,
    device: str,
) -> dict:
    original, codec = denoiser.get_submodule(spec.name), CODECS[config.kind]
    matrix, found = matrix_of(denoiser, spec).cpu(), {}
    for code_bits in CODE_BITS:
        scheme = codec.scheme_at(spec, code_bits)
        with one_thread_each():
            weight = codec.encode(matrix, hessian.cpu(), scheme, config=config, shared=shared, layer=spec.name)
        swap(denoiser, spec, copy.deepcopy(weight), decode="cached")  # and its part: `shared` stays on the CPU
        nn.Module.to(denoiser, device=device)
        found[f"{scheme.bits:.6f}"] = output_error(denoiser, calls, device)
        replace_layer(denoiser, spec.name, original)
        delattr(denoiser, SHARED_NAME)
    return {"harm": found}
