"""The quantized weight: one module that an encoder makes, a layer decodes, distillation trains and a file stores.

Its integer buffers are packed bytes, its float parameters fp16 as stored. A weight built from (scheme, shape) alone is
empty: ready for `load_state_dict`, or, on the meta device, for a plan that sums its bytes before anything runs.
"""

import functools
import math
from dataclasses import asdict, dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor, nn

from vqdm.errors import UserError
from vqdm.weights.bitpack import pack, packed_bytes, unpack

STORED = torch.float16  # dtype on disk of every float parameter of a quantized weight
LARGEST = torch.finfo(STORED).max
LARGEST_COUNT = 1 << 16  # limit for every count in a scheme: whatever a file says, shapes stay within 64 bits
NOT_MERGED = (
    "quantized weights merge neither with a LoRA nor with each other: keep the LoRA loaded, or dequantize() the model"
)


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """The kind of a weight's codes, and the numbers that fix the shapes of its tensors."""

    kind: ClassVar[str]
    told_by_shapes: ClassVar[tuple[str, ...]] = ()  # fields that follow from the shapes of the weight's tensors
    codec: str

    def __post_init__(self):
        """Raise UserError for a field of the wrong type or too large a count, as a damaged file may have."""
        for field in fields(self):
            value = getattr(self, field.name)
            fits = isinstance(value, field.type) or (field.type is float and type(value) is int)
            if not fits or (isinstance(value, bool) and field.type is not bool):
                expected = getattr(field.type, "__name__", field.type)
                raise UserError(f"{self.kind} codes: {field.name} must be of type {expected}, not {str(value)[:80]!r}")
            if type(value) is int and not 0 <= value <= LARGEST_COUNT:
                found = str(value)[:40]
                raise UserError(f"{self.kind} codes: {field.name} must be from 0 to {LARGEST_COUNT}, not {found}")

    @property
    def name(self) -> str:
        raise NotImplementedError

    @property
    def shared_key(self) -> str | None:
        """The key of the denoiser's shared part that this scheme decodes with, or None if it needs none."""
        return None

    def to_dict(self) -> dict:
        """The scheme as JSON values: its fields and `kind`; `registry.scheme_from_dict` is the inverse."""
        return {"kind": self.kind, **asdict(self)}

    def to_header(self) -> dict:
        """The fields that a file's header holds: all but those that follow from the shapes of the tensors."""
        return {key: value for key, value in self.to_dict().items() if key not in self.told_by_shapes}

    @property
    def decoder(self) -> "Scheme":
        """The scheme of the codes, which is this one, or that beside which a low-rank branch stands."""
        return self

    @property
    def format_version(self) -> int:
        """The first version of the file format (docs/format.md) whose readers know it."""
        return 1


class SharedPart(nn.Module):
    """A parameter that many weights of a denoiser decode with, stored once, in the denoiser's `SHARED_NAME`."""

    def forward(self) -> Tensor:
        """The parameter. Weights get it by a call, since offloading puts tensors in place only around a call.

        It is returned as a view, since diffusers' group offloading takes the data out of the parameter after the call.
        """
        (parameter,) = self.parameters()
        if parameter.device.type not in ("cpu", "meta", "mps") and not torch.compiler.is_compiling():
            # offloading by a stream of its own frees the memory after the call, while kernels queued here still read it
            parameter.data.record_stream(torch.accelerator.current_stream())
        return parameter.view_as(parameter)


SHARED_NAME = "shared"  # an nn.ModuleDict at the denoiser's root: Scheme.shared_key -> SharedPart


def stored_parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape, dtype=STORED))


def widened(*parameters: Tensor | None) -> tuple[torch.dtype, list[Tensor | None]]:
    """The dtype of the decoded weight, which is that of its float parameters, and these in the computation's dtype.

    Weights are computed in fp32 (or fp64, if that is theirs) and rounded once, so that all ways to decode agree bit
    for bit.
    """
    dtype = functools.reduce(torch.promote_types, [p.dtype for p in parameters if p is not None])
    computed = torch.promote_types(dtype, torch.float32)
    return dtype, [None if p is None else p.to(computed) for p in parameters]


def kernels_apply(*tensors: Tensor | None) -> bool:
    """True if `kernels` can compute with these tensors, widened: plain, on the CPU, and nothing being traced."""
    return not torch.compiler.is_compiling() and all(
        type(tensor) in (Tensor, nn.Parameter) and tensor.device.type == "cpu"
        for tensor in tensors
        if tensor is not None
    )


