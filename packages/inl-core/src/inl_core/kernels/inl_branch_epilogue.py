"""The step after a branch, its gated residual sum and the next norm, in one pass, in Triton.

Forward, with the coefficients alpha, beta, gate and the equilibrium mu as they are used, and one
vector per sample of each of rho (the gate of the residual sum), shift and scale:

    e  = h - mu                        p = alpha * v - beta * e
    v' = clip(p, -velocity_max, velocity_max)
    h' = h + dt * gate * v'
    s  = residual + rho * h'           m = (1 + scale) * w
    y  = s * rsqrt(mean(s²) + eps) * m + shift

Nothing is rounded before y, s and v' are stored: 12 bytes per element in bf16, where the gated sum
and its norm alone take 8. Backward recomputes h', s, r and n = s·r:

    ds = ds_out + r·(m·dy - n·mean(n·m·dy))          dresidual = ds     dh' = rho·ds
    dp = (dv' + dh' * dt * gate) where |p| <= velocity_max, else 0
    dh = dh' - beta * dp                             dv = alpha * dp

    sums over the tokens of a sample   drho = Σ ds·h'   dshift = Σ dy   S = Σ dy·n
    sums over all rows   dalpha = Σ dp·v   dbeta = -Σ dp·e   dgate = Σ dh'·dt·v'   dmu = Σ beta·dp

dscale and dw follow from S as in `inl_core.kernels.modulated_rms_norm`. A program loops over tokens
of one sample and keeps a partial sum of each.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from inl_core.kernels import _common
from inl_core.kernels._common import contiguous, load, rows_of, store
from inl_core.kernels.inl_step import advance, retreat
from inl_core.kernels.modulated_rms_norm import modulation_gradients
from inl_core.kernels.rms_norm import inverse_rms, norm_gradient
from inl_core.reference import bounded_clamp

__all__ = ["inl_branch_epilogue", "inl_branch_epilogue_bwd", "inl_branch_epilogue_fwd", "takes"]


@triton.jit
def coefficient(pointer, number, column, inside, CHANNEL: tl.constexpr):
    """A coefficient: a row of D values, one value in memory, or a number."""
    if pointer is None:
        value = number
    elif CHANNEL:
        value = load(pointer + column, inside)
    else:
        value = tl.load(pointer).to(tl.float32)
    return value


@triton.jit
def vector(pointer, row, stride, column, inside, absent):
    """A row of D values, or the number `absent` if the pointer is None."""
    return absent if pointer is None else load(pointer + row * stride + column, inside)


@triton.jit
def add_up(pointer, partial, column, inside, D: tl.constexpr):
    """Store the partial sum of a program, if the pointer is not None."""
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
    """One block of tokens of one sample per program."""
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
    """A program loops over token blocks of one sample; sums are (programs, D) in fp32."""
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


OP = "inl_branch_epilogue"

# ------------------------------------------------------------------------------------------------
# Launches


def _samples(*conditions: Tensor | None) -> int:
    """Number of groups of rows that share a condition; 1 without conditions."""
    return next((c.shape[:-1].numel() for c in conditions if c is not None), 1)


@_common.operator
def inl_branch_epilogue_fwd(
    h: Tensor, v: Tensor | None, alpha: Tensor | None, beta: Tensor | None, gate: Tensor | None,
    mu: Tensor, residual: Tensor, residual_gate: Tensor | None, shift: Tensor | None,
    scale: Tensor | None, weight: Tensor | None,
    alpha_number: float, beta_number: float, gate_number: float, dt: float, velocity_max: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(y, sum, v'). A coefficient that is None is its number; mu is already clamped."""
    results = _common.empty_tensors(h, residual, h if v is None else v)
    if _common.nothing_to_launch(h):
        return results
    (x, v_rows, *rows), strides = rows_of(h, v, residual, residual_gate, shift, scale)
    samples = _samples(residual_gate, shift, scale)
    tokens, blocks, _, sizes = _common.sample_config(x, samples)
    forward_kernel[(samples * blocks,)](
        x, v_rows, *(contiguous(c) for c in (alpha, beta, gate, mu)), *rows, contiguous(weight),
        *results, tokens, blocks, *strides,
        alpha_number, beta_number, gate_number, dt, velocity_max, eps,
        *(_by_channel(c) for c in (alpha, beta, gate)), math.isfinite(velocity_max), **sizes,
    )  # fmt: skip
    return results


def _by_channel(coefficient: Tensor | None) -> bool:
    return coefficient is not None and coefficient.numel() > 1


