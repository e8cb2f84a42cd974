"""Four integrators of the dynamics, for comparison with the one of the paper.

The update of the paper is semi-implicit Euler on the ordinary differential equation

    dh/dt = gate * v
    dv/dt = -((1 - alpha) / dt) * v - (beta / dt) * (h - mu)

whose coefficients carry the step size: one step of size dt is exactly equations (2)-(3) of
`inl_core.reference`. The other three are more accurate (paper §10: "RK4 or symplectic methods");
local error in brackets:

    semi_implicit_euler   v first, then h with the new v (dt²)
    leapfrog              half a kick, drift, half a kick; friction split evenly (dt³)
    rk4                   the classical Runge-Kutta method (dt⁵)
    exact                 the matrix exponential, in closed form

They have no bounds and no force; models use the bounded, fused step of `INLDynamics`. All arguments
broadcast together; floats or tensors of any floating dtype.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["INTEGRATORS", "exact", "leapfrog", "rk4", "semi_implicit_euler"]

Scalar = Tensor | float


def semi_implicit_euler(
    h: Tensor, v: Tensor, alpha: Scalar, beta: Scalar, gate: Scalar, mu: Scalar, dt: float
) -> tuple[Tensor, Tensor]:
    """The paper's step (§2.1): v' = alpha v - beta (h - mu), then h' = h + dt gate v'.

    Args:
        h: Position.
        v: Velocity.
        alpha: Inertia; 1 means no friction.
        beta: Correction strength.
        gate: Share of the velocity that moves the position.
        mu: Equilibrium.
        dt: Step size.

    Returns:
        The next position and velocity.
    """
    v_next = alpha * v - beta * (h - mu)
    return h + dt * gate * v_next, v_next


def leapfrog(
    h: Tensor, v: Tensor, alpha: Scalar, beta: Scalar, gate: Scalar, mu: Scalar, dt: float
) -> tuple[Tensor, Tensor]:
    """Kick-drift-kick. Arguments and results as in `semi_implicit_euler`.

    Friction acts explicitly in the first half kick and implicitly in the second, so the step is its
    own inverse under time reversal, hence of second order; without friction it is symplectic.
    """
    half_friction = (1 - alpha) / 2
    v_half = (1 - half_friction) * v - beta / 2 * (h - mu)
    h_next = h + dt * gate * v_half
    return h_next, (v_half - beta / 2 * (h_next - mu)) / (1 + half_friction)


def rk4(
    h: Tensor, v: Tensor, alpha: Scalar, beta: Scalar, gate: Scalar, mu: Scalar, dt: float
) -> tuple[Tensor, Tensor]:
    """The classical Runge-Kutta method. Arguments and results as in `semi_implicit_euler`."""

    def change(e: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Both derivatives times dt."""
        return dt * gate * v, -(1 - alpha) * v - beta * e

    e = h - mu
    de1, dv1 = change(e, v)
    de2, dv2 = change(e + de1 / 2, v + dv1 / 2)
    de3, dv3 = change(e + de2 / 2, v + dv2 / 2)
    de4, dv4 = change(e + de3, v + dv3)
    return h + (de1 + 2 * de2 + 2 * de3 + de4) / 6, v + (dv1 + 2 * dv2 + 2 * dv3 + dv4) / 6


def exact(
    h: Tensor, v: Tensor, alpha: Scalar, beta: Scalar, gate: Scalar, mu: Scalar, dt: float
) -> tuple[Tensor, Tensor]:
    """The solution after time dt. Arguments and results as in `semi_implicit_euler`.

    With m = -(1 - alpha) / 2 and s² = m² - dt gate beta, the matrix M = [[0, dt gate],
    [-beta, 2 m]] has exp(M) = eᵐ (cosh s · I + sinh(s)/s · (M - m I)); s is imaginary when the
    oscillator is underdamped, and cosh and sinh(s)/s are then cos and sin(|s|)/|s|.
    """
    e = h - mu
    m = torch.as_tensor((alpha - 1) / 2, dtype=e.dtype, device=e.device)
    s2 = m * m - dt * gate * beta
    even, odd = _cosh_and_sinhc(s2)
    scale = torch.exp(m)
    e_next = scale * ((even - m * odd) * e + odd * dt * gate * v)
    v_next = scale * ((even + m * odd) * v - odd * beta * e)
    return mu + e_next, v_next


def _cosh_and_sinhc(s2: Tensor) -> tuple[Tensor, Tensor]:
    """cosh(s) and sinh(s)/s as functions of s², which may be negative; smooth through 0."""
    # Near 0 the root has no derivative; the series is exact to the last bit of fp64 there.
    near = s2.abs() < 1e-3
    root = torch.where(near, torch.ones_like(s2), s2.abs()).sqrt()
    grows = s2 > 0
    even = torch.where(grows, torch.cosh(root), torch.cos(root))
    odd = torch.where(grows, torch.sinh(root), torch.sin(root)) / root
    series_even = 1 + s2 / 2 * (1 + s2 / 12 * (1 + s2 / 30 * (1 + s2 / 56)))
    series_odd = 1 + s2 / 6 * (1 + s2 / 20 * (1 + s2 / 42 * (1 + s2 / 72)))
    return torch.where(near, series_even, even), torch.where(near, series_odd, odd)


INTEGRATORS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "semi_implicit_euler": semi_implicit_euler,
    "leapfrog": leapfrog,
    "rk4": rk4,
    "exact": exact,
}
"""Integrators by name, for ablations."""
