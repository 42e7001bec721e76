"""Quantize the denoiser group by group: one file per layer until all are there, then one file for the model.

Each layer is encoded on one CPU thread, several layers in parallel: results do not depend on the number of threads.
The denoiser, and so Hessians and block reconstruction, is on the device.
"""

import concurrent.futures
import copy
import dataclasses
import functools
import logging
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from vqdm.calibration.blocks import Block
from vqdm.calibration.calls import recorded_calls
from vqdm.calibration.collect import (
    TEACHER_BYTES,
    collect,
    drive_student,
    drive_teacher,
    execution_groups,
    in_passes,
    teacher_groups,
)
from vqdm.calibration.lockstep import waiting_bytes
from vqdm.calibration.pairs import PairedInputs, corrected_target, pair_moments, same_inputs
from vqdm.codecs.allocation import Assignment, assign_schemes, read_harm
from vqdm.codecs.cards import CODECS
from vqdm.codecs.codec import Codec
from vqdm.codecs.encode import Problem, make_shared, matrix_of, users_of_shared
from vqdm.config.codecs import QuantizeConfig
from vqdm.config.options import CalibrationConfig, ModelConfig
from vqdm.models.loader import denoiser_of
from vqdm.models.specs import LayerSpec
from vqdm.runs import progress, threads
from vqdm.runs.device import MemoryGate, encoding_room, one_thread_each
from vqdm.runs.files import write_json
from vqdm.runs.items import read_item, write_item
from vqdm.runs.texts import duration
from vqdm.stages.finished import finished_denoiser
from vqdm.stages.layout import label_of
from vqdm.weights.base import QuantizedWeight, SharedPart
from vqdm.weights.bits import tensor_bytes
from vqdm.weights.layers import swap
from vqdm.weights.registry import empty_shared, empty_weight, scheme_from_dict

log = logging.getLogger("vqdm")


def shared_parts(
    directory: Path, denoiser: nn.Module, problems: list[Problem], *, config: QuantizeConfig
) -> dict[str, SharedPart]:
    """The schemes' shared parts by key; learned codebooks are learned once and kept as items."""
    return {key: _shared_part(directory, denoiser, users, config) for key, users in users_of_shared(problems).items()}


def _shared_part(directory: Path, denoiser: nn.Module, users: list[Problem], config: QuantizeConfig) -> SharedPart:
    scheme = users[0][1]
    name = f"shared_{scheme.shared_key}"
    if read_item(directory, name) is None:
        made = make_shared(denoiser, users, config=config)
        write_item(directory, name, {f"{name}.safetensors": to_bytes(made.state_dict())}, {})
    part = empty_shared(scheme)
    part.load_state_dict(load((directory / f"{name}.safetensors").read_bytes()))
    return part


