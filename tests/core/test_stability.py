"""The theory of the frozen update: the Jury test, its faces, Lyapunov's function, settling."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from inl_core import (
    is_stable,
    lyapunov,
    reference,
    settling_steps,
    spectral_radius,
    transition_matrix,
)

DEFAULTS = (0.9, 0.1, 0.5, 0.1)


def grid() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    axes = (
        torch.tensor([-1.1, -1.0, -0.5, 0.0, 0.3, 0.9, 0.999, 1.0, 1.2]),
        torch.tensor([-0.2, 0.0, 0.01, 0.1, 1.0, 2.0, 5.0]),
        torch.tensor([0.0, 0.01, 0.5, 1.0]),
        torch.tensor([0.1, 0.5, 1.0, 2.0]),
    )
    return torch.meshgrid(*(axis.double() for axis in axes), indexing="ij")


def energies(point: tuple[float, float, float, float], x0: list[float], steps: int) -> Tensor:
    a = transition_matrix(*point)
    x = torch.tensor(x0, dtype=torch.float64)
    values = []
    for _ in range(steps):
        values.append(0.5 * x @ x)
        x = a @ x
    return torch.stack(values)


def test_transition_matrix_matches_the_simulated_step() -> None:
    generator = torch.Generator().manual_seed(0)
    h, v, mu = (torch.rand(6, generator=generator, dtype=torch.float64) for _ in range(3))
    alpha, beta, gate = (torch.rand(6, generator=generator, dtype=torch.float64) for _ in range(3))
    a = transition_matrix(alpha, beta, gate, 0.1)
    x = torch.stack([h - mu, v], dim=-1)
    for _ in range(20):
        h, v = reference.inl_update(
            h, v, alpha, beta, gate, mu, dt=0.1, velocity_max=None, mu_min=None, mu_max=None
        )
        x = (a @ x.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(torch.stack([h - mu, v], dim=-1), x, rtol=1e-12, atol=1e-12)


def test_determinant_is_alpha_and_trace_as_stated() -> None:
    alpha, beta, gate, dt = grid()
    a = transition_matrix(alpha, beta, gate, dt)
    assert a.shape == (*alpha.shape, 2, 2)
    assert a.dtype == torch.float64
    torch.testing.assert_close(torch.linalg.det(a), alpha, rtol=0, atol=1e-12)
    trace = a.diagonal(dim1=-2, dim2=-1).sum(-1)
    torch.testing.assert_close(trace, 1 + alpha - dt * gate * beta, rtol=0, atol=1e-12)


def test_spectral_radius_matches_eigenvalues() -> None:
    radius = torch.linalg.eigvals(transition_matrix(*grid())).abs().amax(-1)
    # At a double eigenvalue the numeric solver itself is good to sqrt(eps) only.
    torch.testing.assert_close(spectral_radius(*grid()), radius, rtol=0, atol=1e-7)


def test_jury_matches_eigenvalues() -> None:
    radius = torch.linalg.eigvals(transition_matrix(*grid())).abs().amax(-1)
    clear = (radius - 1.0).abs() > 1e-7
    assert clear.float().mean() > 0.5
    assert torch.equal(is_stable(*grid())[clear], (radius < 1.0)[clear])
    assert not is_stable(*grid())[~clear].any()
    stable = is_stable(*grid())
    assert 0.1 < stable.float().mean() < 0.9


def test_every_interior_point_of_the_bounds_is_stable() -> None:
    generator = torch.Generator().manual_seed(0)
    alpha, beta, gate, dt = torch.rand(4, 10_000, generator=generator, dtype=torch.float64)
    assert is_stable(alpha, 2.0 * beta, gate, dt).all()


@pytest.mark.parametrize(
    ("point", "radius"),
    [((1.0, 0.1, 0.5, 0.1), 1.0), ((0.9, 0.0, 0.5, 0.1), 1.0), ((0.9, 0.1, 0.0, 0.1), 1.0),
     ((0.0, 2.0, 1.0, 1.0), 1.0), ((1.0, 0.0, 0.5, 0.1), 1.0)],
    ids=["alpha=1", "beta=0", "gate=0", "corner", "drift"],
)  # fmt: skip
def test_faces_are_marginal(point: tuple[float, float, float, float], radius: float) -> None:
    assert not is_stable(*point)
    assert spectral_radius(*point).item() == pytest.approx(radius, abs=1e-12)
    with pytest.raises(ValueError, match=f"not stable at alpha {point[0]:g}, beta {point[1]:g}"):
        lyapunov(*point)
    with pytest.raises(ValueError, match="not stable"):
        settling_steps(*point)


def test_alpha_one_beta_zero_drifts() -> None:
    power = torch.linalg.matrix_power(transition_matrix(1.0, 0.0, 0.5, 0.1), 1000)
    assert power[0, 1].item() == pytest.approx(1000 * 0.05)


def test_nan_is_not_stable() -> None:
    assert not is_stable(float("nan"), 0.1, 0.5, 0.1)


def test_stable_points_do_not_certify_a_varying_sequence() -> None:
    first, second = (0.9, 0.01, 1.0, 0.1), (0.9, 2.0, 0.01, 0.1)
    assert is_stable(*first)
    assert is_stable(*second)
    power = torch.linalg.matrix_power
    period = power(transition_matrix(*second), 8) @ power(transition_matrix(*first), 8)
    growth = torch.linalg.eigvals(period).abs().max().item()
    assert growth == pytest.approx(4.5, abs=0.05)


def test_energy_may_rise_but_lyapunov_decreases() -> None:
    rise = (energies(DEFAULTS, [1.0, 0.0], 60).max() / 0.5).item()
    assert rise == pytest.approx(1.039, abs=5e-4)
    rise = (energies((0.9, 2.0, 0.5, 0.1), [1.0, 0.0], 60).max() / 0.5).item()
    assert rise == pytest.approx(27.0, abs=0.2)
    for point in (DEFAULTS, (0.9, 2.0, 0.5, 0.1)):
        a, p = transition_matrix(*point), lyapunov(*point)
        for x0 in ([1.0, 0.0], [0.0, 1.0], [0.6, -0.8]):
            x = torch.tensor(x0, dtype=torch.float64)
            for _ in range(60):
                following = a @ x
                fall = x @ p @ x - following @ p @ following
                assert fall.item() == pytest.approx((x @ x).item(), rel=1e-8, abs=1e-14)
                x = following


def test_lyapunov_solves_its_equation_over_the_grid() -> None:
    points = [value[is_stable(*grid())] for value in grid()]
    q = torch.tensor([[2.0, 0.3], [0.3, 1.0]], dtype=torch.float64)
    for matrix in (None, q):
        a, p = transition_matrix(*points), lyapunov(*points, q=matrix)
        want = torch.eye(2, dtype=torch.float64) if matrix is None else matrix
        residual = a.mT @ p @ a - p + want
        assert (residual.abs().amax((-1, -2)) / p.abs().amax((-1, -2))).max() < 1e-10
        assert torch.equal(p, p.mT)
        assert (torch.linalg.eigvalsh(p) > 0).all()


def test_lyapunov_errors() -> None:
    with pytest.raises(ValueError, match="symmetric and positive definite"):
        lyapunov(*DEFAULTS, q=torch.tensor([[1.0, 0.0], [0.0, -1.0]]))
    with pytest.raises(ValueError, match="symmetric and positive definite"):
        lyapunov(*DEFAULTS, q=torch.tensor([[1.0, 0.5], [0.0, 1.0]]))
    with pytest.raises(ValueError, match=r"shape \(\.\.\., 2, 2\), got \(3, 3\)"):
        lyapunov(*DEFAULTS, q=torch.eye(3))
    with pytest.raises(ValueError, match=r"not stable at alpha 0\.5, beta 5,"):
        lyapunov(torch.tensor([0.5, 0.5]), torch.tensor([0.1, 5.0]), 1.0, 1.0)


def brute_force_settling(points: Tensor, tolerance: float) -> list[int]:
    a = transition_matrix(*points.T)
    power, last = torch.eye(2, dtype=torch.float64).expand_as(a), torch.zeros(len(a))
    for k in range(2000):
        above = torch.linalg.matrix_norm(power, 2) > tolerance
        last[above] = k
        power = a @ power
    assert last.max() < 1000  # the horizon was long enough to mean "stays"
    return (last.long() + 1).tolist()


@pytest.mark.parametrize("tolerance", [0.5, 0.02, 1e-6])
def test_settling_steps_match_brute_force(tolerance: float) -> None:
    points = list(itertools.product([0.0, 0.5, 0.97], [0.1, 2.0], [0.5, 1.0], [0.3, 1.0]))
    points = torch.tensor(points, dtype=torch.float64)
    points = points[is_stable(*points.T)]
    got = settling_steps(*points.T, tolerance=tolerance)
    assert got.shape == (len(points),)
    assert got.dtype == torch.int64
    assert got.tolist() == brute_force_settling(points, tolerance)


def test_settling_is_monotone_in_tolerance_and_handles_slow_points() -> None:
    steps = [int(settling_steps(*DEFAULTS, tolerance=t)) for t in (0.5, 0.1, 0.02, 1e-3)]
    assert steps == sorted(steps)
    # One eigenvalue is 1 - 1e-9: about ln(50)/1e-9 steps, found without walking them.
    slow = int(settling_steps(0.0, 1e-6, 1e-3, 1.0))
    assert slow == pytest.approx(3.912e9, rel=1e-3)


def test_settling_steps_reject_a_tolerance_outside_0_1() -> None:
    for tolerance in (0.0, 1.0, -1.0):
        with pytest.raises(ValueError, match=r"tolerance must lie in \(0, 1\)"):
            settling_steps(*DEFAULTS, tolerance=tolerance)
