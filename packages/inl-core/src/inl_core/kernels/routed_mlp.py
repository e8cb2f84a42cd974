"""Token-routed SwiGLU MLP in Triton: grouped products with gather and scatter inside.

For the rows of expert e, with σ the logistic function, s = σ(g) and tokens in any order:

    g = x·gateₑᵀ     u = x·upₑᵀ     h = g · s · u     y = h·downₑᵀ
    dh = dy·downₑ    dg = dh · u · s · (1 + g · (1 − s))    du = dh · g · s
    dx = dg·gateₑ + du·upₑ
    dgateₑ = dgᵀ·x     dupₑ = duᵀ·x     ddownₑ = dyᵀ·h      summed over the rows of e

Two launches forward (x to h, h to y), two backward for dx and one for each weight. g and u are
kept for the backward, in the dtype of x; h is computed again there.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from inl_core.kernels import _common
from inl_core.kernels._routed_mlp_kernels import (
    d_inner_kernel,
    d_weight_kernel,
    d_x_kernel,
    down_kernel,
    gate_up_kernel,
)
from inl_core.segments import RoutingPlan, check_routed_mlp

__all__ = ["AOT", "routed_mlp", "routed_mlp_bwd", "routed_mlp_fwd"]


def _blocks(dtype: torch.dtype) -> tuple[int, int, int, int]:
    """(rows, columns, depth, warps) of a tile: at most 96 KiB of shared memory in three stages."""
    if _common.INTERPRETED:
        return 16, 32, 16, 4  # small tensors in tests have several tiles
    return (64, 64, 32, 8) if dtype == torch.float32 else (128, 128, 64, 8)


def _dot_options(dtype: torch.dtype) -> dict[str, Any]:
    wide = _common.INTERPRETED or dtype == torch.float32
    return {"WIDE": wide, "PRECISION": "ieee" if wide else "tf32"}


def _tile_options(
    kernel: Any, experts: int, inner: int, width: int, dtype: torch.dtype
) -> dict[str, Any]:
    """Constants of a launch over row tiles. A kernel with more to hold takes a smaller tile."""
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
    """Launch `kernel` over every row tile that T tokens can make, whatever their experts."""
    experts, inner, width = gate.shape
    options = _tile_options(kernel, experts, inner, width, gate.dtype)
    tokens = next(t.shape[0] for t in tensors if t is not None)
    # An expert that has tokens wastes less than one tile.
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


@torch.library.custom_op("inl_core::routed_mlp_fwd", mutates_args=())
def routed_mlp_fwd(
    x: Tensor, order: Tensor, offsets: Tensor, gate: Tensor, up: Tensor, down: Tensor, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the forward kernels on rows (T, D): (y, g, u), g and u without rows unless `keep`."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tokens, inner = x.shape[0], gate.shape[1]
    gated, upped = (x.new_empty(tokens if keep else 0, inner) for _ in range(2))
    if tokens == 0:
        return y, gated, upped
    x, h, kept = _common.as_rows(x), x.new_empty(tokens, inner), (gated, upped)
    gate, up, down = gate.contiguous(), up.contiguous(), down.contiguous()
    with _common.launch_guard(x):
        tensors = [x, order, offsets, gate, up, h, *(kept if keep else (None, None))]
        _over_rows(gate_up_kernel, tensors, [x.stride(0)], gate)
        _over_rows(down_kernel, [h, order, offsets, down, y], [], gate)
    return y, gated, upped


@routed_mlp_fwd.register_fake
def _(
    x: Tensor, order: Tensor, offsets: Tensor, gate: Tensor, up: Tensor, down: Tensor, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    gated, upped = (x.new_empty(x.shape[0] if keep else 0, gate.shape[1]) for _ in range(2))
    return y, gated, upped


@torch.library.custom_op("inl_core::routed_mlp_bwd", mutates_args=())
def routed_mlp_bwd(
    dy: Tensor, x: Tensor, order: Tensor, offsets: Tensor, gate: Tensor, up: Tensor, down: Tensor,
    gated: Tensor, upped: Tensor, need_dx: bool, need_dw: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Launch the backward kernels: (dx, dgate, dup, ddown), of size 0 where not needed."""
    dx, dgate, dup, ddown = (x.new_empty(0) for _ in range(4))
    if need_dx:
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.shape[0] == 0:
        if need_dw:
            dgate, dup, ddown = (x.new_zeros(weight.shape) for weight in (gate, up, down))
        return dx, dgate, dup, ddown
    dy, x = _common.as_rows(dy), _common.as_rows(x)
    gate, up, down = gate.contiguous(), up.contiguous(), down.contiguous()
    dgated, dupped = torch.empty_like(gated), torch.empty_like(upped)
    h = torch.empty_like(gated) if need_dw else None
    with _common.launch_guard(x):
        tensors = [dy, order, offsets, down, gated, upped, dgated, dupped, h]
        _over_rows(d_inner_kernel, tensors, [dy.stride(0)], gate)
        if need_dx:
            _over_rows(d_x_kernel, [dgated, dupped, order, offsets, gate, up, dx], [], gate)
        if h is not None:
            dgate = _d_weight(dgated, x, order, offsets, by_token=False)
            dup = _d_weight(dupped, x, order, offsets, by_token=False)
            ddown = _d_weight(dy, h, order, offsets, by_token=True)
    return dx, dgate, dup, ddown


