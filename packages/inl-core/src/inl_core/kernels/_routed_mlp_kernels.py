"""Grouped matrix products over the segments of a routing plan: the kernels of `routed_mlp`.

A tile is BLOCK_T rows of one expert. Tokens are read and written through `order` inside the
products, so no permuted copy of x, y or their gradients exists. The number of tiles is known on
the device only; the grid has the most there can be, and a program without a tile ends at once.

Operands keep their dtype until the dot, which takes them by asynchronous copies. WIDE turns them
to fp32 first: for fp32 (with PRECISION "ieee") and in the interpreter.
"""

from __future__ import annotations

import triton
import triton.language as tl

from inl_core.kernels._common import load, sigmoid, store

GROUP = tl.constexpr(8)


@triton.jit
def find_tile(
    offsets_ptr, tiles, columns, E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_T: tl.constexpr
):
    """(expert, first row, end of the expert, column tile) of a program; expert >= E: it has none.

    GROUP row tiles share their column tiles in time, so that weights are read from the cache.
    """
    program = tl.program_id(0)
    first = program // (GROUP * columns) * GROUP
    height = tl.minimum(tiles - first, GROUP)
    tile = first + program % (GROUP * columns) % height
    column = program % (GROUP * columns) // height

    experts = tl.arange(0, BLOCK_E)
    ends = tl.load(offsets_ptr + experts, mask=experts < E, other=0)
    starts = tl.load(offsets_ptr + experts - 1, mask=(experts > 0) & (experts < E), other=0)
    counts = (ends - starts + BLOCK_T - 1) // BLOCK_T
    upto = tl.cumsum(counts, 0)
    expert = tl.sum((upto <= tile).to(tl.int32), 0)
    mine = experts == expert
    row = tl.sum(tl.where(mine, starts + (tile - upto + counts) * BLOCK_T, 0), 0)
    end = tl.sum(tl.where(mine, ends, 0), 0)
    return expert.to(tl.int64), row, end, column


@triton.jit
def operand(pointer, mask, WIDE: tl.constexpr):
    """Load a tile for a dot, 0 where masked."""
    value = tl.load(pointer, mask=mask, other=0.0)
    return value.to(tl.float32) if WIDE else value


