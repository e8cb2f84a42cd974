"""INL dynamics, equations (1) to (3), and the operations fused with them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from inl_core.reference.bounds import bounded_clamp, cast, compute_dtype
from inl_core.reference.layers import normalise, per_sample


def inl_coefficients(
    alpha_raw: Tensor, beta_raw: Tensor, gate_raw: Tensor, *, beta_max: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Bounded coefficients from raw controller outputs.

    Args:
        alpha_raw: Any shape; alpha = sigmoid(alpha_raw) lies in [0, 1].
        beta_raw: Any shape; beta = softplus(beta_raw), clamped to at most `beta_max`.
        gate_raw: Any shape; gate = sigmoid(gate_raw) lies in [0, 1].
        beta_max: Upper bound of beta, or None for none. Softplus alone is unbounded.

    Returns:
        (alpha, beta, gate) in fp32, or fp64 if an argument is fp64.
    """
    dtype = compute_dtype(alpha_raw, beta_raw, gate_raw)
    alpha = torch.sigmoid(alpha_raw.to(dtype))
    beta = bounded_clamp(F.softplus(beta_raw.to(dtype)), None, beta_max)
    gate = torch.sigmoid(gate_raw.to(dtype))
    return alpha, beta, gate


def inl_update(
    h: Tensor, v: Tensor | None, alpha: Tensor | float, beta: Tensor | float | None,
    gate: Tensor | float, mu: Tensor, force: Tensor | None = None, *,
    dt: float, velocity_max: float | None, mu_min: float | None, mu_max: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One semi-implicit Euler step of INL dynamics, equations (1)-(3), from activated coefficients.

    Args:
        h: Position (..., D).
        v: Velocity, shaped like `h`; None means zero.
        alpha: Inertia, a float or a tensor that broadcasts to `h`.
        beta: Correction strength, likewise; None means zero, and no pull is computed.
        gate: Share of the velocity that moves the position, likewise.
        mu: Equilibrium (D,), clamped here by `bounded_clamp`.
        force: External force added to the velocity, shaped like `h`; None means zero.
        dt: Time step.
        velocity_max: Bound of |v'|, or None for none. Outside it the gradient is 0.
        mu_min: Lower bound of mu, or None for none.
        mu_max: Upper bound of mu, or None for none.

    Returns:
        (h', v'): h' in the dtype of `h`, v' in the dtype of `v` (of `h` when v is None).
    """
    v_dtype = h.dtype if v is None else v.dtype
    dtype = compute_dtype(h, v, alpha, beta, gate, mu, force)
    h_wide = h.to(dtype)
    alpha, gate = cast(alpha, dtype), cast(gate, dtype)

    if beta is None:
        v_next = torch.zeros_like(h_wide) if v is None else alpha * v.to(dtype)
    else:
        pull = cast(beta, dtype) * (h_wide - bounded_clamp(mu.to(dtype), mu_min, mu_max))  # (1)
        v_next = -pull if v is None else alpha * v.to(dtype) - pull  # (2)
    if force is not None:
        v_next = v_next + force.to(dtype)
    if velocity_max is not None:
        v_next = torch.clamp(v_next, -velocity_max, velocity_max)
    h_next = h_wide + dt * gate * v_next  # (3)
    return h_next.to(h.dtype), v_next.to(v_dtype)


def inl_step(
    h: Tensor, v: Tensor | None, alpha_raw: Tensor, beta_raw: Tensor, gate_raw: Tensor, mu: Tensor,
    force: Tensor | None = None, *,
    dt: float, beta_max: float | None, velocity_max: float | None, mu_min: float | None,
    mu_max: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`inl_coefficients` followed by `inl_update`: arguments and results as there.

    The raw coefficients broadcast to `h`.
    """
    alpha, beta, gate = inl_coefficients(alpha_raw, beta_raw, gate_raw, beta_max=beta_max)
    bounds = {"velocity_max": velocity_max, "mu_min": mu_min, "mu_max": mu_max}
    return inl_update(h, v, alpha, beta, gate, mu, force, dt=dt, **bounds)


def looped_step(
    h: Tensor, v: Tensor | None, alpha: Tensor, beta: Tensor | None, gate: Tensor,
    equilibrium: Tensor, force: Tensor | None = None, *,
    dt: float, beta_max: float | None, velocity_max: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`inl_update` with an equilibrium per token, and coefficients that are bounded by clamping.

    In a loop the block is the force, and the equilibrium is the input that the loop began with. A
    sigmoid or a softplus never reaches 0 or 1, a clamp does: alpha = beta = 0 with gate = dt = 1 is
    exactly the plain loop h + f.

    Args:
        h: Position (..., D).
        v: Velocity, shaped like `h`; None means zero.
        alpha: Inertia (D,) or (1,), clamped to [0, 1] by `bounded_clamp`.
        beta: Correction strength, likewise to [0, beta_max]; None means zero.
        gate: Share of the velocity that moves the position, likewise to [0, 1].
        equilibrium: Shaped like `h`; not clamped. Without a beta it has no effect.
        force: External force, shaped like `h`; None means zero.
        dt: Time step.
        beta_max: Upper bound of beta, or None for none.
        velocity_max: Bound of |v'|, or None for none.

    Returns:
        (h', v') as from `inl_update`.
    """
    dtype = compute_dtype(alpha, beta, gate)
    return inl_update(
        h, v, bounded_clamp(alpha.to(dtype), 0.0, 1.0),
        None if beta is None else bounded_clamp(beta.to(dtype), 0.0, beta_max),
        bounded_clamp(gate.to(dtype), 0.0, 1.0), equilibrium, force, dt=dt,
        velocity_max=velocity_max, mu_min=None, mu_max=None,
    )  # fmt: skip


def controller_output(
    h: Tensor, v: Tensor | None, hidden: Tensor, weight: Tensor, bias: Tensor, mu: Tensor,
    force: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Raw coefficients (a, b, c) = weight · hidden + bias; arguments of `inl_controlled_step`."""
    wide = compute_dtype(h, v, hidden, weight, bias, mu, force) == torch.float64
    operand = torch.float64 if wide else hidden.dtype
    raw = F.linear(hidden.to(operand), weight.to(operand), bias.to(operand))
    alpha_raw, beta_raw, gate_raw = raw.chunk(3, dim=-1)
    return alpha_raw, beta_raw, gate_raw


def inl_controlled_step(
    h: Tensor, v: Tensor | None, hidden: Tensor, weight: Tensor, bias: Tensor, mu: Tensor,
    force: Tensor | None = None, *,
    dt: float, beta_max: float | None, velocity_max: float | None, mu_min: float | None,
    mu_max: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The controller's up-projection (a, b, c) = weight · hidden + bias, then `inl_step`.

    The product takes its operands in the dtype of `hidden` (fp64 if any argument is fp64), or in
    that of autocast, like any matrix product. Other arguments and results are those of `inl_step`.

    `hidden` (..., C) is the activated hidden state of the controller, C channels. `weight` (3·D, C)
    has the rows of alpha, then those of beta, then those of the gate; `bias` (3·D,) likewise.
    """
    raw = controller_output(h, v, hidden, weight, bias, mu, force)
    bounds = {"velocity_max": velocity_max, "mu_min": mu_min, "mu_max": mu_max}
    return inl_step(h, v, raw[0], raw[1], raw[2], mu, force, dt=dt, beta_max=beta_max, **bounds)


def inl_branch_epilogue(
    h: Tensor, v: Tensor | None, alpha: Tensor | float, beta: Tensor | float, gate: Tensor | float,
    mu: Tensor, residual: Tensor, residual_gate: Tensor | None = None, shift: Tensor | None = None,
    scale: Tensor | None = None, weight: Tensor | None = None, eps: float = 1e-6, *,
    dt: float, velocity_max: float | None, mu_min: float | None, mu_max: float | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`inl_update`, then `gated_residual_norm`, as one operation.

    `h` (B, ..., D) is the output of the sub-layer and `residual`, of the same shape, the residual
    stream. The other arguments up to `mu`, and the keywords, are those of `inl_update`.
    `residual_gate`, `shift` and `scale` are (B, D), broadcast over the tokens, or None for ones,
    zeros and zeros. `weight` is (D,), or None for ones; `eps` is added to the mean square.

    Returns:
        (the normed and modulated sum in the dtype of `h`, residual + residual_gate * h' in the
        dtype of `residual`, v' in the dtype of `v`, or of `h` if v is None). Neither h' nor the sum
        is rounded before the norm.
    """
    v_dtype = h.dtype if v is None else v.dtype
    dtype = compute_dtype(
        h, v, alpha, beta, gate, mu, residual, residual_gate, shift, scale, weight
    )
    bounds = {"velocity_max": velocity_max, "mu_min": mu_min, "mu_max": mu_max}
    h_next, v_next = inl_update(h.to(dtype), v, alpha, beta, gate, mu, None, dt=dt, **bounds)
    if residual_gate is not None:
        h_next = per_sample(residual_gate, h).to(dtype) * h_next
    total = residual.to(dtype) + h_next
    normed = normalise(total, weight, eps)
    if scale is not None:
        normed = normed * (1.0 + per_sample(scale, h).to(dtype))
    if shift is not None:
        normed = normed + per_sample(shift, h).to(dtype)
    return normed.to(h.dtype), total.to(residual.dtype), v_next.to(v_dtype)
