"""Shared code of the kernel files: argument checks, custom ops, launch sizes, device functions.

Everything inside a kernel is fp32: every load is converted at once by ``.to(tl.float32)``, which
also makes Triton's interpreter exact for bf16.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cache, wraps
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._library.custom_ops import CustomOpDef
from torch._subclasses import FakeTensor
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


def conditions(op: str, x: Tensor, **values: Tensor) -> list[Tensor]:
    """`per_sample` of each value by its name; all must have one shape."""
    given = [per_sample(op, name, value, x) for name, value in values.items()]
    shapes = sorted({tuple(value.shape) for value in given})
    if len(shapes) > 1:
        raise ValueError(f"{op}: {', '.join(values)} must have one shape, got {shapes}")
    return given


# ------------------------------------------------------------------------------------------------
# Custom ops


def operator(launch: Callable[..., Any]) -> CustomOpDef:
    """Register a function as the custom op ``inl_core::<its name>``, for real and fake tensors.

    It takes tensors, then numbers; it allocates its results, returns them if `nothing_to_launch`,
    and otherwise launches its kernels with the device of its tensors current, because Triton does
    not infer the device from the arguments.
    """

    @wraps(launch)
    def on_device(*args: Any) -> Any:
        first = next(x for x in args if isinstance(x, Tensor))
        with torch.cuda.device(first.device) if first.is_cuda else nullcontext():
            return launch(*args)

    schema = torch.library.infer_schema(launch, mutates_args=())
    name = f"inl_core::{launch.__name__}"
    op = torch.library.custom_op(name, on_device, mutates_args=(), schema=schema)
    op.register_fake(launch)
    return op


def nothing_to_launch(x: Tensor) -> bool:
    """Whether `x` has no data or no elements; the allocated results are then the results.

    The compiler runs an op on such fake tensors to learn the shapes and dtypes of its results.
    """
    return isinstance(x, FakeTensor) or x.is_meta or x.numel() == 0


def gradient_of(op: CustomOpDef, materialize: bool = True) -> Callable[..., None]:
    """Register a backward of `op`: (ctx, all inputs of the forward, gradients of its results).

    It returns gradients of the first inputs; they are cast to the dtype of the input, and left out
    where autograd does not need them. Without `materialize` the gradient of an unused result is
    None: reading zeros instead would cost a pass.
    """

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        tensors = [x for x in inputs if x is None or isinstance(x, Tensor)]
        ctx.save_for_backward(*tensors)
        ctx.numbers = inputs[len(tensors) :]
        ctx.set_materialize_grads(materialize)

    def register(gradients: Callable[..., Any]) -> None:
        def backward(ctx: Any, *down: Tensor | None) -> tuple[Tensor | None, ...]:
            inputs = (*ctx.saved_tensors, *ctx.numbers)
            grads = [
                grad.to(x.dtype) if needed and grad is not None else None
                for grad, x, needed in zip(
                    gradients(ctx, inputs, *down), inputs, ctx.needs_input_grad, strict=False
                )
            ]
            return (*grads, *(None,) * (len(inputs) - len(grads)))

        op.register_autograd(backward, setup_context=setup_context)

    return register


def empty_tensors(*inputs: Tensor | None) -> Any:
    """A tuple of empty tensors like the inputs, of size 0 for None; the first is not None."""
    first = inputs[0]
    assert first is not None
    return tuple(first.new_empty(0) if x is None else x.new_empty(x.shape) for x in inputs)


# ------------------------------------------------------------------------------------------------
# Launches

REGISTERS_PER_PROCESSOR = 65_536
"""Of a multiprocessor, on every GPU since V100."""

BLOCK_P, BLOCK_C = 32, 64
"""Partial sums and columns that a program of `add_parts` loads at once."""


def as_rows(x: Tensor) -> Tensor:
    """View `x` (..., D) as (rows, D) with contiguous channels; copied only if that is impossible.

    The row stride may exceed D, so a chunk of a wider tensor is not copied.
    """
    # Not -1: with an empty batch and D = 0 the number of rows cannot be inferred.
    flat = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    return flat if flat.stride(1) == 1 or flat.shape[1] == 1 else flat.contiguous()


def rows_of(*tensors: Tensor | None) -> tuple[list[Any], list[int]]:
    """`as_rows` of every tensor and their row strides in elements; None stays None, of stride 0."""
    rows = [None if x is None else as_rows(x) for x in tensors]
    return rows, [0 if x is None else x.stride(0) for x in rows]


def contiguous(x: Tensor | None) -> Tensor | None:
    """An optional tensor, contiguous."""
    return None if x is None else x.contiguous()


def is_vector(x: Tensor, h: Tensor) -> bool:
    """Whether `x` has one value, or D values for the last dimension of `h`."""
    lead = (1,) * (h.ndim - x.ndim)
    return x.numel() == 1 or (*lead, *x.shape) == (*(1,) * (h.ndim - 1), h.shape[-1])


@cache
def _processors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def one_wave(x: Tensor, blocks: int, warps: int, registers: int) -> int:
    """Programs of a persistent launch over `blocks`: as many as x's device runs at once.

    They have `warps` warps, and `registers` registers a thread: each kernel file states those on
    H100 and H200, and a test compares them with what the compiler gives it. More programs would run
    after the others and leave more partial sums.

    In the interpreter it is 3, so that small tests add up several partial sums.
    """
    wanted = 3
    if x.is_cuda:
        resident = max(1, REGISTERS_PER_PROCESSOR // (32 * warps * registers))
        wanted = _processors(x.get_device()) * resident
    return max(1, min(blocks, wanted))


def row_config(width: int, rows: int = 16, per_thread: int = 8) -> dict[str, int]:
    """Constants of a kernel that reduces over rows of size `width`, of which it has `rows` or more.

    BLOCK_D is the next power of 2; narrow rows are processed several at a time. A thread holds
    `per_thread` elements of each tensor, more only where a row needs over 16 warps. With 32 of them
    a row of up to 1024 is in one warp: its sums need no barrier, more loads are in flight, and
    masked columns that fill whole loads cost nothing, because D is known to the compiler.
    """
    block_d = triton.next_power_of_2(width)
    block_r = max(1, min(16, 1024 // block_d, triton.next_power_of_2(rows)))
    num_warps = min(16, max(1, block_r * block_d // (32 * per_thread)))
    return {"D": width, "BLOCK_R": block_r, "BLOCK_D": block_d, "num_warps": num_warps}


def tile(width: int, rows: int = 1024) -> tuple[int, int, int]:
    """(BLOCK_R, BLOCK_D, num_warps) of a kernel that is elementwise along `rows` of size `width`.

    BLOCK_D is the widest power of two up to 512 that wastes at most 1/16 of its lanes, at least
    128: 256 for D = 768, 128 for D = 1152.
    """
    block_d = min(512, triton.next_power_of_2(width))
    while block_d > 128 and 16 * (-width % block_d) > width:
        block_d //= 2
    block_r = min(1024 // block_d, triton.next_power_of_2(rows))
    return block_r, block_d, max(1, block_r * block_d // 256)


def sample_config(x: Tensor, samples: int, per_thread: int = 8) -> tuple[int, int, dict[str, int]]:
    """Launch sizes for the rows `x` (R, D) of `samples` samples; a block never spans two samples.

    Returns:
        (tokens per sample, blocks per sample, `row_config`).
    """
    tokens = x.shape[0] // samples
    sizes = row_config(x.shape[1], tokens, per_thread)
    return tokens, triton.cdiv(tokens, sizes["BLOCK_R"]), sizes


def sample_parts(x: Tensor, samples: int, blocks: int, warps: int, registers: int) -> int:
    """Programs that share the `blocks` of a sample, in `one_wave` over all samples."""
    return max(1, min(blocks, one_wave(x, samples * blocks, warps, registers) // samples))


def partial_sums(results: Sequence[Tensor], parts: int) -> Sequence[Tensor] | Tensor:
    """Where the programs of a sample store sums for `results`, each (..., D) of all samples.

    One program stores its result; several store fp32 (results, samples, parts, D) for `add_parts`.
    """
    if parts == 1:
        return results
    size = (len(results), results[0].shape[:-1].numel(), parts, results[0].shape[-1])
    return results[0].new_empty(size, dtype=torch.float32)


def add_parts(partials: Sequence[Tensor] | Tensor, results: Sequence[Tensor]) -> None:
    """Sum `partial_sums` over the parts into `results`, at most three, in one launch."""
    if isinstance(partials, Tensor):
        count, samples, parts, width = partials.shape
        grid = (samples * triton.cdiv(width, BLOCK_C), count)
        pointers = (*results, None, None)[:3]
        _add_parts[grid](partials, *pointers, samples, parts, width, BLOCK_P, BLOCK_C)


# ------------------------------------------------------------------------------------------------
# Device functions; all values are fp32


@triton.jit
def column_sum(pointer, column, inside, count, width, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Sum a (count, width) fp32 buffer over its rows, for the columns `column` (1, BLOCK_C)."""
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for start in range(0, count, BLOCK_P):
        row = start + tl.arange(0, BLOCK_P)[:, None]
        total += load(pointer + row * width + column, (row < count) & inside)
    return tl.sum(total, axis=0, keep_dims=True)


@triton.jit
def _add_parts(
    parts_ptr, first_ptr, second_ptr, third_ptr, samples, parts, D,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(D, BLOCK_C)
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    column = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    inside = column < D
    result = tl.program_id(1)
    start = parts_ptr + (result * samples + sample) * parts * D
    total = column_sum(start, column, inside, parts, D, BLOCK_P, BLOCK_C)
    at = sample * D + column
    store(first_ptr + at, total, inside & (result == 0))
    if second_ptr is not None:
        store(second_ptr + at, total, inside & (result == 1))
    if third_ptr is not None:
        store(third_ptr + at, total, inside & (result == 2))


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
