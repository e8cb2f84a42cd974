"""Root-mean-square norm in Triton.

With r = rsqrt(mean(x²) + eps), for each row:

    y  = x · r · w
    dx = r · (w·dy − x · r² · mean(x·w·dy))
    dw = Σ_rows dy · x · r

The weight belongs inside the bracket of dx.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from inl_core.kernels import _common
from inl_core.kernels._common import load, store

__all__ = ["rms_norm", "rms_norm_bwd", "rms_norm_fwd"]

PER_THREAD, REGISTERS = 32, 128
"""Elements of each tensor that a thread of the backward holds, and the most registers it needs."""


@triton.jit
def inverse_rms(x, live, eps, D: tl.constexpr):
    """rsqrt(mean(x²) + eps) of every row; columns beyond D must hold 0.

    A row beyond the last is all zeros, and with eps = 0 its r would be infinite: where `live` is
    false r is 1, so that such rows add only zeros to a sum over rows.
    """
    mean = tl.sum(x * x, axis=1, keep_dims=True) / D
    return tl.rsqrt(tl.where(live, mean + eps, 1.0))


@triton.jit
def norm_gradient(x, normed, r, dnormed, D: tl.constexpr):
    """Gradient of the rows x of normed = x · r, given dnormed = w · dy.

    Its sum over a row does not wait for r, which comes from another one.
    """
    mean = tl.sum(x * dnormed, axis=1, keep_dims=True) / D
    return r * (dnormed - normed * (r * mean))


@triton.jit
def _forward(
    x_ptr, weight_ptr, y_ptr, rows, x_stride, eps,
    D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)[:, None]
    column = tl.arange(0, BLOCK_D)[None, :]
    mask = (row < rows) & (column < D)
    x = load(x_ptr + row * x_stride + column, mask)
    y = x * inverse_rms(x, row < rows, eps, D)
    if weight_ptr is not None:
        y *= load(weight_ptr + column, column < D)
    store(y_ptr + row * D + column, y, mask)


@triton.jit
def _backward(
    dy_ptr, x_ptr, weight_ptr, dx_ptr, dweight_ptr, rows, dy_stride, x_stride, eps,
    D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK_D)[None, :]
    if weight_ptr is not None:
        weight = load(weight_ptr + column, column < D)
    dweight = tl.zeros((BLOCK_R, BLOCK_D), dtype=tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(rows, BLOCK_R), tl.num_programs(0)):
        row = (block * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)[:, None]
        mask = (row < rows) & (column < D)
        x = load(x_ptr + row * x_stride + column, mask)
        dy = load(dy_ptr + row * dy_stride + column, mask)
        r = inverse_rms(x, row < rows, eps, D)
        normed = x * r
        if dweight_ptr is not None:
            dweight += dy * normed
        if weight_ptr is not None:
            dy *= weight
        store(dx_ptr + row * D + column, norm_gradient(x, normed, r, dy, D), mask)
    if dweight_ptr is not None:
        partial = tl.sum(dweight, axis=0, keep_dims=True)
        store(dweight_ptr + tl.program_id(0) * D + column, partial, column < D)


@_common.operator
def rms_norm_fwd(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Launch the forward kernel; `rms_norm` checks the arguments."""
    y = x.new_empty(x.shape)
    if _common.nothing_to_launch(x):
        return y
    x_rows = _common.as_rows(x)
    rows, width = x_rows.shape
    sizes = _common.row_config(width)
    _forward[(triton.cdiv(rows, sizes["BLOCK_R"]),)](
        x_rows, _common.contiguous(weight), y, rows, x_rows.stride(0), eps, **sizes
    )
    return y


@_common.operator
def rms_norm_bwd(
    dy: Tensor, x: Tensor, weight: Tensor | None, eps: float, need_dweight: bool
) -> tuple[Tensor, Tensor]:
    """Launch the backward kernel: (dx, dweight), dweight of size 0 if not needed."""
    dx = x.new_empty(x.shape)
    columns = x.shape[-1] if need_dweight else 0
    dtype = torch.float32 if weight is None else weight.dtype
    if _common.nothing_to_launch(x):
        return dx, x.new_zeros(columns, dtype=dtype)
    (dy_rows, x_rows), strides = _common.rows_of(dy, x)
    rows, width = x_rows.shape
    sizes = _common.row_config(width, per_thread=PER_THREAD)
    blocks = triton.cdiv(rows, sizes["BLOCK_R"])
    programs = _common.one_wave(x, blocks, sizes["num_warps"], REGISTERS)
    partials = x.new_empty(programs, columns, dtype=torch.float32)
    _backward[(programs,)](
        dy_rows, x_rows, _common.contiguous(weight), dx, partials if need_dweight else None,
        rows, *strides, eps, **sizes,
    )  # fmt: skip
    return dx, partials.sum(0).to(dtype)


@_common.gradient_of(rms_norm_fwd)
def _(ctx: Any, inputs: tuple[Any, ...], dy: Tensor) -> tuple[Tensor, Tensor]:
    return rms_norm_bwd(dy, *inputs, ctx.needs_input_grad[1])


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """`inl_core.reference.rms_norm` as one kernel forward and one backward.

    `x` (..., D) is fp32, bf16 or fp16, D at most 16384; the weight may have another dtype. The
    result is contiguous.

    Raises:
        ValueError: If a dtype, a device or a shape does not fit.
    """
    _common.check_inputs("rms_norm", x, weight)
    _common.check_rows("rms_norm", x)
    _common.check_weight("rms_norm", "weight", weight, x.shape[-1])
    return rms_norm_fwd(x, weight, eps)
