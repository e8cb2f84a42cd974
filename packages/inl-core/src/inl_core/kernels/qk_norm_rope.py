"""RMS norm of every query and key head and rotary embedding in Triton, in one pass.

A head is held as its two halves 1 and 2, because channel i rotates with channel i + Dh/2. With
r = rsqrt(mean(x²) + eps), n = x · r and z = n · w:

    y1 = z1 · cos − z2 · sin                y2 = z2 · cos + z1 · sin
    dz1 = dy1 · cos + dy2 · sin             dz2 = dy2 · cos − dy1 · sin
    dx = r · (w·dz − n · mean(n·w·dz))      dw = Σ_rows dz · n

One launch covers queries and keys, read at their strides: slices of a projection are not copied.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from inl_core.kernels import _common
from inl_core.kernels._common import load, store

__all__ = ["qk_norm_rope", "qk_norm_rope_bwd", "qk_norm_rope_fwd", "takes"]

OP = "qk_norm_rope"

REGISTERS = 96
"""The most registers that a thread of the backward needs."""


@triton.jit
def _offsets(
    block, tokens, batch_stride, token_stride, head_stride,
    HEADS: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Row numbers of a block, their batch and token indices, and their offsets in memory."""
    row = block * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    batch = (row // HEADS // tokens).to(tl.int64)
    token = (row // HEADS % tokens).to(tl.int64)
    head = (row % HEADS).to(tl.int64)
    start = batch * batch_stride + token * token_stride + head * head_stride
    return row, batch, token, start


@triton.jit
def _inverse_rms(first, second, live, eps, HALF: tl.constexpr):
    """`inl_core.kernels.rms_norm.inverse_rms` of heads held as two halves."""
    mean = tl.sum(first * first + second * second, axis=1, keep_dims=True) / (2 * HALF)
    return tl.rsqrt(tl.where(live, mean + eps, 1.0))


@triton.jit
def _forward_block(
    block, x_ptr, weight_ptr, cos_ptr, sin_ptr, y_ptr, rows, tokens, batch_stride, token_stride,
    head_stride, table_batch_stride, table_token_stride, eps,
    HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    row, batch, token, start = _offsets(
        block, tokens, batch_stride, token_stride, head_stride, HEADS, BLOCK_R
    )
    column = tl.arange(0, BLOCK_H)[None, :]
    inside = column < HALF
    mask = (row < rows) & inside
    first = load(x_ptr + start + column, mask)
    second = load(x_ptr + start + HALF + column, mask)
    r = _inverse_rms(first, second, row < rows, eps, HALF)
    first *= r
    second *= r
    if weight_ptr is not None:
        first *= load(weight_ptr + column, inside)
        second *= load(weight_ptr + HALF + column, inside)
    angle = batch * table_batch_stride + token * table_token_stride + column
    cos, sin = load(cos_ptr + angle, mask), load(sin_ptr + angle, mask)
    out = y_ptr + row.to(tl.int64) * (2 * HALF) + column
    store(out, first * cos - second * sin, mask)
    store(out + HALF, second * cos + first * sin, mask)


@triton.jit
def _forward(
    q_ptr, k_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr,
    q_rows, k_rows, tokens,
    q_batch_stride, q_token_stride, q_head_stride, k_batch_stride, k_token_stride, k_head_stride,
    table_batch_stride, table_token_stride, eps,
    HEADS: tl.constexpr, K_HEADS: tl.constexpr,
    HALF: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    q_blocks = tl.cdiv(q_rows, BLOCK_R)
    block = tl.program_id(0)
    if block < q_blocks:
        _forward_block(
            block, q_ptr, q_weight_ptr, cos_ptr, sin_ptr, q_out_ptr, q_rows, tokens,
            q_batch_stride, q_token_stride, q_head_stride,
            table_batch_stride, table_token_stride, eps, HEADS, HALF, BLOCK_R, BLOCK_H,
        )  # fmt: skip
    else:
        _forward_block(
            block - q_blocks, k_ptr, k_weight_ptr, cos_ptr, sin_ptr, k_out_ptr, k_rows, tokens,
            k_batch_stride, k_token_stride, k_head_stride,
            table_batch_stride, table_token_stride, eps, K_HEADS, HALF, BLOCK_R, BLOCK_H,
        )  # fmt: skip


@triton.jit
def _backward_rows(
    dy_ptr, x_ptr, weight_ptr, cos_ptr, sin_ptr, dx_ptr, dweight_ptr, rows, tokens,
    dy_batch_stride, dy_token_stride, dy_head_stride, batch_stride, token_stride, head_stride,
    table_batch_stride, table_token_stride, eps,
    HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK_H)[None, :]
    inside = column < HALF
    if weight_ptr is not None:
        weight1 = load(weight_ptr + column, inside)
        weight2 = load(weight_ptr + HALF + column, inside)
    dweight1 = tl.zeros((BLOCK_R, BLOCK_H), dtype=tl.float32)
    dweight2 = tl.zeros((BLOCK_R, BLOCK_H), dtype=tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(rows, BLOCK_R), tl.num_programs(0)):
        row, batch, token, start = _offsets(
            block, tokens, batch_stride, token_stride, head_stride, HEADS, BLOCK_R
        )
        mask = (row < rows) & inside
        head = (row % HEADS).to(tl.int64)
        dy = batch * dy_batch_stride + token * dy_token_stride + head * dy_head_stride + column
        angle = batch * table_batch_stride + token * table_token_stride + column
        first = load(x_ptr + start + column, mask)
        second = load(x_ptr + start + HALF + column, mask)
        dy1, dy2 = load(dy_ptr + dy, mask), load(dy_ptr + dy + HALF, mask)
        cos, sin = load(cos_ptr + angle, mask), load(sin_ptr + angle, mask)
        r = _inverse_rms(first, second, row < rows, eps, HALF)
        first *= r
        second *= r
        dz1 = dy1 * cos + dy2 * sin
        dz2 = dy2 * cos - dy1 * sin
        if dweight_ptr is not None:
            dweight1 += dz1 * first
            dweight2 += dz2 * second
        if weight_ptr is not None:
            dz1 *= weight1
            dz2 *= weight2
        mean = tl.sum(first * dz1 + second * dz2, axis=1, keep_dims=True) / (2 * HALF)
        out = dx_ptr + row.to(tl.int64) * (2 * HALF) + column
        store(out, r * (dz1 - first * mean), mask)
        store(out + HALF, r * (dz2 - second * mean), mask)
    if dweight_ptr is not None:
        partial = dweight_ptr + tl.program_id(0) * (2 * HALF) + column
        store(partial, tl.sum(dweight1, axis=0, keep_dims=True), inside)
        store(partial + HALF, tl.sum(dweight2, axis=0, keep_dims=True), inside)


@triton.jit
def _backward(
    dq_out_ptr, dk_out_ptr, q_ptr, k_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr,
    dq_ptr, dk_ptr, dq_weight_ptr, dk_weight_ptr, q_rows, k_rows, tokens,
    dq_batch_stride, dq_token_stride, dq_head_stride,
    dk_batch_stride, dk_token_stride, dk_head_stride,
    q_batch_stride, q_token_stride, q_head_stride, k_batch_stride, k_token_stride, k_head_stride,
    table_batch_stride, table_token_stride, eps,
    HEADS: tl.constexpr, K_HEADS: tl.constexpr,
    HALF: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    _backward_rows(
        dq_out_ptr, q_ptr, q_weight_ptr, cos_ptr, sin_ptr, dq_ptr, dq_weight_ptr, q_rows, tokens,
        dq_batch_stride, dq_token_stride, dq_head_stride,
        q_batch_stride, q_token_stride, q_head_stride,
        table_batch_stride, table_token_stride, eps, HEADS, HALF, BLOCK_R, BLOCK_H,
    )  # fmt: skip
    _backward_rows(
        dk_out_ptr, k_ptr, k_weight_ptr, cos_ptr, sin_ptr, dk_ptr, dk_weight_ptr, k_rows, tokens,
        dk_batch_stride, dk_token_stride, dk_head_stride,
        k_batch_stride, k_token_stride, k_head_stride,
        table_batch_stride, table_token_stride, eps, K_HEADS, HALF, BLOCK_R, BLOCK_H,
    )  # fmt: skip


def _config(width: int, heads: int, k_heads: int) -> dict[str, int]:
    """Constants of a launch; heads are narrow, so a program takes several."""
    block_h = triton.next_power_of_2(width // 2)
    block_r = max(1, min(32, 1024 // block_h))
    return {
        "HEADS": heads, "K_HEADS": k_heads, "HALF": width // 2, "BLOCK_R": block_r,
        "BLOCK_H": block_h, "num_warps": min(16, max(1, block_r * block_h // 256)),
    }  # fmt: skip


def _heads(x: Tensor) -> Tensor:
    """`x` (B, N, H, Dh) with contiguous channels; copied only if they are not."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _tables(cos: Tensor, sin: Tensor, batch: int) -> tuple[Tensor, Tensor]:
    """Both tables as (B, N, Dh/2) views with equal strides."""
    size = (batch, *cos.shape[-2:])
    return cos.contiguous().expand(size), sin.contiguous().expand(size)


@_common.operator
def qk_norm_rope_fwd(
    q: Tensor, k: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor,
    sin: Tensor, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Launch the forward kernel; `qk_norm_rope` checks the arguments."""
    results = q.new_empty(q.shape), k.new_empty(k.shape)
    if _common.nothing_to_launch(q) and _common.nothing_to_launch(k):
        return results
    q, k = _heads(q), _heads(k)
    cos, sin = _tables(cos, sin, q.shape[0])
    sizes = _config(q.shape[3], q.shape[2], k.shape[2])
    rows = [x.shape[:-1].numel() for x in (q, k)]
    programs = sum(triton.cdiv(count, sizes["BLOCK_R"]) for count in rows)
    _forward[(programs,)](
        q, k, _common.contiguous(q_weight), _common.contiguous(k_weight), cos, sin, *results,
        *rows, q.shape[1], *q.stride()[:3], *k.stride()[:3], *cos.stride()[:2], eps, **sizes,
    )  # fmt: skip
    return results


@_common.operator
def qk_norm_rope_bwd(
    dq_out: Tensor, dk_out: Tensor, q: Tensor, k: Tensor, q_weight: Tensor | None,
    k_weight: Tensor | None, cos: Tensor, sin: Tensor, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Launch the backward kernel: (dq, dk, dq_weight, dk_weight).

    The gradients of the weights are fp32, of size 0 if there is no weight.
    """
    dq, dk = q.new_empty(q.shape), k.new_empty(k.shape)
    widths = [0 if weight is None else q.shape[-1] for weight in (q_weight, k_weight)]
    if _common.nothing_to_launch(q) and _common.nothing_to_launch(k):
        dq_weight, dk_weight = (q.new_zeros(width, dtype=torch.float32) for width in widths)
        return dq, dk, dq_weight, dk_weight
    tensors = [_heads(x) for x in (dq_out, dk_out, q, k)]
    cos, sin = _tables(cos, sin, q.shape[0])
    sizes = _config(q.shape[3], q.shape[2], k.shape[2])
    rows = [x.shape[:-1].numel() for x in (q, k)]
    blocks = triton.cdiv(max(rows), sizes["BLOCK_R"])
    programs = _common.one_wave(q, blocks, sizes["num_warps"], REGISTERS)
    partials = [q.new_empty(programs, width, dtype=torch.float32) for width in widths]
    _backward[(programs,)](
        *tensors, _common.contiguous(q_weight), _common.contiguous(k_weight), cos, sin, dq, dk,
        *(partial if partial.shape[1] else None for partial in partials),
        *rows, q.shape[1], *(stride for x in tensors for stride in x.stride()[:3]),
        *cos.stride()[:2], eps, **sizes,
    )  # fmt: skip
    return dq, dk, partials[0].sum(0), partials[1].sum(0)


@_common.gradient_of(qk_norm_rope_fwd)
def _(ctx: Any, inputs: tuple[Any, ...], dq_out: Tensor, dk_out: Tensor) -> tuple[Tensor, ...]:
    return qk_norm_rope_bwd(dq_out, dk_out, *inputs)


def takes(
    q: Tensor, k: Tensor, q_weight: Any, k_weight: Any, cos: Tensor, sin: Tensor, *_: Any
) -> bool:
    """Whether the kernel supports these: heads (B, N, H, Dh) and a table that is not learned."""
    learned = torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad)
    return q.ndim == k.ndim == 4 and cos.ndim in (2, 3) and not learned


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """`inl_core.reference.qk_norm_rope` as one kernel forward and one backward.

    `q` and `k` are fp32, bf16 or fp16 and read at their strides; cos and sin get no gradient. The
    results are contiguous.

    Raises:
        ValueError: If a dtype, a device or a shape does not fit, or the table needs a gradient.
    """
    _common.check_inputs(OP, q, k, q_weight, k_weight, cos, sin)
    if q.ndim != 4 or k.ndim != 4 or (*k.shape[:2], k.shape[3]) != (*q.shape[:2], q.shape[3]):
        raise ValueError(
            f"{OP}: q and k must be (B, N, H, Dh) and (B, N, Hk, Dh), "
            f"got {tuple(q.shape)} and {tuple(k.shape)}"
        )
    batch, tokens, _, width = q.shape
    _common.check_width(OP, width)
    _common.check_weight(OP, "q_weight", q_weight, width)
    _common.check_weight(OP, "k_weight", k_weight, width)
    allowed = [(tokens, width // 2), (1, tokens, width // 2), (batch, tokens, width // 2)]
    if width % 2 or cos.shape != sin.shape or tuple(cos.shape) not in allowed:
        raise ValueError(
            f"{OP}: head_dim {width} over {tokens} tokens needs cos and sin of shape "
            f"{allowed[0]} or {allowed[2]}, got {tuple(cos.shape)} and {tuple(sin.shape)}"
        )
    if not takes(q, k, q_weight, k_weight, cos, sin, eps):
        raise ValueError(
            f"the Triton kernel of {OP} gives cos and sin no gradient, but one of them needs it; "
            f"inl_core.reference.{OP} does"
        )
    return qk_norm_rope_fwd(q, k, q_weight, k_weight, cos, sin, eps)