@_common.operator
def inl_branch_epilogue_bwd(
    dy: Tensor | None, dtotal: Tensor | None, dv_next: Tensor | None,
    h: Tensor, v: Tensor | None, alpha: Tensor | None, beta: Tensor | None, gate: Tensor | None,
    mu: Tensor, residual: Tensor, residual_gate: Tensor | None, shift: Tensor | None,
    scale: Tensor | None, weight: Tensor | None,
    alpha_number: float, beta_number: float, gate_number: float, dt: float, velocity_max: float,
    eps: float,
) -> tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor
]:  # fmt: skip
    """Gradients of (h, v, residual), then the sums over rows, in fp32.

    These are dalpha, dbeta, dgate, dmu, d(residual_gate), dshift and S = Σ dy·n; size 0 for an
    argument that is None.
    """
    states = _common.empty_tensors(h, v, residual)
    shared = (alpha, beta, gate, mu, residual_gate, shift, weight if scale is None else scale)
    if _common.nothing_to_launch(h):
        sizes = [0 if x is None else x.shape for x in shared]
        return *states, *(h.new_zeros(size, dtype=torch.float32) for size in sizes)  # type: ignore[return-value]
    (*rows, residual_rows, rho, scales), strides = rows_of(
        dy, dtotal, dv_next, h, v, residual, residual_gate, scale
    )
    samples = _samples(residual_gate, shift, scale)
    tokens, _, parts, sizes = _common.sample_config(rows[3], samples)
    partials = [
        None if x is None else h.new_empty(samples, parts, h.shape[-1], dtype=torch.float32)
        for x in shared
    ]
    backward_kernel[(samples * parts,)](
        *rows, *(contiguous(c) for c in (alpha, beta, gate, mu)), residual_rows, rho, scales,
        contiguous(weight), *states, *partials, tokens, parts, *strides,
        alpha_number, beta_number, gate_number, dt, velocity_max, eps,
        *(_by_channel(c) for c in (alpha, beta, gate)), math.isfinite(velocity_max), **sizes,
    )  # fmt: skip
    return *states, *(  # type: ignore[return-value]
        h.new_empty(0, dtype=torch.float32) if x is None or partial is None else _summed(partial, x)
        for partial, x in zip(partials, shared, strict=True)
    )


def _summed(partial: Tensor, like: Tensor) -> Tensor:
    """Sum (samples, parts, D) over the parts, over all rows, or over everything."""
    if like.numel() == 1:
        return partial.sum().reshape(like.shape)
    return partial.sum((0, 1)) if like.ndim == 1 else _common.sum_parts(partial, like)


# ------------------------------------------------------------------------------------------------
# Autograd and the public function


@_common.gradient_of(inl_branch_epilogue_fwd, materialize=False)
def _(ctx: Any, inputs: tuple[Any, ...], *down: Tensor | None) -> tuple[Tensor | None, ...]:
    dh, dv, dresidual, *sums, s = inl_branch_epilogue_bwd(*down, *inputs)
    scale, weight = inputs[9:11]
    modulation = modulation_gradients(s, scale, weight, weight is not None)
    return dh, dv, *sums[:4], dresidual, *sums[4:], *modulation


def takes(
    h: Tensor, v: Any, alpha: Tensor | float, beta: Tensor | float, gate: Tensor | float,
    *_: Any, **__: Any,
) -> bool:  # fmt: skip
    """Whether the coefficients are per layer or per channel, not per token."""
    return all(not isinstance(x, Tensor) or _common.is_vector(x, h) for x in (alpha, beta, gate))


def inl_branch_epilogue(
    h: Tensor, v: Tensor | None, alpha: Tensor | float, beta: Tensor | float, gate: Tensor | float,
    mu: Tensor, residual: Tensor, residual_gate: Tensor | None = None, shift: Tensor | None = None,
    scale: Tensor | None = None, weight: Tensor | None = None, eps: float = 1e-6, *,
    dt: float, velocity_max: float | None, mu_min: float | None, mu_max: float | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`inl_core.reference.inl_branch_epilogue` in one kernel; same arguments and results.

    Coefficients must be numbers, hold one value, or D values for the last dimension of `h`.

    Raises:
        ValueError: If a shape, a dtype (fp64) or a device does not fit, or D exceeds 16384.
    """
    coefficients = [x.reshape(-1) if isinstance(x, Tensor) else None for x in (alpha, beta, gate)]
    numbers = [0.0 if isinstance(x, Tensor) else float(x) for x in (alpha, beta, gate)]
    _common.check_inputs(OP, h, v, *coefficients, mu, residual, residual_gate, shift, scale, weight)
    same = [("residual", residual)] if v is None else [("residual", residual), ("v", v)]
    _common.check_rows(OP, h, *same)
    _common.check_weight(OP, "mu", mu, h.shape[-1])
    _common.check_weight(OP, "weight", weight, h.shape[-1])
    if not takes(h, v, alpha, beta, gate):
        shapes = [tuple(x.shape) if isinstance(x, Tensor) else x for x in (alpha, beta, gate)]
        raise ValueError(
            f"the Triton kernel of {OP} takes coefficients that are numbers, (1,) or "
            f"({h.shape[-1]},), got {shapes}; inl_core.reference.{OP} takes any that broadcast"
        )
    given = _common.conditions(OP, h, residual_gate=residual_gate, shift=shift, scale=scale)
    return inl_branch_epilogue_fwd(
        h, v, *coefficients, bounded_clamp(mu, mu_min, mu_max), residual, *given, weight, *numbers,
        dt, math.inf if velocity_max is None else velocity_max, eps,
    )  # fmt: skip
