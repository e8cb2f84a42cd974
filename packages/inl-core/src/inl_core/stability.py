"""Stability, settling time and Lyapunov function of the frozen update.

For constant coefficients, away from the velocity clip and without a force, x = (e, v) follows
x' = A x, one channel at a time:

    A = [[1 - dt*gate*beta, dt*gate*alpha],        det A = alpha
         [-beta,            alpha        ]]        tr A  = 1 + alpha - dt*gate*beta

A is stable (every eigenvalue inside the unit circle) if and only if -1 < alpha < 1 and
0 < dt*gate*beta < 2*(1 + alpha) (Jury). So every interior point of the bounds 0 < alpha < 1,
0 < beta <= 2, 0 < gate < 1 is stable for dt <= 1. For a stable A the function V(x) = xᵀPx of
`lyapunov` decreases at every step.

Limits:

* The faces alpha = 1, beta = 0, gate = 0 and (alpha, beta, gate, dt) = (0, 2, 1, 1) are marginal,
  and alpha = 1 with beta = 0 drifts without bound.
* The energy ½‖e‖² + ½‖v‖² of the paper (§4.3) does not decrease at every step: from v = 0 it first
  rises by 3.9 % at the default coefficients and 27-fold at beta = 2.
* Stable points do not certify coefficients that vary: at dt = 0.1, alpha = 0.9, eight steps of
  (beta 0.01, gate 1) followed by eight of (beta 2, gate 0.01) have spectral radius 4.5.

Everything is fp64. Arguments are floats or tensors that broadcast together to points, one per
element. `inl_core.certificate` applies this to a trained model.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["is_stable", "lyapunov", "settling_steps", "spectral_radius", "transition_matrix"]

Scalar = Tensor | float


def _points(*values: Scalar) -> tuple[Tensor, ...]:
    device = next((value.device for value in values if isinstance(value, Tensor)), None)
    tensors = [torch.as_tensor(value, dtype=torch.float64, device=device) for value in values]
    return torch.broadcast_tensors(*tensors)


def transition_matrix(alpha: Scalar, beta: Scalar, gate: Scalar, dt: Scalar) -> Tensor:
    """The matrix A of the frozen update (paper §4.1).

    Args:
        alpha: Inertia.
        beta: Correction strength.
        gate: Gate.
        dt: Time step.

    Returns:
        (..., 2, 2) in fp64, where ... is the broadcast shape of the arguments.
    """
    alpha_, beta_, gate_, dt_ = _points(alpha, beta, gate, dt)
    rate = dt_ * gate_
    top = torch.stack([1.0 - rate * beta_, rate * alpha_], dim=-1)
    bottom = torch.stack([-beta_, alpha_], dim=-1)
    return torch.stack([top, bottom], dim=-2)


def is_stable(alpha: Scalar, beta: Scalar, gate: Scalar, dt: Scalar) -> Tensor:
    """Whether every eigenvalue of A lies strictly inside the unit circle (Jury's test).

    Arguments as in `transition_matrix`.

    Returns:
        Boolean tensor, one element per point; marginal points and NaN are False.
    """
    alpha_, beta_, gate_, dt_ = _points(alpha, beta, gate, dt)
    pull = dt_ * gate_ * beta_  # = 1 - tr A + det A
    return (alpha_.abs() < 1.0) & (pull > 0.0) & (pull < 2.0 * (1.0 + alpha_))


def spectral_radius(alpha: Scalar, beta: Scalar, gate: Scalar, dt: Scalar) -> Tensor:
    """Largest eigenvalue modulus of A, in closed form from its trace and determinant.

    Arguments as in `transition_matrix`.

    Returns:
        fp64 tensor, one element per point.
    """
    alpha_, beta_, gate_, dt_ = _points(alpha, beta, gate, dt)
    half_trace = (1.0 + alpha_ - dt_ * gate_ * beta_) / 2.0
    discriminant = half_trace.square() - alpha_
    real_pair = half_trace.abs() + discriminant.clamp(min=0.0).sqrt()
    complex_pair = alpha_.clamp(min=0.0).sqrt()
    return torch.where(discriminant < 0.0, complex_pair, real_pair)


def _require_stable(alpha: Scalar, beta: Scalar, gate: Scalar, dt: Scalar) -> None:
    stable = is_stable(alpha, beta, gate, dt)
    if bool(stable.all()):
        return
    index = int((~stable).flatten().nonzero()[0])
    point = [float(value.flatten()[index]) for value in _points(alpha, beta, gate, dt)]
    names = ("alpha", "beta", "gate", "dt")
    described = ", ".join(f"{name} {value:g}" for name, value in zip(names, point, strict=True))
    raise ValueError(
        f"not stable at {described}: needs |alpha| < 1 and "
        f"0 < dt*gate*beta = {point[3] * point[2] * point[1]:g} < {2 * (1 + point[0]):g}"
    )


def lyapunov(
    alpha: Scalar, beta: Scalar, gate: Scalar, dt: Scalar, q: Tensor | None = None
) -> Tensor:
    """The matrix P with AᵀPA - P = -Q: V(x) = xᵀPx decreases by xᵀQx at every step.

    Args:
        alpha: Inertia.
        beta: Correction strength.
        gate: Gate.
        dt: Time step.
        q: Symmetric positive definite (2, 2), or (..., 2, 2) to broadcast with the points; None
            means the identity.

    Returns:
        Symmetric positive definite (..., 2, 2) in fp64.

    Raises:
        ValueError: If a point is not stable (no such P exists), or q is not symmetric positive
            definite.
    """
    _require_stable(alpha, beta, gate, dt)
    a = transition_matrix(alpha, beta, gate, dt)
    if q is None:
        q = torch.eye(2, dtype=a.dtype, device=a.device)
    q = q.to(a)
    if q.shape[-2:] != (2, 2):
        raise ValueError(f"q must have shape (..., 2, 2), got {tuple(q.shape)}")
    if not torch.equal(q, q.mT) or not bool((torch.linalg.eigvalsh(q) > 0.0).all()):
        raise ValueError(f"q must be symmetric and positive definite, got {q.tolist()}")
    # Row by row, vec(AᵀPA) = (Aᵀ ⊗ Aᵀ) vec(P): a 4-by-4 linear system per point.
    kron = torch.einsum("...ji,...lk->...ikjl", a, a).flatten(-4, -3).flatten(-2, -1)
    eye = torch.eye(4, dtype=a.dtype, device=a.device)
    shape = torch.broadcast_shapes(a.shape, q.shape)
    rhs = q.expand(shape).flatten(-2, -1).unsqueeze(-1)
    p = torch.linalg.solve(eye - kron, rhs).squeeze(-1).unflatten(-1, (2, 2))
    return (p + p.mT) / 2.0


def _norm(matrix: Tensor) -> Tensor:
    """Largest singular value of (..., 2, 2), in closed form."""
    (a, b), (c, d) = [row.unbind(-1) for row in matrix.unbind(-2)]
    return (torch.hypot(a + d, b - c) + torch.hypot(a - d, b + c)) / 2.0


def _settle(a: Tensor, tolerance: float) -> int:
    # Find m, a power of two, with ‖A^m‖ <= 1, and all powers below it.
    powers, step = torch.eye(2, dtype=a.dtype, device=a.device)[None], a
    while _norm(step) > 1.0:
        powers, step = torch.cat([powers, powers @ step]), step @ step
    m = len(powers)

    def block(i: int) -> Tensor:
        """Norms of A^(i·m) … A^(i·m + m - 1); their maximum never grows with i."""
        return _norm(powers @ torch.linalg.matrix_power(step, i))

    below = 1
    while block(below).max() > tolerance:
        below *= 2
    above = below // 2  # block(above) exceeds the tolerance, block(below) does not
    while below - above > 1:
        middle = (above + below) // 2
        if block(middle).max() > tolerance:
            above = middle
        else:
            below = middle
    return above * m + int((block(above) > tolerance).nonzero()[-1]) + 1


def settling_steps(
    alpha: Scalar, beta: Scalar, gate: Scalar, dt: Scalar, tolerance: float = 0.02
) -> Tensor:
    """Steps until every unit initial state has decayed to `tolerance` and stays below it.

    The smallest n with ‖A^k‖₂ <= tolerance for all k >= n, exactly: once ‖A^m‖ <= 1, the largest
    norm in a block of m consecutive steps never grows, so doubling and bisection over blocks take
    log2(n / m) probes of m small products.

    Args:
        alpha: Inertia.
        beta: Correction strength.
        gate: Gate.
        dt: Time step.
        tolerance: Share of the initial norm, in (0, 1); default 2 %, usual in control theory.

    Returns:
        int64 tensor, one element per point.

    Raises:
        ValueError: If a point is not stable, or tolerance is outside (0, 1).
    """
    if not 0.0 < tolerance < 1.0:
        raise ValueError(f"tolerance must lie in (0, 1), got {tolerance}")
    _require_stable(alpha, beta, gate, dt)
    a = transition_matrix(alpha, beta, gate, dt).detach()
    steps = [_settle(point, tolerance) for point in a.reshape(-1, 2, 2)]
    return torch.tensor(steps, dtype=torch.int64, device=a.device).reshape(a.shape[:-2])
