"""Simulated systems obey their physics; comparisons are between networks of equal size."""

import math

import pytest
import torch
from benchmarks.theory import closed_loop, physics
from benchmarks.theory import physics_report as report
from benchmarks.theory import physics_systems as systems

from support.benchmark_rows import row


def walk(system, steps, dt):
    state, states = system.start, [system.start]
    for _ in range(steps):
        state = systems.rk4_step(system.change, state, dt)
        states.append(state)
    return torch.stack(states, 1)


def test_the_double_pendulum_keeps_its_energy():
    """With unit rods and masses E = va² + vb²/2 + va vb cos(a - b) - g (2 cos a + cos b)."""
    system = systems.double_pendulum(8, torch.Generator().manual_seed(0))
    a, b, va, vb = walk(system, 400, 0.005).unbind(-1)
    kinetic = va**2 + vb**2 / 2 + va * vb * torch.cos(a - b)
    energy = kinetic - 9.81 * (2 * a.cos() + b.cos())
    assert float((energy - energy[:, :1]).abs().max()) < 1e-5


def test_the_oscillator_is_the_closed_form():
    draw = torch.Generator().manual_seed(0)
    frequency, damping = systems.uniform(draw, 8, 1.0, 3.0), systems.uniform(draw, 8, 0.02, 0.3)
    system = systems.oscillator(8, torch.Generator().manual_seed(0))
    seen = walk(system, 100, 0.01)[:, -1, 0]
    fast, decay = frequency * (1 - damping**2).sqrt(), damping * frequency
    q, speed = system.start.unbind(-1)
    wanted = torch.exp(-decay) * (q * fast.cos() + (speed + decay * q) / fast * fast.sin())
    torch.testing.assert_close(seen, wanted, rtol=1e-7, atol=1e-9)


def test_the_arm_loses_exactly_the_energy_that_its_damping_takes():
    """E = v'Mv / 2 + kp |target - q|^2 / 2 falls by kd |v|^2 a second, and by nothing else."""
    draw, dt = torch.Generator().manual_seed(0), 0.002
    kp, kd = systems.uniform(draw, 8, 5.0, 20.0), systems.uniform(draw, 8, 1.0, 6.0)
    states = walk(systems.arm(8, torch.Generator().manual_seed(0)), 300, dt)
    q, v, target = states[..., :2], states[..., 2:4], states[..., 4:]
    c = q[..., 1].cos()
    kinetic = (3 + 2 * c) * v[..., 0] ** 2 + 2 * (1 + c) * v[..., 0] * v[..., 1] + v[..., 1] ** 2
    energy = kinetic / 2 + kp[:, None] * (target - q).square().sum(-1) / 2
    lost = torch.trapezoid(kd[:, None] * v.square().sum(-1), dx=dt)
    torch.testing.assert_close(energy[:, 0] - energy[:, -1], lost, rtol=1e-4, atol=1e-6)
    assert bool((energy.diff(dim=1) <= 0).all())


def test_the_interval_of_paired_ratios():
    """Three ratios 0.5, 1, 2: mean of logs 0, deviation ln 2, half width 4.303 ln 2 / sqrt 3."""
    middle, low, high = report.ratio_interval([0.5, 1.0, 2.0])
    assert middle == pytest.approx(1.0)
    assert high == pytest.approx(math.exp(4.303 * math.log(2) / math.sqrt(3)), rel=1e-3)
    assert low == pytest.approx(1 / high)
    assert report.ratio_interval([0.5]) == (pytest.approx(0.5), None, None)


def test_a_rollout_reads_its_own_output():
    """A forecaster that repeats the last state is wrong by how far the truth has moved since."""
    truth = torch.arange(96.0).view(1, 96, 1).expand(2, 96, 3)
    errors = physics.rollout_errors(lambda states: states, truth)
    torch.testing.assert_close(errors, torch.arange(1.0, 65.0))


def test_compared_models_have_equal_parameters():
    for network, baseline in physics.BASELINES.items():
        wider = physics.width_for_equal_parameters(6, physics.EQUALS[baseline])
        plain = physics.parameters(physics.Forecaster(6, "none", wider))
        mine = physics.parameters(physics.Forecaster(6, network))
        assert plain == pytest.approx(mine, rel=0.005)


