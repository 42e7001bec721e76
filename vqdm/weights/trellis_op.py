"""The operator `vqdm::decode_trellis` and its gradients."""

import torch

from vqdm.weights import ops
from vqdm.weights.base import kernels_apply, widened
from vqdm.weights.trellis_codes import decode_by_torch, split_codes, split_scales
from vqdm.weights.trellis_format import BYTE


def _on_cpu(codes, starts, rates, table, scales, outputs, inputs, side):
    from vqdm.weights import kernels  # imports numba, which is not always needed

    packed, stream = split_codes(codes, inputs, side)
    dtype, (table, scales) = widened(table, scales)
    rows, columns = split_scales(scales, packed, outputs, side)
    return kernels.decode_trellis(packed, side, stream, table, row_scales=rows, column_scales=columns).to(dtype)


def _on_gpu(codes, starts, rates, table, scales, outputs, inputs, side):
    if not ops.in_reach(codes, (outputs, inputs)):
        return decode_by_torch(codes, table, scales, (outputs, inputs), side).contiguous()
    from vqdm.weights import triton_kernels

    return triton_kernels.decode_trellis(
        codes, starts, rates, table=table, scales=scales, shape=(outputs, inputs), byte=side == BYTE
    )


def _fake(codes, starts, rates, table, scales, outputs, inputs, side):
    return scales.new_empty((outputs, inputs), dtype=torch.promote_types(table.dtype, scales.dtype))


def _save(ctx, inputs, output):
    codes, _, _, table, scales, ctx.outputs, ctx.inputs, ctx.side = inputs
    ctx.save_for_backward(codes, table, scales)


def _backward(ctx, gradient):
    codes, table, scales = ctx.saved_tensors  # once: under checkpointing they may be asked for once
    wanted = ctx.needs_input_grad[3:5]
    if kernels_apply(gradient, codes, table, scales):
        found = _gradients_on_cpu(gradient, codes, table, scales, ctx.outputs, ctx.inputs, ctx.side, of_table=wanted[0])
    else:
        arguments = codes, table, scales, (ctx.outputs, ctx.inputs), ctx.side
        wanted = False, *wanted, False, False
        found = ops.recomputed_gradients(decode_by_torch, arguments, wanted, gradient)[1:3]
    return None, None, None, *found, None, None, None


def _gradients_on_cpu(gradient, codes, table, scales, outputs, inputs, side, *, of_table):
    from vqdm.weights import kernels

    packed, stream = split_codes(codes, inputs, side)
    _, (values, widened_scales) = widened(table, scales)
    rows, columns = split_scales(widened_scales, packed, outputs, side)
    of_values, of_rows, of_columns = kernels.trellis_gradients(
        gradient.float(), packed, side, stream, values, row_scales=rows, column_scales=columns, of_table=of_table
    )
    of_scales = of_rows if side == BYTE else torch.cat([of_rows, of_columns])
    return None if of_values is None else of_values.to(table.dtype), of_scales.to(scales.dtype)


decode = ops.operator(
    "decode_trellis(Tensor codes, Tensor? starts, Tensor? rates, Tensor table, Tensor scales, "
    "SymInt outputs, SymInt inputs, str side) -> Tensor",
    cpu=_on_cpu,
    gpu=_on_gpu,
    fake=_fake,
    save=_save,
    backward=_backward,
)
