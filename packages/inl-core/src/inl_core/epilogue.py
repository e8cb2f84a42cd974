"""What follows a branch in placement "branch": step, gated sum, next norm, modulate; one call."""

from __future__ import annotations

import torch
from torch import Tensor

from inl_core import ops
from inl_core.dynamics import INLDynamics, INLDynamicsLite


def branch_epilogue(
    dynamics: INLDynamics | INLDynamicsLite,
    x: Tensor,
    v: Tensor | None,
    residual: Tensor,
    conditions: tuple[Tensor, Tensor, Tensor] | None = None,
    weight: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    """Move a sub-layer's output by `dynamics`, add it to the residual stream, normalise the sum.

    With coefficients of a channel or a layer, or fixed ones, this is `ops.inl_branch_epilogue`: one
    pass over the row. A token controller has its product in `ops.inl_controlled_step`, so there it
    is that and one pass more. A subclass is called as it is: its step may be another.

    Args:
        dynamics: The module that moves `x`.
        x: Sub-layer output (B, ..., D).
        v: Velocity, shaped like `x`; None means zero.
        residual: Residual stream, shaped like `x`.
        conditions: (gate of the sum, shift, scale), each (B, D), of AdaLN; None for a plain sum.
        weight: Weight of the norm (D,), or None for ones.
        eps: Added to the mean square.

    Returns:
        (the normed sum in the dtype of `x`, the sum in the dtype of `residual`, the velocity).
    """
    noted = not torch.compiler.is_compiling() and dynamics._collecting
    ours = type(dynamics) in (INLDynamics, INLDynamicsLite)
    if noted or not ours or (isinstance(dynamics, INLDynamics) and dynamics.adaptive == "token"):
        x, v_next = dynamics(x, v)
        if conditions is None:
            return *ops.add_rms_norm(x, residual, weight, eps), v_next
        return *ops.gated_residual_norm(residual, x, *conditions, weight, eps), v_next
    if isinstance(dynamics, INLDynamics):
        raw = dynamics.alpha_raw, dynamics.beta_raw, dynamics.gate_raw
        coefficients = ops.inl_coefficients(*raw, beta_max=dynamics.beta_max)
    else:
        coefficients = dynamics.alpha, dynamics.beta, dynamics.gate
    dynamics._check_inputs(x, v, None)
    return ops.inl_branch_epilogue(
        x,
        v,
        *coefficients,
        dynamics.mu,
        residual,
        *(conditions or (None, None, None)),
        weight,
        eps,
        dt=dynamics.dt,
        velocity_max=dynamics.velocity_max,
        mu_min=dynamics.mu_min,
        mu_max=dynamics.mu_max,
    )
