"""Triton kernels of `inl_core.reference.inl_controlled_step`.

With W the rows of the up-projection for one coefficient, and z the controller's hidden state (C
wide), each tile of columns makes its raw coefficients itself,

    a = z·W_aᵀ + b_a        b = z·W_bᵀ + b_b        c = z·W_cᵀ + b_c

and goes on as `inl_core.kernels._inl_step_kernels` describes: they never reach memory. The backward
makes them again, then da, db, dc as there, and from these

    dz   = da·W_a + db·W_b + dc·W_c        a sum over columns
    dW_a = daᵀ·z     db_a = Σ da           sums over rows, as is dmu

Two sums in two directions are two kernels, which both read the state: `rows_kernel` walks along the
columns, keeps dz and stores the gradients of the state; `columns_kernel` walks down the rows, keeps
the others, and leaves an fp32 partial a program. No atomics, and nothing D-wide is stored besides.

Matrix products take operands in DOT, the dtype of z, and sum in fp32. W is read anew for each tile
(from the cache, mostly): kept for a whole loop, its operands would fill all registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from inl_core.kernels._common import clamp, load, sigmoid, softplus, store
from inl_core.kernels._inl_step_kernels import advance, retreat, through

# ------------------------------------------------------------------------------------------------
# Parts of kernels


@triton.jit
def load_tile(pointer, rows, stride, across, mask):
    """A tile of a state, or 0 where there is none."""
    return 0.0 if pointer is None else load(pointer + rows * stride + across, mask)


@triton.jit
def raw_coefficient(hidden, weight_ptr, bias_ptr, inside, col_mask):
    """z·Wᵀ + b for a tile, in fp32; the pointers are those of its rows of W and of its columns."""
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
    """Gradients of one tile: (h, v, force, clamped mu, a, b, c), all still to be masked."""
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
    """One tile (BLOCK_R, BLOCK_D) a program; neighbouring programs take neighbouring columns."""
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
    """Gradients of W, b and mu: a program walks down BLOCK_D columns, row blocks apart by the grid.

    It fills its slice of dweight (walkers, 3, C, D), dbias (walkers, 3, D) and dmu (walkers, D),
    the last still with respect to the clamped mu.
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