@triton.jit
def gate_up_kernel(
    x_ptr, order_ptr, offsets_ptr, gate_ptr, up_ptr, inner_ptr, gated_ptr, upped_ptr,
    tiles, x_stride, E: tl.constexpr, D: tl.constexpr, I: tl.constexpr,  # noqa: E741
    WIDE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """inner = silu(x·gateᵀ) * (x·upᵀ) for grouped rows, tokens gathered; keeps both products."""
    expert, first, end, column = find_tile(
        offsets_ptr, tiles, tl.cdiv(I, BLOCK_N), E, BLOCK_E, BLOCK_T
    )
    if expert < E:
        row = first + tl.arange(0, BLOCK_T)[:, None]
        n = column * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        k = tl.arange(0, BLOCK_K)
        token = tl.load(order_ptr + row, mask=row < end, other=0)
        x_at = x_ptr + token * x_stride + k[None, :]
        weight_at = expert * I * D + n * D + k[:, None]
        gated = tl.zeros((BLOCK_T, BLOCK_N), dtype=tl.float32)
        upped = tl.zeros((BLOCK_T, BLOCK_N), dtype=tl.float32)
        for done in range(0, D, BLOCK_K):
            inside = k < D - done
            x = operand(x_at + done, (row < end) & inside[None, :], WIDE)
            wanted = (n < I) & inside[:, None]
            weight = operand(gate_ptr + weight_at + done, wanted, WIDE)
            gated = tl.dot(x, weight, gated, input_precision=PRECISION)
            weight = operand(up_ptr + weight_at + done, wanted, WIDE)
            upped = tl.dot(x, weight, upped, input_precision=PRECISION)
        mask = (row < end) & (n < I)
        out = row.to(tl.int64) * I + n
        store(inner_ptr + out, gated * sigmoid(gated) * upped, mask)
        if gated_ptr is not None:
            store(gated_ptr + out, gated, mask)
            store(upped_ptr + out, upped, mask)


@triton.jit
def down_kernel(
    inner_ptr, order_ptr, offsets_ptr, down_ptr, y_ptr,
    tiles, E: tl.constexpr, D: tl.constexpr, I: tl.constexpr,  # noqa: E741
    WIDE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y = inner·downᵀ, each row written to its token."""
    expert, first, end, column = find_tile(
        offsets_ptr, tiles, tl.cdiv(D, BLOCK_N), E, BLOCK_E, BLOCK_T
    )
    if expert < E:
        row = first + tl.arange(0, BLOCK_T)[:, None]
        n = column * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        k = tl.arange(0, BLOCK_K)
        inner_at = inner_ptr + row.to(tl.int64) * I + k[None, :]
        weight_at = down_ptr + expert * D * I + n * I + k[:, None]
        y = tl.zeros((BLOCK_T, BLOCK_N), dtype=tl.float32)
        for done in range(0, I, BLOCK_K):
            inside = k < I - done
            inner = operand(inner_at + done, (row < end) & inside[None, :], WIDE)
            weight = operand(weight_at + done, (n < D) & inside[:, None], WIDE)
            y = tl.dot(inner, weight, y, input_precision=PRECISION)
        token = tl.load(order_ptr + row, mask=row < end, other=0)
        store(y_ptr + token * D + n, y, (row < end) & (n < D))


@triton.jit
def d_inner_kernel(
    dy_ptr, order_ptr, offsets_ptr, down_ptr, gated_ptr, upped_ptr,
    dgated_ptr, dupped_ptr, inner_ptr,
    tiles, dy_stride, E: tl.constexpr, D: tl.constexpr, I: tl.constexpr,  # noqa: E741
    WIDE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """d_inner = dy·down, tokens gathered, then through SwiGLU; inner itself once more if wanted."""
    expert, first, end, column = find_tile(
        offsets_ptr, tiles, tl.cdiv(I, BLOCK_N), E, BLOCK_E, BLOCK_T
    )
    if expert < E:
        row = first + tl.arange(0, BLOCK_T)[:, None]
        n = column * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        k = tl.arange(0, BLOCK_K)
        token = tl.load(order_ptr + row, mask=row < end, other=0)
        dy_at = dy_ptr + token * dy_stride + k[None, :]
        weight_at = down_ptr + expert * D * I + n + k[:, None] * I
        d_inner = tl.zeros((BLOCK_T, BLOCK_N), dtype=tl.float32)
        for done in range(0, D, BLOCK_K):
            inside = k < D - done
            dy = operand(dy_at + done, (row < end) & inside[None, :], WIDE)
            weight = operand(weight_at + done * I, (n < I) & inside[:, None], WIDE)
            d_inner = tl.dot(dy, weight, d_inner, input_precision=PRECISION)
        mask = (row < end) & (n < I)
        out = row.to(tl.int64) * I + n
        gated = load(gated_ptr + out, mask)
        upped = load(upped_ptr + out, mask)
        rest = sigmoid(-gated)  # 1 - sigmoid without cancellation
        slope = (1.0 - rest) * (1.0 + gated * rest)
        silu = gated * sigmoid(gated)
        store(dgated_ptr + out, d_inner * upped * slope, mask)
        store(dupped_ptr + out, d_inner * silu, mask)
        if inner_ptr is not None:
            store(inner_ptr + out, silu * upped, mask)


@triton.jit
def d_x_kernel(
    dgated_ptr, dupped_ptr, order_ptr, offsets_ptr, gate_ptr, up_ptr, dx_ptr,
    tiles, E: tl.constexpr, D: tl.constexpr, I: tl.constexpr,  # noqa: E741
    WIDE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dx = dgated·gate + dupped·up, each row written to its token."""
    expert, first, end, column = find_tile(
        offsets_ptr, tiles, tl.cdiv(D, BLOCK_N), E, BLOCK_E, BLOCK_T
    )
    if expert < E:
        row = first + tl.arange(0, BLOCK_T)[:, None]
        n = column * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        k = tl.arange(0, BLOCK_K)
        row_at = row.to(tl.int64) * I + k[None, :]
        weight_at = expert * I * D + n + k[:, None] * D
        dx = tl.zeros((BLOCK_T, BLOCK_N), dtype=tl.float32)
        for done in range(0, I, BLOCK_K):
            inside = k < I - done
            given, wanted = (row < end) & inside[None, :], (n < D) & inside[:, None]
            gradient = operand(dgated_ptr + row_at + done, given, WIDE)
            weight = operand(gate_ptr + weight_at + done * D, wanted, WIDE)
            dx = tl.dot(gradient, weight, dx, input_precision=PRECISION)
            gradient = operand(dupped_ptr + row_at + done, given, WIDE)
            weight = operand(up_ptr + weight_at + done * D, wanted, WIDE)
            dx = tl.dot(gradient, weight, dx, input_precision=PRECISION)
        token = tl.load(order_ptr + row, mask=row < end, other=0)
        store(dx_ptr + token * D + n, dx, (row < end) & (n < D))


@triton.jit
def d_weight_kernel(
    a_ptr, b_ptr, order_ptr, offsets_ptr, dweight_ptr, a_stride, b_stride,
    M: tl.constexpr, N: tl.constexpr, A_BY_TOKEN: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dweight_e = aᵀ·b over the rows of expert e; a or else b is ordered by token and gathered."""
    across = tl.cdiv(N, BLOCK_N)
    tile = tl.program_id(0) % (tl.cdiv(M, BLOCK_M) * across)
    expert = tl.program_id(0) // (tl.cdiv(M, BLOCK_M) * across)
    end = tl.load(offsets_ptr + expert)
    first = tl.load(offsets_ptr + expert - 1, mask=expert > 0, other=0)
    m = tile // across * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile % across * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    dweight = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    token = tl.load(order_ptr + first + k, mask=first + k < end, other=0)
    for at in range(first, end, BLOCK_K):
        row = at + k
        a_row, b_row = (token, row.to(tl.int64)) if A_BY_TOKEN else (row.to(tl.int64), token)
        given = (row < end)[:, None]
        a = operand(a_ptr + a_row[:, None] * a_stride + m[None, :], given & (m < M)[None, :], WIDE)
        b = operand(b_ptr + b_row[:, None] * b_stride + n[None, :], given & (n < N)[None, :], WIDE)
        dweight = tl.dot(tl.trans(a), b, dweight, input_precision=PRECISION)
        token = tl.load(order_ptr + row + BLOCK_K, mask=row + BLOCK_K < end, other=0)
    out = expert.to(tl.int64) * M * N + m[:, None] * N + n[None, :]
    store(dweight_ptr + out, dweight, (m < M)[:, None] & (n < N)[None, :])
