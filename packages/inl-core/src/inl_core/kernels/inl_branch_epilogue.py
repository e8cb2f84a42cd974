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
from inl_core.kernels._common import as_rows, contiguous, load, row_stride, rows_or_none, store
from inl_core.kernels.inl_step import advance, retreat
from inl_core.kernels.modulated_rms_norm import parts_of, sample_blocks
from inl_core.kernels.rms_norm import inverse_rms, norm_gradient
from inl_core.reference import bounded_clamp

__all__ = [
    "inl_branch_epilogue",
    "inl_branch_epilogue_bwd",
    "inl_branch_epilogue_fwd",
    "takes",
]


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

TENSORS = 11
"""Leading arguments of the custom op that are tensors or None."""


# ------------------------------------------------------------------------------------------------
# Launches


def _samples(*conditions: Tensor | None) -> int:
    """Number of groups of rows that share a condition; 1 without conditions."""
    return next((c.shape[:-1].numel() for c in conditions if c is not None), 1)


@torch.library.custom_op("inl_core::inl_branch_epilogue_fwd", mutates_args=())
def inl_branch_epilogue_fwd(
    h: Tensor, v: Tensor | None, alpha: Tensor | None, beta: Tensor | None, gate: Tensor | None,
    mu: Tensor, residual: Tensor, residual_gate: Tensor | None, shift: Tensor | None,
    scale: Tensor | None, weight: Tensor | None,
    alpha_number: float, beta_number: float, gate_number: float, dt: float, velocity_max: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(y, sum, v'). A coefficient that is None is its number; mu is already clamped."""
    y, total, v_out = _empty_results(h, v, residual)
    if h.numel() == 0:
        return y, total, v_out
    x, residual_rows, v_rows = as_rows(h), as_rows(residual), rows_or_none(v)
    rho, shifts, scales = (rows_or_none(c) for c in (residual_gate, shift, scale))
    rows, width = x.shape
    samples = _samples(rho, shifts, scales)
    tokens = rows // samples
    blocks, block_r, block_d, warps = sample_blocks(tokens, width)
    with _common.launch_guard(h):
        forward_kernel[(samples * blocks,)](
            x, v_rows, *(contiguous(c) for c in (alpha, beta, gate, mu)),
            residual_rows, rho, shifts, scales, contiguous(weight), y, total, v_out,
            tokens, blocks, x.stride(0), row_stride(v_rows), residual_rows.stride(0),
            row_stride(rho), row_stride(shifts), row_stride(scales),
            alpha_number, beta_number, gate_number, dt, velocity_max, eps,
            *(_by_channel(c) for c in (alpha, beta, gate)), math.isfinite(velocity_max),
            width, block_r, block_d, num_warps=warps,
        )  # fmt: skip
    return y, total, v_out


def _empty_results(h: Tensor, v: Tensor | None, residual: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    v_dtype = h.dtype if v is None else v.dtype
    return (
        h.new_empty(h.shape),
        h.new_empty(h.shape, dtype=residual.dtype),
        h.new_empty(h.shape, dtype=v_dtype),
    )


def _by_channel(coefficient: Tensor | None) -> bool:
    return coefficient is not None and coefficient.numel() > 1


@inl_branch_epilogue_fwd.register_fake
def _(h: Tensor, v: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    residual = rest[4]
    return _empty_results(h, v, residual)


@torch.library.custom_op("inl_core::inl_branch_epilogue_bwd", mutates_args=())
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
    tensors = (h, v, alpha, beta, gate, mu, residual, residual_gate, shift, scale, weight)
    dh, dv, dresidual, *targets = _empty_gradients(*tensors)
    if h.numel() == 0:
        for target in targets:
            target.zero_()
        return dh, dv, dresidual, *targets  # type: ignore[return-value]
    x, residual_rows, v_rows = as_rows(h), as_rows(residual), rows_or_none(v)
    dy_rows, dtotal_rows, dv_rows = (rows_or_none(d) for d in (dy, dtotal, dv_next))
    rho, scales = rows_or_none(residual_gate), rows_or_none(scale)
    rows, width = x.shape
    samples = _samples(residual_gate, shift, scale)
    tokens = rows // samples
    blocks, block_r, block_d, warps = sample_blocks(tokens, width)
    parts = parts_of(x, samples, blocks, warps)
    partials = [
        torch.empty(samples, parts, width, dtype=torch.float32, device=h.device)
        if target.numel()
        else None
        for target in targets
    ]
    with _common.launch_guard(h):
        backward_kernel[(samples * parts,)](
            dy_rows, dtotal_rows, dv_rows,
            x, v_rows, *(contiguous(c) for c in (alpha, beta, gate, mu)),
            residual_rows, rho, scales, contiguous(weight), dh, dv, dresidual, *partials,
            tokens, parts, row_stride(dy_rows), row_stride(dtotal_rows), row_stride(dv_rows),
            x.stride(0), row_stride(v_rows), residual_rows.stride(0), row_stride(rho),
            row_stride(scales),
            alpha_number, beta_number, gate_number, dt, velocity_max, eps,
            *(_by_channel(c) for c in (alpha, beta, gate)), math.isfinite(velocity_max),
            width, block_r, block_d, num_warps=warps,
        )  # fmt: skip
    sums = [
        target if partial is None else _summed(partial, target)
        for partial, target in zip(partials, targets, strict=True)
    ]
    return dh, dv, dresidual, *sums  # type: ignore[return-value]


def _summed(partial: Tensor, target: Tensor) -> Tensor:
    """Sum (samples, parts, D) over the parts, over all rows, or over everything."""
    if target.numel() == 1:
        return partial.sum().reshape(target.shape)
    if target.ndim == 1:
        return partial.sum((0, 1))
    return partial.sum(1).reshape(target.shape)


def _empty_gradients(
    h: Tensor, v: Tensor | None, alpha: Tensor | None, beta: Tensor | None, gate: Tensor | None,
    mu: Tensor, residual: Tensor, residual_gate: Tensor | None, shift: Tensor | None,
    scale: Tensor | None, weight: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    def like(x: Tensor | None) -> Tensor:
        return h.new_empty(0) if x is None else x.new_empty(x.shape)

    def sums(x: Tensor | None) -> Tensor:
        return h.new_empty(0 if x is None else x.shape, dtype=torch.float32)

    by_row = (alpha, beta, gate, mu, residual_gate, shift, weight if scale is None else scale)
    return like(h), like(v), like(residual), *map(sums, by_row)


@inl_branch_epilogue_bwd.register_fake
def _(
    dy: Tensor | None, dtotal: Tensor | None, dv_next: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    return _empty_gradients(*rest[:TENSORS])


# ------------------------------------------------------------------------------------------------
# Autograd and the public function


def _setup_context(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]
) -> None:
    # An unused result has no gradient; reading zeros instead would cost a pass.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:TENSORS])
    ctx.numbers = inputs[TENSORS:]


def _gradients(
    ctx: Any, dy: Tensor | None, dtotal: Tensor | None, dv_next: Tensor | None
) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    dh, dv, dresidual, *sums, s = inl_branch_epilogue_bwd(
        dy, dtotal, dv_next, *tensors, *ctx.numbers
    )
    scale, weight = tensors[9], tensors[10]
    dscale = dweight = None
    if scale is not None:
        dscale = s if weight is None else s * weight.float()
    if weight is not None:
        each = s if scale is None else (1.0 + scale.float()) * s
        dweight = each.reshape(-1, weight.shape[0]).sum(0)
    grads = (dh, dv, *sums[:4], dresidual, *sums[4:], dscale, dweight)
    wanted = [
        grad.to(x.dtype) if grad is not None and x is not None and use else None
        for grad, x, use in zip(grads, tensors, ctx.needs_input_grad, strict=False)
    ]
    return (*wanted, *(None,) * len(ctx.numbers))


inl_branch_epilogue_fwd.register_autograd(_gradients, setup_context=_setup_context)


def takes(
    h: Tensor, v: Any, alpha: Tensor | float, beta: Tensor | float, gate: Tensor | float,
    *_: Any, **__: Any,
) -> bool:  # fmt: skip
    """Whether the coefficients are per layer or per channel, not per token."""
    vector = (*(1,) * (h.ndim - 1), h.shape[-1])
    return all(
        not isinstance(x, Tensor)
        or x.numel() == 1
        or (*(1,) * (h.ndim - x.ndim), *x.shape) == vector
        for x in (alpha, beta, gate)
    )


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
    conditions = {"residual_gate": residual_gate, "shift": shift, "scale": scale}
    _common.check_inputs(OP, h, v, *coefficients, mu, residual, *conditions.values(), weight)
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
    given = [
        None if value is None else _common.per_sample(OP, name, value, h)
        for name, value in conditions.items()
    ]
    shapes = {tuple(value.shape) for value in given if value is not None}
    if len(shapes) > 1:
        raise ValueError(
            f"{OP}: residual_gate, shift and scale must have one shape, got {sorted(shapes)}"
        )
    return inl_branch_epilogue_fwd(
        h, v, *coefficients, bounded_clamp(mu, mu_min, mu_max), residual, *given, weight, *numbers,
        dt, math.inf if velocity_max is None else velocity_max, eps,
    )  # fmt: skip
