"""Sums of codewords: the additive vector codes of VQDM (and AQLM)."""

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from vqdm.errors import UserError
from vqdm.weights import ops
from vqdm.weights.base import (
    FixedWidthWeight,
    Scheme,
    SharedPart,
    check_groups,
    kernels_apply,
    stored_parameter,
    unpack_codes,
    widened,
)

MOST_BOOKS, LARGEST_GROUP = 16, 128  # that GPU kernels are compiled for, since both are unrolled there


@dataclass(frozen=True, kw_only=True)
class AdditiveScheme(Scheme):
    """A sum of codewords per group of weights: `3x8g8` = 3 codebooks of 2^8 words for groups of 8 inputs.

    `3x8g8o2`: groups of 2 outputs × 8 inputs; `3x8g8-shared`: one codebook set for many layers; `+c`: input scales.
    """

    kind: ClassVar[str] = "additive"
    codec: str = "additive"
    num_codebooks: int
    codebook_bits: int = 8
    group_size: int = 8  # number of consecutive inputs
    out_group_size: int = 1  # number of consecutive outputs
    input_scales: bool = False
    shared: str | None = None  # None: the layer's own codebooks; else a key of the denoiser's shared parts

    def __post_init__(self):
        super().__post_init__()
        if min(self.num_codebooks, self.group_size, self.out_group_size) < 1 or not 1 <= self.codebook_bits <= 16:
            raise UserError(f"{self.codec}: {self.name} needs 1 or more codebooks of 1 to 16 bits, groups of 1 or more")
        if self.shared is not None and (not self.shared.isidentifier() or hasattr(nn.ModuleDict, self.shared)):
            raise UserError(f"{self.codec}: {self.shared[:80]!r} cannot name shared codebooks: take a plain word")

    @property
    def name(self) -> str:
        out = f"o{self.out_group_size}" if self.out_group_size != 1 else ""
        name = f"{self.num_codebooks}x{self.codebook_bits}g{self.group_size}{out}"
        return name + ("+c" if self.input_scales else "") + ("-shared" if self.shared else "")

    @property
    def shared_key(self) -> str | None:
        return self.shared

    @property
    def codebooks_shape(self) -> tuple[int, int, int, int]:
        """Shape of the codebooks: [num_codebooks, codebook_size, out_group_size, in_group_size]."""
        return self.num_codebooks, 1 << self.codebook_bits, self.out_group_size, self.group_size


def sum_codewords(codes: Tensor, codebooks: Tensor) -> Tensor:
    """The matrix Σ_m codebook_m[code_m]: int [out_groups, in_groups, M] to [out, in] in the codebooks' dtype."""
    words = codebooks.flatten(2)  # [M, codebook_size, out_group_size · in_group_size]
    total = F.embedding(codes[..., 0], words[0])
    for m in range(1, len(words)):
        total = total + F.embedding(codes[..., m], words[m])
    out_size, in_size = codebooks.shape[2:]
    blocks = total.view(*codes.shape[:2], out_size, in_size)
    return blocks.transpose(1, 2).reshape(codes.shape[0] * out_size, codes.shape[1] * in_size)


def decode_additive(codes: Tensor, codebooks: Tensor, scales: Tensor, input_scales: Tensor | None = None) -> Tensor:
    """The weight scale_out · Σ_m codebook_m[code_m] · scale_in: [out, in] in the dtype of codebooks and scales.

    scales: [out]; input_scales: [in] or none.
    """
    weight = sum_codewords(codes, codebooks) * scales[:, None]
    return weight if input_scales is None else weight * input_scales