@routed_mlp_bwd.register_fake
def _(
    dy: Tensor, x: Tensor, order: Tensor, offsets: Tensor, gate: Tensor, up: Tensor, down: Tensor,
    gated: Tensor, upped: Tensor, need_dx: bool, need_dw: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dx = torch.empty(x.shape if need_dx else 0, dtype=x.dtype, device=x.device)
    shapes = [weight.shape if need_dw else 0 for weight in (gate, up, down)]
    dgate, dup, ddown = (torch.empty(s, dtype=x.dtype, device=x.device) for s in shapes)
    return dx, dgate, dup, ddown


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:6], *output[1:])
    ctx.set_materialize_grads(False)  # g and u are outputs for this backward alone


def _gradients(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    need_dx, need_dw = ctx.needs_input_grad[0], any(ctx.needs_input_grad[3:6])
    dx, *weights = routed_mlp_bwd(dy, *ctx.saved_tensors, need_dx, need_dw)
    given = [dweight if need_dw else None for dweight in weights]
    return dx if need_dx else None, None, None, *given, None


routed_mlp_fwd.register_autograd(_gradients, setup_context=_setup_context)


def routed_mlp(x: Tensor, plan: RoutingPlan, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """`inl_core.reference.routed_mlp` in two launches forward and five backward.

    The products take operands in the dtype of `x` and add up in fp32; h, and for the backward g and
    u, are rounded to that dtype, as an MLP of ``nn.Linear`` rounds them.

    Args:
        x: (..., D) with T rows; fp32, bf16 or fp16.
        plan: Plan of T tokens and E experts.
        gate: (E, I, D), in the dtype of `x`.
        up: (E, I, D), likewise.
        down: (E, D, I), likewise.

    Returns:
        Tensor shaped like `x`, in its dtype, contiguous.

    Raises:
        ValueError: If a dtype, a device or a shape does not fit.
    """
    check_routed_mlp(x, plan, gate, up, down)
    _common.check_inputs("routed_mlp", x, gate, up, down)
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in (x, gate, up, down))
    rows = x.reshape(-1, x.shape[-1])
    y, _, _ = routed_mlp_fwd(rows, plan.order, plan.offsets, gate, up, down, keep)
    return y.reshape(x.shape)


def _specs(width: int, inner: int, experts: int, dtype: torch.dtype) -> list[_common.AotSpec]:
    kind = "*fp32" if dtype == torch.float32 else "*bf16"
    known = {"order_ptr": "*i64", "offsets_ptr": "*i32", "tiles": "i32"}

    def spec(kernel: Any, options: dict[str, Any]) -> _common.AotSpec:
        warps = options.pop("num_warps")
        types = {
            name: known.get(name, kind if name.endswith("_ptr") else "i32:16")
            for name in kernel.arg_names
            if name not in options
        }
        return _common.aot_spec(kernel, types, options, warps)

    over_rows = (gate_up_kernel, d_inner_kernel, down_kernel, d_x_kernel)
    return [
        *(spec(k, _tile_options(k, experts, inner, width, dtype)) for k in over_rows),
        spec(d_weight_kernel, _weight_options(inner, width, False, dtype)),
        spec(d_weight_kernel, _weight_options(width, inner, True, dtype)),
    ]


AOT = _specs(768, 2048, 8, torch.bfloat16) + _specs(768, 2048, 8, torch.float32)