@dataclasses.dataclass
class Encoder:
    """Maker of the quantized weights of a stage: each is an item, made once and read back later."""

    directory: Path
    denoiser: nn.Module
    config: QuantizeConfig
    shared: dict[str, SharedPart]  # on the CPU, where layers are encoded

    @functools.cached_property
    def placed(self) -> dict[str, SharedPart]:
        """Copies of the shared parts, which go with the weights to the denoiser's device."""
        return copy.deepcopy(self.shared)

    @property
    def codec(self) -> Codec:
        return CODECS[self.config.kind]

    def stored(self, spec: LayerSpec) -> QuantizedWeight | None:
        record = read_item(self.directory, spec.name)
        if record is None:
            return None
        scheme = scheme_from_dict(record["scheme"])
        weight = empty_weight(scheme, spec.shape, self.placed.get(scheme.shared_key))
        weight.load_state_dict(load((self.directory / _file(spec)).read_bytes()))
        return weight

    def store(
        self, spec: LayerSpec, weight: QuantizedWeight, matrix: Tensor, hessian: Tensor | None = None, **more
    ) -> dict:
        record = _record(spec, weight, matrix, hessian) | more
        write_item(self.directory, spec.name, {_file(spec): to_bytes(weight.state_dict())}, record)
        return record

    def encode(self, problem: Problem, hessian: Tensor | None, target: Tensor | None = None) -> dict:
        """Encode a layer; target: the matrix to come near to, if it is not the layer's own."""
        spec, scheme = problem
        began = time.monotonic()
        matrix = matrix_of(self.denoiser, spec).cpu()
        hessian = None if hessian is None else hessian.cpu()
        options = {"config": self.config, "shared": self.shared.get(scheme.shared_key), "layer": spec.name}
        weight = self.codec.encode(matrix if target is None else target.cpu(), hessian, scheme, **options)
        return self.store(spec, weight, matrix, hessian, seconds=round(time.monotonic() - began, 3))

    def encode_all(
        self,
        problems: list[Problem],
        hessians: dict[str, Tensor],
        *,
        workers: int,
        layers: "LayerProgress",
        targets: dict[str, Tensor] | None = None,
    ) -> None:
        """Encode layers in parallel, the largest first, as many at once as the host's memory allows."""
        gate = MemoryGate(encoding_room())

        def encode(problem: Problem) -> dict:
            with gate.holding(self.codec.encoder_bytes(problem[0].shape, self.config)):
                layers.begin(problem[0])
                name = problem[0].name
                return self.encode(problem, hessians.get(name), (targets or {}).get(name))

        with one_thread_each():
            pool = concurrent.futures.ThreadPoolExecutor(workers)
            largest_first = sorted(problems, key=lambda problem: -problem[0].size)
            futures = [pool.submit(encode, problem) for problem in largest_first]
            stopped = False
            try:
                for future in concurrent.futures.as_completed(futures):
                    layers.show(future.result())
            except KeyboardInterrupt:  # the layers at work, a minute each, go down with the process
                stopped = True
                raise
            finally:
                pool.shutdown(wait=not stopped, cancel_futures=True)


class LayerProgress:
    """Progress of a stage, by what its layers take: `effort` of a shape, in the bar's measure.

    lines: also log a line for every layer made.
    """

    def __init__(self, bar: progress.Bar, effort: Callable[[Sequence[int]], float] = math.prod, *, lines: bool = False):
        self.bar, self.effort, self.lines = bar, effort, lines

    def skip(self, specs: list[LayerSpec]) -> None:
        """Count layers that were already there."""
        self.bar.skip(sum(self.effort(spec.shape) for spec in specs), items=len(specs))

    def begin(self, spec: LayerSpec) -> None:
        self.bar.begin(spec.name)

    def show(self, record: dict) -> None:
        self.bar.add(self.effort(record["shape"]), item=record["name"])
        if self.lines:
            left = self.bar.left()
            log.info(
                f"{self.bar.items:4d}/{self.bar.count} {record['name']}: {record['bits']:.3f} bits, "
                f"error {_error_of(record):.2g}, {record.get('seconds', 0):.1f} s"
                + ("" if left is None else f", {duration(left)} left")
            )


def _file(spec: LayerSpec) -> str:
    return f"layers/{spec.name}.safetensors"


def _error_of(record: dict) -> float:
    return record.get("relative_output_error", record["relative_weight_error"])


def _record(spec: LayerSpec, weight: QuantizedWeight, matrix: Tensor, hessian: Tensor | None) -> dict:
    """A line of the table of layers; errors are relative to the power of the weight or of its output."""
    with torch.no_grad():
        change = weight().float() - matrix
    record = {
        "name": spec.name,
        "shape": list(spec.shape),
        "scheme": weight.scheme.to_dict(),
        "bits": 8 * tensor_bytes(weight.state_dict(keep_vars=True).values()) / matrix.numel(),
        "relative_weight_error": float(change.square().sum() / matrix.square().sum().clamp(min=1e-30)),
    }
    if hessian is not None:
        power = float(((matrix @ hessian) * matrix).sum())
        record["relative_output_error"] = float(((change @ hessian) * change).sum()) / max(power, 1e-30)
    return record


