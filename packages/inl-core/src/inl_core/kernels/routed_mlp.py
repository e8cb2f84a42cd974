"""Token-routed SwiGLU MLP in Triton: grouped products with gather and scatter inside.

For the rows of expert e, with σ the logistic function, s = σ(g) and tokens in any order:

    g = x·gateₑᵀ     u = x·upₑᵀ     h = g · s · u     y = h·downₑᵀ
    dh = dy·downₑ    dg = dh · u · s · (1 + g · (1 − s))    du = dh · g · s
    dx = dg·gateₑ + du·upₑ
    dgateₑ = dgᵀ·x     dupₑ = duᵀ·x     ddownₑ = dyᵀ·h      summed over the rows of e

Two launches forward (x to h, h to y), two backward for dx and one for each weight. g and u are
saved for the backward, in the dtype of x; h is recomputed there.

A tile is BLOCK_T rows of one expert. Tokens are read and written through `order` inside the
products, so there are no permuted copies of x, y or their gradients. The number of tiles is known
on the device only; the grid has the largest possible number, and a program without a tile returns.

Operands keep their dtype until the dot, which loads them by asynchronous copies. WIDE converts them
to fp32 first: for fp32 (with PRECISION "ieee") and in the interpreter.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from inl_core.kernels import _common
from inl_core.kernels._common import load, sigmoid, store
from inl_core.segments import RoutingPlan, check_routed_mlp

__all__ = ["routed_mlp", "routed_mlp_bwd", "routed_mlp_fwd"]


GROUP = tl.constexpr(8)


@triton.jit
def find_tile(
    offsets_ptr, tiles, columns, E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_T: tl.constexpr
):
    """(expert, first row, end of the expert, column tile) of a program; no tile if expert >= E.

    GROUP row tiles run through the same column tiles together, so that weights stay in the cache.
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
    """inner = silu(x·gateᵀ) * (x·upᵀ) of grouped rows, gathered by token; stores both products."""
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
    """d_inner = dy·down, gathered by token, then the SwiGLU backward; optionally inner again."""
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
    """dweight_e = aᵀ·b over the rows of expert e; a or b is ordered by token and gathered."""
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


def _blocks(dtype: torch.dtype) -> tuple[int, int, int, int]:
    """(rows, columns, depth, warps) of a tile: at most 96 KiB of shared memory in three stages."""
    if _common.INTERPRETED:
        return 16, 32, 16, 4  # so that small tensors in tests have several tiles
    return (64, 64, 32, 8) if dtype == torch.float32 else (128, 128, 64, 8)


def _dot_options(dtype: torch.dtype) -> dict[str, Any]:
    wide = _common.INTERPRETED or dtype == torch.float32
    return {"WIDE": wide, "PRECISION": "ieee" if wide else "tf32"}