def decode_by_torch(
    codes: Tensor, codebooks: Tensor, scales: Tensor, input_scales: Tensor | None, shape: tuple[int, int], width: int
) -> Tensor:
    """Decode packed codes of `width` bits, [out, in], like `decode_additive`, in torch: in the parameters' dtype."""
    dtype, factors = widened(codebooks, scales, input_scales)
    books, _, out_size, size = codebooks.shape
    return decode_additive(unpack_codes(codes, width, (shape[0] // out_size, shape[1] // size, books)), *factors).to(
        dtype
    )


def _on_cpu(codes, codebooks, scales, input_scales, outputs, inputs, width):
    from vqdm.weights import kernels  # imports numba, which is not always needed

    dtype, (words, rows, columns) = widened(codebooks, scales, input_scales)
    return kernels.decode_additive(codes, width, words, inputs=inputs, scales=rows, input_scales=columns).to(dtype)


def _on_gpu(codes, codebooks, scales, input_scales, outputs, inputs, width):
    books, size, shape = codebooks.shape[0], codebooks.shape[3], (outputs, inputs)
    if books > MOST_BOOKS or size > LARGEST_GROUP or not ops.in_reach(codes, shape):
        return decode_by_torch(codes, codebooks, scales, input_scales, shape, width)
    from vqdm.weights import triton_kernels

    return triton_kernels.decode_additive(
        codes, width, codebooks, scales=scales, input_scales=input_scales, shape=shape
    )


def _fake(codes, codebooks, scales, input_scales, outputs, inputs, width):
    return scales.new_empty((outputs, inputs), dtype=widened(codebooks, scales, input_scales)[0])


def _save(ctx, inputs, output):
    codes, codebooks, scales, input_scales, *ctx.others = inputs
    ctx.save_for_backward(codes, codebooks, scales, input_scales)


def _backward(ctx, gradient):
    codes, *factors = ctx.saved_tensors
    outputs, inputs, width = ctx.others
    wanted = ctx.needs_input_grad[:4]
    if not kernels_apply(gradient, codes, *factors):
        arguments = codes, *factors, (outputs, inputs), width
        found = ops.recomputed_gradients(decode_by_torch, arguments, (*wanted, False, False), gradient)
        return *found[:4], None, None, None
    from vqdm.weights import kernels

    _, (words, rows, columns) = widened(*factors)
    found = kernels.additive_gradients(
        gradient.float(), codes, width, words, scales=rows, input_scales=columns, of_codebooks=wanted[1]
    )
    found = [None if f is None else f.to(factor.dtype) for f, factor in zip(found, factors, strict=True)]
    return None, *found, None, None, None


_decode = ops.operator(
    "decode_additive(Tensor codes, Tensor codebooks, Tensor scales, Tensor? input_scales, "
    "SymInt outputs, SymInt inputs, int width) -> Tensor",
    cpu=_on_cpu,
    gpu=_on_gpu,
    fake=_fake,
    save=_save,
    backward=_backward,
)


class SharedCodebooks(SharedPart):
    """One codebook set for many layers: fp16 [num_codebooks, codebook_size, out_group_size, in_group_size]."""

    def __init__(self, scheme: AdditiveScheme):
        super().__init__()
        self.codebooks = stored_parameter(*scheme.codebooks_shape)

    @classmethod
    def from_codebooks(cls, scheme: AdditiveScheme, codebooks: Tensor) -> "SharedCodebooks":
        with codebooks.device:
            shared = cls(scheme)
        shared.codebooks.data.copy_(codebooks)
        return shared


def check_shared(scheme: AdditiveScheme, shared: SharedCodebooks | None) -> None:
    """ValueError if the shared set has another shape than the scheme's codebooks."""
    if shared is not None and tuple(shared.codebooks.shape) != scheme.codebooks_shape:
        raise ValueError(f"{scheme.name} cannot use codebooks {list(shared.codebooks.shape)}")


class AdditiveWeight(FixedWidthWeight):
    """Codes [out_groups, in_groups, num_codebooks], its own or shared codebooks, scales [out], input_scales [in]."""

    scheme_type = AdditiveScheme

    def __init__(self, scheme: AdditiveScheme, shape: tuple[int, int], shared: SharedCodebooks | None = None):
        super().__init__(scheme, shape, shared)
        check_groups(self.shape[1], group_size=scheme.group_size)
        if self.shape[0] % scheme.out_group_size:
            raise UserError(f"out_group_size {scheme.out_group_size} does not divide out_features {self.shape[0]}")
        check_shared(scheme, shared)
        groups = self.shape[0] // scheme.out_group_size, self.shape[1] // scheme.group_size
        self._add_codes((*groups, scheme.num_codebooks), scheme.codebook_bits)
        self.register_parameter("codebooks", None if self.shared else stored_parameter(*scheme.codebooks_shape))
        self.scales = stored_parameter(self.shape[0])
        self.register_parameter("input_scales", stored_parameter(self.shape[1]) if scheme.input_scales else None)

    @classmethod
    def from_parts(
        cls,
        scheme: AdditiveScheme,
        codes: Tensor,
        *,
        codebooks: Tensor | SharedCodebooks,
        scales: Tensor,
        input_scales: Tensor | None = None,
    ) -> "AdditiveWeight":
        """Build a weight from codes int [out_groups, in_groups, M], own or shared codebooks, scales [out] and [in]."""
        shared = codebooks if isinstance(codebooks, SharedCodebooks) else None
        shape = codes.shape[0] * scheme.out_group_size, codes.shape[1] * scheme.group_size
        with codes.device:
            weight = cls(scheme, shape, shared)
        weight.set_codes(codes)
        weight.scales.data.copy_(scales)
        if shared is None:
            weight.codebooks.data.copy_(codebooks)
        if scheme.input_scales:
            weight.input_scales.data.copy_(input_scales)
        return weight

    def effective_codebooks(self) -> Tensor:
        """The codebooks that decode this weight, its own or shared."""
        return self.shared[0]() if self.shared else self.codebooks

    def forward(self) -> Tensor:
        factors = self.effective_codebooks(), self.scales, self.input_scales
        if ops.apply_to(*factors):
            return _decode(self.codes, *factors, *self.shape, self.code_width)
        return ops.by_torch(decode_by_torch, self.codes, *factors, self.shape, self.code_width)

    def paper_bits(self) -> int:
        return super().paper_bits() + (0 if self.shared else 16 * self.codebooks.numel())
