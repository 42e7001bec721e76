"""What `plan=true` prints and writes: the stages at once; then, after some imports, layers, sizes, memory and time."""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from vqdm.config.options import Config
from vqdm.errors import UserError
from vqdm.models.location import configs_directory
from vqdm.models.samplers import check_sampler
from vqdm.runs.items import batches, peek
from vqdm.runs.store import Store
from vqdm.stages.graph.denoiser import Quantization
from vqdm.stages.graph.experiment import Graph, build_stages, image_list
from vqdm.stages.graph.samplers import samplers

log = logging.getLogger("vqdm")
LARGE, LONG = 100_000_000, 12 * 3600  # parameters and seconds from which a CPU has to be asked for


def print_plan(config: Config, store: Store, *, every_layer: bool = True):
    """Print what a run will do and take; write it to plans/<experiment>.json. Nothing is loaded, downloaded or made.

    Returns the plan.

    What keeps the stages from being known (a caption file that is missing) is said; the rest is planned all the same.
    """
    if config.model.hub_id is None:  # a model from the hub may not be downloaded yet
        for sampler in samplers(config):
            check_sampler(configs_directory(config.model), sampler)
    try:
        stages = build_stages(config, cache=store.hashes)
    except UserError as error:
        stages = None
        print(f"{config.name}: the stages are known once this is mended: {error}")
    todo = None if stages is None else _print_stages(config, store, stages)
    sys.stdout.flush()
    from vqdm.stages.plan.report import layer_table, summary, write_plan

    plan = _plan(config, store, stages, todo)
    file = store.root / "plans" / f"{config.name}.json"
    write_plan(plan, file, experiment=config.name, model=config.model.name)
    if every_layer:
        print(layer_table(plan.denoiser))
    print(summary(plan))
    print(f"wrote {file}")
    return plan


def _plan(config: Config, store: Store, stages: Graph | Quantization | None, todo: set[str] | None):
    from vqdm.stages.plan.recorded import Recorded
    from vqdm.stages.plan.report import make_plan

    machine = _machine(config)
    recorded = Recorded(store if config.plan_for is None else None, config, machine.device)
    counts, harm = _counts(config, stages), _harm(store, stages, todo)
    removed = _removed(store, stages, todo)
    return make_plan(config, counts, machine, recorded=recorded, harm=harm, todo=todo, removed=removed)


def _removed(store: Store, stages: Graph | Quantization | None, todo: set[str] | None) -> list[str]:
    """The operators that the prune stage took out, if it is needed and done."""
    quantization = _quantization(stages)
    if quantization is None or quantization.prune is None or "prune" in todo:
        return []
    from vqdm.stages.prune import removed_in

    return removed_in(store.directory(quantization.prune))


def say_before_work(config: Config, store: Store, stages: Graph | Quantization) -> None:
    """Log what training a large model's blocks will take, before any work.

    UserError where a large model would run for long, from nothing, on a CPU that nobody asked for.
    """
    states = {name: store.status(stage) for name, stage in stages.named().items()}
    begun = any(state != "missing" for state in states.values())
    if config.device == "cuda" or (config.device == "auto" and begun):
        unasked = False
    else:
        import torch

        unasked = config.device == "auto" and not torch.cuda.is_available()
    trains = states.get("quantize", "done") != "done" and _trains_blocks(config)
    if not unasked and not trains:
        return
    from vqdm.models.loader import denoiser_on_meta
    from vqdm.runs.texts import duration
    from vqdm.stages.plan.report import cost_line

    size = sum(parameter.numel() for parameter in denoiser_on_meta(config.model).parameters())
    if size <= LARGE:
        return
    plan = _plan(config, store, stages, {name for name, state in states.items() if state != "done"})
    for cost in plan.costs:
        if trains and cost.name == "quantize":
            log.info("%s: before any work: %s", config.name, " ".join(cost_line(cost, plan).split()))
    seconds = sum(cost.seconds or 0 for cost in plan.costs)
    if unasked and seconds > LONG:
        raise UserError(
            f"{config.name}: torch sees no GPU, and a denoiser of {size / 1e6:,.0f} M parameters "
            f"takes {duration(seconds)} on this CPU (estimate): install a driver and a torch build that match, "
            "or go on all the same with device=cpu"
        )


