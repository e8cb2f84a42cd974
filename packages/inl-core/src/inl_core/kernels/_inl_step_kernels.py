"""Triton kernels of `inl_core.reference.inl_step`: one pass forward, one pass backward.

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

``through`` is the gradient rule of `bounded_clamp`. A coefficient is read as it is stored: a value
a token and channel, a vector (D,) or one number; the gradients of the latter two, and of mu, are
sums over rows: each program keeps fp32 partials, and one small kernel adds them up and applies the
rule. No atomics, so results repeat bit for bit. Only inputs are saved for the backward.
"""

from __future__ import annotations

import triton
import triton.language as tl

from inl_core.kernels._common import clamp, load, sigmoid, softplus, store

# ------------------------------------------------------------------------------------------------
# Parts of kernels


@triton.jit
def load_raw(pointer, rows, cols, stride, mask, col_mask, KIND: tl.constexpr):
    """Load raw coefficients: a tile, a row of it, or one number."""
    if KIND == 0:
        raw = load(pointer + rows * stride + cols, mask)
    elif KIND == 1:
        raw = load(pointer + cols, col_mask)
    else:
        raw = tl.load(pointer).to(tl.float32)
    return raw


@triton.jit
def advance(h, v, alpha, beta, gate, mu, force, dt, velocity_max, CLIP: tl.constexpr):
    """Equations (1)-(3): returns (h', v', p, e)."""
    error = h - mu
    free = alpha * v - beta * error + force
    v_next = free
    if CLIP:
        v_next = clamp(free, -velocity_max, velocity_max)
    return h + dt * gate * v_next, v_next, free, error


@triton.jit
def retreat(dh_next, dv_next, alpha, beta, gate, free, dt, velocity_max, CLIP: tl.constexpr):
    """Gradient of equations (2) and (3): returns (dh, dp)."""
    dp = dv_next + dh_next * (dt * gate)
    if CLIP:
        dp = tl.where((free >= -velocity_max) & (free <= velocity_max), dp, 0.0)
    return dh_next - beta * dp, dp


@triton.jit
def through(grad, x, minimum, maximum):
    """Gradient of `bounded_clamp`: beyond a bound only what leads back inside passes."""
    blocked = ((x < minimum) & (grad > 0)) | ((x > maximum) & (grad < 0))
    return tl.where(blocked, 0.0, grad)


@triton.jit
def column_sum(pointer, cols, col_mask, count, width, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Sum a (count, width) fp32 buffer over its rows, for the columns `cols` (1, BLOCK_C)."""
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for start in range(0, count, BLOCK_P):
        index = start + tl.arange(0, BLOCK_P)[:, None]
        total += load(pointer + index * width + cols, (index < count) & col_mask)
    return tl.sum(total, axis=0, keep_dims=True)


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
    """One tile (BLOCK_R, BLOCK_D) a program; neighbouring programs take neighbouring columns."""
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
    """A program walks down one stripe of BLOCK_D columns, row blocks apart by the grid.

    Gradients of per-token inputs are stored at once. The others are summed over the program's rows:
    dmu, da, db, dc then point to partials, (programs, D) or one number a program, still with
    respect to the activated coefficients and the clamped mu.
    """
    tiles = tl.cdiv(D, BLOCK_D)
    tile = tl.program_id(0)
    walker = tl.program_id(1)
    cols = tile * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    col_mask = cols < D
    mu = clamp(load(mu_ptr + cols, col_mask), mu_min, mu_max)
    sum_mu = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    # What does not depend on the row is read and activated once.
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
    """Add up the partials of mu and of every coefficient without rows, and finish the gradients.

    One number for the whole layer is a vector of width 1 here, with a partial from every program.
    """
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    col_mask = cols < D
    dmu = column_sum(mu_parts_ptr, cols, col_mask, walkers, D, BLOCK_P, BLOCK_C)
    dmu = through(dmu, load(mu_ptr + cols, col_mask), mu_min, mu_max)
    store(dmu_ptr + cols, dmu, col_mask)
    if KIND_A != 0:
        width = D if KIND_A == 1 else 1
        count = walkers if KIND_A == 1 else programs
        inside = cols < width
        total = column_sum(a_parts_ptr, cols, inside, count, width, BLOCK_P, BLOCK_C)
        alpha = sigmoid(load(a_ptr + cols, inside))
        store(da_ptr + cols, total * (alpha * (1.0 - alpha)), inside)
    if KIND_B != 0:
        width = D if KIND_B == 1 else 1
        count = walkers if KIND_B == 1 else programs
        inside = cols < width
        total = column_sum(b_parts_ptr, cols, inside, count, width, BLOCK_P, BLOCK_C)
        raw = load(b_ptr + cols, inside)
        total = through(total, softplus(raw), 0.0, beta_max)
        store(db_ptr + cols, total * sigmoid(raw), inside)
    if KIND_C != 0:
        width = D if KIND_C == 1 else 1
        count = walkers if KIND_C == 1 else programs
        inside = cols < width
        total = column_sum(c_parts_ptr, cols, inside, count, width, BLOCK_P, BLOCK_C)
        gate = sigmoid(load(c_ptr + cols, inside))
        store(dc_ptr + cols, total * (gate * (1.0 - gate)), inside)
