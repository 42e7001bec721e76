"""`plan=true`: what a run will make, how large, with how much memory and in what time, before anything is loaded."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch

from vqdm.acceleration.operators import operators
from vqdm.codecs.allocation import Assignment, Harm
from vqdm.config.options import Config
from vqdm.models.loader import denoiser_on_meta
from vqdm.models.location import DENOISERS, configs_directory
from vqdm.models.single_file import component_on_meta
from vqdm.runs.files import write_json
from vqdm.stages.graph.acceleration import tells_work
from vqdm.stages.plan.cost import DISTILLATION, guidance_factor, stage_costs, stage_names
from vqdm.stages.plan.forward import latent_size
from vqdm.stages.plan.layers import DenoiserPlan, assignment_of, plan_denoiser
from vqdm.stages.plan.parts import PartSize, part_lines, plan_parts
from vqdm.stages.plan.rates import Machine
from vqdm.stages.plan.recorded import Recorded
from vqdm.stages.plan.space import disk_bytes, downloads, missing_lists, with_disk
from vqdm.stages.plan.stage import StageCost, duration, gibibytes
from vqdm.stages.plan.work import work_lines, work_of
from vqdm.weights.layers import swap_empty

LARGE_FILES = 1 << 30  # bytes of mapped files from which a line tells of them


@dataclasses.dataclass(frozen=True)
class Plan:
    """The quantized denoiser, what every stage takes, and the machine that this is for.

    fetched: {what: bytes} of what is downloaded first; lists: files of captions that are missing.
    """

    denoiser: DenoiserPlan
    costs: list[StageCost]
    todo: set[str] | None  # names of the stages that are not done; None: not known
    machine: Machine
    parts: dict[str, PartSize] = dataclasses.field(default_factory=dict)  # what else is to be quantized
    fetched: dict[str, int] = dataclasses.field(default_factory=dict)
    lists: list[str] = dataclasses.field(default_factory=list)
    work: list[str] = dataclasses.field(default_factory=list)  # lines on what is accelerated
    exceptions: str | None = None  # selected layers that are not in the codec's own codes

    @property
    def to_run(self) -> list[StageCost]:
        return [cost for cost in self.costs if self.todo is None or cost.name in self.todo]

    @property
    def seconds(self) -> float | None:
        """Seconds of all stages that are still to run; None if one of them cannot be estimated."""
        known = [cost.seconds for cost in self.to_run]
        return None if None in known else sum(known)

    @property
    def peak_memory_bytes(self) -> int | None:
        """The most that a stage takes of the GPU's memory, or, without one, of the host's."""
        known = [cost.memory.device or cost.memory.host for cost in self.costs if cost.memory is not None]
        return max(known, default=None)


def make_plan(
    config: Config,
    counts: dict[str, int],
    machine: Machine,
    *,
    recorded: Recorded,
    harm: Harm | None,
    todo: set[str] | None,
    removed: Sequence[str] = (),
) -> Plan:
    """Plan a configuration. counts: images and prompts, as `stage_costs` takes them. harm: what the sensitivity stage
    measured, if it is needed and done. removed: operators that the prune stage took out, if it is done.

    UserError for a model whose configs are not here, and for a scheme that does not fit a layer.
    """
    model, denoiser = config.model, denoiser_on_meta(config.model)
    assignment = assignment_of(denoiser, config.quantize, pattern=model.layers, min_size=model.min_size, harm=harm)
    directory = configs_directory(model)
    parts = [part for part in directory.iterdir() if (part / "config.json").is_file()]
    modules = {part.name: component_on_meta(part) for part in parts if part.name not in DENOISERS}
    modules |= {"denoiser": denoiser}
    parameters = {name: sum(p.numel() for p in module.parameters()) for name, module in modules.items()}
    costs = stage_costs(
        config,
        denoiser,
        assignment.specs,
        parts=parameters,
        vae=modules.get("vae"),
        student=_student(config, assignment),
        machine=machine,
        recorded=recorded,
        **counts,
    )
    compressing = (
        "calibrate",
        "scores",
        "prune",
        "sensitivity",
        "quantize",
        *DISTILLATION,
        "schedule",
        "activations",
        "correct",
    )
    wanted = compressing if config.task == "compress" else None
    costs = [cost for cost in costs if wanted is None or cost.name in wanted]
    others = {} if not config.parts.given else plan_parts(config, {p.name: component_on_meta(p) for p in parts})
    planned = plan_denoiser(denoiser_on_meta(model), assignment)
    costs = with_disk(
        costs,
        config,
        denoiser,
        rows=_recorded_rows(config, denoiser, counts["calibration_prompts"]),
        images=counts["images"],
        numbers=_image_numbers(denoiser, modules.get("vae"), model.sampler.size),
        file=planned.bytes,
    )
    fetched = downloads(config, getattr(torch, model.dtype).itemsize * sum(parameters.values()))
    work, exceptions = _work(config, planned, list(removed)), assignment.exceptions(config.quantize.kind)
    return Plan(planned, costs, todo, machine, others, fetched, missing_lists(config), work, exceptions)


def _recorded_rows(config: Config, denoiser: torch.nn.Module, prompts: int) -> int:
    steps = min(config.calibration.recorded_steps, config.model.sampler.steps)
    return prompts * steps * guidance_factor(denoiser, config.model.sampler.guidance)


def _image_numbers(denoiser: torch.nn.Module, vae: torch.nn.Module | None, size: int | None) -> int:
    """Numbers of an image, 3 · height · width; 0 without a decoder."""
    height, width = latent_size(denoiser, size)
    return 0 if vae is None else 3 * height * width * 4 ** (len(vae.config.block_out_channels) - 1)


def _work(config: Config, planned: DenoiserPlan, removed: list[str]) -> list[str]:
    """Lines on what caching, activations, pruning and fewer steps make of the work; none where there is none of it."""
    if not tells_work(config):
        return []
    weights = {layer.name: layer.bits for layer in planned.quantized}
    work = work_of(config, weights=weights, removed=removed)
    if work is None:
        return ["multiply-adds not estimated: the plan does not know what this denoiser takes"]
    count = len(operators(denoiser_on_meta(config.model))) if config.prune.kind != "none" else 0
    return work_lines(config, work, removed=removed, operators=count)


def _student(config: Config, assignment: Assignment) -> torch.nn.Module | None:
    """The quantized denoiser on meta, as distillation loads it; None where nothing is distilled."""
    if not any(name in DISTILLATION for name in stage_names(config)):
        return None
    return swap_empty(denoiser_on_meta(config.model), assignment.quantized)


def layer_table(plan: DenoiserPlan) -> str:
    """One line for every Linear and Conv2d."""
    width = max(len(layer.name) for layer in plan.layers)
    return "\n".join(
        f"{layer.name:{width}s} {'×'.join(map(str, layer.shape)):>16s}  {layer.scheme:>12s} {layer.bits:7.3f} bits "
        f"{layer.bytes:>11,} bytes{f'  stays: {layer.reason}' if layer.reason else ''}"
        for layer in plan.layers
    )


def summary(plan: Plan) -> str:
    """Lines with the totals and what every stage takes."""
    denoiser, counts = plan.denoiser, plan.denoiser.counts
    weights = sum(layer.weights for layer in denoiser.quantized)
    original = round(8 * counts.bytes / counts.bits_per_weight)
    rest = ", ".join(f"{name} {size:,}" for name, size in denoiser.rest.items())
    lines = [
        f"{len(denoiser.quantized)} layers quantized, {weights:,} weights, {weights / original:.2%} of {original:,}; "
        f"{len(denoiser.layers) - len(denoiser.quantized)} layers stay in 16 bit",
        *([plan.exceptions] if plan.exceptions else []),
        "bytes by group: " + ", ".join(f"{name} {size:,}" for name, size in denoiser.groups().items()),
        f"bytes beside the layers' weights: {rest}",
        f"the denoiser's file: {denoiser.bytes:,} bytes ({denoiser.bytes / 2**20:.2f} MiB, "
        f"{denoiser.bytes / (2 * original):.3f} × its weights at 16 bit)",
        f"bits_per_weight {counts.bits_per_weight:.3f}, bits_quantized {counts.bits_quantized:.3f}, "
        f"bits_as_in_paper {counts.bits_as_in_paper:.3f}",
        *part_lines(plan.parts, denoiser.bytes),
        *plan.work,
        f"memory and times for {plan.machine.label}:",
        *(cost_line(cost, plan) for cost in plan.costs),
    ]
    if plan.seconds is not None:
        disk = f", up to {gibibytes(disk_bytes(plan.to_run))} on disk" if plan.to_run else ""
        lines.append(f"  what is still to run: {duration(plan.seconds)}{disk}")
    return "\n".join([*lines, *fetch_lines(plan)])


def fetch_lines(plan: Plan) -> list[str]:
    """Lines with what is not here and is fetched, or has to be, before the run."""
    lines = []
    if plan.fetched:
        parts = ", ".join(f"{what} {size / 1e9:.2f}" for what, size in plan.fetched.items())
        lines.append(f"to download, about {sum(plan.fetched.values()) / 1e9:.1f} GB: {parts}")
    if plan.lists:
        lines.append(f"captions to fetch first, by scripts/download_coco.py (--list: sizes): {', '.join(plan.lists)}")
    return lines


def cost_line(cost: StageCost, plan: Plan) -> str:
    """Line with the memory and time of one stage, and where the time comes from."""
    memory = "memory not estimated"
    if cost.memory is not None:
        on_device = f"{gibibytes(cost.memory.device)} on the device and " if cost.memory.device else ""
        memory = f"{on_device}{gibibytes(cost.memory.host)} of memory"
        files = cost.memory.host - cost.memory.anonymous
        if not cost.memory.device and files > LARGE_FILES:
            memory += f" ({gibibytes(files)} of it mapped files)"
        card = plan.machine.card
        if card is not None and cost.memory.device > card.memory:
            memory += f" (more than the {gibibytes(card.memory)} of an {card.name})"
    disk = f", up to {gibibytes(cost.disk)} on disk" if cost.disk else ""
    origin = "estimate" if cost.origin.startswith("estimate") else cost.origin
    time = "time not estimated" if cost.seconds is None else f"{duration(cost.seconds)} ({origin})"
    state = " (done)" if plan.todo is not None and cost.name not in plan.todo else ""
    return f"  {cost.name:14s} {memory}{disk}, {time}{state}{f'; {cost.note}' if cost.note else ''}"


def write_plan(plan: Plan, file: Path, *, experiment: str, model: str) -> None:
    """Write the plan as JSON."""
    layers = [
        {"name": n.name, "shape": list(n.shape), "scheme": n.scheme, "bits": n.bits, "bytes": n.bytes}
        | ({"reason": n.reason} if n.reason else {})
        for n in plan.denoiser.layers
    ]
    stages = [
        dataclasses.asdict(cost) | {"done": None if plan.todo is None else cost.name not in plan.todo}
        for cost in plan.costs
    ]
    counts = plan.denoiser.counts.to_dict() | {"bytes": plan.denoiser.bytes}
    found = {"experiment": experiment, "model": model, "device": plan.machine.device} | counts
    found |= {"machine": plan.machine.label, "peak_memory_bytes": plan.peak_memory_bytes, "seconds": plan.seconds}
    found |= {"downloads": plan.fetched, "missing_lists": plan.lists}
    write_json(file, found | {"rest": plan.denoiser.rest, "stages": stages, "layers": layers})
