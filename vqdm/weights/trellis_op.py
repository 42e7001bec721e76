"""The operator `vqdm::decode_trellis` and its gradients."""

import torch

from vqdm.weights import ops
from vqdm.weights.base import kernels_apply, widened
from vqdm.weights.trellis_codes import (
    byte_scales,
    decode_by_torch,
    gradients_by_torch,
    gradients_from_states,
    split_codes,
    split_scales,
)
from vqdm.weights.trellis_format import BYTE, WINDOW_BITS, scales_count


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
    codes, starts, rates, table, scales, ctx.outputs, ctx.inputs, ctx.side = inputs
    ctx.save_for_backward(codes, starts, rates, table, scales)


def _backward(ctx, gradient):
    codes, starts, rates, table, scales = ctx.saved_tensors  # once: under checkpointing they may be asked for once
    shape, wanted = (ctx.outputs, ctx.inputs), ctx.needs_input_grad[3:5]
    if kernels_apply(gradient, codes, table, scales):
        found = _gradients_on_cpu(gradient, codes, table, scales, *shape, ctx.side, of_table=wanted[0])
    elif rates is None:  # traced on a CPU
        found = gradients_by_torch((codes, table, scales, shape, ctx.side), (False, *wanted), gradient)[1:3]
    else:
        states = _states(codes, starts, rates, *shape, ctx.side)
        found = gradients_from_states(
            gradient, states, rates, codes=codes, table=table, scales=scales, side=ctx.side, of_table=wanted[0]
        )
    return None, None, None, *found, None, None, None


def _states(codes, starts, rates, outputs, inputs, side):
    """The states, int [out, in], by the kernel that decodes: of a table whose values are their own numbers.

    Float32 holds them, times the scale of a BYTE column (7 bits of fraction), exactly.
    """
    numbers = torch.arange(1 << WINDOW_BITS, dtype=torch.float32, device=codes.device)
    scales = numbers.new_ones(scales_count((outputs, inputs), side))
    found = decode(codes, starts, rates, numbers, scales, outputs, inputs, side)
    if side == BYTE:
        found = found / byte_scales(split_codes(codes, inputs, side)[0])
    return found.int()


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
