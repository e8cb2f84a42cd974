"""Every operation in plain PyTorch: the definition that any faster implementation must match.

Arithmetic runs in fp32, or in fp64 as soon as one tensor argument is fp64; results are rounded
once, to the dtype of the argument they replace. Numbers in parentheses are the equations
of INL dynamics:

    e  = h - mu                                                        (1)
    v' = clip(alpha * v - beta * e + f, -velocity_max, velocity_max)   (2)
    h' = h + dt * gate * v'                                            (3)

Shape letters: B batch, N tokens, H heads, D channels, Dh channels of one head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "BoundedClamp",
    "add_rms_norm",
    "bounded_clamp",
    "gated_residual",
    "inl_coefficients",
    "inl_step",
    "inl_update",
    "modulated_rms_norm",
    "qk_norm_rope",
    "rms_norm",
    "rotate",
    "swiglu",
]


def _compute_dtype(*values: Tensor | float | None) -> torch.dtype:
    tensors = [value for value in values if isinstance(value, Tensor)]
    for tensor in tensors:
        if not tensor.is_floating_point():
            raise ValueError(f"expected floating-point tensors, got one of dtype {tensor.dtype}")
    wide = any(tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if wide else torch.float32


def _cast(value: Tensor | float, dtype: torch.dtype) -> Tensor | float:
    return value.to(dtype) if isinstance(value, Tensor) else value


# ------------------------------------------------------------------------------------------------
# The clamp that does not trap a parameter


class BoundedClamp(torch.autograd.Function):
    """Plain clamp forward; backward lets a value beyond its bound come back.

    A plain clamp has gradient 0 outside, so a parameter that crosses its bound stays there for
    ever. Here the gradient passes outside too, but only when the descent step ``x - lr * grad``
    points back inside. Call it through `bounded_clamp`.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, minimum: float | None, maximum: float | None) -> Tensor:
        return torch.clamp(x, min=minimum, max=maximum)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.minimum, ctx.maximum = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        (grad,) = grad_outputs
        # Written as "what is blocked" so that a NaN, in x or in grad, is never masked away.
        if ctx.minimum is not None:
            grad = torch.where((x < ctx.minimum) & (grad > 0), 0.0, grad)
        if ctx.maximum is not None:
            grad = torch.where((x > ctx.maximum) & (grad < 0), 0.0, grad)
        return grad, None, None


def bounded_clamp(x: Tensor, minimum: float | None, maximum: float | None) -> Tensor:
    """Clamp `x` to [minimum, maximum] with gradients that lead back inside.

    Which gradients pass is decided on what reaches this call: for a parameter used by a whole
    batch that is the gradient of the batch, so outside a bound the gradients of single samples
    (``torch.func.vmap`` over ``grad``, micro-batches) need not add up to it.

    Args:
        x: Tensor of any shape. NaN stays NaN.
        minimum: Lower bound, or None for none.
        maximum: Upper bound, or None for none.

    Returns:
        The clamped tensor. Strictly beyond a bound its gradient passes only if the descent step
        ``x - lr * grad`` moves towards the bound; at a bound and inside it always passes.

    Raises:
        ValueError: If minimum is above maximum.
    """
    if minimum is None and maximum is None:
        return x
    if minimum is not None and maximum is not None and minimum > maximum:
        raise ValueError(f"minimum {minimum} must not be above maximum {maximum}")
    return BoundedClamp.apply(x, minimum, maximum)


# ------------------------------------------------------------------------------------------------
# INL dynamics


