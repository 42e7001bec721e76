"""The low-rank branch that any codec may stand beside: W ≈ Q + L, where Q are its codes and L = A B in fp16.

SVDQuant (Li et al. 2025, arXiv 2411.05007) takes the first singular vectors of the weight, smoothed by its inputs'
size, and quantizes what is left. Here errors count by the Hessian H = C Cᵀ of the layer's inputs: L is the best of its
rank for the target T in ‖(T − L) C‖, which is the truncated singular value decomposition of T C, times C⁻¹. First
T = W; then T = W − Q, in turn with Q = codes of W − L, and the best of all rounds is kept.
"""

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

from vqdm.codecs.codec import Codec, Harm, Shape
from vqdm.config.codecs import QuantizeConfig
from vqdm.errors import UserError
from vqdm.models.specs import LayerSpec
from vqdm.weights.base import LARGEST, STORED, QuantizedWeight, Scheme
from vqdm.weights.low_rank import LowRankScheme, LowRankWeight, branch_bits

ROUNDS = 1  # of codes, then factors: more gave .0 to .1 dB (docs/lab-notes.md)
DAMPING = 0.01  # added to the Hessian's diagonal, relative to its mean: the factors' inverse needs it


def with_low_rank(codec: Codec) -> Codec:
    """The codec, which with `low_rank` above 0 makes codes for what the branch leaves."""
    if codec.by_blocks is not None:  # its options refuse a branch
        return codec

    def encode(weight: Tensor, hessian: Tensor | None, scheme: Scheme, *, config, layer: str, **more):
        if not isinstance(scheme, LowRankScheme):
            return codec.encode(weight, hessian, scheme, config=config, layer=layer, **more)

        def code(target: Tensor, moments: Tensor) -> QuantizedWeight:
            return codec.encode(target, moments, scheme.base, config=config, layer=layer, **more)

        return encode_with_branch(
            weight, hessian, rank=scheme.rank, code=code, codec=scheme.codec, smoothing=config.smoothing
        )

    def assign(specs: list[LayerSpec], config, harm: Harm | None) -> dict[str, Scheme | str]:
        if not config.low_rank:
            return codec.schemes(specs, config, harm)
        return _schemes_beside(codec, specs, config)

    def encoder_bytes(shape: Shape, config) -> float:
        own = codec.encoder_bytes(shape, config)
        return own + (4 * (2 * shape[1] ** 2 + 4 * shape[0] * shape[1]) if config.low_rank else 0)

    shared = codec.make_shared
    return dataclasses.replace(
        codec,
        encode=encode,
        scheme=None,
        assign=assign,
        needs_hessian=lambda config: bool(config.low_rank) or codec.needs_hessian(config),
        encoder_bytes=encoder_bytes,
        make_shared=shared and (lambda matrices, scheme, config: shared(matrices, scheme.decoder, config)),
    )


def _has_room(spec: LayerSpec, config: QuantizeConfig) -> bool:
    """True unless the branch has half the layer's smaller side, or takes more than half the bits that are asked for."""
    cost = branch_bits(spec.shape, config.low_rank, input_scales=config.smoothing > 0)
    return 2 * config.low_rank <= min(spec.shape) and 2 * cost <= config.bits


def _schemes_beside(codec: Codec, specs: list[LayerSpec], config: QuantizeConfig) -> dict[str, Scheme | str]:
    """Schemes with a branch for layers that have room for it. Codecs whose bits count all get what it leaves."""
    scales = config.smoothing > 0
    alone = codec.schemes(specs, config)
    fitting = [spec for spec in specs if not isinstance(alone[spec.name], str)]
    chosen = [spec for spec in fitting if _has_room(spec, config)]
    taken = sum(branch_bits(spec.shape, config.low_rank, input_scales=scales) * spec.size for spec in chosen)
    left = config.bits - config.counts_all * taken / max(1, sum(spec.size for spec in fitting))
    found = codec.schemes(specs, dataclasses.replace(config, bits=left))
    for spec in chosen:
        base = found[spec.name]
        found[spec.name] = LowRankScheme(codec=config.kind, rank=config.low_rank, input_scales=scales, base=base)
    return found


@torch.no_grad()
def encode_with_branch(
    weight: Tensor,
    hessian: Tensor,
    *,
    rank: int,
    code: Callable[[Tensor, Tensor], QuantizedWeight],
    codec: str,
    smoothing: float = 0.0,
    rounds: int = ROUNDS,
) -> LowRankWeight:
    """Codes by `code(target, second moments)` and factors of this rank for a weight [out, in].

    smoothing: α of the scales s_j = max|W_j|^(1−α) / E[x_j²]^(α/2) that codes are made in, so that inputs that matter
    get finer ones (SmoothQuant, Xiao et al. 2023, eq. 4, with RMS for the largest input); 0: none. codec: its name.
    """
    weight, hessian = weight.detach().float(), hessian.detach().float()
    root = _root(hessian)
    scales = _input_scales(weight, hessian, smoothing) if smoothing else None
    applied = torch.ones_like(weight[0]) if scales is None else scales.float()
    moments = hessian * applied[:, None] * applied
    left, right = _factors(weight, root, rank)
    best: tuple[float, LowRankWeight] | None = None
    for _ in range(rounds):
        base = code((weight - left.float() @ right.float()) / applied, moments)
        decoded = base().float() * applied
        left, right = _factors(weight - decoded, root, rank)
        error = weight - decoded - left.float() @ right.float()
        size = float(((error @ hessian) * error).sum())
        if best is None or size < best[0]:
            best = size, LowRankWeight.from_parts(base, left=left, right=right, input_scales=scales, codec=codec)
    return best[1]


def _root(hessian: Tensor) -> Tensor:
    """The lower triangular C of H = C Cᵀ, damped as much as it takes."""
    mean = hessian.diagonal().mean().clamp(min=1e-30)
    for factor in (1, 10, 100):
        root, failed = torch.linalg.cholesky_ex(
            hessian + DAMPING * factor * mean * torch.eye(len(hessian), device=hessian.device)
        )
        if not failed:
            return root
    raise UserError("the second moments of a layer's inputs are no second moments: calibrate again")


def _factors(target: Tensor, root: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Left [out, rank] and right [rank, in], fp16, of the best product for `target` in ‖(T − L) C‖; alike in size."""
    left, sizes, right = torch.linalg.svd(target @ root, full_matrices=False)
    left = left[:, :rank] * sizes[:rank]
    right = torch.linalg.solve_triangular(root, right[:rank], upper=False, left=False)
    balance = (left.norm(dim=0) / right.norm(dim=1).clamp(min=1e-30)).clamp(min=1e-30).sqrt()
    return tuple(part.clamp(-LARGEST, LARGEST).to(STORED) for part in (left / balance, right * balance[:, None]))


def _input_scales(weight: Tensor, hessian: Tensor, alpha: float) -> Tensor:
    """Scales [in], fp16, with the geometric mean 1."""
    largest = weight.abs().amax(0).clamp(min=1e-8)
    inputs = hessian.diagonal().clamp(min=1e-12).sqrt()
    logs = (1 - alpha) * largest.log() - alpha * inputs.log()
    return (logs - logs.mean()).clamp(-math.log(64), math.log(64)).exp().to(STORED)
