"""Gated residual sum and the modulated RMS norm that follows it, in one pass, in Triton.

With one gate, shift and scale vector per sample, s = residual + gate · x; r = rsqrt(mean(s²) + eps)
and n = s · r come from the unrounded s; with m = (1 + scale) · w:

    y  = n · m + shift
    ds = ds_out + r · (m·dy − n · mean(n·m·dy))
    dresidual = ds     dx = gate · ds     dgate = Σ_tokens ds · x     dshift = Σ_tokens dy
    S = Σ_tokens dy · n     dscale = w · S     dw = Σ_samples (1 + scale) · S

Backward needs x for dgate, so it recomputes s from x and the residual without extra traffic.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from inl_core.kernels import _common
from inl_core.kernels._common import load, store
from inl_core.kernels.modulated_rms_norm import empty_sums, modulation, modulation_gradients
from inl_core.kernels.rms_norm import inverse_rms, norm_gradient

__all__ = ["gated_residual_norm", "gated_residual_norm_bwd", "gated_residual_norm_fwd"]

PER_THREAD, REGISTERS = 16, 168
"""Elements of each tensor that a thread of the backward holds, and the most registers it needs."""


@triton.jit
def _forward(
    residual_ptr, x_ptr, gate_ptr, shift_ptr, scale_ptr, weight_ptr, y_ptr, total_ptr,
    tokens, blocks, residual_stride, x_stride, gate_stride, shift_stride, scale_stride, eps,
    D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    token = (tl.program_id(0) % blocks) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    row = sample * tokens + token
    column = tl.arange(0, BLOCK_D)[None, :]
    mask = (token < tokens) & (column < D)
    gate = load(gate_ptr + sample * gate_stride + column, column < D)
    total = load(residual_ptr + row * residual_stride + column, mask)
    total += gate * load(x_ptr + row * x_stride + column, mask)
    store(total_ptr + row * D + column, total, mask)
    factor = modulation(weight_ptr, scale_ptr + sample * scale_stride, column, D)
    shift = load(shift_ptr + sample * shift_stride + column, column < D)
    y = total * inverse_rms(total, token < tokens, eps, D) * factor + shift
    store(y_ptr + row * D + column, y, mask)


@triton.jit
def _backward(
    dy_ptr, dtotal_ptr, residual_ptr, x_ptr, gate_ptr, scale_ptr, weight_ptr,
    dresidual_ptr, dx_ptr, dgate_ptr, dshift_ptr, sums_ptr,
    tokens, parts, dy_stride, dtotal_stride, residual_stride, x_stride, gate_stride, scale_stride,
    eps, D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    sample = (tl.program_id(0) // parts).to(tl.int64)
    column = tl.arange(0, BLOCK_D)[None, :]
    gate = load(gate_ptr + sample * gate_stride + column, column < D)
    factor = modulation(weight_ptr, scale_ptr + sample * scale_stride, column, D)
    dgate = tl.zeros((BLOCK_R, BLOCK_D), dtype=tl.float32)
    dshift = tl.zeros((BLOCK_R, BLOCK_D), dtype=tl.float32)
    sums = tl.zeros((BLOCK_R, BLOCK_D), dtype=tl.float32)
    for block in range(tl.program_id(0) % parts, tl.cdiv(tokens, BLOCK_R), parts):
        token = block * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
        row = sample * tokens + token
        mask = (token < tokens) & (column < D)
        x = load(x_ptr + row * x_stride + column, mask)
        total = load(residual_ptr + row * residual_stride + column, mask) + gate * x
        dy = load(dy_ptr + row * dy_stride + column, mask)
        r = inverse_rms(total, token < tokens, eps, D)
        normed = total * r
        dshift += dy
        sums += dy * normed
        dtotal = norm_gradient(total, normed, r, dy * factor, D)
        if dtotal_ptr is not None:
            dtotal += load(dtotal_ptr + row * dtotal_stride + column, mask)
        dgate += dtotal * x
        store(dresidual_ptr + row * D + column, dtotal, mask)
        store(dx_ptr + row * D + column, gate * dtotal, mask)
    part = tl.program_id(0).to(tl.int64) * D + column
    store(dgate_ptr + part, tl.sum(dgate, axis=0, keep_dims=True), column < D)
    store(dshift_ptr + part, tl.sum(dshift, axis=0, keep_dims=True), column < D)
    store(sums_ptr + part, tl.sum(sums, axis=0, keep_dims=True), column < D)


@_common.operator
def gated_residual_norm_fwd(
    residual: Tensor, x: Tensor, gate: Tensor, shift: Tensor, scale: Tensor,
    weight: Tensor | None, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Launch the forward kernel; `gated_residual_norm` checks and shapes the arguments."""
    y, total = x.new_empty(x.shape), x.new_empty(x.shape, dtype=residual.dtype)
    if _common.nothing_to_launch(x):
        return y, total
    rows, strides = _common.rows_of(residual, x, gate, shift, scale)
    samples = rows[2].shape[0]
    tokens, blocks, sizes = _common.sample_config(rows[1], samples)
    _forward[(samples * blocks,)](
        *rows, _common.contiguous(weight), y, total, tokens, blocks, *strides, eps, **sizes
    )
    return y, total


