"""Triton kernels of `inl_core.reference.inl_branch_epilogue`: all of it in one pass over the row.

Forward, with the INL coefficients alpha, beta, gate and the equilibrium mu as they are used, and
one vector a sample of each of rho (the gate of the residual sum), shift and scale:

    e  = h - mu                        p = alpha * v - beta * e
    v' = clip(p, -velocity_max, velocity_max)
    h' = h + dt * gate * v'
    s  = residual + rho * h'           m = (1 + scale) * w
    y  = s * rsqrt(mean(s²) + eps) * m + shift

Nothing is rounded before y, s and v' are stored: 12 bytes an element in bf16, where the gated sum
and its norm alone take 8. Backward makes h', s, r and n = s·r again:

    ds = ds_out + r·(m·dy - n·mean(n·m·dy))          dresidual = ds     dh' = rho·ds
    dp = (dv' + dh' * dt * gate) where |p| <= velocity_max, else 0
    dh = dh' - beta * dp                             dv = alpha * dp

    sums over the tokens of a sample   drho = Σ ds·h'   dshift = Σ dy   S = Σ dy·n
    sums over all rows   dalpha = Σ dp·v   dbeta = -Σ dp·e   dgate = Σ dh'·dt·v'   dmu = Σ beta·dp

dscale and dw follow from S as in `inl_core.kernels.modulated_rms_norm`. A program walks over tokens
of one sample and keeps its part of every sum.
"""

from __future__ import annotations

import triton
import triton.language as tl

from inl_core.kernels._common import load, store
from inl_core.kernels._inl_step_kernels import advance, retreat
from inl_core.kernels.rms_norm import inverse_rms, norm_gradient


@triton.jit
def coefficient(pointer, number, column, inside, CHANNEL: tl.constexpr):
    """A coefficient of the layer: a row of D values, one value in memory, or a plain number."""
    if pointer is None:
        value = number
    elif CHANNEL:
        value = load(pointer + column, inside)
    else:
        value = tl.load(pointer).to(tl.float32)
    return value


@triton.jit
def vector(pointer, row, stride, column, inside, absent):
    """A row of D values, or the number that stands for it where there is none."""
    return absent if pointer is None else load(pointer + row * stride + column, inside)


@triton.jit
def add_up(pointer, partial, column, inside, D: tl.constexpr):
    """Store a program's part of a sum over rows, where the sum is wanted."""
    if pointer is not None:
        total = tl.sum(partial, axis=0, keep_dims=True)
        store(pointer + tl.program_id(0).to(tl.int64) * D + column, total, inside)


