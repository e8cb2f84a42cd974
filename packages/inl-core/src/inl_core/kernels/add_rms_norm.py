"""Residual sum and RMS norm in Triton, in one pass.

With r = rsqrt(mean(s²) + eps), for each row:

    s  = x + residual                                  not rounded before y is computed
    y  = s · r · w
    ds = ds_out + r · (w·dy − s · r² · mean(s·w·dy))   dx = dresidual = ds
    dw = Σ_rows dy · s · r

Backward reads s instead of x and residual, 8 bytes per element in bf16, unless s was rounded to a
dtype with fewer digits than that of x.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from inl_core.kernels import _common
from inl_core.kernels._common import load, store
from inl_core.kernels.rms_norm import inverse_rms, norm_gradient

__all__ = ["add_rms_norm", "add_rms_norm_bwd", "add_rms_norm_fwd"]

PER_THREAD, REGISTERS = 32, 128
"""Elements of each tensor that a thread of the backward holds, and the most registers it needs."""


@triton.jit
def _forward(
    x_ptr, residual_ptr, weight_ptr, y_ptr, total_ptr, rows, x_stride, residual_stride, eps,
    D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)[:, None]
    column = tl.arange(0, BLOCK_D)[None, :]
    mask = (row < rows) & (column < D)
    total = load(x_ptr + row * x_stride + column, mask)
    total += load(residual_ptr + row * residual_stride + column, mask)
    store(total_ptr + row * D + column, total, mask)
    y = total * inverse_rms(total, row < rows, eps, D)
    if weight_ptr is not None:
        y *= load(weight_ptr + column, column < D)
    store(y_ptr + row * D + column, y, mask)


@triton.jit
def _backward(
    dy_ptr, dtotal_ptr, a_ptr, b_ptr, weight_ptr, dx_ptr, dresidual_ptr, dweight_ptr,
    rows, dy_stride, dtotal_stride, a_stride, b_stride, eps,
    D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK_D)[None, :]
    if weight_ptr is not None:
        weight = load(weight_ptr + column, column < D)
    dweight = tl.zeros((BLOCK_R, BLOCK_D), dtype=tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(rows, BLOCK_R), tl.num_programs(0)):
        row = (block * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)[:, None]
        mask = (row < rows) & (column < D)
        total = load(a_ptr + row * a_stride + column, mask)
        if b_ptr is not None:
            total += load(b_ptr + row * b_stride + column, mask)
        dy = load(dy_ptr + row * dy_stride + column, mask)
        r = inverse_rms(total, row < rows, eps, D)
        normed = total * r
        if dweight_ptr is not None:
            dweight += dy * normed
        if weight_ptr is not None:
            dy *= weight
        dtotal = norm_gradient(total, normed, r, dy, D)
        if dtotal_ptr is not None:
            dtotal += load(dtotal_ptr + row * dtotal_stride + column, mask)
        store(dx_ptr + row * D + column, dtotal, mask)
        if dresidual_ptr is not None:
            store(dresidual_ptr + row * D + column, dtotal, mask)
    if dweight_ptr is not None:
        partial = tl.sum(dweight, axis=0, keep_dims=True)
        store(dweight_ptr + tl.program_id(0) * D + column, partial, column < D)


@_common.operator
def add_rms_norm_fwd(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Launch the forward kernel; `add_rms_norm` checks the arguments."""
    y, total = x.new_empty(x.shape), x.new_empty(x.shape, dtype=residual.dtype)
    if _common.nothing_to_launch(x):
        return y, total
    tensors, strides = _common.rows_of(x, residual)
    rows, width = tensors[0].shape
    sizes = _common.row_config(width)
    _forward[(triton.cdiv(rows, sizes["BLOCK_R"]),)](
        *tensors, _common.contiguous(weight), y, total, rows, *strides, eps, **sizes
    )
    return y, total


@_common.operator
def add_rms_norm_bwd(
    dy: Tensor, dtotal: Tensor | None, a: Tensor, b: Tensor | None, weight: Tensor | None,
    eps: float, residual_dtype: torch.dtype, need_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Launch the backward kernel: (dx, dresidual, dweight).

    The sum is `a`, or a + b if b is not None. dresidual is empty if it equals dx (an operator must
    not return one tensor twice), dweight if it is not needed.
    """
    same = residual_dtype == dy.dtype
    dx = a.new_empty(a.shape, dtype=dy.dtype)
    dresidual = a.new_empty(0 if same else a.shape, dtype=residual_dtype)
    columns = a.shape[-1] if need_dweight else 0
    dtype = torch.float32 if weight is None else weight.dtype
    if _common.nothing_to_launch(a):
        return dx, dresidual, a.new_zeros(columns, dtype=dtype)
    tensors, strides = _common.rows_of(dy, dtotal, a, b)
    rows, width = tensors[0].shape
    sizes = _common.row_config(width, per_thread=PER_THREAD)
    blocks = triton.cdiv(rows, sizes["BLOCK_R"])
    programs = _common.one_wave(a, blocks, sizes["num_warps"], REGISTERS)
    partials = a.new_empty(programs, columns, dtype=torch.float32)
    _backward[(programs,)](
        *tensors, _common.contiguous(weight), dx, None if same else dresidual,
        partials if need_dweight else None, rows, *strides, eps, **sizes,
    )  # fmt: skip
    return dx, dresidual, partials.sum(0).to(dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, residual, weight, ctx.eps = inputs
    ctx.set_materialize_grads(False)
    ctx.x_dtype, ctx.residual_dtype = x.dtype, residual.dtype
    if residual.dtype in (x.dtype, torch.float32):
        ctx.save_for_backward(output[1], None, weight)
    else:
        ctx.save_for_backward(x, residual, weight)


def _gradients(
    ctx: Any, dy: Tensor | None, dtotal: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, None]:
    a, b, weight = ctx.saved_tensors
    if dy is None:
        dy = a.new_zeros(a.shape, dtype=ctx.x_dtype)
    need_dweight = ctx.needs_input_grad[2]
    dx, dresidual, dweight = add_rms_norm_bwd(
        dy, dtotal, a, b, weight, ctx.eps, ctx.residual_dtype, need_dweight
    )
    if ctx.residual_dtype == ctx.x_dtype:
        dresidual = dx
    return dx, dresidual, dweight if need_dweight else None, None


add_rms_norm_fwd.register_autograd(_gradients, setup_context=_setup_context)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None = None, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """`inl_core.reference.add_rms_norm` as one kernel forward and one backward.

    `x` and `residual` (..., D) are fp32, bf16 or fp16, D at most 16384; dtypes may differ. The
    results are contiguous.

    Raises:
        ValueError: If a dtype, a device or a shape does not fit.
    """
    _common.check_inputs("add_rms_norm", x, residual, weight)
    _common.check_rows("add_rms_norm", x, ("residual", residual))
    _common.check_weight("add_rms_norm", "weight", weight, x.shape[-1])
    return add_rms_norm_fwd(x, residual, weight, eps)