@_common.operator
def gated_residual_norm_bwd(
    dy: Tensor, dtotal: Tensor | None, residual: Tensor, x: Tensor, gate: Tensor, scale: Tensor,
    weight: Tensor | None, eps: float, shift_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Launch the backward kernel: (dresidual, dx, dgate, dshift, S), S in fp32 if with a weight.

    `dy` is the gradient of the normed result, `dtotal` that of the sum, None for zero.
    """
    dresidual, dx = x.new_empty(x.shape, dtype=residual.dtype), x.new_empty(x.shape)
    dgate, dshift = gate.new_empty(gate.shape), gate.new_empty(gate.shape, dtype=shift_dtype)
    sums = empty_sums(scale, weight)
    if _common.nothing_to_launch(x):
        return dresidual, dx, dgate.zero_(), dshift.zero_(), sums.zero_()
    rows, strides = _common.rows_of(dy, dtotal, residual, x, gate, scale)
    samples = rows[4].shape[0]
    tokens, blocks, sizes = _common.sample_config(rows[3], samples, PER_THREAD)
    parts = _common.sample_parts(x, samples, blocks, sizes["num_warps"], REGISTERS)
    partials = _common.partial_sums((dgate, dshift, sums), parts)
    _backward[(samples * parts,)](
        *rows, _common.contiguous(weight), dresidual, dx, *partials,
        tokens, parts, *strides, eps, **sizes,
    )  # fmt: skip
    _common.add_parts(partials, (dgate, dshift, sums))
    return dresidual, dx, dgate, dshift, sums


@_common.gradient_of(gated_residual_norm_fwd, materialize=False)
def _(
    ctx: Any, inputs: tuple[Any, ...], dy: Tensor | None, dtotal: Tensor | None
) -> tuple[Tensor | None, ...]:
    residual, x, gate, shift, scale, weight, eps = inputs
    if dy is None:
        dy = x.new_zeros(x.shape)
    *grads, sums = gated_residual_norm_bwd(
        dy, dtotal, residual, x, gate, scale, weight, eps, shift.dtype
    )
    return *grads, *modulation_gradients(sums, scale, weight, ctx.needs_input_grad[5])


def gated_residual_norm(
    residual: Tensor,
    x: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """`inl_core.reference.gated_residual_norm` as one kernel forward and one backward.

    `residual` and `x` (B, ..., D) are fp32, bf16 or fp16, D at most 16384; dtypes may differ, and
    chunks of a wider tensor are read in place. The results are contiguous.

    Raises:
        ValueError: If a dtype, a device or a shape does not fit.
    """
    op = "gated_residual_norm"
    _common.check_inputs(op, residual, x, gate, shift, scale, weight)
    _common.check_rows(op, residual, ("x", x))
    _common.check_weight(op, "weight", weight, x.shape[-1])
    conditions = _common.conditions(op, residual, gate=gate, shift=shift, scale=scale)
    return gated_residual_norm_fwd(residual, x, *conditions, weight, eps)
