"""Error feedback from column to column, as used by GPTQ, block LDLQ and trellis codes."""

import logging

import torch
from torch import Tensor

from vqdm.errors import UserError

log = logging.getLogger("vqdm")


def feedback_of(hessian: Tensor, *, damping: float, layer: str = "") -> tuple[Tensor, Tensor]:
    """Unit lower triangular F [in, in] and costs d [in] with H + λI = Fᵀ diag(d) F, λ = damping · mean of H's diagonal.

    The target of column j is W_j + Σ_{k<j} F_jk E_k, and tr(E H Eᵀ) is the sum of d_j |target_j − Q_j|². An input that
    was always 0 is decoupled, as if its second moment were 1, and costs nothing. If the factorisation fails in fp32,
    damping is raised by factors of ten, with a warning; UserError if even 1 is too little.
    """
    flipped = hessian.flip(0, 1)  # a copy; its Cholesky factor, flipped back, starts from the last column
    diagonal = flipped.diagonal()
    mean, dead = diagonal.mean(), hessian.diagonal() == 0
    original = diagonal.masked_fill(diagonal == 0, 1.0)
    where = f" of layer {layer}" if layer else ""
    while True:
        diagonal.copy_(original + damping * mean)
        factor, failed = torch.linalg.cholesky_ex(flipped, upper=True)
        if not int(failed):
            break
        if damping >= 1:
            raise UserError(f"the Hessian{where} is not positive semidefinite: record the activations anew")
        raised = max(10 * damping, 1e-4)
        log.warning("the Hessian%s is nearly singular: damping %g instead of %g", where, raised, damping)
        damping = raised
    del flipped, diagonal, original  # matrices of convolutions take gigabytes
    factor = factor.flip(0, 1)
    pivots = factor.diagonal().clone()
    return factor.div_(pivots[:, None]), pivots.square_().masked_fill_(dead, 0.0)
