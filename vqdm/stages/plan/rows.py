"""What all rows of a table take together: a stage that rows share counts once."""

from dataclasses import asdict

from vqdm.config.options import Config
from vqdm.stages.plan.report import Plan
from vqdm.stages.plan.space import disk_bytes
from vqdm.stages.plan.stage import duration, gibibytes


def total_line(plans: list[tuple[Config, Plan]]) -> str:
    """A line with the time and disk of what is still to run of all rows."""
    costs = {_identity(config, cost.name): cost for config, plan in plans for cost in plan.to_run}
    disk = gibibytes(disk_bytes(costs.values()))
    return f"all {len(plans)} rows: {_time(costs.values())}, up to {disk} on disk; what rows share is counted once"


def _time(costs) -> str:
    known = [cost.seconds for cost in costs if cost.seconds is not None]
    lacking = len(list(costs)) - len(known)
    return duration(sum(known)) + (f" without {lacking} stages whose time is not known" if lacking else "")


def _identity(config: Config, stage: str) -> str:
    """What tells one stage from another: the parts of the configuration that it follows from, in words."""
    scored = asdict(config.evaluate) | {"metrics": None}
    of_model, plain = [asdict(config.model)], config.quantize.kind == "none"
    if stage == "teacher_images" or (stage == "images" and plain and config.cache.kind == "none"):
        return repr(["full precision", *of_model, scored])
    if stage == "calibrate":
        return repr([stage, *of_model, asdict(config.calibration)])
    if stage == "trajectories":
        return repr([stage, *of_model, asdict(config.finetune.trajectories)])
    quantized = [*of_model, asdict(config.calibration), asdict(config.quantize)]
    if stage in ("sensitivity", "quantize"):
        return repr([stage, *quantized])
    if stage in ("tune_blocks", "finetune"):
        return repr([stage, *quantized, asdict(config.finetune)])
    return repr([stage, config.name])