def _tile_options(
    kernel: Any, experts: int, inner: int, width: int, dtype: torch.dtype
) -> dict[str, Any]:
    """Constants of a launch over row tiles; kernels with more operands take smaller tiles."""
    rows, columns, depth, warps = _blocks(dtype)
    if kernel in (gate_up_kernel, d_inner_kernel):  # two accumulators; one and two more operands
        columns //= 2
    if kernel is d_x_kernel:  # two products a step
        depth = max(16, depth // 2)
    return {
        "E": experts, "D": width, "I": inner, **_dot_options(dtype),
        "BLOCK_E": triton.next_power_of_2(experts), "BLOCK_T": rows, "BLOCK_N": columns,
        "BLOCK_K": depth, "num_warps": warps,
    }  # fmt: skip


def _over_rows(kernel: Any, tensors: list[Tensor | None], strides: list[int], gate: Tensor) -> None:
    """Launch `kernel` over the largest number of row tiles that T tokens can have."""
    experts, inner, width = gate.shape
    options = _tile_options(kernel, experts, inner, width, gate.dtype)
    tokens = next(t.shape[0] for t in tensors if t is not None)
    # Each expert with tokens wastes less than one tile.
    used = min(experts, tokens)
    tiles = (tokens + used * (options["BLOCK_T"] - 1)) // options["BLOCK_T"]
    made = inner if kernel in (gate_up_kernel, d_inner_kernel) else width
    kernel[(tiles * triton.cdiv(made, options["BLOCK_N"]),)](*tensors, tiles, *strides, **options)


def _weight_options(m: int, n: int, by_token: bool, dtype: torch.dtype) -> dict[str, Any]:
    _, columns, depth, warps = _blocks(dtype)
    return {
        "M": m, "N": n, "A_BY_TOKEN": by_token, **_dot_options(dtype),
        "BLOCK_M": columns, "BLOCK_N": columns, "BLOCK_K": depth, "num_warps": warps,
    }  # fmt: skip


def _d_weight(a: Tensor, b: Tensor, order: Tensor, offsets: Tensor, by_token: bool) -> Tensor:
    """Gradient (E, M, N) of a stacked weight; `a` is ordered by token if `by_token`, else `b`."""
    m, n, experts = a.shape[1], b.shape[1], offsets.shape[0]
    options = _weight_options(m, n, by_token, a.dtype)
    dweight = torch.empty(experts, m, n, dtype=a.dtype, device=a.device)
    tiles = triton.cdiv(m, options["BLOCK_M"]) * triton.cdiv(n, options["BLOCK_N"])
    d_weight_kernel[(experts * tiles,)](
        a, b, order, offsets, dweight, a.stride(0), b.stride(0), **options
    )
    return dweight


@_common.operator
def routed_mlp_fwd(
    x: Tensor, order: Tensor, offsets: Tensor, gate: Tensor, up: Tensor, down: Tensor, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the forward kernels on rows (T, D): (y, g, u); g and u have no rows unless `keep`."""
    y = x.new_empty(x.shape)
    tokens, inner = x.shape[0], gate.shape[1]
    gated, upped = (x.new_empty(tokens if keep else 0, inner) for _ in range(2))
    if _common.nothing_to_launch(x):
        return y, gated, upped
    x, h, kept = _common.as_rows(x), x.new_empty(tokens, inner), (gated, upped)
    gate, up, down = gate.contiguous(), up.contiguous(), down.contiguous()
    tensors = [x, order, offsets, gate, up, h, *(kept if keep else (None, None))]
    _over_rows(gate_up_kernel, tensors, [x.stride(0)], gate)
    _over_rows(down_kernel, [h, order, offsets, down, y], [], gate)
    return y, gated, upped


@_common.operator
def routed_mlp_bwd(
    dy: Tensor, x: Tensor, order: Tensor, offsets: Tensor, gate: Tensor, up: Tensor, down: Tensor,
    gated: Tensor, upped: Tensor, need_dx: bool, need_dw: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Launch the backward kernels: (dx, dgate, dup, ddown), of size 0 where not needed."""
    dx, dgate, dup, ddown = (x.new_empty(0) for _ in range(4))
    if need_dx:
        dx = x.new_empty(x.shape)
    if _common.nothing_to_launch(x):
        if need_dw:
            dgate, dup, ddown = (x.new_zeros(weight.shape) for weight in (gate, up, down))
        return dx, dgate, dup, ddown
    dy, x = _common.as_rows(dy), _common.as_rows(x)
    gate, up, down = gate.contiguous(), up.contiguous(), down.contiguous()
    dgated, dupped = torch.empty_like(gated), torch.empty_like(upped)
    h = torch.empty_like(gated) if need_dw else None
    tensors = [dy, order, offsets, down, gated, upped, dgated, dupped, h]
    _over_rows(d_inner_kernel, tensors, [dy.stride(0)], gate)
    if need_dx:
        _over_rows(d_x_kernel, [dgated, dupped, order, offsets, gate, up, dx], [], gate)
    if h is not None:
        dgate = _d_weight(dgated, x, order, offsets, by_token=False)
        dup = _d_weight(dupped, x, order, offsets, by_token=False)
        ddown = _d_weight(dy, h, order, offsets, by_token=True)
    return dx, dgate, dup, ddown


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:6], *output[1:])
    ctx.set_materialize_grads(False)  # g and u are outputs only for this backward


def _gradients(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    need_dx, need_dw = ctx.needs_input_grad[0], any(ctx.needs_input_grad[3:6])
    dx, *weights = routed_mlp_bwd(dy, *ctx.saved_tensors, need_dx, need_dw)
    given = [dweight if need_dw else None for dweight in weights]
    return dx if need_dx else None, None, None, *given, None


routed_mlp_fwd.register_autograd(_gradients, setup_context=_setup_context)


def routed_mlp(x: Tensor, plan: RoutingPlan, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """`inl_core.reference.routed_mlp` in two launches forward and five backward.

    The products take operands in the dtype of `x` (fp32, bf16 or fp16), which is also that of the
    weights, and sum in fp32; h, and for the backward g and u, are rounded to that dtype, as an MLP
    of ``nn.Linear`` rounds them. The result is contiguous.

    Raises:
        ValueError: If a dtype, a device or a shape does not fit.
    """
    check_routed_mlp(x, plan, gate, up, down)
    _common.check_inputs("routed_mlp", x, gate, up, down)
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in (x, gate, up, down))
    rows = x.reshape(-1, x.shape[-1])
    y, _, _ = routed_mlp_fwd(rows, plan.order, plan.offsets, gate, up, down, keep)
    return y.reshape(x.shape)
