"""The quantized weight: one module that an encoder makes, a layer decodes, distillation trains and a file stores.

Its integer buffers are packed bytes, its float parameters fp16 as stored. A weight built from (scheme, shape) alone is
empty: ready for `load_state_dict`, or, on the meta device, the plan whose bytes are summed before anything is run.
"""

import math
from dataclasses import asdict, dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqdm.bitpack import pack, packed_bytes, unpack
from vqdm.errors import UserError

STORED = torch.float16  # every float parameter of a quantized weight on disk


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """The codec that made a weight, and the numbers that fix the shapes of its tensors."""

    kind: ClassVar[str]
    codec: str

    @property
    def name(self) -> str:
        raise NotImplementedError

    def to_dict(self) -> dict:
        """As JSON: the dataclass's fields and `kind`."""
        return {"kind": self.kind, **asdict(self)}

    @staticmethod
    def from_dict(fields: dict) -> "Scheme":
        """The inverse of `to_dict`. UserError for what no known scheme reads."""
        numbers = {key: value for key, value in fields.items() if key != "kind"}
        try:
            return WEIGHTS[fields["kind"]].scheme_type(**numbers)
        except (KeyError, TypeError) as error:
            raise UserError(f"not a weight scheme of this version: {fields} ({error})") from error


@dataclass(frozen=True, kw_only=True)
class ScalarScheme(Scheme):
    """One uniform code per weight, scale and zero point per row or per group of a row: `rtn4`, `gptq3g64`."""

    kind: ClassVar[str] = "scalar"
    codec: str = "rtn"
    bits: int
    group_size: int | None = None  # consecutive inputs that share a scale; None: the whole row

    def __post_init__(self):
        if not 1 <= self.bits <= 8:  # zero points up to 255 are exact in fp16 and in bf16
            raise UserError(f"{self.codec}: bits must be 1 to 8, not {self.bits}")

    @property
    def name(self) -> str:
        return f"{self.codec}{self.bits}" + (f"g{self.group_size}" if self.group_size else "")


@dataclass(frozen=True, kw_only=True)
class AdditiveScheme(Scheme):
    """A sum of codewords per group of consecutive inputs: `3x8g8`; `3x8g8-shared` with one set for the whole model."""

    kind: ClassVar[str] = "additive"
    codec: str = "additive"
    num_codebooks: int
    codebook_bits: int = 8
    group_size: int = 8
    shared: bool = False

    def __post_init__(self):
        if not (self.num_codebooks >= 1 and 1 <= self.codebook_bits <= 16 and self.group_size >= 1):
            raise UserError(f"{self.codec}: {self.name} needs 1 or more codebooks of 1 to 16 bits, groups of 1 or more")

    @property
    def name(self) -> str:
        return f"{self.num_codebooks}x{self.codebook_bits}g{self.group_size}" + ("-shared" if self.shared else "")

    @property
    def codebooks_shape(self) -> tuple[int, int, int, int]:
        """[num_codebooks, codebook_size, out_group_size, in_group_size]."""
        return self.num_codebooks, 1 << self.codebook_bits, 1, self.group_size


def check_matrix(weight: Tensor, *, layer: str = "", group_size: int | None = None) -> None:
    """UserError, with the layer's name, unless `weight` is a finite [out, in] that groups of `group_size` divide."""
    where = f" of layer {layer}" if layer else ""
    if weight.ndim != 2 or weight.numel() == 0:
        raise ValueError(f"the weight{where} must be a matrix [out, in], not {list(weight.shape)}")
    check_groups(weight.shape[1], layer=layer, group_size=group_size)
    if not bool(torch.isfinite(weight).all()):
        raise UserError(f"the weight{where} has infinite or NaN entries: load the model in another dtype or repair it")


def check_groups(in_features: int, *, layer: str = "", group_size: int | None = None) -> None:
    """UserError, with the layer's name, unless `group_size` divides the inputs."""
    if group_size is not None and (group_size < 1 or in_features % group_size):
        where = f" of layer {layer}" if layer else ""
        raise UserError(
            f"group_size {group_size} does not divide in_features {in_features}{where}: "
            "choose a divisor, or leave the layer out of the pattern"
        )


