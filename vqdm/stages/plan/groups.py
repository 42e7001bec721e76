"""The groups in which layers' Hessians are collected, foreseen from what every layer reads."""

import itertools

from vqdm.calibration.collect import in_passes, teacher_groups
from vqdm.codecs.encode import needs_hessians
from vqdm.config.codecs import QuantizeConfig
from vqdm.models.specs import LayerSpec, in_groups
from vqdm.stages.plan.forward import LayerInput


def reads_both(config: QuantizeConfig) -> bool:
    """True if the student and the original read every call."""
    return needs_hessians(config) and config.hessian_from == "both"


def groups_of(
    specs: list[LayerSpec], inputs: dict[str, LayerInput], config: QuantizeConfig, *, room: int
) -> list[list[LayerSpec]]:
    """Groups of layers as vqdm/stages/quantize.py takes them, in order.

    inputs: in the order in which layers run. room: bytes of a student's Hessians in one pass.
    """
    by_name = {spec.name: spec for spec in specs}
    found = in_groups(by_name[name] for name in inputs)
    if not needs_hessians(config) or config.hessian_from == "teacher":
        return teacher_groups(found)
    if config.hessian_from == "student":
        return [part for group in found for part in in_passes(group, room)]
    order = (spec for group in found for spec in group)
    return [list(part) for _, part in itertools.groupby(order, lambda spec: inputs[spec.name].tensor)]


def readers(groups: list[list[LayerSpec]], inputs: dict[str, LayerInput]) -> list[LayerSpec]:
    """One layer for every Hessian: layers of a group that read the same tensor in the same geometry share it."""
    found = {(i, inputs[spec.name].tensor, spec.conv): spec for i, group in enumerate(groups) for spec in group}
    return list(found.values())
