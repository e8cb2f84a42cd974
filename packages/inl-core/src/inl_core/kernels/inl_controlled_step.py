"""`inl_core.reference.inl_controlled_step` in Triton: launches, custom ops, autograd.

The kernels and their formulas are in `inl_core.kernels._inl_controlled_kernels`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from inl_core.kernels import _common, _shapes
from inl_core.kernels._common import as_rows, row_stride
from inl_core.kernels._inl_controlled_kernels import (
    columns_kernel,
    forward_kernel,
    rows_kernel,
)
from inl_core.kernels._inl_step_kernels import finish_kernel
from inl_core.kernels.inl_step import FINISH, TOKEN, empty_gradients, save_inputs

__all__ = [
    "AOT",
    "inl_controlled_step",
    "inl_controlled_step_bwd",
    "inl_controlled_step_fwd",
    "takes",
]

OP = "inl_controlled_step"

MAX_CONTROLLER = 64
"""Widest controller whose hidden state and its gradient a program can keep in registers."""

BLOCK_R, NUM_WARPS = 64, 4
"""Rows of a tile: 16 for each warp, which a matrix product gives to one warp whole."""

FORWARD_COLUMNS, BACKWARD_COLUMNS = 32, 16
"""Columns of a tile, so that none of a dozen tiles and sums leaves the registers."""

PER_PROCESSOR = 4
"""Programs a multiprocessor of the kernel that leaves partials."""

_OPERANDS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


# ------------------------------------------------------------------------------------------------
# Launches


def _constants(velocity_max: float, hidden: Tensor, columns: int) -> dict[str, Any]:
    """What a kernel is compiled for."""
    return {
        "CLIP": math.isfinite(velocity_max),
        # The interpreter multiplies bf16 wrongly; fp32 it multiplies as it is.
        "DOT": tl.float32 if _common.INTERPRETED else _OPERANDS[hidden.dtype],
        "BLOCK_R": BLOCK_R,
        "BLOCK_D": columns,
        "BLOCK_C": _block_c(hidden.shape[-1]),
        "num_warps": NUM_WARPS,
    }


def _block_c(controller: int) -> int:
    return max(16, triton.next_power_of_2(controller))  # a matrix product needs 16 of everything


@torch.library.custom_op("inl_core::inl_controlled_step_fwd", mutates_args=())
def inl_controlled_step_fwd(
    h: Tensor,
    v: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    mu: Tensor,
    force: Tensor | None,
    dt: float,
    beta_max: float,
    velocity_max: float,
    mu_min: float,
    mu_max: float,
) -> tuple[Tensor, Tensor]:
    """(h', v'). Infinite bounds are none; `inl_controlled_step` checks the arguments."""
    h_out = torch.empty(h.shape, dtype=h.dtype, device=h.device)
    v_out = torch.empty(h.shape, dtype=h.dtype if v is None else v.dtype, device=h.device)
    if h.numel() == 0:
        return h_out, v_out
    x, hidden_rows = as_rows(h), as_rows(hidden)
    v_rows, force_rows = (None if t is None else as_rows(t) for t in (v, force))
    rows, width = x.shape
    tiles = triton.cdiv(rows, BLOCK_R) * triton.cdiv(width, FORWARD_COLUMNS)
    with _common.launch_guard(h):
        forward_kernel[(tiles,)](
            x, v_rows, hidden_rows, weight.contiguous(), bias.contiguous(), mu.contiguous(),
            force_rows, h_out, v_out,
            rows, width, hidden_rows.shape[1],
            x.stride(0), row_stride(v_rows), hidden_rows.stride(0), row_stride(force_rows),
            dt, beta_max, velocity_max, mu_min, mu_max,
            **_constants(velocity_max, hidden, FORWARD_COLUMNS),
        )  # fmt: skip
    return h_out, v_out


@inl_controlled_step_fwd.register_fake
def _(h: Tensor, v: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    v_dtype = h.dtype if v is None else v.dtype
    return h.new_empty(h.shape), h.new_empty(h.shape, dtype=v_dtype)


@torch.library.custom_op("inl_core::inl_controlled_step_bwd", mutates_args=())
def inl_controlled_step_bwd(
    dh_next: Tensor | None,
    dv_next: Tensor | None,
    h: Tensor,
    v: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    mu: Tensor,
    force: Tensor | None,
    dt: float,
    beta_max: float,
    velocity_max: float,
    mu_min: float,
    mu_max: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of (h, v, hidden, weight, bias, mu, force); empty for v or force None."""
    if h.numel() == 0:
        grads = empty_gradients(h, v, hidden, weight, bias, mu, force)
        for grad in grads:
            grad.zero_()
        return grads
    x, hidden_rows = as_rows(h), as_rows(hidden)
    dh_rows, dv_rows, v_rows, force_rows = (
        None if t is None else as_rows(t) for t in (dh_next, dv_next, v, force)
    )
    (rows, width), controller = x.shape, hidden_rows.shape[1]
    row_blocks, stripes = triton.cdiv(rows, BLOCK_R), triton.cdiv(width, BACKWARD_COLUMNS)
    wave = _common.num_programs(h, row_blocks * stripes, PER_PROCESSOR)
    walkers = min(row_blocks, triton.cdiv(wave, stripes))

    def fp32(*size: int) -> Tensor:
        return torch.empty(size, dtype=torch.float32, device=h.device)

    dweight, dbias = fp32(walkers, 3, controller, width), fp32(walkers, 3 * width)
    dmu_parts, dhidden = fp32(walkers, width), hidden.new_empty(hidden.shape)
    dh, dv, dforce = (h.new_empty(0) if t is None else t.new_empty(t.shape) for t in (h, v, force))
    mu, dmu = mu.contiguous(), mu.new_empty(mu.shape)
    inputs = (
        dh_rows, dv_rows, x, v_rows, hidden_rows, weight.contiguous(), bias.contiguous(), mu,
        force_rows,
    )  # fmt: skip
    numbers = (
        rows, width, controller, row_stride(dh_rows), row_stride(dv_rows),
        x.stride(0), row_stride(v_rows), hidden_rows.stride(0), row_stride(force_rows),
        dt, beta_max, velocity_max, mu_min, mu_max,
    )  # fmt: skip
    constants = _constants(velocity_max, hidden, BACKWARD_COLUMNS)
    with _common.launch_guard(h):
        rows_kernel[(row_blocks,)](*inputs, dh, dv, dforce, dhidden, *numbers, **constants)
        columns_kernel[(stripes, walkers)](
            *inputs, dweight, dbias, dmu_parts, *numbers, **constants
        )
        block_p, columns, num_warps = FINISH
        finish_kernel[(triton.cdiv(width, columns),)](
            dmu_parts, None, None, None, mu, None, None, None, dmu, None, None, None,
            walkers, walkers, width, beta_max, mu_min, mu_max,
            TOKEN, TOKEN, TOKEN, block_p, columns, num_warps=num_warps,
        )  # fmt: skip
    dweight = dweight.sum(0).transpose(1, 2).reshape(weight.shape).to(weight.dtype)
    return dh, dv, dhidden, dweight, dbias.sum(0).to(bias.dtype), dmu, dforce