def decode_scalar(codes: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """weight = scale · (code − zero): int [out, in], float [out, groups] twice, to [out, in] in the scales' dtype."""
    grouped = codes.view(*scales.shape, -1).to(scales.dtype)
    return ((grouped - zeros[..., None]) * scales[..., None]).view(codes.shape)


def sum_codewords(codes: Tensor, codebooks: Tensor) -> Tensor:
    """Σ_m codebook_m[code_m] as a matrix: int [out_groups, in_groups, M] to [out, in] in the codebooks' dtype."""
    words = codebooks.flatten(2)  # [M, codebook_size, out_group_size · in_group_size]
    total = F.embedding(codes[..., 0], words[0])
    for m in range(1, len(words)):
        total = total + F.embedding(codes[..., m], words[m])
    out_size, in_size = codebooks.shape[2:]
    blocks = total.view(*codes.shape[:2], out_size, in_size)
    return blocks.transpose(1, 2).reshape(codes.shape[0] * out_size, codes.shape[1] * in_size)


def decode_additive(codes: Tensor, codebooks: Tensor, scales: Tensor) -> Tensor:
    """weight = scale_out · Σ_m codebook_m[code_m]: [out, in] in the dtype of codebooks and scales [out]."""
    return sum_codewords(codes, codebooks) * scales[:, None]


def _parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape, dtype=STORED))


class QuantizedWeight(nn.Module):
    """A weight [out, in] held as packed codes and float parameters; calling it decodes it.

    The result has the dtype of the float parameters: fp16 as stored, fp32 after `.float()`, say for training.
    """

    scheme_type: ClassVar[type[Scheme]]

    def __init__(self, scheme: Scheme, shape: tuple[int, int]):
        super().__init__()
        if not isinstance(scheme, self.scheme_type):
            raise TypeError(f"{type(self).__name__} is described by {self.scheme_type.__name__}, not {scheme}")
        self.scheme = scheme
        self.shape = (int(shape[0]), int(shape[1]))

    def forward(self) -> Tensor:
        """The decoded weight [out, in]."""
        raise NotImplementedError

    @property
    def dtype(self) -> torch.dtype:
        """Of the float parameters, hence of the decoded weight (diffusers asks layers for `weight.dtype`)."""
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def paper_bits(self) -> int:
        """Stored bits as the paper counts them: codes, and codebooks that are this weight's own; no scales."""
        return 8 * sum(buffer.numel() for buffer in self.buffers())

    def extra_repr(self) -> str:
        return f"{self.scheme.name}, shape={self.shape}"


class _FixedWidthWeight(QuantizedWeight):
    """A weight whose codes all have one width: `codes` is their packed stream."""

    def _add_codes(self, shape: tuple[int, ...], width: int) -> None:
        self.codes_shape, self.code_width = shape, width
        size = packed_bytes(math.prod(shape), width)
        self.register_buffer("codes", torch.zeros(size, dtype=torch.uint8))

    def unpacked_codes(self) -> Tensor:
        """int32, in the shape of the codes."""
        return unpack(self.codes, self.code_width, math.prod(self.codes_shape)).view(self.codes_shape)

    def set_codes(self, codes: Tensor) -> None:
        """Replace all codes by integers in the shape of the codes."""
        if tuple(codes.shape) != self.codes_shape:
            raise ValueError(f"codes must be {self.codes_shape}, not {tuple(codes.shape)}")
        self.codes.copy_(pack(codes, self.code_width))


class ScalarWeight(_FixedWidthWeight):
    """Uniform codes [out, in]; scales and integer zero points [out, groups]."""

    scheme_type = ScalarScheme

    def __init__(self, scheme: ScalarScheme, shape: tuple[int, int]):
        super().__init__(scheme, shape)
        check_groups(self.shape[1], group_size=scheme.group_size)
        groups = self.shape[1] // (scheme.group_size or self.shape[1])
        self._add_codes(self.shape, scheme.bits)
        self.scales = _parameter(self.shape[0], groups)
        self.zeros = _parameter(self.shape[0], groups)

    @classmethod
    def from_parts(cls, scheme: ScalarScheme, codes: Tensor, *, scales: Tensor, zeros: Tensor) -> "ScalarWeight":
        """codes: int [out, in]; scales, zeros: [out, groups], stored as fp16."""
        with codes.device:
            weight = cls(scheme, tuple(codes.shape))
        weight.set_codes(codes)
        weight.scales.data.copy_(scales)
        weight.zeros.data.copy_(zeros)
        return weight

    def forward(self) -> Tensor:
        return decode_scalar(self.unpacked_codes(), self.scales, self.zeros)