def quantize(
    directory: Path,
    pipeline,
    calibration: Path,
    *,
    config: QuantizeConfig,
    model: ModelConfig,
    calibration_config: CalibrationConfig,
    device: str,
    harm: Path | None = None,
    show_layers: bool = False,
    hessian_room: int = TEACHER_BYTES,
) -> dict:
    """Fill the stage's directory: `denoiser/`, `layers.json`. Returns bits, bytes and output error.

    pipeline: full precision, on `device`; its denoiser is quantized in place. calibration: that stage's directory.
    harm: directory of the sensitivity stage, which decides the layers' bits; None: all get the same.
    show_layers: print a line for every layer. hessian_room: bytes of a student's Hessians in one pass of its sampling,
    or of the calls that wait between layers (hessian_from=both).
    """
    denoiser = denoiser_of(pipeline)
    dtype = next(denoiser.parameters()).dtype
    measured = None if harm is None else read_harm(harm)
    assignment = assign_schemes(denoiser, config, pattern=model.layers, min_size=model.min_size, harm=measured)
    if (exceptions := assignment.exceptions(config.kind)) is not None:
        log.info("%s: %s", label_of(directory), exceptions)
    with one_thread_each(), progress.step("kernels, and what layers share"):
        from vqdm.weights import kernels  # noqa: F401 (numba takes seconds to import: not in the first layer's time)

        shared = shared_parts(directory, denoiser, assignment.quantized, config=config)
    encoder = Encoder(directory, denoiser, config, shared)
    specs = assignment.specs
    effort = functools.partial(encoder.codec.effort, config=config)
    total = sum(effort(spec.shape) for spec in specs)
    with progress.bar(f"quantize {label_of(directory)}", total, count=len(specs), unit="layer") as bar:
        layers = LayerProgress(bar, effort, lines=show_layers)
        if encoder.codec.by_blocks is not None:
            _by_blocks(encoder, assignment, calibration, layers=layers)
        elif encoder.codec.needs_hessian(config) and config.hessian_from == "both":
            _by_pairs(encoder, assignment, calibration, layers=layers, room=hessian_room)
        else:
            drive = functools.partial(drive_student, pipeline, config=calibration_config, sampler=model.sampler)
            _by_groups(encoder, assignment, calibration, drive, device=device, layers=layers, room=hessian_room)
    return _finish(directory, denoiser, assignment, calibration, dtype=dtype, device=device)


def _by_groups(
    encoder: Encoder, assignment: Assignment, calibration: Path, drive, *, device: str, layers, room: int
) -> None:
    """Quantize group after group: its Hessians, then its layers in parallel; a student takes it in before the next.

    A student's Hessians that take more than `room` bytes come in several passes of the same sampling.
    """
    config, denoiser, schemes = encoder.config, encoder.denoiser, {s.name: scheme for s, scheme in assignment.quantized}
    wanted = encoder.codec.needs_hessian(config)
    student = wanted and config.hessian_from == "student"
    with progress.step("order of the layers"):
        groups = execution_groups(denoiser, assignment.specs, calibration)
    drive = drive(calibration) if student else drive_teacher(denoiser, calibration, device=device)
    workers = threads.workers()
    for group in groups if student else teacher_groups(groups):
        for part in in_passes(group, room) if student else [group]:
            missing = [spec for spec in part if read_item(encoder.directory, spec.name) is None]
            layers.skip([spec for spec in part if spec not in missing])
            hessians = {}
            if missing and wanted:  # for the whole part, so that its draws of tokens do not depend on what is there
                hessians = collect(denoiser, group, drive, config=config, wanted=part)
            problems = [(spec, schemes[spec.name]) for spec in missing]
            encoder.encode_all(problems, hessians, workers=workers, layers=layers)
        if student:
            _take_in(encoder, group)
    if not student:
        _take_in(encoder, assignment.specs)


