"""What several kernel files share: limits, shapes, launch sizes, and helpers used inside kernels.

Everything inside a kernel is fp32: every load is followed at once by ``.to(tl.float32)``, which is
also what makes Triton's interpreter exact for bf16.
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

# Shapes of the row kernels' arguments: checks, and rows grouped by sample.


def check_rows(op: str, x: Tensor, *same: tuple[str, Tensor]) -> None:
    """Refuse rows that a kernel cannot take, and companions that are not shaped like them.

    Args:
        op: Name of the operation, for the message.
        x: The tensor (..., D) whose rows are worked on.
        *same: (name, tensor) of each argument that must be shaped like `x`.

    Raises:
        ValueError: If D is out of range or a shape differs.
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
    """Refuse a weight that is neither None nor (width,).

    Args:
        op: Name of the operation, for the message.
        name: Name of the argument, for the message.
        weight: The weight.
        width: Size D of a row.

    Raises:
        ValueError: If the shape differs.
    """
    if weight is not None and weight.shape != (width,):
        raise ValueError(f"{op}: {name} must have shape ({width},), got {tuple(weight.shape)}")


def per_sample(op: str, name: str, value: Tensor, x: Tensor) -> Tensor:
    """Bring `value` to one row a sample, where the rows of `x` are grouped by sample.

    (B, D) is the usual case. More leading dimensions, taken from the left of those of `x`, make
    smaller groups: with (B, N, D) every token is a sample of its own. Size 1 stands for all.
    The result is a view, so autograd sums an expansion away by itself.

    Args:
        op: Name of the operation, for the message.
        name: Name of the argument, for the message.
        value: (B, D), or as above.
        x: (B, ..., D).

    Returns:
        `value` expanded to (B, ..., D) with as many leading dimensions as it has, less those of
        size 1 at their end.

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


MAX_WIDTH = 16384
"""Widest last dimension D that the row kernels hold in one block."""

SUPPORTED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""fp64 is left to the reference: a kernel that computes in fp32 would silently lose digits."""

INTERPRETED = bool(knobs.runtime.interpret)
"""Whether the kernels run in Triton's interpreter, on CPU tensors; settled by the first import."""


# ------------------------------------------------------------------------------------------------
# Around a launch


def check_inputs(op: str, *tensors: Tensor | None) -> None:
    """Refuse what the kernels cannot compute.

    Args:
        op: Name of the operation, for the message.
        *tensors: Arguments of the operation; None is skipped.

    Raises:
        ValueError: On a dtype outside `SUPPORTED_DTYPES`, two devices, or a CPU tensor outside the
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
    """Refuse a last dimension that does not fit into one block.

    Args:
        op: Name of the operation, for the message.
        width: Size D of the last dimension.

    Raises:
        ValueError: If width is outside 1 … `MAX_WIDTH`.
    """
    if not 1 <= width <= MAX_WIDTH:
        raise ValueError(f"the Triton kernel of {op} takes 1 <= D <= {MAX_WIDTH}, got D = {width}")


def as_rows(x: Tensor) -> Tensor:
    """View `x` (..., D) as (rows, D) with neighbouring channels adjacent; copies only if it must.

    The row stride may exceed D, so a chunk of a wider tensor is taken as it lies.
    """
    # Not -1: with an empty batch and D = 0 the number of rows cannot be inferred.
    flat = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    return flat if flat.stride(1) == 1 or flat.shape[1] == 1 else flat.contiguous()


def row_stride(rows: Tensor | None) -> int:
    """Elements from one row of `rows` (R, D) to the next; 0 where there is no tensor."""
    return 0 if rows is None else rows.stride(0)


def launch_guard(x: Tensor) -> AbstractContextManager[Any]:
    """Make the device of `x` current for a launch: Triton does not look where its arguments are."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


@cache
def _processors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def num_programs(x: Tensor, blocks: int, per_processor: int = 4) -> int:
    """Programs of a persistent launch over `blocks` blocks of rows of `x`.

    Args:
        x: A tensor of the launch; its device decides.
        blocks: Number of row blocks; at least 1 is assumed.
        per_processor: Programs wanted on each multiprocessor at a time.

    Returns:
        min(blocks, multiprocessors * per_processor). The interpreter counts as 3 processors with
        one program each, so that small tests sum several partials.
    """
    wanted = _processors(x.get_device()) * per_processor if x.is_cuda else 3
    return max(1, min(blocks, wanted))


def row_config(width: int) -> tuple[int, int, int]:
    """Block sizes of a kernel that reduces over whole rows.

    Args:
        width: Size D of a row.

    Returns:
        (BLOCK_R, BLOCK_D, num_warps): BLOCK_D = next_power_of_2(D), narrow rows are taken several
        at a time, and a thread holds at most 32 elements of a tensor.
    """
    block_d = triton.next_power_of_2(width)
    block_r = max(1, min(16, 1024 // block_d))
    num_warps = min(16, max(1, block_r * block_d // 256))
    return block_r, block_d, num_warps


# ------------------------------------------------------------------------------------------------
# Inside a kernel; all values are fp32


@triton.jit
def clamp(x, minimum, maximum):
    """Clamp to [minimum, maximum]; NaN stays NaN, infinite bounds are none."""
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