def inl_coefficients(
    alpha_raw: Tensor, beta_raw: Tensor, gate_raw: Tensor, *, beta_max: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Turn raw controller outputs into bounded coefficients.

    Args:
        alpha_raw: Any shape; alpha = sigmoid(alpha_raw) lies in [0, 1].
        beta_raw: Any shape; beta = softplus(beta_raw), clamped to at most `beta_max`.
        gate_raw: Any shape; gate = sigmoid(gate_raw) lies in [0, 1].
        beta_max: Upper bound of beta, or None for none. Softplus alone is unbounded.

    Returns:
        (alpha, beta, gate) in fp32, or fp64 if an argument is fp64.
    """
    dtype = _compute_dtype(alpha_raw, beta_raw, gate_raw)
    alpha = torch.sigmoid(alpha_raw.to(dtype))
    beta = bounded_clamp(F.softplus(beta_raw.to(dtype)), None, beta_max)
    gate = torch.sigmoid(gate_raw.to(dtype))
    return alpha, beta, gate


def inl_update(
    h: Tensor,
    v: Tensor | None,
    alpha: Tensor | float,
    beta: Tensor | float,
    gate: Tensor | float,
    mu: Tensor,
    force: Tensor | None = None,
    *,
    dt: float,
    velocity_max: float | None,
    mu_min: float | None,
    mu_max: float | None,
) -> tuple[Tensor, Tensor]:
    """One semi-implicit Euler step of INL dynamics, equations (1)-(3), from activated coefficients.

    Args:
        h: Position (..., D).
        v: Velocity, shaped like `h`; None means zero and costs nothing.
        alpha: Inertia, a float or a tensor that broadcasts to `h`.
        beta: Correction strength, likewise.
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
    dtype = _compute_dtype(h, v, alpha, beta, gate, mu, force)
    h_wide = h.to(dtype)
    alpha, beta, gate = _cast(alpha, dtype), _cast(beta, dtype), _cast(gate, dtype)

    error = h_wide - bounded_clamp(mu.to(dtype), mu_min, mu_max)  # (1)
    v_next = -(beta * error) if v is None else alpha * v.to(dtype) - beta * error  # (2)
    if force is not None:
        v_next = v_next + force.to(dtype)
    if velocity_max is not None:
        v_next = torch.clamp(v_next, -velocity_max, velocity_max)
    h_next = h_wide + dt * gate * v_next  # (3)
    return h_next.to(h.dtype), v_next.to(v_dtype)


def inl_step(
    h: Tensor,
    v: Tensor | None,
    alpha_raw: Tensor,
    beta_raw: Tensor,
    gate_raw: Tensor,
    mu: Tensor,
    force: Tensor | None = None,
    *,
    dt: float,
    beta_max: float | None,
    velocity_max: float | None,
    mu_min: float | None,
    mu_max: float | None,
) -> tuple[Tensor, Tensor]:
    """`inl_coefficients` followed by `inl_update`.

    Args:
        h: Position (..., D).
        v: Velocity, shaped like `h`, or None for zero.
        alpha_raw: Raw inertia, broadcastable to `h`.
        beta_raw: Raw correction strength, broadcastable to `h`.
        gate_raw: Raw gate, broadcastable to `h`.
        mu: Equilibrium (D,).
        force: External force, shaped like `h`, or None for zero.
        dt: Time step.
        beta_max: Upper bound of beta, or None for none.
        velocity_max: Bound of |v'|, or None for none.
        mu_min: Lower bound of mu, or None for none.
        mu_max: Upper bound of mu, or None for none.

    Returns:
        (h', v') as `inl_update` gives them.
    """
    alpha, beta, gate = inl_coefficients(alpha_raw, beta_raw, gate_raw, beta_max=beta_max)
    return inl_update(
        h,
        v,
        alpha,
        beta,
        gate,
        mu,
        force,
        dt=dt,
        velocity_max=velocity_max,
        mu_min=mu_min,
        mu_max=mu_max,
    )


# ------------------------------------------------------------------------------------------------
# Norms and gated sums


def _normalise(x_wide: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    normed = x_wide * torch.rsqrt(x_wide.square().mean(dim=-1, keepdim=True) + eps)
    return normed if weight is None else normed * weight.to(x_wide.dtype)


def _per_sample(value: Tensor, x: Tensor) -> Tensor:
    """Give `value` (B, D) the rank of `x` (B, ..., D), so that it broadcasts over the tokens."""
    missing = (1,) * (x.ndim - value.ndim)
    return value.reshape(*value.shape[:-1], *missing, value.shape[-1])


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """Root-mean-square norm x / sqrt(mean(x²) + eps) * weight over the last dimension.

    The weight multiplies after the normalisation, so with r = rsqrt(mean(x²) + eps) the gradient
    is dx = r * (w·dy - x * r² * mean(x·w·dy)): the weight belongs inside the bracket.

    Args:
        x: (..., D).
        weight: (D,), or None for ones.
        eps: Added to the mean square.

    Returns:
        Tensor shaped like `x`, in its dtype.
    """
    dtype = _compute_dtype(x, weight)
    return _normalise(x.to(dtype), weight, eps).to(x.dtype)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None = None, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Add to the residual stream and normalise the sum, as one operation.

    Args:
        x: Sub-layer output (..., D).
        residual: Residual stream, shaped like `x`.
        weight: (D,), or None for ones.
        eps: Added to the mean square.

    Returns:
        (rms_norm(x + residual) in the dtype of `x`, x + residual in the dtype of `residual`). The
        norm sees the sum before it is rounded.
    """
    dtype = _compute_dtype(x, residual, weight)
    total = x.to(dtype) + residual.to(dtype)
    return _normalise(total, weight, eps).to(x.dtype), total.to(residual.dtype)


def modulated_rms_norm(
    x: Tensor, shift: Tensor, scale: Tensor, weight: Tensor | None = None, eps: float = 1e-6
) -> Tensor:
    """rms_norm(x) * (1 + scale) + shift, with shift and scale per sample (AdaLN; DiT, 2022).

    Args:
        x: (B, ..., D), usually (B, N, D).
        shift: (B, D), broadcast over the tokens.
        scale: (B, D), likewise.
        weight: (D,), or None for ones.
        eps: Added to the mean square.

    Returns:
        Tensor shaped like `x`, in its dtype.
    """
    dtype = _compute_dtype(x, shift, scale, weight)
    normed = _normalise(x.to(dtype), weight, eps)
    scale_wide, shift_wide = _per_sample(scale, x).to(dtype), _per_sample(shift, x).to(dtype)
    return (normed * (1.0 + scale_wide) + shift_wide).to(x.dtype)


def gated_residual(residual: Tensor, x: Tensor, gate: Tensor) -> Tensor:
    """Residual + gate * x, with one gate vector per sample.

    Args:
        residual: (B, ..., D).
        x: Shaped like `residual`.
        gate: (B, D), broadcast over the tokens.

    Returns:
        Tensor shaped like `residual`, in its dtype.
    """
    dtype = _compute_dtype(residual, x, gate)
    gated = _per_sample(gate, residual).to(dtype) * x.to(dtype)
    return (residual.to(dtype) + gated).to(residual.dtype)


# ------------------------------------------------------------------------------------------------
# Rotary embedding and the gated activation


def _rotate(x_wide: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x_wide.shape[-1] // 2
    if x_wide.shape[-1] != 2 * cos.shape[-1] or cos.shape != sin.shape:
        raise ValueError(
            f"head_dim {x_wide.shape[-1]} needs cos and sin of {half} angles a token, "
            f"got shapes {tuple(cos.shape)} and {tuple(sin.shape)}"
        )
    cos, sin = cos.to(x_wide.dtype).unsqueeze(-2), sin.to(x_wide.dtype).unsqueeze(-2)
    first, second = x_wide[..., :half], x_wide[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn channel pairs (i, i + Dh/2) by the given angles (the half-split convention).

    Args:
        x: (B, N, H, Dh).
        cos: Cosines (N, Dh/2), or (B, N, Dh/2).
        sin: Sines, shaped like `cos`.

    Returns:
        Tensor shaped like `x`, in its dtype.

    Raises:
        ValueError: If the last dimensions do not fit.
    """
    dtype = _compute_dtype(x, cos, sin)
    return _rotate(x.to(dtype), cos, sin).to(x.dtype)


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """RMS-normalise every query and key head, then rotate both: `rms_norm`, then `rotate`.

    Args:
        q: Queries (B, N, H, Dh).
        k: Keys (B, N, Hk, Dh); Hk may differ from H (grouped-query attention).
        q_weight: (Dh,), or None for ones.
        k_weight: (Dh,), or None for ones.
        cos: Cosines (N, Dh/2), or (B, N, Dh/2).
        sin: Sines, shaped like `cos`.
        eps: Added to the mean square.

    Returns:
        (q, k), shapes and dtypes kept.
    """
    dtype = _compute_dtype(q, k, q_weight, k_weight, cos, sin)
    q_out = _rotate(_normalise(q.to(dtype), q_weight, eps), cos, sin)
    k_out = _rotate(_normalise(k.to(dtype), k_weight, eps), cos, sin)
    return q_out.to(q.dtype), k_out.to(k.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer, 2020).

    Args:
        gate: Any shape.
        up: Shaped like `gate`.

    Returns:
        Tensor shaped like `gate`, in its dtype.
    """
    dtype = _compute_dtype(gate, up)
    return (F.silu(gate.to(dtype)) * up.to(dtype)).to(gate.dtype)
