"""Gated residual sum in Triton.

With one gate vector per sample:

    s = residual + gate · x
    dresidual = ds     dx = gate · ds     dgate = Σ_tokens ds · x

The backward needs no whole rows: a program loops over tokens of one sample for a stripe of columns
and keeps their sum, which is dgate where a sample has one program for each stripe.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from inl_core.kernels import _common
from inl_core.kernels._common import load, store

__all__ = ["gated_residual", "gated_residual_bwd", "gated_residual_fwd"]

REGISTERS = 48
"""The most registers that a thread of the backward needs."""


@triton.jit
def _forward(
    residual_ptr, x_ptr, gate_ptr, total_ptr,
    tokens, blocks, residual_stride, x_stride, gate_stride,
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


@triton.jit
def _backward(
    dtotal_ptr, x_ptr, gate_ptr, dx_ptr, dgate_ptr,
    tokens, parts, dtotal_stride, x_stride, gate_stride,
    D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(D, BLOCK_D)
    walker = tl.program_id(0) // tiles
    sample = (walker // parts).to(tl.int64)
    column = (tl.program_id(0) % tiles) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    gate = load(gate_ptr + sample * gate_stride + column, column < D)
    dgate = tl.zeros((BLOCK_R, BLOCK_D), dtype=tl.float32)
    for block in range(walker % parts, tl.cdiv(tokens, BLOCK_R), parts):
        token = block * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
        row = sample * tokens + token
        mask = (token < tokens) & (column < D)
        dtotal = load(dtotal_ptr + row * dtotal_stride + column, mask)
        dgate += dtotal * load(x_ptr + row * x_stride + column, mask)
        store(dx_ptr + row * D + column, gate * dtotal, mask)
    total = tl.sum(dgate, axis=0, keep_dims=True)
    store(dgate_ptr + walker.to(tl.int64) * D + column, total, column < D)


@_common.operator
def gated_residual_fwd(residual: Tensor, x: Tensor, gate: Tensor) -> Tensor:
    """Launch the forward kernel; `gated_residual` checks and shapes the arguments."""
    total = x.new_empty(x.shape, dtype=residual.dtype)
    if _common.nothing_to_launch(x):
        return total
    rows, strides = _common.rows_of(residual, x, gate)
    samples = rows[2].shape[0]
    tokens, blocks, sizes = _common.sample_config(rows[1], samples)
    _forward[(samples * blocks,)](*rows, total, tokens, blocks, *strides, **sizes)
    return total


@_common.operator
def gated_residual_bwd(dtotal: Tensor, x: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """Launch the backward kernel: (dx, dgate)."""
    dx, dgate = x.new_empty(x.shape), gate.new_empty(gate.shape)
    if _common.nothing_to_launch(x):
        return dx, dgate.zero_()
    rows, strides = _common.rows_of(dtotal, x, gate)
    samples, width = rows[2].shape
    tokens = rows[1].shape[0] // samples
    block_r, block_d, warps = _common.tile(width, tokens)
    tiles, blocks = triton.cdiv(width, block_d), triton.cdiv(tokens, block_r)
    parts = _common.sample_parts(x, samples * tiles, blocks, warps, REGISTERS)
    (partial,) = partials = _common.partial_sums((dgate,), parts)
    _backward[(samples * parts * tiles,)](
        *rows, dx, partial, tokens, parts, *strides, width, block_r, block_d, num_warps=warps
    )
    _common.add_parts(partials, (dgate,))
    return dx, dgate


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])  # the residual is not needed


def _gradients(ctx: Any, dtotal: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return dtotal, *gated_residual_bwd(dtotal, *ctx.saved_tensors)


gated_residual_fwd.register_autograd(_gradients, setup_context=_setup_context)


def gated_residual(residual: Tensor, x: Tensor, gate: Tensor) -> Tensor:
    """`inl_core.reference.gated_residual` as one kernel forward and one backward.

    `residual` and `x` (B, ..., D) are fp32, bf16 or fp16, D at most 16384; dtypes may differ, and a
    gate that is a chunk of a wider tensor is read in place. The result is contiguous.

    Raises:
        ValueError: If a dtype, a device or a shape does not fit.
    """
    _common.check_inputs("gated_residual", residual, x, gate)
    _common.check_rows("gated_residual", residual, ("x", x))
    gate = _common.per_sample("gated_residual", "gate", gate, residual)
    return gated_residual_fwd(residual, x, gate)
