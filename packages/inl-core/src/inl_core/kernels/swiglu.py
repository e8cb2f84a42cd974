"""SwiGLU in Triton, element by element.

With s = 1 / (1 + exp(−g)):

    y   = g · s · u
    dg  = dy · u · s · (1 + g · (1 − s))
    du  = dy · g · s

Gate and up are usually the two halves of one projection, so rows are read at their own stride; a
contiguous tensor is a single row.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from inl_core.kernels import _common
from inl_core.kernels._common import load, store

__all__ = ["swiglu", "swiglu_bwd", "swiglu_fwd"]

BLOCK = 1024
WARPS = 4


@triton.jit
def _forward(
    gate_ptr, up_ptr, y_ptr, width, blocks, gate_stride, up_stride, BLOCK: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    gate = load(gate_ptr + row * gate_stride + column, mask)
    up = load(up_ptr + row * up_stride + column, mask)
    small = tl.exp(-tl.abs(gate))
    silu = gate * tl.where(gate >= 0, 1.0, small) / (1.0 + small)
    store(y_ptr + row * width + column, silu * up, mask)


@triton.jit
def _backward(
    dy_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr,
    width, blocks, dy_stride, gate_stride, up_stride, BLOCK: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    dy = load(dy_ptr + row * dy_stride + column, mask)
    gate = load(gate_ptr + row * gate_stride + column, mask)
    up = load(up_ptr + row * up_stride + column, mask)
    small = tl.exp(-tl.abs(gate))
    above = 1.0 + small
    sigmoid = tl.where(gate >= 0, 1.0, small) / above
    rest = tl.where(gate >= 0, small, 1.0) / above  # 1 - sigmoid without cancellation
    slope = sigmoid * (1.0 + gate * rest)
    silu = gate * tl.where(gate >= 0, 1.0, small) / above
    store(dgate_ptr + row * width + column, dy * up * slope, mask)
    store(dup_ptr + row * width + column, dy * silu, mask)


def _as_lines(*tensors: Tensor) -> tuple[list[Tensor], int, int]:
    """Rows of each tensor, their number and width; a single row if all are contiguous."""
    if all(tensor.is_contiguous() for tensor in tensors):
        return [tensor.reshape(1, -1) for tensor in tensors], 1, tensors[0].numel()
    lines = [_common.as_rows(tensor) for tensor in tensors]
    rows, width = lines[0].shape
    return lines, rows, width


@torch.library.custom_op("inl_core::swiglu_fwd", mutates_args=())
def swiglu_fwd(gate: Tensor, up: Tensor) -> Tensor:
    """Launch the forward kernel; `swiglu` checks the arguments."""
    y = gate.new_empty(gate.shape)
    if gate.numel() == 0:
        return y
    (gate_rows, up_rows), rows, width = _as_lines(gate, up)
    blocks = triton.cdiv(width, BLOCK)
    with _common.launch_guard(gate):
        _forward[(rows * blocks,)](
            gate_rows, up_rows, y, width, blocks, gate_rows.stride(0), up_rows.stride(0),
            BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
    return y


@swiglu_fwd.register_fake
def _(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


@torch.library.custom_op("inl_core::swiglu_bwd", mutates_args=())
def swiglu_bwd(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Launch the backward kernel: (dgate, dup)."""
    dgate = gate.new_empty(gate.shape)
    dup = up.new_empty(up.shape)
    if gate.numel() == 0:
        return dgate, dup
    (dy_rows, gate_rows, up_rows), rows, width = _as_lines(dy, gate, up)
    blocks = triton.cdiv(width, BLOCK)
    with _common.launch_guard(gate):
        _backward[(rows * blocks,)](
            dy_rows, gate_rows, up_rows, dgate, dup,
            width, blocks, dy_rows.stride(0), gate_rows.stride(0), up_rows.stride(0),
            BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
    return dgate, dup


@swiglu_bwd.register_fake
def _(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    dgate = gate.new_empty(gate.shape)
    return dgate, up.new_empty(up.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
    return swiglu_bwd(dy, *ctx.saved_tensors)


swiglu_fwd.register_autograd(_gradients, setup_context=_setup_context)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`inl_core.reference.swiglu` as one kernel forward and one backward.

    `gate` and `up`, of at least one dimension, are fp32, bf16 or fp16; dtypes may differ, and
    halves of a wider tensor are read in place. The result is contiguous.

    Raises:
        ValueError: If a dtype, a device or a shape does not fit.
    """
    _common.check_inputs("swiglu", gate, up)
    if gate.ndim == 0 or up.shape != gate.shape:
        raise ValueError(
            "swiglu: gate and up must have one shape of at least one dimension, "
            f"got {tuple(gate.shape)} and {tuple(up.shape)}"
        )
    return swiglu_fwd(gate, up)
