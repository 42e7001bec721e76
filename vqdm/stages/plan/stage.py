"""What a plan says of one stage, and how it says numbers."""

from dataclasses import dataclass, field

from vqdm.stages.plan.memory import Memory


@dataclass(frozen=True)
class StageCost:
    """What a stage takes. name: its field of `vqdm.stages.graph.Graph`. None: not estimated, and `note` says why.

    origin: how the seconds are known, estimated or recorded. detail: numbers behind the note, for the plan's JSON.
    """

    name: str
    memory: Memory | None
    seconds: float | None
    note: str = ""
    origin: str = ""
    detail: dict = field(default_factory=dict)


def duration(seconds: float) -> str:
    """Time in words, to two digits: 40 s, 12 min, 3.5 h, 12 days."""
    for unit, size, limit in (("s", 1, 90), ("min", 60, 90), ("h", 3600, 48)):
        if seconds < limit * size:
            return f"{two_digits(seconds / size)} {unit}"
    return f"{two_digits(seconds / 86400)} days"


def gibibytes(size: float) -> str:
    return f"{two_digits(size / 2**30)} GiB"


def two_digits(value: float) -> str:
    if value >= 9.95:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 0.095 else f"{value:.1g}"
