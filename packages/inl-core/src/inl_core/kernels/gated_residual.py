"""Gated residual sum in Triton.

With one gate vector per sample:

    s = residual + gate · x
    dresidual = ds     dx = gate · ds     dgate = Σ_tokens ds · x

A program of the backward loops over tokens of one sample and keeps a partial sum of dgate.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from inl_core.kernels import _common
from inl_core.kernels._common import load, store
from inl_core.kernels.modulated_rms_norm import parts_of, sample_blocks, sum_parts

__all__ = ["gated_residual", "gated_residual_bwd", "gated_residual_fwd"]


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
    sample = (tl.program_id(0) // parts).to(tl.int64)
    column = tl.arange(0, BLOCK_D)[None, :]
    gate = load(gate_ptr + sample * gate_stride + column, column < D)
    dgate = tl.zeros((BLOCK_R, BLOCK_D), dtype=tl.float32)
    for block in range(tl.program_id(0) % parts, tl.cdiv(tokens, BLOCK_R), parts):
        token = block * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
        row = sample * tokens + token
        mask = (token < tokens) & (column < D)
        dtotal = load(dtotal_ptr + row * dtotal_stride + column, mask)
        dgate += dtotal * load(x_ptr + row * x_stride + column, mask)
        store(dx_ptr + row * D + column, gate * dtotal, mask)
    part = tl.program_id(0).to(tl.int64) * D + column
    store(dgate_ptr + part, tl.sum(dgate, axis=0, keep_dims=True), column < D)


@torch.library.custom_op("inl_core::gated_residual_fwd", mutates_args=())
def gated_residual_fwd(residual: Tensor, x: Tensor, gate: Tensor) -> Tensor:
    """Launch the forward kernel; `gated_residual` checks and shapes the arguments."""
    total = x.new_empty(x.shape, dtype=residual.dtype)
    if x.numel() == 0:
        return total
    residual_rows, x_rows, gate_rows = (_common.as_rows(t) for t in (residual, x, gate))
    samples, width = gate_rows.shape
    tokens = x_rows.shape[0] // samples
    blocks, block_r, block_d, warps = sample_blocks(tokens, width)
    with _common.launch_guard(x):
        _forward[(samples * blocks,)](
            residual_rows, x_rows, gate_rows, total,
            tokens, blocks, residual_rows.stride(0), x_rows.stride(0), gate_rows.stride(0),
            D=width, BLOCK_R=block_r, BLOCK_D=block_d, num_warps=warps,
        )  # fmt: skip
    return total


@gated_residual_fwd.register_fake
def _(residual: Tensor, x: Tensor, gate: Tensor) -> Tensor:
    return x.new_empty(x.shape, dtype=residual.dtype)


@torch.library.custom_op("inl_core::gated_residual_bwd", mutates_args=())
def gated_residual_bwd(dtotal: Tensor, x: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """Launch the backward kernel: (dx, dgate)."""
    dx = x.new_empty(x.shape)
    if x.numel() == 0:
        return dx, torch.zeros(gate.shape, dtype=gate.dtype, device=x.device)
    dtotal_rows, x_rows, gate_rows = (_common.as_rows(t) for t in (dtotal, x, gate))
    samples, width = gate_rows.shape
    tokens = x_rows.shape[0] // samples
    blocks, block_r, block_d, warps = sample_blocks(tokens, width)
    parts = parts_of(x, samples, blocks, warps)
    dgate = torch.empty(samples, parts, width, dtype=torch.float32, device=x.device)
    with _common.launch_guard(x):
        _backward[(samples * parts,)](
            dtotal_rows, x_rows, gate_rows, dx, dgate,
            tokens, parts, dtotal_rows.stride(0), x_rows.stride(0), gate_rows.stride(0),
            D=width, BLOCK_R=block_r, BLOCK_D=block_d, num_warps=warps,
        )  # fmt: skip
    return dx, sum_parts(dgate, gate).to(gate.dtype)


@gated_residual_bwd.register_fake
def _(dtotal: Tensor, x: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    dx = x.new_empty(x.shape)
    return dx, torch.empty(gate.shape, dtype=gate.dtype, device=x.device)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, x, gate = inputs
    ctx.save_for_backward(x, gate)


def _gradients(ctx: Any, dtotal: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dx, dgate = gated_residual_bwd(dtotal, *ctx.saved_tensors)
    return dtotal, dx, dgate


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
