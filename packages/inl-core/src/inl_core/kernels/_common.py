"""Shared code of the kernel files: argument checks, launch sizes, and device functions.

Everything inside a kernel is fp32: every load is converted at once by ``.to(tl.float32)``, which
also makes Triton's interpreter exact for bf16.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

MAX_WIDTH = 16384
"""Largest D that the row kernels hold in one block."""

SUPPORTED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Without fp64: the kernels compute in fp32 and would silently lose digits."""

INTERPRETED = bool(knobs.runtime.interpret)
"""Whether the kernels run in Triton's interpreter, on CPU tensors; fixed by the first import."""


# ------------------------------------------------------------------------------------------------
# Argument checks


def check_inputs(op: str, *tensors: Tensor | None) -> None:
    """Raise ValueError on arguments that the kernels cannot compute; None is skipped.

    These are dtypes outside `SUPPORTED_DTYPES`, two devices, and CPU tensors outside the
    interpreter.
    """
    given = [tensor for tensor in tensors if tensor is not None]
    for tensor in given:
        if tensor.dtype not in SUPPORTED_DTYPES:
            names = ", ".join(str(dtype) for dtype in SUPPORTED_DTYPES)
            raise ValueError(
                f"the Triton kernel of {op} takes {names}, got {tensor.dtype}; "
                f"inl_core.reference.{op} takes any floating-point dtype"
            )
        if tensor.device != given[0].device:
            raise ValueError(f"{op} got tensors on {given[0].device} and on {tensor.device}")
    if given and given[0].device.type == "cpu" and not INTERPRETED:
        raise ValueError(
            f"the Triton kernel of {op} got a tensor on cpu; move it to a GPU, use "
            "inl_core.reference, or set TRITON_INTERPRET=1 before the first import"
        )


def check_width(op: str, width: int) -> None:
    """Raise ValueError if `width` is outside 1 … `MAX_WIDTH`."""
    if not 1 <= width <= MAX_WIDTH:
        raise ValueError(f"the Triton kernel of {op} takes 1 <= D <= {MAX_WIDTH}, got D = {width}")


def check_rows(op: str, x: Tensor, *same: tuple[str, Tensor]) -> None:
    """Raise ValueError if D of `x` (..., D) is out of range or a tensor is not shaped like `x`.

    Args:
        op: Name of the operation, for the message.
        x: Rows of the operation.
        *same: (name, tensor) of each argument that must have the shape of `x`.
    """
    if x.ndim == 0:
        raise ValueError(f"{op} needs at least one dimension, got a 0-dimensional tensor")
    check_width(op, x.shape[-1])
    for name, tensor in same:
        if tensor.shape != x.shape:
            raise ValueError(
                f"{op}: {name} must have shape {tuple(x.shape)}, got {tuple(tensor.shape)}"
            )


def check_weight(op: str, name: str, weight: Tensor | None, width: int) -> None:
    """Raise ValueError if a weight is neither None nor (width,)."""
    if weight is not None and weight.shape != (width,):
        raise ValueError(f"{op}: {name} must have shape ({width},), got {tuple(weight.shape)}")


def per_sample(op: str, name: str, value: Tensor, x: Tensor) -> Tensor:
    """Expand `value` to one row per sample, for rows of `x` grouped by sample.

    (B, D) is the usual case. More leading dimensions, from the left of those of `x`, make smaller
    groups: with (B, N, D) every token is its own sample. Size 1 broadcasts. The result is a view,
    so autograd sums over an expansion.

    Args:
        op: Name of the operation, for the message.
        name: Name of the argument, for the message.
        value: (B, D), or as above.
        x: (B, ..., D).

    Returns:
        `value` expanded to (B, ..., D), without trailing leading dimensions of size 1.

    Raises:
        ValueError: If `value` does not fit.
    """
    lead = list(value.shape[:-1])
    while len(lead) > 1 and lead[-1] == 1:
        lead.pop()
    groups = x.shape[: len(lead)]
    fits = (
        2 <= value.ndim <= x.ndim
        and value.shape[-1] == x.shape[-1]
        and all(size in (1, wanted) for size, wanted in zip(lead, groups, strict=True))
    )
    if not fits:
        raise ValueError(
            f"{op}: {name} must have shape {(x.shape[0], x.shape[-1])} for rows of shape "
            f"{tuple(x.shape)}, got {tuple(value.shape)}"
        )
    return value.reshape(*lead, value.shape[-1]).expand(*groups, value.shape[-1])


# ------------------------------------------------------------------------------------------------
# Launches


def as_rows(x: Tensor) -> Tensor:
    """View `x` (..., D) as (rows, D) with contiguous channels; copied only if that is impossible.

    The row stride may exceed D, so a chunk of a wider tensor is not copied.
    """
    # Not -1: with an empty batch and D = 0 the number of rows cannot be inferred.
    flat = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    return flat if flat.stride(1) == 1 or flat.shape[1] == 1 else flat.contiguous()


def rows_or_none(x: Tensor | None) -> Tensor | None:
    """`as_rows` of an optional tensor."""
    return None if x is None else as_rows(x)


def contiguous(x: Tensor | None) -> Tensor | None:
    """An optional tensor, contiguous."""
    return None if x is None else x.contiguous()


def row_stride(rows: Tensor | None) -> int:
    """Row stride of `rows` (R, D) in elements; 0 for None."""
    return 0 if rows is None else rows.stride(0)


def launch_guard(x: Tensor) -> AbstractContextManager[Any]:
    """Make the device of `x` current for a launch: Triton does not infer it from the arguments."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


@cache
def _processors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def num_programs(x: Tensor, blocks: int, per_processor: int = 4) -> int:
    """Programs of a persistent launch: min(blocks, multiprocessors of x's device * per_processor).

    The interpreter counts as 3 multiprocessors with one program each, so that small tests add up
    several partial sums.
    """
    wanted = _processors(x.get_device()) * per_processor if x.is_cuda else 3
    return max(1, min(blocks, wanted))


def row_config(width: int) -> tuple[int, int, int]:
    """(BLOCK_R, BLOCK_D, num_warps) of a kernel that reduces over rows of size `width`.

    BLOCK_D is the next power of 2; narrow rows are processed several at a time, and a thread holds
    at most 32 elements of a tensor.
    """
    block_d = triton.next_power_of_2(width)
    block_r = max(1, min(16, 1024 // block_d))
    num_warps = min(16, max(1, block_r * block_d // 256))
    return block_r, block_d, num_warps


# ------------------------------------------------------------------------------------------------
# Device functions; all values are fp32


@triton.jit
def clamp(x, minimum, maximum):
    """Clamp to [minimum, maximum]; NaN stays NaN, infinite bounds mean none."""
    x = tl.maximum(x, minimum, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(x, maximum, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)) without overflow."""
    small = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, small) / (1.0 + small)


@triton.jit
def softplus(x):
    """log(1 + exp(x)) = max(x, 0) + log1p(exp(-|x|)), full precision in the negative tail."""
    small = tl.exp(-tl.abs(x))
    # log1p(y) = log(u) * y / (u - 1) with u = 1 + y rounded: the rounding error cancels (Kahan).
    above = 1.0 + small
    lost = above == 1.0
    log1p = tl.log(above) * (small / tl.where(lost, 1.0, above - 1.0))
    return tl.where(x > 0, x, 0.0) + tl.where(lost, small, log1p)


@triton.jit
def load(pointer, mask):
    """Load as fp32, 0 where masked."""
    return tl.load(pointer, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store(pointer, value, mask):
    """Store in the pointer's dtype."""
    tl.store(pointer, value.to(pointer.dtype.element_ty), mask=mask)
