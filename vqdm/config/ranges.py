"""Ranges and choices of options: they stand in a dataclass field's metadata, and one walk checks them all."""

import dataclasses
import math
from typing import Any

from vqdm.errors import UserError


def number(default: float | None, *, least: float | None = None, most: float | None = None) -> Any:
    """A field whose number must be `least` to `most`, both included; None may always stand for "not given"."""
    return dataclasses.field(default=default, metadata={"least": least, "most": most})


def choice(default: str, *others: str) -> Any:
    """A field whose word must be one of these."""
    return dataclasses.field(default=default, metadata={"choices": (default, *others)})


def check_fields(config, key: str, *, where: str = "") -> None:
    """UserError, naming `key`.<field>, for the first value outside its range or choices; no float is NaN or infinite.

    key: of the whole dataclass in the configuration. where: what ends the message, such as " for rtn".
    """
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), f"{key}.{field.name}".lstrip(".")
        if dataclasses.is_dataclass(value):
            check_fields(value, name, where=where)
        elif value is not None and not isinstance(value, bool):
            _check(value, name, field.metadata, where)


def _check(value, name: str, metadata, where: str) -> None:
    choices = metadata.get("choices")
    if choices is not None and value not in choices:
        raise UserError(f"{name}={value!r} is not one of {', '.join(choices)}{where}")
    if not isinstance(value, int | float):
        return
    least, most = metadata.get("least"), metadata.get("most")
    inside = math.isfinite(value) and (least is None or value >= least) and (most is None or value <= most)
    if not inside:
        raise UserError(f"{name}={value:g} must be {_range(least, most)}{where}")


def _range(least: float | None, most: float | None) -> str:
    if least is None and most is None:
        return "a finite number"
    if least is None or most is None:
        return f"at most {most:g}" if least is None else f"at least {least:g}"
    return f"{least:g} to {most:g}"