def test_the_table_compares_each_placement_with_its_own_plain_network():
    errors = {"none": 2.0, "none, wider": 4.0, "stream": 1.0, "branch": 2.0, "force": 1.0}
    errors["force, no-carry"] = 2.0
    known = {
        f"arm / {network} / seed {seed}": {
            f"rollout error, {steps} steps": error * (1 + seed) for steps in physics.STEPS
        }
        for network, error in errors.items()
        for seed in (0, 1)
    }
    lines = physics.table(known, ["arm"], (0, 1))
    cells = {line.split(" | ")[1]: line.split(" | ")[2] for line in lines[2:]}
    assert cells == {
        "stream": "0.500 [0.500, 0.500]",
        "branch": "1.000 [1.000, 1.000]",
        "force": "0.250 [0.250, 0.250]",
        "force, no-carry": "0.500 [0.500, 0.500]",
        "force over force, no-carry": "0.500 [0.500, 0.500]",
    }


def test_ratios_are_paired_by_seed():
    """Seeds that only one network has are left out, as are placements without a pair."""
    errors = {"branch / seed 0": 1.0, "branch / seed 1": 3.0, "none / seed 0": 2.0}
    rows = [
        row("physics", f"arm / {case}", f"rollout error, {steps} steps", error, shape="4096 x 96")
        for case, error in errors.items()
        for steps in report.STEPS
    ]
    lines = report.rollouts(rows).splitlines()
    assert [line for line in lines if line.startswith("| arm")] == [
        "| arm | branch | 0.500 | 0.500 | 0.500 | 1 |"
    ]
    assert "commit 1234567" in lines[-1]
    assert report.rollouts([]) == ""


def test_closed_loop_values_are_medians_over_seeds():
    layer = [
        row("closed_loop", "INL, heavier payloads", "lost", value, shape=f"seed {seed}")
        for seed, value in enumerate((0, 0.5, 0.1))
    ]
    rows = [*layer, row("closed_loop", "PD alone", "lost", 1, shape="seed 0")]
    lines = report.closed_loop(rows).splitlines()
    assert "| INL, heavier payloads | 0.1 [0, 0.5] | 3 |" in lines
    assert "| PD alone | 1 | 1 |" in lines


def test_the_arm_with_a_payload_keeps_its_energy():
    """Without torque v'Mv / 2 stays, whatever the payload."""
    draw, m = torch.Generator().manual_seed(0), torch.tensor([0.5, 1.0, 4.0], dtype=torch.float64)
    q, v = torch.randn(2, 3, 2, generator=draw, dtype=torch.float64)

    def change(state):
        q, v = state.chunk(2, -1)
        return torch.cat([v, systems.arm_acceleration(q, v, torch.zeros_like(q), m)], -1)

    state, energies = torch.cat([q, v], -1), []
    for _ in range(200):
        c = state[:, 1].cos()
        a, b = state[:, 2], state[:, 3]
        energies.append((1 + 2 * m + 2 * m * c) * a**2 + 2 * m * (1 + c) * a * b + m * b**2)
        state = systems.rk4_step(change, state, 0.005)
    torch.testing.assert_close(energies[-1], energies[0], rtol=1e-7, atol=0)


def test_the_layer_is_a_pd_controller_of_as_many_parameters():
    """At its start: -K 0.1 e - K 0.1 v, with K = 10."""
    policy, plain = closed_loop.INLPolicy(), closed_loop.Perceptron()
    error, speed = torch.tensor([[0.5, -1.0]]), torch.tensor([[2.0, 0.0]])
    torch.testing.assert_close(policy(error, speed), -error - speed)
    assert not plain(error, speed).any()
    sizes = [sum(p.numel() for p in module.parameters()) for module in (policy, plain)]
    assert sizes[0] == sizes[1]


def test_a_policy_learns_through_the_simulation():
    torch.manual_seed(0)
    policy = closed_loop.trained(closed_loop.INLPolicy(), 3, seed=0, count=16)
    payloads = closed_loop.PAYLOADS["payloads as trained"]
    before = closed_loop.tried(closed_loop.no_policy, payloads)["mean squared error"][0]
    assert closed_loop.tried(policy, payloads)["mean squared error"][0] < before


def test_the_control_has_no_memory():
    """Without carrying, a layer's output does not depend on the velocity that it is given."""
    torch.manual_seed(0)
    control, carried = (physics.Forecaster(2, n) for n in ("force, no-carry", "force"))
    control.load_state_dict(carried.state_dict())
    h, v, push = torch.randn(3, 1, 4, 64)
    for model, equal in ((control, True), (carried, False)):
        dynamics = model.body.layers[1].dynamics
        moved, still = dynamics(h, v, force=push)[0], dynamics(h, None, force=push)[0]
        assert torch.equal(moved, still) == equal
