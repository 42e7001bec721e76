"""Checks that every codec makes before it starts, naming the layer."""

import torch
from torch import Tensor

from vqdm.errors import UserError
from vqdm.weights.base import check_groups


def check_matrix(weight: Tensor, *, layer: str = "", group_size: int | None = None) -> None:
    """Raise UserError, with the layer's name, unless `weight` is a finite [out, in] divisible into groups."""
    where = f" of layer {layer}" if layer else ""
    if weight.ndim != 2 or weight.numel() == 0:
        raise ValueError(f"the weight{where} must be a matrix [out, in], not {list(weight.shape)}")
    check_groups(weight.shape[1], layer=layer, group_size=group_size)
    if not bool(torch.isfinite(weight).all()):
        raise UserError(f"the weight{where} has infinite or NaN entries: load the model in another dtype or repair it")


def check_hessian(hessian: Tensor, weight: Tensor, *, layer: str = "") -> None:
    """Raise UserError, with the layer's name, for non-finite entries; ValueError unless `hessian` is [in, in]."""
    where = f" of layer {layer}" if layer else ""
    if tuple(hessian.shape) != (weight.shape[1], weight.shape[1]):
        raise ValueError(f"the Hessian{where} must be [in, in] = {[weight.shape[1]] * 2}, not {list(hessian.shape)}")
    if not bool(torch.isfinite(hessian).all()):
        raise UserError(f"the activations{where} have infinite or NaN entries: load the model in another dtype")
