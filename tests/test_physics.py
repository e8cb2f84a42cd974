"""The simulated systems obey their physics, and the comparison counts what it says."""

from __future__ import annotations

import math
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def systems(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import physics_systems

    return physics_systems


@pytest.fixture
def physics(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import physics

    return physics


def walk(systems: ModuleType, system: object, steps: int, dt: float) -> torch.Tensor:
    state, states = system.start, [system.start]
    for _ in range(steps):
        state = systems.rk4_step(system.change, state, dt)
        states.append(state)
    return torch.stack(states, 1)


def test_the_double_pendulum_keeps_its_energy(systems: ModuleType) -> None:
    """With unit rods and masses E = va² + vb²/2 + va vb cos(a - b) - g (2 cos a + cos b)."""
    system = systems.double_pendulum(8, torch.Generator().manual_seed(0))
    a, b, va, vb = walk(systems, system, 400, 0.005).unbind(-1)
    kinetic = va**2 + vb**2 / 2 + va * vb * torch.cos(a - b)
    energy = kinetic - 9.81 * (2 * a.cos() + b.cos())
    assert float((energy - energy[:, :1]).abs().max()) < 1e-5


def test_the_oscillator_is_the_closed_form(systems: ModuleType) -> None:
    draw = torch.Generator().manual_seed(0)
    frequency, damping = systems.uniform(draw, 8, 1.0, 3.0), systems.uniform(draw, 8, 0.02, 0.3)
    system = systems.oscillator(8, torch.Generator().manual_seed(0))
    seen = walk(systems, system, 100, 0.01)[:, -1, 0]
    fast, decay = frequency * (1 - damping**2).sqrt(), damping * frequency
    q, speed = system.start.unbind(-1)
    wanted = torch.exp(-decay) * (q * fast.cos() + (speed + decay * q) / fast * fast.sin())
    torch.testing.assert_close(seen, wanted, rtol=1e-7, atol=1e-9)


def test_the_arm_loses_exactly_the_energy_that_its_damping_takes(systems: ModuleType) -> None:
    """E = v'Mv / 2 + kp |target - q|^2 / 2 falls by kd |v|^2 a second, and by nothing else."""
    draw, dt = torch.Generator().manual_seed(0), 0.002
    kp, kd = systems.uniform(draw, 8, 5.0, 20.0), systems.uniform(draw, 8, 1.0, 6.0)
    states = walk(systems, systems.arm(8, torch.Generator().manual_seed(0)), 300, dt)
    q, v, target = states[..., :2], states[..., 2:4], states[..., 4:]
    c = q[..., 1].cos()
    kinetic = (3 + 2 * c) * v[..., 0] ** 2 + 2 * (1 + c) * v[..., 0] * v[..., 1] + v[..., 1] ** 2
    energy = kinetic / 2 + kp[:, None] * (target - q).square().sum(-1) / 2
    lost = torch.trapezoid(kd[:, None] * v.square().sum(-1), dx=dt)
    torch.testing.assert_close(energy[:, 0] - energy[:, -1], lost, rtol=1e-4, atol=1e-6)
    assert bool((energy.diff(dim=1) <= 0).all())


def test_the_interval_of_paired_ratios(physics: ModuleType) -> None:
    """Three ratios 0.5, 1, 2: mean of logs 0, deviation ln 2, half width 4.303 ln 2 / sqrt 3."""
    middle, low, high = physics.ratio_interval([0.5, 1.0, 2.0])
    assert middle == pytest.approx(1.0)
    assert high == pytest.approx(math.exp(4.303 * math.log(2) / math.sqrt(3)))
    assert low == pytest.approx(1 / high)


def test_a_rollout_reads_its_own_output(physics: ModuleType) -> None:
    """A forecaster that repeats the last state is wrong by how far the truth has moved since."""
    truth = torch.arange(96.0).view(1, 96, 1).expand(2, 96, 3)
    errors = physics.rollout_errors(lambda states: states, truth)
    torch.testing.assert_close(errors, torch.arange(1.0, 65.0))


def test_compared_models_have_equal_parameters(physics: ModuleType) -> None:
    wider = physics.width_for_equal_parameters(6)
    plain = physics.parameters(physics.Forecaster(6, "none", wider))
    assert plain == pytest.approx(physics.parameters(physics.Forecaster(6, "branch")), rel=0.005)