def warn_of_emulated_bfloat16(configs: Sequence[Config], device: str) -> None:
    """Log, before any work, which option has this CPU train in a precision that it does not compute in."""
    from vqdm.runs.device import computes_in_bfloat16

    groups = [("finetune", c.finetune) for c in configs]
    groups += [("few_step", c.few_step) for c in configs if c.few_step.kind != "none"]
    asked = {name for name, own in groups if own.steps and own.precision == "bfloat16"}
    if not asked or computes_in_bfloat16(device):
        return
    for name in sorted(asked):
        log.warning(
            "%s.precision=bfloat16 is emulated on this CPU, many times as slow as float32: "
            "%s.precision=float32 (which gives other digits)",
            name,
            name,
        )


def _trains_blocks(config: Config) -> bool:
    from vqdm.codecs.encode import trains_blocks

    return trains_blocks(config.quantize)


def _machine(config: Config):
    """The machine to plan for: this one, or one with the card that plan_for names, which need not be here."""
    from vqdm.runs.device import resolve_device
    from vqdm.stages.plan.rates import machine_of

    named = config.plan_for is not None
    found = resolve_device("cpu" if named else config.device, threads=config.threads)
    return machine_of("cuda" if named else found.name, threads=found.threads, wanted=config.plan_for)


def _quantization(stages: Graph | Quantization | None) -> Quantization | None:
    return stages.quantization if isinstance(stages, Graph) else stages


def _harm(store: Store, stages: Graph | Quantization | None, todo: set[str] | None):
    """What the sensitivity stage measured, if it is needed and done."""
    from vqdm.codecs.allocation import read_harm

    quantization = _quantization(stages)
    if quantization is None or quantization.sensitivity is None or "sensitivity" in todo:
        return None
    return read_harm(store.directory(quantization.sensitivity))


def _counts(config: Config, stages: Graph | Quantization | None) -> dict[str, int]:
    """Numbers of images to score and of prompts to calibrate and train on: from the lists, or, as long as these are
    missing, as configured.
    """
    own = config.finetune.trajectories
    counts = {
        "images": (config.evaluate.prompts.n or 0) * config.evaluate.images_per_prompt,
        "calibration_prompts": config.calibration.n or 0,
        "finetune_prompts": (own.n or 0) + own.validation,
    }
    if stages is None:
        return counts
    quantization = _quantization(stages)
    counts["images"] = _image_count(config, stages) if isinstance(stages, Graph) else 0
    counts["calibration_prompts"] = 0 if quantization is None else len(quantization.prompts or [])
    if quantization is not None and quantization.finetune_prompts is not None:
        counts["finetune_prompts"] = len(quantization.finetune_prompts)
    return counts


def _print_stages(config: Config, store: Store, stages: Graph | Quantization) -> set[str]:
    """Print a line for each stage; returns the names, as fields of Graph, of those that are not done."""
    todo = set()
    for name, stage in stages.named().items():
        state = store.status(stage)
        if stage.name in ("generate", "features"):
            count = _image_count(config, stages)
            made = images_made(store.directory(stage), count, batch_size=config.evaluate.batch_size)
            state = "done" if made == count else f"{made} of {count} images"
        if state != "done":
            todo.add(name)
        print(f"{stage.name:10s} {state if state == 'done' else f'to run ({state})':32s} {store.directory(stage)}")
    if isinstance(stages, Graph):
        for reason in stages.scoring.reasons():  # a run fetches weights first, where there is a network
            print(f"not run, as things are: {reason}")
    return todo


def _image_count(config: Config, graph: Graph) -> int:
    return len(image_list(config, graph.prompts))


def images_made(directory: Path, count: int, *, batch_size: int) -> int:
    """How many of the first `count` images are there or were looked at; a shorter list's last batch was not full."""
    return sum(min(len(rows), _batch_length(directory, name)) for name, rows in batches(count, batch_size))


def _batch_length(directory: Path, name: str) -> int:
    """Images in a batch: 0 if it is missing, or damaged and will be made again."""
    try:
        record = peek(directory, name).record
    except UserError:
        return 0
    return record["rows"] if "rows" in record else len(record["prompts"])