def _by_pairs(encoder: Encoder, assignment: Assignment, calibration: Path, *, layers, room: int) -> None:
    """Quantize input after input: layers that read one tensor, each for what it should give behind those before it.

    Calls that take no more than `room` bytes together wait between two inputs in place of beginning anew.
    """
    config, student, schemes = encoder.config, encoder.denoiser, {s.name: scheme for s, scheme in assignment.quantized}
    teacher, workers = copy.deepcopy(student), threads.workers()
    order = [spec for group in execution_groups(student, assignment.specs, calibration) for spec in group]
    calls = functools.partial(recorded_calls, calibration)
    inputs = same_inputs(student, order, next(calls()))
    missing = {spec.name for spec in order if read_item(encoder.directory, spec.name) is None}
    stops = [together[0] for together in inputs if any(spec.name in missing for spec in together)]
    held = room // (2 * max(1, waiting_bytes(student, next(calls()))))
    with PairedInputs(teacher, student, calls, stops, held=held) as reading:
        for together in inputs:
            layers.skip([spec for spec in together if spec.name not in missing])
            problems = [(spec, schemes[spec.name]) for spec in together if spec.name in missing]
            hessians, targets = {}, {}
            if problems:
                options = {"tokens_per_call": config.tokens_per_call, "seed": config.seed}
                moments = pair_moments(together, reading.of(together[0]), **options)
                for spec, _ in problems:
                    hessians[spec.name], cross = moments[spec.name]
                    targets[spec.name] = corrected_target(matrix_of(student, spec), hessians[spec.name], cross)
            encoder.encode_all(problems, hessians, workers=workers, layers=layers, targets=targets)
            _take_in(encoder, together)


def _take_in(encoder: Encoder, specs: list[LayerSpec]) -> None:
    """Replace layers of the denoiser by their stored quantized weights."""
    device = next(encoder.denoiser.parameters()).device
    for spec in specs:
        swap(encoder.denoiser, spec, encoder.stored(spec), decode="cached")
    nn.Module.to(encoder.denoiser, device=device)  # including the shared parts that came with them


def _by_blocks(encoder: Encoder, assignment: Assignment, calibration: Path, *, layers) -> None:
    """Quantize block after block (AdaRound): inputs from the partly quantized student, targets from the teacher."""
    config, specs = encoder.config, {spec.name: spec for spec in assignment.specs}
    teacher = copy.deepcopy(encoder.denoiser)

    def stored(block: Block) -> dict[str, QuantizedWeight] | None:
        weights = {spec.name: encoder.stored(spec) for spec in block.specs}
        return None if None in weights.values() else weights

    def show(block: Block, step: int, loss: float) -> None:
        done = step / config.iterations * sum(layers.effort(spec.shape) for spec in block.specs)
        layers.bar.partly(done, f"loss {loss:.4f}")

    with one_thread_each():
        for _, weights, report in encoder.codec.by_blocks(
            encoder.denoiser,
            teacher,
            assignment.specs,
            lambda: recorded_calls(calibration),
            config=config,
            stored=stored,
            progress=show,
            directory=encoder.directory,
        ):
            if report is None:
                layers.skip([specs[name] for name in weights])
                continue
            for name, weight in weights.items():
                matrix = matrix_of(teacher, specs[name])
                layers.show(encoder.store(specs[name], weight, matrix, **dataclasses.asdict(report)))


def _finish(
    directory: Path, denoiser: nn.Module, assignment: Assignment, calibration: Path, *, dtype, device: str
) -> dict:
    records = [read_item(directory, spec.name) for spec in assignment.specs]
    left = [{"name": s.name, "shape": list(s.shape), "reason": reason} for s, reason in assignment.skipped]
    write_json(directory / "layers.json", {"quantized": records, "left_in_16_bit": left})
    found = finished_denoiser(directory, denoiser, calibration, dtype=dtype, device=device)
    log.debug(
        "quantized %d layers, %d left in 16 bit: %.3f bits per weight, relative output error %.4f",
        len(records),
        len(left),
        found["bits_per_weight"],
        found["relative_output_error"],
    )
    return found
