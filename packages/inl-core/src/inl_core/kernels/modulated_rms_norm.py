"""RMS norm with a shift and a scale per sample (AdaLN) in Triton.

With n = x · rsqrt(mean(x²) + eps) and m = (1 + scale) · w, for each row of a sample:

    y  = n · m + shift
    dx = r · (m·dy − n · mean(n·m·dy))
    dshift = Σ_tokens dy     S = Σ_tokens dy · n
    dscale = w · S           dw = Σ_samples (1 + scale) · S

A program of the backward loops over tokens of one sample and keeps their sums. Where a sample has
several programs, these are partial sums, which are added up afterwards in a fixed order.
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

__all__ = ["modulated_rms_norm", "modulated_rms_norm_bwd", "modulated_rms_norm_fwd"]

PER_THREAD, REGISTERS = 32, 168
"""Elements of each tensor that a thread of the backward holds, and the most registers it needs."""


@triton.jit
def modulation(weight_ptr, scale_row, column, D: tl.constexpr):
    """(1 + scale) · w of one sample, as a row; `scale_row` points to the sample's first channel."""
    factor = 1.0 + load(scale_row + column, column < D)
    if weight_ptr is not None:
        factor *= load(weight_ptr + column, column < D)
    return factor


@triton.jit
def _forward(
    x_ptr, shift_ptr, scale_ptr, weight_ptr, y_ptr,
    tokens, blocks, x_stride, shift_stride, scale_stride, eps,
    D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    token = (tl.program_id(0) % blocks) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    row = sample * tokens + token
    column = tl.arange(0, BLOCK_D)[None, :]
    mask = (token < tokens) & (column < D)
    factor = modulation(weight_ptr, scale_ptr + sample * scale_stride, column, D)
    shift = load(shift_ptr + sample * shift_stride + column, column < D)
    x = load(x_ptr + row * x_stride + column, mask)
    y = x * inverse_rms(x, token < tokens, eps, D) * factor + shift
    store(y_ptr + row * D + column, y, mask)


@triton.jit
def _backward(
    dy_ptr, x_ptr, scale_ptr, weight_ptr, dx_ptr, dshift_ptr, sums_ptr,
    tokens, parts, dy_stride, x_stride, scale_stride, eps,
    D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    sample = (tl.program_id(0) // parts).to(tl.int64)
    column = tl.arange(0, BLOCK_D)[None, :]
    factor = modulation(weight_ptr, scale_ptr + sample * scale_stride, column, D)
    dshift = tl.zeros((BLOCK_R, BLOCK_D), dtype=tl.float32)
    sums = tl.zeros((BLOCK_R, BLOCK_D), dtype=tl.float32)
    for block in range(tl.program_id(0) % parts, tl.cdiv(tokens, BLOCK_R), parts):
        token = block * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
        row = sample * tokens + token
        mask = (token < tokens) & (column < D)
        x = load(x_ptr + row * x_stride + column, mask)
        dy = load(dy_ptr + row * dy_stride + column, mask)
        r = inverse_rms(x, token < tokens, eps, D)
        normed = x * r
        dshift += dy
        sums += dy * normed
        store(dx_ptr + row * D + column, norm_gradient(x, normed, r, dy * factor, D), mask)
    part = tl.program_id(0).to(tl.int64) * D + column
    store(dshift_ptr + part, tl.sum(dshift, axis=0, keep_dims=True), column < D)
    store(sums_ptr + part, tl.sum(sums, axis=0, keep_dims=True), column < D)


@_common.operator
def modulated_rms_norm_fwd(
    x: Tensor, shift: Tensor, scale: Tensor, weight: Tensor | None, eps: float
) -> Tensor:
    """Launch the forward kernel; `modulated_rms_norm` checks and shapes the arguments."""
    y = x.new_empty(x.shape)
    if _common.nothing_to_launch(x):
        return y
    rows, strides = _common.rows_of(x, shift, scale)
    samples = rows[1].shape[0]
    tokens, blocks, sizes = _common.sample_config(rows[0], samples)
    _forward[(samples * blocks,)](
        *rows, _common.contiguous(weight), y, tokens, blocks, *strides, eps, **sizes
    )
    return y


@_common.operator
def modulated_rms_norm_bwd(
    dy: Tensor, x: Tensor, scale: Tensor, weight: Tensor | None, eps: float,
    shift_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Launch the backward kernel: (dx, dshift, S), S in fp32 if there is a weight."""
    dx, dshift = x.new_empty(x.shape), scale.new_empty(scale.shape, dtype=shift_dtype)
    sums = empty_sums(scale, weight)
    if _common.nothing_to_launch(x):
        return dx, dshift.zero_(), sums.zero_()
    rows, strides = _common.rows_of(dy, x, scale)
    samples = rows[2].shape[0]
    tokens, blocks, sizes = _common.sample_config(rows[1], samples, PER_THREAD)
    parts = _common.sample_parts(x, samples, blocks, sizes["num_warps"], REGISTERS)
    partials = _common.partial_sums((dshift, sums), parts)
    _backward[(samples * parts,)](
        *rows, _common.contiguous(weight), dx, *partials, tokens, parts, *strides, eps, **sizes
    )
    _common.add_parts(partials, (dshift, sums))
    return dx, dshift, sums


def empty_sums(scale: Tensor, weight: Tensor | None) -> Tensor:
    """An empty tensor for S = Σ_tokens dy · n; without a weight, S is dscale itself."""
    return scale.new_empty(scale.shape, dtype=scale.dtype if weight is None else torch.float32)


def modulation_gradients(
    sums: Tensor, scale: Tensor, weight: Tensor | None, need_dweight: bool
) -> tuple[Tensor, Tensor | None]:
    """(dscale, dweight) from S = Σ_tokens dy · n; dweight is None if not needed.

    Plain tensor operations on (B, D): the compiler fuses them with what computes the scale.
    """
    if weight is None:
        return sums, None
    dscale = sums * weight.float()
    if not need_dweight:
        return dscale, None
    return dscale, ((1.0 + scale.float()) * sums).reshape(-1, weight.shape[0]).sum(0)


@_common.gradient_of(modulated_rms_norm_fwd)
def _(ctx: Any, inputs: tuple[Any, ...], dy: Tensor) -> tuple[Tensor | None, ...]:
    x, shift, scale, weight, eps = inputs
    dx, dshift, sums = modulated_rms_norm_bwd(dy, x, scale, weight, eps, shift.dtype)
    return dx, dshift, *modulation_gradients(sums, scale, weight, ctx.needs_input_grad[3])


def modulated_rms_norm(
    x: Tensor, shift: Tensor, scale: Tensor, weight: Tensor | None = None, eps: float = 1e-6
) -> Tensor:
    """`inl_core.reference.modulated_rms_norm` as one kernel forward and one backward.

    `x` (B, ..., D) is fp32, bf16 or fp16, D at most 16384; shift and scale may have other dtypes,
    and chunks of a wider tensor are read in place. The result is contiguous.

    Raises:
        ValueError: If a dtype, a device or a shape does not fit.
    """
    op = "modulated_rms_norm"
    _common.check_inputs(op, x, shift, scale, weight)
    _common.check_rows(op, x)
    _common.check_weight(op, "weight", weight, x.shape[-1])
    conditions = _common.conditions(op, x, shift=shift, scale=scale)
    return modulated_rms_norm_fwd(x, *conditions, weight, eps)