class SharedCodebooks(nn.Module):
    """The one codebook set of a whole model; it lives in a named submodule at the denoiser's root (`SHARED_NAME`).

    codebooks: fp16 [num_codebooks, codebook_size, 1, in_group_size].
    """

    def __init__(self, scheme: AdditiveScheme):
        super().__init__()
        self.codebooks = _parameter(*scheme.codebooks_shape)

    @classmethod
    def from_codebooks(cls, scheme: AdditiveScheme, codebooks: Tensor) -> "SharedCodebooks":
        with codebooks.device:
            shared = cls(scheme)
        shared.codebooks.data.copy_(codebooks)
        return shared


SHARED_NAME = "shared_codebooks"


def check_shared(scheme: AdditiveScheme, shared: SharedCodebooks | None) -> None:
    """ValueError unless `shared` is what the scheme asks for: a set of its shape, or none."""
    if scheme.shared != (shared is not None):
        raise ValueError(f"{scheme.name} takes shared codebooks if and only if its scheme says so")
    if shared is not None and tuple(shared.codebooks.shape) != scheme.codebooks_shape:
        raise ValueError(f"{scheme.name} cannot use codebooks {list(shared.codebooks.shape)}")


class AdditiveWeight(_FixedWidthWeight):
    """Codes [out, in_groups, num_codebooks], codebooks of its own or shared, scales [out].

    Shared codebooks are referred to through a tuple, which nn.Module does not register: they are not in this module's
    state_dict, and a deepcopy of the whole denoiser refers to the copied set.
    """

    scheme_type = AdditiveScheme

    def __init__(self, scheme: AdditiveScheme, shape: tuple[int, int], shared: SharedCodebooks | None = None):
        super().__init__(scheme, shape)
        check_groups(self.shape[1], group_size=scheme.group_size)
        check_shared(scheme, shared)
        self.shared = () if shared is None else (shared,)
        self._add_codes((self.shape[0], self.shape[1] // scheme.group_size, scheme.num_codebooks), scheme.codebook_bits)
        self.register_parameter("codebooks", None if self.shared else _parameter(*scheme.codebooks_shape))
        self.scales = _parameter(self.shape[0])

    @classmethod
    def from_parts(
        cls, scheme: AdditiveScheme, codes: Tensor, *, codebooks: Tensor | SharedCodebooks, scales: Tensor
    ) -> "AdditiveWeight":
        """codes: int [out, in_groups, num_codebooks]; codebooks: its own tensor or the shared set; scales: [out]."""
        shared = codebooks if isinstance(codebooks, SharedCodebooks) else None
        with codes.device:
            weight = cls(scheme, (codes.shape[0], codes.shape[1] * scheme.group_size), shared)
        weight.set_codes(codes)
        weight.scales.data.copy_(scales)
        if shared is None:
            weight.codebooks.data.copy_(codebooks)
        return weight

    def effective_codebooks(self) -> nn.Parameter:
        """Those that decode this weight, its own or shared."""
        return self.shared[0].codebooks if self.shared else self.codebooks

    def forward(self) -> Tensor:
        return decode_additive(self.unpacked_codes(), self.effective_codebooks(), self.scales)

    def paper_bits(self) -> int:
        return super().paper_bits() + (0 if self.shared else 16 * self.codebooks.numel())


WEIGHTS: dict[str, type[QuantizedWeight]] = {kind.scheme_type.kind: kind for kind in (ScalarWeight, AdditiveWeight)}


def empty_weight(scheme: Scheme, shape: tuple[int, int], shared: SharedCodebooks | None = None) -> QuantizedWeight:
    """A weight [out, in] with every tensor allocated and nothing in it, on the current default device (meta too)."""
    kind = WEIGHTS[scheme.kind]
    return kind(scheme, shape) if shared is None else kind(scheme, shape, shared)
