"""One step of the INL dynamics in Triton: one pass forward, one pass backward.

Forward, with alpha = sigmoid(a), beta = min(softplus(b), beta_max), gate = sigmoid(c):

    e  = h - clamp(mu, mu_min, mu_max)
    p  = alpha * v - beta * e + f
    v' = clip(p, -velocity_max, velocity_max)
    h' = h + dt * gate * v'

Backward, from the gradients dh' and dv':

    dp     = (dv' + dh' * dt * gate) where |p| <= velocity_max, else 0
    dh     = dh' - beta * dp             dv = alpha * dp             df = dp
    da     = dp * v * alpha * (1 - alpha)
    dbeta  = -dp * e                     db = through(dbeta) * sigmoid(b)
    dc     = dh' * dt * v' * gate * (1 - gate)
    dmu    = through(sum over rows of beta * dp)

``through`` is the gradient rule of `bounded_clamp`. A coefficient is read as it is stored: one
value per token and channel, a vector (D,) or one number. The gradients of the latter two, and of
mu, are sums over rows: each program stores fp32 partial sums, and a small kernel adds them up and
applies the rule. There are no atomics, so results are reproducible bit for bit. Only inputs are
saved for the backward.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from inl_core.kernels import _common
from inl_core.kernels._common import (
    as_rows,
    clamp,
    column_sum,
    load,
    rows_of,
    sigmoid,
    softplus,
    store,
    tile,
)

# ------------------------------------------------------------------------------------------------
# Device functions


@triton.jit
def load_raw(pointer, rows, cols, stride, mask, col_mask, KIND: tl.constexpr):
    """Load raw coefficients: a tile, a row, or one number."""
    if KIND == 0:
        raw = load(pointer + rows * stride + cols, mask)
    elif KIND == 1:
        raw = load(pointer + cols, col_mask)
    else:
        raw = tl.load(pointer).to(tl.float32)
    return raw


@triton.jit
def advance(h, v, alpha, beta, gate, mu, force, dt, velocity_max, CLIP: tl.constexpr):
    """Equations (1)-(3): (h', v', p, e)."""
    error = h - mu
    free = alpha * v - beta * error + force
    v_next = free
    if CLIP:
        v_next = clamp(free, -velocity_max, velocity_max)
    return h + dt * gate * v_next, v_next, free, error


@triton.jit
def retreat(dh_next, dv_next, alpha, beta, gate, free, dt, velocity_max, CLIP: tl.constexpr):
    """Gradient of equations (2) and (3): (dh, dp)."""
    dp = dv_next + dh_next * (dt * gate)
    if CLIP:
        dp = tl.where((free >= -velocity_max) & (free <= velocity_max), dp, 0.0)
    return dh_next - beta * dp, dp


@triton.jit
def through(grad, x, minimum, maximum):
    """Gradient of `bounded_clamp`: beyond a bound only the part that leads back inside passes."""
    blocked = ((x < minimum) & (grad > 0)) | ((x > maximum) & (grad < 0))
    return tl.where(blocked, 0.0, grad)


# ------------------------------------------------------------------------------------------------
# Kernels


@triton.jit
def forward_kernel(
    h_ptr, v_ptr, a_ptr, b_ptr, c_ptr, mu_ptr, force_ptr, h_out_ptr, v_out_ptr,
    R, D, stride_h, stride_v, stride_a, stride_b, stride_c, stride_f,
    dt, beta_max, velocity_max, mu_min, mu_max,
    KIND_A: tl.constexpr, KIND_B: tl.constexpr, KIND_C: tl.constexpr, CLIP: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One tile (BLOCK_R, BLOCK_D) per program; adjacent programs take adjacent columns."""
    tiles = tl.cdiv(D, BLOCK_D)
    pid = tl.program_id(0)
    cols = (pid % tiles) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    rows = ((pid // tiles) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]).to(tl.int64)
    col_mask = cols < D
    mask = (rows < R) & col_mask

    h = load(h_ptr + rows * stride_h + cols, mask)
    alpha = sigmoid(load_raw(a_ptr, rows, cols, stride_a, mask, col_mask, KIND_A))
    raw = load_raw(b_ptr, rows, cols, stride_b, mask, col_mask, KIND_B)
    beta = clamp(softplus(raw), 0.0, beta_max)
    gate = sigmoid(load_raw(c_ptr, rows, cols, stride_c, mask, col_mask, KIND_C))
    mu = clamp(load(mu_ptr + cols, col_mask), mu_min, mu_max)
    v = 0.0
    if v_ptr is not None:
        v = load(v_ptr + rows * stride_v + cols, mask)
    force = 0.0
    if force_ptr is not None:
        force = load(force_ptr + rows * stride_f + cols, mask)

    h_next, v_next, _, _ = advance(h, v, alpha, beta, gate, mu, force, dt, velocity_max, CLIP)
    store(h_out_ptr + rows * D + cols, h_next, mask)
    store(v_out_ptr + rows * D + cols, v_next, mask)


@triton.jit
def backward_kernel(
    dh_next_ptr, dv_next_ptr, h_ptr, v_ptr, a_ptr, b_ptr, c_ptr, mu_ptr, force_ptr,
    dh_ptr, dv_ptr, da_ptr, db_ptr, dc_ptr, dforce_ptr, dmu_ptr,
    R, D, stride_dh, stride_dv, stride_h, stride_v, stride_a, stride_b, stride_c, stride_f,
    dt, beta_max, velocity_max, mu_min, mu_max,
    KIND_A: tl.constexpr, KIND_B: tl.constexpr, KIND_C: tl.constexpr, CLIP: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A program loops over row blocks of one stripe of BLOCK_D columns, with the grid as stride.

    Gradients of per-token inputs are stored directly. The others are summed over the program's
    rows: dmu, da, db, dc then point to partial sums, (programs, D) or one number per program, with
    respect to the activated coefficients and the clamped mu.
    """
    tiles = tl.cdiv(D, BLOCK_D)
    tile = tl.program_id(0)
    walker = tl.program_id(1)
    cols = tile * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    col_mask = cols < D
    mu = clamp(load(mu_ptr + cols, col_mask), mu_min, mu_max)
    sum_mu = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    # Coefficients that do not depend on the row are loaded once.
    if KIND_A != 0:
        alpha = sigmoid(load_raw(a_ptr, cols, cols, 0, col_mask, col_mask, KIND_A))
        sum_a = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    if KIND_B != 0:
        raw = load_raw(b_ptr, cols, cols, 0, col_mask, col_mask, KIND_B)
        beta = clamp(softplus(raw), 0.0, beta_max)
        sum_b = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    if KIND_C != 0:
        gate = sigmoid(load_raw(c_ptr, cols, cols, 0, col_mask, col_mask, KIND_C))
        sum_c = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)

    for block in range(walker, tl.cdiv(R, BLOCK_R), tl.num_programs(1)):
        rows = (block * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]).to(tl.int64)
        mask = (rows < R) & col_mask
        h = load(h_ptr + rows * stride_h + cols, mask)
        dh_next = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
        if dh_next_ptr is not None:
            dh_next = load(dh_next_ptr + rows * stride_dh + cols, mask)
        dv_next = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
        if dv_next_ptr is not None:
            dv_next = load(dv_next_ptr + rows * stride_dv + cols, mask)
        v = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
        if v_ptr is not None:
            v = load(v_ptr + rows * stride_v + cols, mask)
        force = 0.0
        if force_ptr is not None:
            force = load(force_ptr + rows * stride_f + cols, mask)
        if KIND_A == 0:
            alpha = sigmoid(load(a_ptr + rows * stride_a + cols, mask))
        if KIND_B == 0:
            raw = load(b_ptr + rows * stride_b + cols, mask)
            unbounded = softplus(raw)
            beta = clamp(unbounded, 0.0, beta_max)
        if KIND_C == 0:
            gate = sigmoid(load(c_ptr + rows * stride_c + cols, mask))

        _, v_next, free, error = advance(h, v, alpha, beta, gate, mu, force, dt, velocity_max, CLIP)
        dh, dp = retreat(dh_next, dv_next, alpha, beta, gate, free, dt, velocity_max, CLIP)
        out = rows * D + cols
        store(dh_ptr + out, dh, mask)
        if v_ptr is not None:
            store(dv_ptr + out, alpha * dp, mask)
        if force_ptr is not None:
            store(dforce_ptr + out, dp, mask)
        dalpha = dp * v
        if KIND_A == 0:
            store(da_ptr + out, dalpha * (alpha * (1.0 - alpha)), mask)
        else:
            sum_a += tl.where(mask, dalpha, 0.0)
        dbeta = -(dp * error)
        if KIND_B == 0:
            store(db_ptr + out, through(dbeta, unbounded, 0.0, beta_max) * sigmoid(raw), mask)
        else:
            sum_b += tl.where(mask, dbeta, 0.0)
        dgate = dh_next * dt * v_next
        if KIND_C == 0:
            store(dc_ptr + out, dgate * (gate * (1.0 - gate)), mask)
        else:
            sum_c += tl.where(mask, dgate, 0.0)
        sum_mu += tl.where(mask, beta * dp, 0.0)

    at = walker * D + cols
    store(dmu_ptr + at, tl.sum(sum_mu, axis=0, keep_dims=True), col_mask)
    if KIND_A == 1:
        store(da_ptr + at, tl.sum(sum_a, axis=0, keep_dims=True), col_mask)
    elif KIND_A == 2:
        tl.store(da_ptr + walker * tiles + tile, tl.sum(tl.sum(sum_a, axis=1), axis=0))
    if KIND_B == 1:
        store(db_ptr + at, tl.sum(sum_b, axis=0, keep_dims=True), col_mask)
    elif KIND_B == 2:
        tl.store(db_ptr + walker * tiles + tile, tl.sum(tl.sum(sum_b, axis=1), axis=0))
    if KIND_C == 1:
        store(dc_ptr + at, tl.sum(sum_c, axis=0, keep_dims=True), col_mask)
    elif KIND_C == 2:
        tl.store(dc_ptr + walker * tiles + tile, tl.sum(tl.sum(sum_c, axis=1), axis=0))


@triton.jit
def finish_kernel(
    mu_parts_ptr, a_parts_ptr, b_parts_ptr, c_parts_ptr, mu_ptr, a_ptr, b_ptr, c_ptr,
    dmu_ptr, da_ptr, db_ptr, dc_ptr,
    walkers, programs, D, beta_max, mu_min, mu_max,
    KIND_A: tl.constexpr, KIND_B: tl.constexpr, KIND_C: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Add up the partial sums of mu and of coefficients without rows, and finish their gradients.

    A coefficient of the layer is a vector of width 1 here, with a partial sum from every program.
    """
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    parameter = tl.program_id(1)
    if parameter == 0:
        inside = cols < D
        total = column_sum(mu_parts_ptr, cols, inside, walkers, D, BLOCK_P, BLOCK_C)
        total = through(total, load(mu_ptr + cols, inside), mu_min, mu_max)
        store(dmu_ptr + cols, total, inside)
    if KIND_A != 0:
        width = D if KIND_A == 1 else 1
        count = walkers if KIND_A == 1 else programs
        if parameter == 1:
            inside = cols < width
            total = column_sum(a_parts_ptr, cols, inside, count, width, BLOCK_P, BLOCK_C)
            alpha = sigmoid(load(a_ptr + cols, inside))
            store(da_ptr + cols, total * (alpha * (1.0 - alpha)), inside)
    if KIND_B != 0:
        width = D if KIND_B == 1 else 1
        count = walkers if KIND_B == 1 else programs
        if parameter == 2:
            inside = cols < width
            total = column_sum(b_parts_ptr, cols, inside, count, width, BLOCK_P, BLOCK_C)
            raw = load(b_ptr + cols, inside)
            total = through(total, softplus(raw), 0.0, beta_max)
            store(db_ptr + cols, total * sigmoid(raw), inside)
    if KIND_C != 0:
        width = D if KIND_C == 1 else 1
        count = walkers if KIND_C == 1 else programs
        if parameter == 3:
            inside = cols < width
            total = column_sum(c_parts_ptr, cols, inside, count, width, BLOCK_P, BLOCK_C)
            gate = sigmoid(load(c_ptr + cols, inside))
            store(dc_ptr + cols, total * (gate * (1.0 - gate)), inside)


TOKEN, CHANNEL, LAYER = 0, 1, 2
"""How a raw coefficient is stored: (..., D), (D,) or (1,)."""


# ------------------------------------------------------------------------------------------------
# Launches


REGISTERS = {TOKEN: 160, CHANNEL: 128, LAYER: 128}
"""The most registers that a thread of the backward needs, by the kind that needs most."""

FINISH = (64, 32, 4)
"""(BLOCK_P, BLOCK_C, num_warps) of `finish_kernel`."""


def kind(raw: Tensor, h: Tensor) -> int:
    """How the raw coefficient `raw` of a state `h` is stored: TOKEN, CHANNEL or LAYER."""
    if raw.shape == h.shape:
        return TOKEN
    return LAYER if raw.numel() == 1 else CHANNEL


@_common.operator
def inl_step_fwd(
    h: Tensor, v: Tensor | None, alpha_raw: Tensor, beta_raw: Tensor, gate_raw: Tensor, mu: Tensor,
    force: Tensor | None, dt: float, beta_max: float, velocity_max: float, mu_min: float,
    mu_max: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(h', v'). Infinite bounds mean none; raw coefficients are shaped like h, (D,) or (1,)."""
    h_out, v_out = _common.empty_tensors(h, h if v is None else v)
    if _common.nothing_to_launch(h):
        return h_out, v_out
    block_r, block_d, num_warps = tile(h.shape[-1])
    (x, v_rows, force_rows), (h_stride, v_stride, force_stride) = rows_of(h, v, force)
    rows, width = x.shape
    raws, strides, kinds = _coefficients(h, alpha_raw, beta_raw, gate_raw)
    forward_kernel[(triton.cdiv(rows, block_r) * triton.cdiv(width, block_d),)](
        x, v_rows, *raws, mu.contiguous(), force_rows, h_out, v_out,
        rows, width, h_stride, v_stride, *strides, force_stride,
        dt, beta_max, velocity_max, mu_min, mu_max,
        *kinds, math.isfinite(velocity_max), block_r, block_d, num_warps=num_warps,
    )  # fmt: skip
    return h_out, v_out


@_common.operator
def inl_step_bwd(
    dh_next: Tensor | None, dv_next: Tensor | None, h: Tensor, v: Tensor | None,
    alpha_raw: Tensor, beta_raw: Tensor, gate_raw: Tensor, mu: Tensor, force: Tensor | None,
    dt: float, beta_max: float, velocity_max: float, mu_min: float, mu_max: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of (h, v, alpha_raw, beta_raw, gate_raw, mu, force); size 0 where None."""
    grads = _common.empty_tensors(h, v, alpha_raw, beta_raw, gate_raw, mu, force)
    if _common.nothing_to_launch(h):
        return tuple(grad.zero_() for grad in grads)  # type: ignore[return-value]
    dh, dv, da, db, dc, dmu, dforce = grads
    block_r, block_d, num_warps = tile(h.shape[-1])
    (*states, force_rows), (*state_strides, force_stride) = rows_of(dh_next, dv_next, h, v, force)
    rows, width = states[2].shape
    raws, strides, kinds = _coefficients(h, alpha_raw, beta_raw, gate_raw)
    mu = mu.contiguous()
    tiles = triton.cdiv(width, block_d)
    blocks = triton.cdiv(rows, block_r)
    registers = max(REGISTERS[way] for way in kinds)
    walkers = triton.cdiv(_common.one_wave(h, blocks * tiles, num_warps, registers), tiles)
    columns = {TOKEN: 0, CHANNEL: width, LAYER: tiles}
    mu_parts, *parts = (
        h.new_empty(walkers, columns[way], dtype=torch.float32) if way != TOKEN else None
        for way in (CHANNEL, *kinds)
    )
    targets = [
        grad if part is None else part for grad, part in zip((da, db, dc), parts, strict=True)
    ]
    backward_kernel[(tiles, walkers)](
        *states, *raws, mu, force_rows, dh, dv, *targets, dforce, mu_parts,
        rows, width, *state_strides, *strides, force_stride,
        dt, beta_max, velocity_max, mu_min, mu_max,
        *kinds, math.isfinite(velocity_max), block_r, block_d, num_warps=num_warps,
    )  # fmt: skip
    block_p, block_c, num_warps = FINISH
    # One program for each parameter and block of columns.
    finish_kernel[(triton.cdiv(width, block_c), 1 + 3 * any(kinds))](
        mu_parts, *parts, mu, *raws, dmu, da, db, dc,
        walkers, walkers * tiles, width, beta_max, mu_min, mu_max,
        *kinds, block_p, block_c, num_warps=num_warps,
    )  # fmt: skip
    return grads


def _coefficients(h: Tensor, *raw: Tensor) -> tuple[list[Tensor], list[int], list[int]]:
    """Kernel arguments of the three raw coefficients: tensors, row strides, kinds."""
    kinds = [kind(x, h) for x in raw]
    tensors = [
        as_rows(x) if way == TOKEN else x.contiguous() for x, way in zip(raw, kinds, strict=True)
    ]
    strides = [x.stride(0) if way == TOKEN else 0 for x, way in zip(tensors, kinds, strict=True)]
    return tensors, strides, kinds


def numbers(
    dt: float, beta_max: float | None, velocity_max: float | None, mu_min: float | None,
    mu_max: float | None,
) -> tuple[float, ...]:  # fmt: skip
    """The numbers of a step as its kernels take them, infinite for a bound that is None."""
    beta_max, velocity_max, mu_max = (
        math.inf if bound is None else bound for bound in (beta_max, velocity_max, mu_max)
    )
    return dt, beta_max, velocity_max, -math.inf if mu_min is None else mu_min, mu_max


# ------------------------------------------------------------------------------------------------
# Autograd and the public function


@_common.gradient_of(inl_step_fwd, materialize=False)
def _(
    ctx: Any, inputs: tuple[Any, ...], dh_next: Tensor | None, dv_next: Tensor | None
) -> list[Tensor | None]:
    grads = list(inl_step_bwd(dh_next, dv_next, *inputs))
    if inputs[1] is None:
        grads[2] = None  # alpha has no effect without a velocity
    return grads


def takes(
    h: Tensor, v: Any, alpha_raw: Tensor, beta_raw: Tensor, gate_raw: Tensor, *_: Any, **__: Any
) -> bool:
    """Whether the kernels support the shapes of the raw coefficients of `inl_step`."""
    raw = (alpha_raw, beta_raw, gate_raw)
    return all(x.shape == h.shape or _common.is_vector(x, h) for x in raw)


def inl_step(
    h: Tensor, v: Tensor | None, alpha_raw: Tensor, beta_raw: Tensor, gate_raw: Tensor, mu: Tensor,
    force: Tensor | None = None, *,
    dt: float, beta_max: float | None, velocity_max: float | None, mu_min: float | None,
    mu_max: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`inl_core.reference.inl_step` in one kernel; same arguments and results.

    Raw coefficients must be shaped like `h`, or hold D values for its last dimension, or one value.

    Raises:
        ValueError: If a shape, a dtype (fp64) or a device does not fit, or D exceeds 16384.
    """
    _common.check_inputs("inl_step", h, v, alpha_raw, beta_raw, gate_raw, mu, force)
    _common.check_width("inl_step", h.shape[-1])
    for name, x in (("v", v), ("force", force)):
        if x is not None and x.shape != h.shape:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}, expected that of h, {tuple(h.shape)}"
            )
    if mu.shape != h.shape[-1:]:
        raise ValueError(f"mu has shape {tuple(mu.shape)}, expected ({h.shape[-1]},)")
    raw = (alpha_raw, beta_raw, gate_raw)
    if not takes(h, v, *raw):
        raise ValueError(
            f"raw coefficients have shapes {[tuple(x.shape) for x in raw]}; the kernel takes "
            f"{tuple(h.shape)}, ({h.shape[-1]},) or (1,)"
        )
    # Drop leading dimensions of 1: the custom op takes one shape per kind.
    flat = [x if x.shape == h.shape else x.reshape(-1) for x in raw]
    bounds = numbers(dt, beta_max, velocity_max, mu_min, mu_max)
    return inl_step_fwd(h, v, *flat, mu, force, *bounds)