@inl_controlled_step_bwd.register_fake
def _(
    dh_next: Tensor | None, dv_next: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return empty_gradients(*rest[:7])


# ------------------------------------------------------------------------------------------------
# Autograd and the public function


def _gradients(
    ctx: Any, dh_next: Tensor | None, dv_next: Tensor | None
) -> tuple[Tensor | None, ...]:
    grads = inl_controlled_step_bwd(dh_next, dv_next, *ctx.saved_tensors, *ctx.numbers)
    wanted = [grad if use else None for grad, use in zip(grads, ctx.needs_input_grad, strict=False)]
    return (*wanted, None, None, None, None, None)


inl_controlled_step_fwd.register_autograd(_gradients, setup_context=save_inputs)


def takes(h: Tensor, v: Tensor | None, hidden: Tensor, *_: Any, **__: Any) -> bool:
    """Whether the kernels compute this: a narrow controller in 16 bits, one hidden state a token.

    Products in fp32 are left to the matrix library, which has better ones.
    """
    narrow = 1 <= hidden.shape[-1] <= MAX_CONTROLLER and hidden.shape[:-1] == h.shape[:-1]
    return narrow and (_common.INTERPRETED or _product_dtype(hidden) in _OPERANDS)


def _product_dtype(hidden: Tensor) -> torch.dtype:
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def inl_controlled_step(
    h: Tensor,
    v: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    mu: Tensor,
    force: Tensor | None = None,
    *,
    dt: float,
    beta_max: float | None,
    velocity_max: float | None,
    mu_min: float | None,
    mu_max: float | None,
) -> tuple[Tensor, Tensor]:
    """`inl_core.reference.inl_controlled_step` in one kernel; same arguments and results.

    The products take their operands in the dtype of `hidden`, or in that of autocast, bf16 or fp16,
    and sum in fp32.

    Raises:
        ValueError: If a shape, a dtype (fp64, `hidden` in fp32) or a device does not fit, D exceeds
            16384, or the controller is wider than 64.
    """
    _common.check_inputs(OP, h, v, hidden, weight, bias, mu, force)
    states = [(name, x) for name, x in (("v", v), ("force", force)) if x is not None]
    _shapes.check_rows(OP, h, *states)
    width, controller = h.shape[-1], hidden.shape[-1]
    _shapes.check_weight(OP, "mu", mu, width)
    _shapes.check_weight(OP, "bias", bias, 3 * width)
    if weight.shape != (3 * width, controller):
        raise ValueError(
            f"{OP}: weight must have shape ({3 * width}, {controller}) for D = {width} and a "
            f"controller of width {controller}, got {tuple(weight.shape)}"
        )
    if not takes(h, v, hidden):
        raise ValueError(
            f"the Triton kernel of {OP} takes hidden of shape {(*h.shape[:-1], 'C')} with "
            f"1 <= C <= {MAX_CONTROLLER} in bf16 or fp16, got {tuple(hidden.shape)} in "
            f"{hidden.dtype}; inl_core.reference.{OP} takes any"
        )
    return inl_controlled_step_fwd(
        h, v, hidden.to(_product_dtype(hidden)), weight, bias, mu, force, dt,
        math.inf if beta_max is None else beta_max,
        math.inf if velocity_max is None else velocity_max,
        -math.inf if mu_min is None else mu_min,
        math.inf if mu_max is None else mu_max,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------
# Ahead of time


def _specs(force: bool) -> list[_common.AotSpec]:
    constants: dict[str, Any] = {
        "CLIP": True, "DOT": tl.bfloat16, "BLOCK_R": BLOCK_R, "BLOCK_C": _block_c(64),
    }  # fmt: skip
    if not force:
        constants["force_ptr"] = None
    rowwise = ("h", "v", "hidden", "force", "dh_next", "dv_next", "dh", "dv", "dforce", "dhidden")
    in_dtype = {f"{name}_ptr" for name in (*rowwise, "h_out", "v_out")}

    def kind(name: str) -> str:
        if name.endswith("_ptr"):
            return "*bf16" if name in in_dtype else "*fp32"
        return "i32:16" if name in ("R", "D", "C") or name.startswith("stride") else "fp32"

    specs = []
    for kernel, columns in (
        (forward_kernel, FORWARD_COLUMNS),
        (rows_kernel, BACKWARD_COLUMNS),
        (columns_kernel, BACKWARD_COLUMNS),
    ):
        fixed = constants | {"BLOCK_D": columns}
        types = {name: kind(name) for name in kernel.arg_names if name not in fixed}
        specs.append(_common.aot_spec(kernel, types, fixed, NUM_WARPS))
    return specs


AOT = [*_specs(force=False), *_specs(force=True)]