@triton.jit
def forward_kernel(
    h_ptr, v_ptr, alpha_ptr, beta_ptr, gate_ptr, mu_ptr,
    residual_ptr, rho_ptr, shift_ptr, scale_ptr, weight_ptr, y_ptr, total_ptr, v_out_ptr,
    tokens, blocks, h_stride, v_stride, residual_stride, rho_stride, shift_stride, scale_stride,
    alpha_number, beta_number, gate_number, dt, velocity_max, eps,
    ALPHA: tl.constexpr, BETA: tl.constexpr, GATE: tl.constexpr, CLIP: tl.constexpr,
    D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One block of tokens of one sample a program."""
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    token = (tl.program_id(0) % blocks) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    row = sample * tokens + token
    column = tl.arange(0, BLOCK_D)[None, :]
    inside = column < D
    mask = (token < tokens) & inside

    alpha = coefficient(alpha_ptr, alpha_number, column, inside, ALPHA)
    beta = coefficient(beta_ptr, beta_number, column, inside, BETA)
    gate = coefficient(gate_ptr, gate_number, column, inside, GATE)
    mu = load(mu_ptr + column, inside)
    h = load(h_ptr + row * h_stride + column, mask)
    v = vector(v_ptr, row, v_stride, column, mask, 0.0)
    h_next, v_next, _, _ = advance(h, v, alpha, beta, gate, mu, 0.0, dt, velocity_max, CLIP)
    store(v_out_ptr + row * D + column, v_next, mask)

    rho = vector(rho_ptr, sample, rho_stride, column, inside, 1.0)
    total = load(residual_ptr + row * residual_stride + column, mask) + rho * h_next
    store(total_ptr + row * D + column, total, mask)
    factor = 1.0 + vector(scale_ptr, sample, scale_stride, column, inside, 0.0)
    factor *= vector(weight_ptr, 0, 0, column, inside, 1.0)
    shift = vector(shift_ptr, sample, shift_stride, column, inside, 0.0)
    y = total * inverse_rms(total, token < tokens, eps, D) * factor + shift
    store(y_ptr + row * D + column, y, mask)


@triton.jit
def backward_kernel(
    dy_ptr, dtotal_ptr, dv_next_ptr, h_ptr, v_ptr, alpha_ptr, beta_ptr, gate_ptr, mu_ptr,
    residual_ptr, rho_ptr, scale_ptr, weight_ptr, dh_ptr, dv_ptr, dresidual_ptr,
    dalpha_ptr, dbeta_ptr, dgate_ptr, dmu_ptr, drho_ptr, dshift_ptr, sums_ptr,
    tokens, parts, dy_stride, dtotal_stride, dv_next_stride,
    h_stride, v_stride, residual_stride, rho_stride, scale_stride,
    alpha_number, beta_number, gate_number, dt, velocity_max, eps,
    ALPHA: tl.constexpr, BETA: tl.constexpr, GATE: tl.constexpr, CLIP: tl.constexpr,
    D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A program walks over blocks of tokens of one sample; every sum is (programs, D) in fp32."""
    sample = (tl.program_id(0) // parts).to(tl.int64)
    column = tl.arange(0, BLOCK_D)[None, :]
    inside = column < D
    alpha = coefficient(alpha_ptr, alpha_number, column, inside, ALPHA)
    beta = coefficient(beta_ptr, beta_number, column, inside, BETA)
    gate = coefficient(gate_ptr, gate_number, column, inside, GATE)
    mu = load(mu_ptr + column, inside)
    rho = vector(rho_ptr, sample, rho_stride, column, inside, 1.0)
    factor = 1.0 + vector(scale_ptr, sample, scale_stride, column, inside, 0.0)
    factor *= vector(weight_ptr, 0, 0, column, inside, 1.0)
    dalpha = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    dbeta = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    dgate = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    dmu = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    drho = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    dshift = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    sums = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)

    for block in range(tl.program_id(0) % parts, tl.cdiv(tokens, BLOCK_R), parts):
        token = block * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
        row = sample * tokens + token
        mask = (token < tokens) & inside
        h = load(h_ptr + row * h_stride + column, mask)
        v = vector(v_ptr, row, v_stride, column, mask, 0.0)
        h_next, v_next, free, error = advance(
            h, v, alpha, beta, gate, mu, 0.0, dt, velocity_max, CLIP
        )
        total = load(residual_ptr + row * residual_stride + column, mask) + rho * h_next

        dtotal = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
        if dtotal_ptr is not None:
            dtotal = load(dtotal_ptr + row * dtotal_stride + column, mask)
        if dy_ptr is not None:
            dy = load(dy_ptr + row * dy_stride + column, mask)
            r = inverse_rms(total, token < tokens, eps, D)
            normed = total * r
            dshift += dy
            sums += dy * normed
            dtotal += norm_gradient(normed, r, dy * factor, D)
        store(dresidual_ptr + row * D + column, dtotal, mask)
        drho += dtotal * h_next

        dh_next = rho * dtotal
        dv_next = vector(dv_next_ptr, row, dv_next_stride, column, mask, 0.0)
        dh, dp = retreat(dh_next, dv_next, alpha, beta, gate, free, dt, velocity_max, CLIP)
        store(dh_ptr + row * D + column, dh, mask)
        if v_ptr is not None:
            store(dv_ptr + row * D + column, alpha * dp, mask)
        dalpha += dp * v
        dbeta -= dp * error
        dgate += dh_next * dt * v_next
        dmu += beta * dp

    add_up(dalpha_ptr, dalpha, column, inside, D)
    add_up(dbeta_ptr, dbeta, column, inside, D)
    add_up(dgate_ptr, dgate, column, inside, D)
    add_up(dmu_ptr, dmu, column, inside, D)
    add_up(drho_ptr, drho, column, inside, D)
    add_up(dshift_ptr, dshift, column, inside, D)
    add_up(sums_ptr, sums, column, inside, D)
