"""The controller's up-projection and the step it controls, fused in Triton.

With W the rows of the up-projection for one coefficient and z the hidden state of the controller (C
channels), each tile of columns computes its raw coefficients itself,

    a = z·W_aᵀ + b_a        b = z·W_bᵀ + b_b        c = z·W_cᵀ + b_c

and continues as in `inl_core.kernels.inl_step`: they never reach memory. The backward recomputes
them, then da, db, dc as there, and from these

    dz   = da·W_a + db·W_b + dc·W_c        a sum over columns
    dW_a = daᵀ·z     db_a = Σ da           sums over rows, as is dmu

Sums in two directions take two kernels, which both read the state: `rows_kernel` loops over the
columns, accumulates dz and stores the gradients of the state; `columns_kernel` loops over the rows,
accumulates the others and stores one fp32 partial sum per program. There are no atomics, and no
other tensor of width D is stored.

Matrix products take operands in DOT, the dtype of z, and sum in fp32. W is loaded again for each
tile, mostly from the cache: kept for a whole loop, its operands would fill all registers.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from inl_core.kernels import _common
from inl_core.kernels._common import clamp, load, sigmoid, softplus, store
from inl_core.kernels.inl_step import (
    FINISH,
    TOKEN,
    advance,
    finish_kernel,
    numbers,
    retreat,
    through,
)

__all__ = ["inl_controlled_step", "inl_controlled_step_bwd", "inl_controlled_step_fwd", "takes"]


# ------------------------------------------------------------------------------------------------
# Device functions


@triton.jit
def load_tile(pointer, rows, stride, across, mask):
    """A tile of a state, or 0 if it is None."""
    return 0.0 if pointer is None else load(pointer + rows * stride + across, mask)


@triton.jit
def raw_coefficient(hidden, weight_ptr, bias_ptr, inside, col_mask):
    """z·Wᵀ + b of a tile, in fp32; the pointers are to the rows of W and the elements of b."""
    weight = load(weight_ptr, inside).to(hidden.dtype)
    product = tl.dot(hidden, tl.trans(weight))
    return product + load(bias_ptr, col_mask)


@triton.jit
def raw_coefficients(hidden, weight_ptr, bias_ptr, cols, chans, D, C):
    """The raw coefficients (a, b, c) of a tile."""
    inside = (cols[:, None] < D) & (chans < C)
    col_mask = cols[None, :] < D
    weight, bias = weight_ptr + cols[:, None] * C + chans, bias_ptr + cols[None, :]
    raw_a = raw_coefficient(hidden, weight, bias, inside, col_mask)
    raw_b = raw_coefficient(hidden, weight + D * C, bias + D, inside, col_mask)
    raw_c = raw_coefficient(hidden, weight + 2 * D * C, bias + 2 * D, inside, col_mask)
    return raw_a, raw_b, raw_c


@triton.jit
def step_gradients(
    raw_a, raw_b, raw_c, h, v, mu, force, dh_next, dv_next, dt, beta_max, velocity_max,
    CLIP: tl.constexpr,
):  # fmt: skip
    """Gradients of one tile, unmasked: (h, v, force, clamped mu, a, b, c)."""
    alpha, gate = sigmoid(raw_a), sigmoid(raw_c)
    unbounded = softplus(raw_b)
    beta = clamp(unbounded, 0.0, beta_max)
    _, v_next, free, error = advance(h, v, alpha, beta, gate, mu, force, dt, velocity_max, CLIP)
    dh, dp = retreat(dh_next, dv_next, alpha, beta, gate, free, dt, velocity_max, CLIP)
    da = dp * v * (alpha * (1.0 - alpha))
    db = through(-(dp * error), unbounded, 0.0, beta_max) * sigmoid(raw_b)
    dc = dh_next * dt * v_next * (gate * (1.0 - gate))
    return dh, alpha * dp, dp, beta * dp, da, db, dc


# ------------------------------------------------------------------------------------------------
# Kernels


@triton.jit
def forward_kernel(
    h_ptr, v_ptr, hidden_ptr, weight_ptr, bias_ptr, mu_ptr, force_ptr, h_out_ptr, v_out_ptr,
    R, D, C, stride_h, stride_v, stride_hidden, stride_f,
    dt, beta_max, velocity_max, mu_min, mu_max,
    CLIP: tl.constexpr, DOT: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One tile (BLOCK_R, BLOCK_D) per program; adjacent programs take adjacent columns."""
    tiles = tl.cdiv(D, BLOCK_D)
    pid = tl.program_id(0)
    cols = (pid % tiles) * BLOCK_D + tl.arange(0, BLOCK_D)
    rows = ((pid // tiles) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]).to(tl.int64)
    chans = tl.arange(0, BLOCK_C)[None, :]
    across = cols[None, :]
    mask = (rows < R) & (across < D)

    hidden = load(hidden_ptr + rows * stride_hidden + chans, (rows < R) & (chans < C)).to(DOT)
    raw_a, raw_b, raw_c = raw_coefficients(hidden, weight_ptr, bias_ptr, cols, chans, D, C)
    alpha, gate = sigmoid(raw_a), sigmoid(raw_c)
    beta = clamp(softplus(raw_b), 0.0, beta_max)
    mu = clamp(load(mu_ptr + across, across < D), mu_min, mu_max)
    h = load_tile(h_ptr, rows, stride_h, across, mask)
    v = load_tile(v_ptr, rows, stride_v, across, mask)
    force = load_tile(force_ptr, rows, stride_f, across, mask)
    h_next, v_next, _, _ = advance(h, v, alpha, beta, gate, mu, force, dt, velocity_max, CLIP)
    store(h_out_ptr + rows * D + across, h_next, mask)
    store(v_out_ptr + rows * D + across, v_next, mask)


@triton.jit
def product_with_stripe(draw, weight_ptr, inside, DOT: tl.constexpr):
    """da·W_a: the part of dz that one tile of one coefficient gives."""
    weight = load(weight_ptr, inside).to(DOT)
    return tl.dot(draw.to(DOT), weight)


@triton.jit
def rows_kernel(
    dh_next_ptr, dv_next_ptr, h_ptr, v_ptr, hidden_ptr, weight_ptr, bias_ptr, mu_ptr, force_ptr,
    dh_ptr, dv_ptr, dforce_ptr, dhidden_ptr,
    R, D, C, stride_dh, stride_dv, stride_h, stride_v, stride_hidden, stride_f,
    dt, beta_max, velocity_max, mu_min, mu_max,
    CLIP: tl.constexpr, DOT: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Gradients of h, v, force and z: a program walks along BLOCK_R rows."""
    rows = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]).to(tl.int64)
    chans = tl.arange(0, BLOCK_C)[None, :]
    known = (rows < R) & (chans < C)
    hidden = load(hidden_ptr + rows * stride_hidden + chans, known).to(DOT)
    dhidden = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for start in range(0, D, BLOCK_D):
        cols = start + tl.arange(0, BLOCK_D)
        across = cols[None, :]
        mask = (rows < R) & (across < D)
        raw_a, raw_b, raw_c = raw_coefficients(hidden, weight_ptr, bias_ptr, cols, chans, D, C)
        mu = clamp(load(mu_ptr + across, across < D), mu_min, mu_max)
        dh, dv, dforce, _, da, db, dc = step_gradients(
            raw_a, raw_b, raw_c,
            load_tile(h_ptr, rows, stride_h, across, mask),
            load_tile(v_ptr, rows, stride_v, across, mask), mu,
            load_tile(force_ptr, rows, stride_f, across, mask),
            load_tile(dh_next_ptr, rows, stride_dh, across, mask),
            load_tile(dv_next_ptr, rows, stride_dv, across, mask),
            dt, beta_max, velocity_max, CLIP,
        )  # fmt: skip
        out = rows * D + across
        store(dh_ptr + out, dh, mask)
        if v_ptr is not None:
            store(dv_ptr + out, dv, mask)
        if force_ptr is not None:
            store(dforce_ptr + out, dforce, mask)
        inside = (cols[:, None] < D) & (chans < C)
        weight = weight_ptr + cols[:, None] * C + chans
        dhidden += product_with_stripe(tl.where(mask, da, 0.0), weight, inside, DOT)
        weight += D * C
        dhidden += product_with_stripe(tl.where(mask, db, 0.0), weight, inside, DOT)
        weight += D * C
        dhidden += product_with_stripe(tl.where(mask, dc, 0.0), weight, inside, DOT)
    store(dhidden_ptr + rows * C + chans, dhidden, known)


@triton.jit
def columns_kernel(
    dh_next_ptr, dv_next_ptr, h_ptr, v_ptr, hidden_ptr, weight_ptr, bias_ptr, mu_ptr, force_ptr,
    dweight_ptr, dbias_ptr, dmu_ptr,
    R, D, C, stride_dh, stride_dv, stride_h, stride_v, stride_hidden, stride_f,
    dt, beta_max, velocity_max, mu_min, mu_max,
    CLIP: tl.constexpr, DOT: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Gradients of W, b and mu: a program loops over row blocks of BLOCK_D columns.

    It fills its slice of dweight (walkers, 3, C, D), dbias (walkers, 3, D) and dmu (walkers, D),
    the last with respect to the clamped mu.
    """
    cols = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    chans = tl.arange(0, BLOCK_C)[None, :]
    across, col_mask = cols[None, :], cols[None, :] < D
    mu = clamp(load(mu_ptr + across, col_mask), mu_min, mu_max)
    dweight_a = tl.zeros((BLOCK_C, BLOCK_D), tl.float32)
    dweight_b = tl.zeros((BLOCK_C, BLOCK_D), tl.float32)
    dweight_c = tl.zeros((BLOCK_C, BLOCK_D), tl.float32)
    dbias_a = tl.zeros((1, BLOCK_D), tl.float32)
    dbias_b = tl.zeros((1, BLOCK_D), tl.float32)
    dbias_c = tl.zeros((1, BLOCK_D), tl.float32)
    dmu = tl.zeros((1, BLOCK_D), tl.float32)

    for block in tl.range(tl.program_id(1), tl.cdiv(R, BLOCK_R), tl.num_programs(1), num_stages=1):  # pyright: ignore
        rows = (block * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]).to(tl.int64)
        mask = (rows < R) & col_mask
        hidden = load(hidden_ptr + rows * stride_hidden + chans, (rows < R) & (chans < C)).to(DOT)
        raw_a, raw_b, raw_c = raw_coefficients(hidden, weight_ptr, bias_ptr, cols, chans, D, C)
        _, _, _, pull, da, db, dc = step_gradients(
            raw_a, raw_b, raw_c,
            load_tile(h_ptr, rows, stride_h, across, mask),
            load_tile(v_ptr, rows, stride_v, across, mask), mu,
            load_tile(force_ptr, rows, stride_f, across, mask),
            load_tile(dh_next_ptr, rows, stride_dh, across, mask),
            load_tile(dv_next_ptr, rows, stride_dv, across, mask),
            dt, beta_max, velocity_max, CLIP,
        )  # fmt: skip
        da, db, dc = tl.where(mask, da, 0.0), tl.where(mask, db, 0.0), tl.where(mask, dc, 0.0)
        dmu += tl.sum(tl.where(mask, pull, 0.0), axis=0, keep_dims=True)
        dbias_a += tl.sum(da, axis=0, keep_dims=True)
        dbias_b += tl.sum(db, axis=0, keep_dims=True)
        dbias_c += tl.sum(dc, axis=0, keep_dims=True)
        turned = tl.trans(hidden)
        dweight_a += tl.dot(turned, da.to(DOT))
        dweight_b += tl.dot(turned, db.to(DOT))
        dweight_c += tl.dot(turned, dc.to(DOT))

    walker = tl.program_id(1).to(tl.int64)
    store(dmu_ptr + walker * D + across, dmu, col_mask)
    bias_at = walker * 3 * D + across
    store(dbias_ptr + bias_at, dbias_a, col_mask)
    store(dbias_ptr + bias_at + D, dbias_b, col_mask)
    store(dbias_ptr + bias_at + 2 * D, dbias_c, col_mask)
    down = tl.arange(0, BLOCK_C)[:, None]
    inside = (down < C) & col_mask
    weight_at = walker * 3 * C * D + down * D + across
    store(dweight_ptr + weight_at, dweight_a, inside)
    store(dweight_ptr + weight_at + C * D, dweight_b, inside)
    store(dweight_ptr + weight_at + 2 * C * D, dweight_c, inside)


OP = "inl_controlled_step"

MAX_CONTROLLER = 64
"""Widest controller whose hidden state and its gradient fit into the registers of a program."""

BLOCK_R, NUM_WARPS = 64, 4
"""Rows of a tile: 16 per warp, the unit of a matrix product."""

FORWARD_COLUMNS, BACKWARD_COLUMNS = 32, 16
"""Columns of a tile, so that a dozen tiles and sums stay in registers."""

PER_PROCESSOR = 4
"""Programs per multiprocessor of `columns_kernel`."""

_OPERANDS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


# ------------------------------------------------------------------------------------------------
# Launches


def _constants(velocity_max: float, hidden: Tensor, columns: int) -> dict[str, Any]:
    """Constants of a launch."""
    return {
        "CLIP": math.isfinite(velocity_max),
        # The interpreter multiplies bf16 incorrectly.
        "DOT": tl.float32 if _common.INTERPRETED else _OPERANDS[hidden.dtype],
        "BLOCK_R": BLOCK_R,
        "BLOCK_D": columns,
        "BLOCK_C": _block_c(hidden.shape[-1]),
        "num_warps": NUM_WARPS,
    }


def _block_c(controller: int) -> int:
    return max(16, triton.next_power_of_2(controller))  # the minimum of a matrix product


@_common.operator
def inl_controlled_step_fwd(
    h: Tensor, v: Tensor | None, hidden: Tensor, weight: Tensor, bias: Tensor, mu: Tensor,
    force: Tensor | None, dt: float, beta_max: float, velocity_max: float, mu_min: float,
    mu_max: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(h', v'). Infinite bounds mean none; `inl_controlled_step` checks the arguments."""
    h_out, v_out = _common.empty_tensors(h, h if v is None else v)
    if _common.nothing_to_launch(h):
        return h_out, v_out
    (*states, force_rows), strides = _common.rows_of(h, v, hidden, force)
    rows, width = states[0].shape
    tiles = triton.cdiv(rows, BLOCK_R) * triton.cdiv(width, FORWARD_COLUMNS)
    forward_kernel[(tiles,)](
        *states, weight.contiguous(), bias.contiguous(), mu.contiguous(), force_rows, h_out, v_out,
        rows, width, hidden.shape[-1], *strides, dt, beta_max, velocity_max, mu_min, mu_max,
        **_constants(velocity_max, hidden, FORWARD_COLUMNS),
    )  # fmt: skip
    return h_out, v_out


@_common.operator
def inl_controlled_step_bwd(
    dh_next: Tensor | None, dv_next: Tensor | None, h: Tensor, v: Tensor | None, hidden: Tensor,
    weight: Tensor, bias: Tensor, mu: Tensor, force: Tensor | None,
    dt: float, beta_max: float, velocity_max: float, mu_min: float, mu_max: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of (h, v, hidden, weight, bias, mu, force); size 0 where None."""
    if _common.nothing_to_launch(h):
        grads = _common.empty_tensors(h, v, hidden, weight, bias, mu, force)
        return tuple(grad.zero_() for grad in grads)  # type: ignore[return-value]
    (*states, force_rows), strides = _common.rows_of(dh_next, dv_next, h, v, hidden, force)
    (rows, width), controller = states[2].shape, hidden.shape[-1]
    row_blocks, stripes = triton.cdiv(rows, BLOCK_R), triton.cdiv(width, BACKWARD_COLUMNS)
    wave = _common.num_programs(h, row_blocks * stripes, PER_PROCESSOR)
    walkers = min(row_blocks, triton.cdiv(wave, stripes))
    dweight, dbias, dmu_parts = (
        h.new_empty(walkers, *size, dtype=torch.float32)
        for size in ((3, controller, width), (3 * width,), (width,))
    )
    dh, dv, dforce, dhidden, dmu = _common.empty_tensors(h, v, force, hidden, mu)
    mu = mu.contiguous()
    inputs = (*states, weight.contiguous(), bias.contiguous(), mu, force_rows)
    values = (rows, width, controller, *strides, dt, beta_max, velocity_max, mu_min, mu_max)
    constants = _constants(velocity_max, hidden, BACKWARD_COLUMNS)
    rows_kernel[(row_blocks,)](*inputs, dh, dv, dforce, dhidden, *values, **constants)
    columns_kernel[(stripes, walkers)](*inputs, dweight, dbias, dmu_parts, *values, **constants)
    block_p, columns, num_warps = FINISH
    finish_kernel[(triton.cdiv(width, columns),)](
        dmu_parts, None, None, None, mu, None, None, None, dmu, None, None, None,
        walkers, walkers, width, beta_max, mu_min, mu_max,
        TOKEN, TOKEN, TOKEN, block_p, columns, num_warps=num_warps,
    )  # fmt: skip
    dweight = dweight.sum(0).transpose(1, 2).reshape(weight.shape).to(weight.dtype)
    return dh, dv, dhidden, dweight, dbias.sum(0).to(bias.dtype), dmu, dforce


# ------------------------------------------------------------------------------------------------
# Autograd and the public function


@_common.gradient_of(inl_controlled_step_fwd, materialize=False)
def _(
    ctx: Any, inputs: tuple[Any, ...], dh_next: Tensor | None, dv_next: Tensor | None
) -> tuple[Tensor, ...]:
    return inl_controlled_step_bwd(dh_next, dv_next, *inputs)


def takes(h: Tensor, v: Tensor | None, hidden: Tensor, *_: Any, **__: Any) -> bool:
    """Whether the kernels support this: a narrow controller in bf16 or fp16, one state per token.

    Products in fp32 are left to the matrix library, which is faster.
    """
    narrow = 1 <= hidden.shape[-1] <= MAX_CONTROLLER and hidden.shape[:-1] == h.shape[:-1]
    return narrow and (_common.INTERPRETED or _product_dtype(hidden) in _OPERANDS)


def _product_dtype(hidden: Tensor) -> torch.dtype:
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def inl_controlled_step(
    h: Tensor, v: Tensor | None, hidden: Tensor, weight: Tensor, bias: Tensor, mu: Tensor,
    force: Tensor | None = None, *,
    dt: float, beta_max: float | None, velocity_max: float | None, mu_min: float | None,
    mu_max: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`inl_core.reference.inl_controlled_step` in one kernel; same arguments and results.

    The products take their operands in the dtype of `hidden`, or in that of autocast, bf16 or fp16,
    and sum in fp32.

    Raises:
        ValueError: If a shape, a dtype (fp64, `hidden` in fp32) or a device does not fit, D exceeds
            16384, or the controller is wider than 64.
    """
    _common.check_inputs(OP, h, v, hidden, weight, bias, mu, force)
    states = [(name, x) for name, x in (("v", v), ("force", force)) if x is not None]
    _common.check_rows(OP, h, *states)
    width, controller = h.shape[-1], hidden.shape[-1]
    _common.check_weight(OP, "mu", mu, width)
    _common.check_weight(OP, "bias", bias, 3 * width)
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
    hidden = hidden.to(_product_dtype(hidden))
    bounds = numbers(dt, beta_max, velocity_max, mu_min, mu_max)
    return inl_controlled_step_fwd(h, v, hidden, weight, bias, mu, force, *bounds)
