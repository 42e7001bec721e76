"""The operators of torch that are called, for tests to look at."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vqdm.weights.base import QuantizedWeight


class Calls(TorchDispatchMode):
    """The operators called inside that give new tensors, with their arguments."""

    def __init__(self):
        super().__init__()
        self.made: list[tuple] = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if not function.is_view:
            self.made.append((function, arguments))
        return function(*arguments, **(options or {}))


def operator_call(weight: QuantizedWeight) -> tuple:
    """The one operator that decodes a weight, and its arguments."""
    with torch.no_grad(), Calls() as calls:
        weight()
    (call,) = calls.made
    return call