def state_of(tensor: Tensor) -> tuple:
    """A key that changes whenever the tensor is replaced, moved or written to (inference tensors keep no version)."""
    return tensor.data_ptr(), tensor.dtype, tensor.device, 0 if tensor.is_inference() else tensor._version


class QuantizedWeight(nn.Module):
    """A weight [out, in] held as packed codes and float parameters; calling it decodes it.

    The result has the dtype of the float parameters: fp16 as stored, fp32 after `.float()`, as for training.
    An operator of `ops` decodes it, or torch where there is none, to the same weight bit for bit. Gradients need only
    codes and parameters.
    A shared part is held in a tuple, which nn.Module does not register: it is not in this module's state_dict, and a
    deepcopy of the whole denoiser refers to the copied part.
    """

    scheme_type: ClassVar[type[Scheme]]

    def __init__(self, scheme: Scheme, shape: tuple[int, int], shared: SharedPart | None = None):
        super().__init__()
        if not isinstance(scheme, self.scheme_type):
            raise TypeError(f"{type(self).__name__} is described by {self.scheme_type.__name__}, not {scheme}")
        if (scheme.shared_key is None) != (shared is None):
            raise ValueError(f"{scheme.name} takes a shared part if and only if its scheme says so")
        self.scheme = scheme
        self.shape = (int(shape[0]), int(shape[1]))
        self.original_shape: tuple[int, ...] = self.shape  # that of the dense weight; convolutions set their own
        self.shared = () if shared is None else (shared,)

    def forward(self) -> Tensor:
        """The decoded weight [out, in]."""
        raise NotImplementedError

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of float parameters and decoded weight (diffusers asks layers for `weight.dtype`)."""
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def dim(self) -> int:
        """Number of dimensions of the weight it stands for. peft asks for this, `size` and `data` below a LoRA."""
        return len(self.original_shape)

    def size(self) -> torch.Size:
        return torch.Size(self.original_shape)

    @property
    def data(self) -> Tensor:
        """Raise UserError: whoever reads or writes `weight.data` wants to merge it with a LoRA or other weights."""
        raise UserError(NOT_MERGED)

    @data.setter
    def data(self, value: Tensor) -> None:
        raise UserError(NOT_MERGED)

    def fault(self) -> str | None:
        """The reason why the codes decode to nothing, in words; None if they are what the format allows."""
        return None

    def paper_bits(self) -> int:
        """Stored bits as the paper counts them: codes and this weight's own codebooks, but no scales."""
        return 8 * sum(buffer.numel() for buffer in self.buffers())

    def extra_repr(self) -> str:
        return f"{self.scheme.name}, shape={self.shape}"


class FixedWidthWeight(QuantizedWeight):
    """A weight whose codes all have the same width; `codes` is their packed stream."""

    def _add_codes(self, shape: tuple[int, ...], width: int) -> None:
        self.codes_shape, self.code_width = shape, width
        size = packed_bytes(math.prod(shape), width)
        self.register_buffer("codes", torch.zeros(size, dtype=torch.uint8))

    def unpacked_codes(self) -> Tensor:
        """The codes as int32 in their own shape."""
        return unpack_codes(self.codes, self.code_width, self.codes_shape)

    def set_codes(self, codes: Tensor) -> None:
        """Replace all codes by integers of the same shape."""
        if tuple(codes.shape) != self.codes_shape:
            raise ValueError(f"codes must be {self.codes_shape}, not {tuple(codes.shape)}")
        self.codes.copy_(pack(codes, self.code_width))


def unpack_codes(codes: Tensor, width: int, shape: tuple[int, ...]) -> Tensor:
    """Unpack a stream of codes to int32 of this shape."""
    return unpack(codes, width, math.prod(shape)).view(shape)


def check_groups(in_features: int, *, layer: str = "", group_size: int | None = None) -> None:
    """Raise UserError, with the layer's name, unless `group_size` divides the inputs."""
    if group_size is not None and (group_size < 1 or in_features % group_size):
        where = f" of layer {layer}" if layer else ""
        raise UserError(
            f"group_size {group_size} does not divide in_features {in_features}{where}: "
            "choose a divisor, or leave the layer out of the pattern"
        )
