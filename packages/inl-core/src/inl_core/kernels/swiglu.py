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


def _as_lines(*tensors: Tensor) -> tuple[list[Tensor], list[int], int, int]:
    """`rows_of` the tensors, number of rows and width; a single row if all are contiguous."""
    if all(tensor.is_contiguous() for tensor in tensors):
        tensors = tuple(tensor.reshape(1, -1) for tensor in tensors)
    lines, strides = _common.rows_of(*tensors)
    return lines, strides, *lines[0].shape


@_common.operator
def swiglu_fwd(gate: Tensor, up: Tensor) -> Tensor:
    """Launch the forward kernel; `swiglu` checks the arguments."""
    y = gate.new_empty(gate.shape)
    if _common.nothing_to_launch(gate):
        return y
    lines, strides, rows, width = _as_lines(gate, up)
    blocks = triton.cdiv(width, BLOCK)
    _forward[(rows * blocks,)](*lines, y, width, blocks, *strides, BLOCK=BLOCK, num_warps=WARPS)
    return y


@_common.operator
def swiglu_bwd(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Launch the backward kernel: (dgate, dup)."""
    dgate, dup = gate.new_empty(gate.shape), up.new_empty(up.shape)
    if _common.nothing_to_launch(gate):
        return dgate, dup
    lines, strides, rows, width = _as_lines(dy, gate, up)
    blocks = triton.cdiv(width, BLOCK)
    _backward[(rows * blocks,)](
        *lines, dgate, dup, width, blocks, *strides, BLOCK=BLOCK, num_warps=WARPS
    )
    return dgate, dup


@_common.gradient_of(swiglu_fwd)
def _(ctx: Any, inputs: tuple[Any, ...], dy: Tensor) -> tuple[Tensor, Tensor]:
    return swiglu_bwd(dy, *inputs)


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
