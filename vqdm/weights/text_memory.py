"""What layers make of a prompt's embedding, kept: it is one tensor at every step, so one product serves an image.

In SDXL's U-Net these are keys and values of cross-attention, 13 % of all weights. An output is given again only for the
very tensor that it was computed from (by weak reference), unwritten since (by its version), with the same parameters.
"""

import re
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vqdm.weights.base import state_of

TEXT_LAYERS = re.compile(r"(^|\.)(attn2\.to_[kv]|context_embedder)$")  # of U-Nets and of SD3 and FLUX


@dataclass(frozen=True)
class _Kept:
    inputs: weakref.ref
    sources: list[weakref.ref]
    state: tuple
    output: Tensor
    version: int  # of the output, in which nobody may have written either


class TextMemory:
    """The last output of one layer, for as long as the input that it was computed from lives."""

    def __init__(self):
        self._kept: _Kept | None = None

    def recall(
        self, compute: Callable[[Tensor], Tensor], inputs: Tensor, sources: Sequence[Tensor], *, decode: str
    ) -> Tensor:
        """compute(inputs), or what it gave for them before. sources: every tensor that it computes with.

        It is computed whenever a change could pass unseen, and where outputs are recorded: see `_may_keep`.
        """
        if not _may_keep(inputs, sources):
            self._kept = None
            return compute(inputs)
        state = decode, _setting(inputs), *(state_of(tensor) for tensor in (inputs, *sources))
        kept = self._kept
        if kept is not None and _still_holds(kept, inputs, sources, state):
            return kept.output
        self._kept = None  # its memory is free before the new output takes any
        output = compute(inputs)
        gone = weakref.ref(inputs, _forgetter(self))
        self._kept = _Kept(gone, [weakref.ref(tensor) for tensor in sources], state, output, output._version)
        return output


def _may_keep(inputs: Tensor, sources: Sequence[Tensor]) -> bool:
    """False where gradients are recorded, where tensors keep no version (inference mode), of traces and CUDA graphs,
    which replay without looking, of tensors that are not plain, and of parameters that are kept elsewhere (offloaded).
    """
    return not (
        torch.is_grad_enabled()
        or torch.is_inference_mode_enabled()
        or torch.jit.is_tracing()
        or type(inputs) is not Tensor
        or inputs.is_inference()
        or (inputs.is_cuda and torch.cuda.is_current_stream_capturing())
        or any(tensor.is_inference() or tensor.device != inputs.device for tensor in sources)
    )


def _setting(inputs: Tensor) -> tuple:
    """What else decides on the output: autocast, and on a GPU the stream in which it is ready."""
    kind = inputs.device.type
    cast = torch.get_autocast_dtype(kind) if kind != "meta" and torch.is_autocast_enabled(kind) else None
    return cast, inputs.shape, inputs.stride(), torch.cuda.current_stream(inputs.device) if inputs.is_cuda else None


def _still_holds(kept: _Kept, inputs: Tensor, sources: Sequence[Tensor], state: tuple) -> bool:
    return (
        kept.inputs() is inputs
        and kept.state == state
        and kept.output._version == kept.version
        and all(reference() is tensor for reference, tensor in zip(kept.sources, sources, strict=True))
    )


def _forgetter(memory: TextMemory) -> Callable[[weakref.ref], None]:
    """A callback that drops what is kept for an input that is gone; it holds no memory alive itself."""
    place = weakref.ref(memory)

    def forget(gone: weakref.ref) -> None:
        found = place()
        if found is not None and found._kept is not None and found._kept.inputs is gone:
            found._kept = None

    return forget
