"""Ranges and choices of options, kept in the metadata of dataclass fields, and which of them enter an identity."""

import dataclasses
import math
from typing import Any

from vqdm.errors import UserError

MOST = 10**9  # of what is counted: far beyond use, and still a number that nothing overflows with
SEEDS = (1 << 63) - 1


def number(default: Any, *, least: float | None = None, most: float | None = None, above: bool = False) -> Any:
    """A field whose number must be `least` to `most`, both included; above: all but `least` itself.

    None may always stand for "not given"; of a list, every number is meant.
    """
    return dataclasses.field(default=default, metadata={"least": least, "most": most, "above": above})


def choice(default: str, *others: str) -> Any:
    """A field whose text must be one of these."""
    return dataclasses.field(default=default, metadata={"choices": (default, *others)})


def later(option: Any) -> Any:
    """A field, or the default of one, that came after results: `settings_of` leaves it out where it changes nothing."""
    field = option if isinstance(option, dataclasses.Field) else dataclasses.field(default=option)
    return dataclasses.field(default=field.default, metadata={**field.metadata, "later": True})


def settings_of(config, *names: str) -> dict:
    """{option: value} for a stage's identity: of these names, or all, without `later` ones that have their default.

    So what was made before there was such an option stays valid.
    """
    idle = {field.name: field.default for field in dataclasses.fields(config) if field.metadata.get("later")}
    values = dataclasses.asdict(config)
    return {name: values[name] for name in names or values if name not in idle or values[name] != idle[name]}


def check_fields(config, key: str, *, where: str = "") -> None:
    """Raise UserError, naming `key`.<field>, for the first value outside its range or choices, NaN or infinity
    included.

    key: the dataclass's own key in the configuration. where: end of the message, such as " for rtn".
    """
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), f"{key}.{field.name}".lstrip(".")
        if dataclasses.is_dataclass(value):
            check_fields(value, name, where=where)
            continue
        for one in value if isinstance(value, list) else [value]:
            if one is not None and not isinstance(one, bool):
                _check(one, name, field.metadata, where)


def _check(value, name: str, metadata, where: str) -> None:
    choices = metadata.get("choices")
    if choices is not None and value not in choices:
        raise UserError(f"{name}={value!r} is not one of {', '.join(choices)}{where}")
    if not isinstance(value, int | float):
        return
    least, most, above = metadata.get("least"), metadata.get("most"), metadata.get("above", False)
    high_enough = least is None or (value > least if above else value >= least)
    finite = isinstance(value, int) or math.isfinite(value)  # a long integer is beyond what floats hold
    if not (finite and high_enough and (most is None or value <= most)):
        raise UserError(f"{name}={_shown(value)} must be {_range(value, least, most, above)}{where}")


def _range(value: float, least: float | None, most: float | None, above: bool) -> str:
    """The range in words; its upper end, where that is only a bound of what can be counted, if the value is beyond."""
    if least is None and most is None:
        return "a finite number"
    lower = "" if least is None else f"{'above' if above else 'at least'} {_shown(least)}"
    if least is None or most is None or (most >= MOST and not value > most):
        return lower or f"at most {_shown(most)}"
    between = ", up to" if above else " to"
    return f"{'above ' if above else ''}{_shown(least)}{between} {_shown(most)}"


def _shown(value: float) -> str:
    """A number in a message: integers digit by digit, as seeds differ in their last one, but no more than forty."""
    return str(value)[:40] if isinstance(value, int) else f"{value:g}"
