"""The integrators against the paper's step, the matrix exponential and their orders."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from inl_core import reference
from inl_core.integrators import INTEGRATORS, exact, leapfrog, semi_implicit_euler

POINTS = [
    (0.9, 0.1, 0.5, 0.1),  # underdamped: the defaults
    (0.2, 0.05, 0.3, 0.1),  # overdamped
    (0.5, 0.625, 1.0, 0.1),  # critical: m² = dt gate beta
    (1.0, 0.0, 1.0, 0.1),  # free motion
    (0.0, 2.0, 1.0, 1.0),
]


def state(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    h, v, mu = (torch.randn(4, 6, generator=generator, dtype=torch.float64) for _ in range(3))
    return h, v, mu


def expected(point: tuple[float, float, float, float], time: float) -> Tensor:
    """exp of the equation's matrix over a time, by torch."""
    alpha, beta, gate, dt = point
    matrix = torch.tensor([[0.0, gate], [-beta / dt, -(1 - alpha) / dt]], dtype=torch.float64)
    return torch.matrix_exp(matrix * time)


@pytest.mark.parametrize("point", POINTS)
def test_semi_implicit_euler_is_the_papers_step(point: tuple) -> None:
    h, v, mu = state()
    alpha, beta, gate, dt = point
    bounds = {"velocity_max": None, "mu_min": None, "mu_max": None}
    wanted = reference.inl_update(h, v, alpha, beta, gate, mu, dt=dt, **bounds)
    for got, want in zip(semi_implicit_euler(h, v, alpha, beta, gate, mu, dt), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("point", POINTS)
def test_exact_is_the_matrix_exponential(point: tuple) -> None:
    h, v, mu = state()
    matrix = expected(point, point[3])
    h_next, v_next = exact(h, v, *point[:3], mu, point[3])
    e = h - mu
    torch.testing.assert_close(
        h_next, mu + matrix[0, 0] * e + matrix[0, 1] * v, rtol=1e-13, atol=1e-13
    )
    torch.testing.assert_close(v_next, matrix[1, 0] * e + matrix[1, 1] * v, rtol=1e-13, atol=1e-13)


def test_exact_is_smooth_through_critical_damping() -> None:
    """The closed form changes branch there: values and gradients must not notice."""
    h, v, mu = state()
    for offset in (-1.1e-3, -0.9e-3, -1e-9, 0.0, 1e-9, 0.9e-3, 1.1e-3):
        alpha = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
        beta = torch.tensor(0.625 + offset / 0.1, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(
            lambda a, b: exact(h[0], v[0], a, b, 1.0, mu[0], 0.1), (alpha, beta)
        )


@pytest.mark.parametrize(
    ("name", "order"), [("semi_implicit_euler", 1), ("leapfrog", 2), ("rk4", 4)]
)
def test_halving_the_step_divides_the_error_by_two_to_the_order(name: str, order: int) -> None:
    """One equation, solved over a fixed time in n and in 2 n steps."""
    friction, spring, gate, time = 1.0, 4.0, 1.0, 2.0
    h, v, mu = state()
    matrix = torch.matrix_exp(
        torch.tensor([[0.0, gate], [-spring, -friction]], dtype=torch.float64) * time
    )
    truth = mu + matrix[0, 0] * (h - mu) + matrix[0, 1] * v

    def error(steps: int) -> float:
        dt = time / steps
        x, speed = h, v
        for _ in range(steps):
            x, speed = INTEGRATORS[name](x, speed, 1 - friction * dt, spring * dt, gate, mu, dt)
        return float((x - truth).abs().max())

    assert math.log2(error(200) / error(400)) == pytest.approx(order, abs=0.1)


def test_leapfrog_without_friction_keeps_energy_bounded() -> None:
    h, v, mu = state()
    beta, gate, dt = 0.1, 1.0, 0.1
    x, speed = h, v

    def energy() -> Tensor:
        return speed.square() / 2 * gate + beta / dt * (x - mu).square() / 2

    start = energy()
    worst = torch.zeros_like(start)
    for _ in range(20_000):
        x, speed = leapfrog(x, speed, 1.0, beta, gate, mu, dt)
        worst = torch.maximum(worst, (energy() / start - 1).abs())
    assert float(worst.max()) < 0.01


@pytest.mark.parametrize("name", INTEGRATORS)
def test_broadcasting_dtype_and_rest(name: str) -> None:
    """Coefficients of a channel broadcast, the dtype stays, the equilibrium is a fixed point."""
    h, v, mu = (x.float() for x in state())
    alpha = torch.linspace(0.1, 0.9, 6)
    h_next, v_next = INTEGRATORS[name](h, v, alpha, alpha, alpha, mu[0], 0.1)
    assert h_next.shape == v_next.shape == h.shape
    assert h_next.dtype == v_next.dtype == torch.float32
    rest = mu[0].expand_as(h)
    h_next, v_next = INTEGRATORS[name](rest, torch.zeros_like(v), alpha, alpha, alpha, mu[0], 0.1)
    assert torch.equal(h_next, rest)
    assert not v_next.any()
