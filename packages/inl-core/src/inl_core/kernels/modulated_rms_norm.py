"""RMS norm with a shift and a scale per sample (AdaLN) in Triton.

With n = x · rsqrt(mean(x²) + eps) and m = (1 + scale) · w, for each row of a sample:

    y  = n · m + shift
    dx = r · (m·dy − n · mean(n·m·dy))
    dshift = Σ_tokens dy     S = Σ_tokens dy · n
    dscale = w · S           dw = Σ_samples (1 + scale) · S

A program of the backward loops over tokens of one sample and keeps partial sums, which are added up
afterwards in a fixed order.
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
        store(dx_ptr + row * D + column, norm_gradient(normed, r, dy * factor, D), mask)
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
    tokens, blocks, _, sizes = _common.sample_config(rows[0], samples)
    _forward[(samples * blocks,)](
        *rows, _common.contiguous(weight), y, tokens, blocks, *strides, eps, **sizes
    )
    return y


@_common.operator
def modulated_rms_norm_bwd(
    dy: Tensor, x: Tensor, scale: Tensor, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the backward kernel: (dx, dshift, S), the sums over tokens in fp32."""
    dx = x.new_empty(x.shape)
    if _common.nothing_to_launch(x):
        zeros = scale.new_zeros(scale.shape, dtype=torch.float32)
        return dx, zeros, zeros.clone()
    rows, strides = _common.rows_of(dy, x, scale)
    samples, width = rows[2].shape
    tokens, _, parts, sizes = _common.sample_config(rows[1], samples)
    dshift, sums = (x.new_empty(samples, parts, width, dtype=torch.float32) for _ in range(2))
    _backward[(samples * parts,)](
        *rows, _common.contiguous(weight), dx, dshift, sums, tokens, parts, *strides, eps, **sizes
    )
    return dx, _common.sum_parts(dshift, scale), _common.sum_parts(sums, scale)


def modulation_gradients(
    sums: Tensor, scale: Tensor | None, weight: Tensor | None, need_dweight: bool
) -> tuple[Tensor, Tensor | None]:
    """(dscale, dweight) in fp32 from S = Σ_tokens dy · n; dweight is None if not needed.

    Plain tensor operations on (B, D): the compiler fuses them with what computes the scale.
    """
    dscale = sums if weight is None or scale is None else sums * weight.float()
    if weight is None or not need_dweight:
        return dscale, None
    each = sums if scale is None else (1.0 + scale.float()) * sums
    return dscale, each.reshape(-1, weight.shape[0]).sum(0)


@_common.gradient_of(modulated_rms_norm_fwd)
def _(ctx: Any, inputs: tuple[Any, ...], dy: Tensor) -> tuple[Tensor | None, ...]:
    x, _, scale, weight, eps = inputs
    dx, dshift, sums = modulated_rms_norm_bwd(dy, x, scale, weight, eps)
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
