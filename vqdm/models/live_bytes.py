"""Bytes of the tensors that operations make, while they live."""

import weakref
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

CONVOLUTIONS = {torch.ops.aten.convolution, torch.ops.aten._convolution}
PRODUCTS = {torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.aten.baddbmm}
PRODUCTS |= {torch.ops.aten.addmm_, torch.ops.aten.addmv, torch.ops.aten.mv}


class LiveBytes(TorchDispatchMode):
    """Context that follows the storages that operations make until they are freed; views share a storage.

    live, peak: bytes now and at most. written: bytes that operations other than products and convolutions wrote.
    """

    def __init__(self):
        super().__init__()
        self.live = self.peak = self.written = 0
        self._known = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for given in _tensors((args, kwargs)):
            self._known.add(given.untyped_storage())
        result = func(*args, **(kwargs or {}))
        counted = func.overloadpacket in CONVOLUTIONS or func.overloadpacket in PRODUCTS
        for made in _tensors(result):
            new = self._follow(made.untyped_storage())
            if (new or func._schema.is_mutable) and not counted:
                self.written += made.nbytes
        return result

    def _follow(self, storage: torch.UntypedStorage) -> bool:
        if storage in self._known:
            return False
        self._known.add(storage)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, storage.nbytes()).atexit = False
        return True

    def _free(self, size: int) -> None:
        self.live -= size


def _tensors(nested) -> Iterator[Tensor]:
    """All tensors in an operation's arguments or results: torch's tree_leaves would take a third of a plan's time."""
    if isinstance(nested, Tensor):
        yield nested
    elif isinstance(nested, (tuple, list)):
        for inner in nested:
            yield from _tensors(inner)
    elif isinstance(nested, dict):
        yield from _tensors(tuple(nested.values()))
