"""A loop with carried velocity: exact starts, bounds, exits, and its certificate."""

import itertools

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap

from inl_core import (
    LoopedDynamics,
    apply_bounds,
    certify_loop,
    certify_loops,
    collect_dynamics_stats,
    defer_bounds,
    draw_num_loops,
    ops,
    read_dynamics,
    reference,
)

D = 6


@pytest.fixture
def block():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(D, 8), nn.Tanh(), nn.Linear(8, D)).double()
    return net.requires_grad_(False)


def test_one_repetition_from_rest_is_the_plain_block(block):
    x = torch.randn(2, 3, D, dtype=torch.float64)
    dynamics = LoopedDynamics(D).double()
    h, v, loops, _ = dynamics.loop(block, x, 1)
    assert torch.equal(h, x + block(x))
    assert torch.equal(v, block(x))
    assert loops == 1


def test_without_inertia_it_is_the_plain_loop(block):
    x = torch.randn(2, 3, D, dtype=torch.float64)
    expected = x
    for _ in range(5):
        expected = expected + block(expected)
    assert torch.equal(LoopedDynamics(D, init_alpha=0.0).double().loop(block, x, 5).h, expected)


def test_the_initial_coefficients_are_exact_and_the_equilibrium_is_the_input():
    dynamics = LoopedDynamics(D, init_alpha=1.0, init_gate=1.0, spring=True)
    assert dynamics.alpha.tolist() == [1.0] * D
    assert dynamics.beta.tolist() == [0.0] * D
    x = torch.randn(2, D)
    assert torch.equal(dynamics.equilibrium(x), x)
    assert torch.equal(LoopedDynamics(D, spring=True, learn_equilibrium=False).equilibrium(x), x)
    nn.init.normal_(dynamics.alpha)
    dynamics.reset_parameters()
    assert dynamics.alpha.tolist() == [1.0] * D


def test_it_is_the_definition_with_an_equilibrium_per_token():
    torch.manual_seed(1)
    h, v, f, mu = (torch.randn(2, 3, D, dtype=torch.float64) for _ in range(4))
    alpha, beta, gate = 0.3, 0.7, 0.9
    dynamics = LoopedDynamics(
        D, alpha, gate, dt=0.5, velocity_max=0.8, spring=True, init_beta=beta
    ).double()
    h_next, v_next = dynamics(h, v, f, mu)
    expected = (alpha * v - beta * (h - mu) + f).clamp(-0.8, 0.8)
    torch.testing.assert_close(v_next, expected)
    torch.testing.assert_close(h_next, h + 0.5 * gate * expected)


def test_without_a_spring_it_is_one_whose_strength_is_zero(block):
    x = torch.randn(2, 3, D, dtype=torch.float64)
    free, held = LoopedDynamics(D).double(), LoopedDynamics(D, spring=True).double()
    assert torch.equal(free.loop(block, x, 5).h, held.loop(block, x, 5).h)
    assert sorted(free.state_dict()) == ["alpha", "gate"]
    assert "beta" not in str(free)
    free(x, None, None, x)[0].sum().backward()
    assert bool(free.gate.grad.isfinite().all())


def test_gradients_in_fp64():
    torch.manual_seed(2)
    h, v, f, mu = (torch.randn(2, D, dtype=torch.float64, requires_grad=True) for _ in range(4))
    raw = [torch.rand(D, dtype=torch.float64).mul(0.8).add(0.1).requires_grad_() for _ in range(3)]

    def step(h, v, f, mu, *raw):
        bounds = {"dt": 0.5, "beta_max": 2.0, "velocity_max": 10.0}
        return ops.looped_step(h, v, *raw, mu, f, **bounds)

    assert torch.autograd.gradcheck(step, (h, v, f, mu, *raw))


def test_heavy_ball_needs_the_root_of_the_repetitions():
    """Gradient descent on a quadratic of condition number 100 as the block of a loop."""
    kappa = 100.0
    curvature = torch.logspace(0, 2, D, dtype=torch.float64)
    x = torch.ones(1, D, dtype=torch.float64)

    def repetitions(alpha, rate):
        dynamics = LoopedDynamics(D, init_alpha=alpha, velocity_max=None)
        dynamics.double().requires_grad_(False)
        h, v = x, None
        for k in range(1, 2000):
            h, v = dynamics(h, v, -rate * curvature * h, x)
            if float(h.norm()) < 1e-3:
                return k
        raise AssertionError("no convergence")

    root = kappa**0.5
    plain = repetitions(0.0, 2 / (1 + kappa))
    ball = repetitions(((root - 1) / (root + 1)) ** 2, (2 / (1 + root)) ** 2)
    assert plain > 3 * ball


def test_a_sample_stops_at_the_same_state_whatever_is_beside_it(block):
    torch.manual_seed(3)
    dynamics = LoopedDynamics(D, init_alpha=0.2).double()
    target = torch.randn(D, dtype=torch.float64)
    near, far = target[None] + 1e-6, 100 * torch.randn(1, D, dtype=torch.float64)

    def pull(h):
        return 0.5 * (target - h)

    both = dynamics.loop(pull, torch.cat([near, far]), 60, tolerance=1e-4)
    alone = [dynamics.loop(pull, x, 60, tolerance=1e-4) for x in (near, far)]
    assert torch.equal(both.h, torch.cat([state.h for state in alone]))
    assert torch.equal(both.v, torch.cat([state.v for state in alone]))
    assert alone[0].num_loops < alone[1].num_loops == both.num_loops < 60
    torch.testing.assert_close(both.h[1], target, rtol=0, atol=0.05)


@pytest.mark.parametrize("name", ["alpha", "beta", "gate"])
def test_a_coefficient_beyond_its_bound_comes_back(name):
    dynamics = LoopedDynamics(D, init_alpha=0.5, init_gate=0.5, spring=True, init_beta=0.5)
    parameter = dynamics.get_parameter(name)
    bound = 2.0 if name == "beta" else 1.0
    h, v, f, mu = (torch.ones(4, D) * k for k in (0.0, 1.0, 0.0, 1.0))

    def moved():
        h_next, v_next = dynamics(h, v, f, mu)
        return v_next.sum() if name != "gate" else h_next.sum()

    for sign, start in ((1, bound + 0.5), (-1, -0.5)):
        with torch.no_grad():
            parameter.fill_(start)
        (inward,) = torch.autograd.grad(sign * moved(), parameter)
        (outward,) = torch.autograd.grad(-sign * moved(), parameter)
        assert bool((sign * inward > 0).all())
        assert bool((outward == 0).all())


def test_deferred_bounds_give_the_same_gradients():
    torch.manual_seed(4)
    x, f = torch.randn(4, D), torch.randn(4, D)
    found = []
    for deferred in (False, True):
        dynamics = LoopedDynamics(D, spring=True)
        with torch.no_grad():
            dynamics.alpha.uniform_(-1.0, 2.0, generator=torch.Generator().manual_seed(5))
            dynamics.beta.uniform_(-1.0, 3.0, generator=torch.Generator().manual_seed(6))
        defer_bounds(dynamics, deferred)
        h, v = dynamics(x, f, f, torch.zeros_like(x))
        (h.square().sum() + v.sum()).backward()
        apply_bounds(dynamics)
        found.append([p.grad for p in (dynamics.alpha, dynamics.beta, dynamics.gate)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_deferred_bounds_act_on_the_sum_of_the_repetitions():
    """The first repetition would move the gate back to its bound, both together further away."""
    found = []
    for deferred in (False, True):
        dynamics = LoopedDynamics(1)
        with torch.no_grad():
            dynamics.gate.fill_(1.5)
        defer_bounds(dynamics, deferred)
        forces = iter((torch.ones(1), torch.full((1,), -3.0)))
        dynamics.loop(lambda h, f=forces: next(f), torch.zeros(1), 2).h.sum().backward()
        apply_bounds(dynamics)
        found.append(float(dynamics.gate.grad))
    assert dynamics.init_alpha + 1.0 - 3.0 < -1.0  # the second velocity, the gate's gradient
    assert found == [1.0, 0.0]


def test_per_sample_gradients_and_compilation():
    torch.manual_seed(5)
    dynamics = LoopedDynamics(D, spring=True)
    params = dict(dynamics.named_parameters())
    x = torch.randn(3, D)

    def loss(params, x):
        mu = x @ params["equilibrium.weight"].T
        return functional_call(dynamics, params, (x, x, x, mu))[0].square().sum()

    each = vmap(grad(loss), in_dims=(None, 0))(params, x)
    assert each["alpha"].shape == (3, D)

    def run(x):
        return dynamics.loop(torch.sin, x, 4).h

    torch.testing.assert_close(torch.compile(run, fullgraph=True, backend="eager")(x), run(x))


def test_statistics_are_collected():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.dynamics = LoopedDynamics(D, init_alpha=0.25)

        def forward(self, x):
            return self.dynamics.loop(torch.sin, x, 3).h

    net = Net()
    with collect_dynamics_stats(net):
        net(torch.randn(2, D))
    stats = net.dynamics.get_dynamics_stats()
    assert stats["alpha_mean"] == 0.25
    assert stats["velocity_abs_max"] > 0
    net = Net()
    net.dynamics.compile(backend="eager")  # as a trainer compiles layers in place
    read = read_dynamics(net, (torch.randn(2, D),))["dynamics"]
    assert read["velocity_rms"] > 0
    assert read["spectral_radius"] == 1.0  # beta = 0: no pull, and marginal on its own


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"init_alpha": 1.1}, r"init_alpha must lie in \[0, 1\], got 1.1"),
        ({"init_beta": 3.0}, r"init_beta must lie in \[0, 2\], got 3.0"),
        ({"init_gate": -0.1}, r"init_gate must lie in \[0, 1\], got -0.1"),
        ({"beta_max": 0.0}, "beta_max must be positive"),
        ({"dt": 0.0}, "dt must be positive"),
    ],
)
def test_arguments_out_of_range_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        LoopedDynamics(D, **change)


def test_wrong_calls_are_refused():
    dynamics, x = LoopedDynamics(D), torch.randn(2, D)
    with pytest.raises(ValueError, match="equilibrium has shape"):
        dynamics(x, None, x, x[0])
    with pytest.raises(ValueError, match="num_loops must be at least 0, got -1"):
        dynamics.loop(torch.sin, x, -1)
    with pytest.raises(ValueError, match="tolerance must be positive"):
        dynamics.loop(torch.sin, x, 2, tolerance=0.0)
    with pytest.raises(ValueError, match="num_loops must be at least 1"):
        certify_loop(lambda h, v: (h, v), x, num_loops=0)


def brute_force(step, h, v):
    """The whole Jacobian of a step, by rows."""

    def flat(state):
        parts = state.split(h.numel())
        return torch.cat([x.flatten() for x in step(*(part.view(h.shape) for part in parts))])

    return torch.autograd.functional.jacobian(flat, torch.cat([h.flatten(), v.flatten()]))


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.95])
def test_the_certificate_of_a_loop_is_that_of_its_whole_jacobian(block, alpha):
    torch.manual_seed(6)
    dynamics = LoopedDynamics(D, alpha, spring=True, init_beta=0.1).double().requires_grad_(False)
    x = torch.randn(2, 2, D, dtype=torch.float64)

    def step(h, v):
        return dynamics(h, v, block(h) - 0.5 * h, x)

    report = certify_loop(step, x, num_loops=4)
    h, v = x, torch.zeros_like(x)
    whole = torch.eye(2 * x.numel(), dtype=torch.float64)
    changes = []
    for radius in report.spectral_radius:
        jacobian = brute_force(step, h, v)
        expected = torch.linalg.eigvals(jacobian).abs().max()
        torch.testing.assert_close(torch.tensor(radius).double(), expected, rtol=1e-6, atol=1e-9)
        whole = jacobian @ whole
        h_next, v_next = step(h, v)
        changes.append(float(torch.cat([h_next - h, v_next - v]).norm()))
        h, v = h_next, v_next
    ratios = [b / a for a, b in itertools.pairwise(changes)]
    assert report.contraction == pytest.approx(ratios)
    assert report.response == pytest.approx(float(torch.linalg.matrix_norm(whole, ord=2)), rel=1e-3)
    assert report.frozen_stable == (max(report.spectral_radius) < 1)
    assert len(str(report).splitlines()) == 6


def test_a_loop_that_cannot_settle_is_certified_as_unstable():
    dynamics = LoopedDynamics(D, init_alpha=0.9).double().requires_grad_(False)
    x = torch.randn(1, D, dtype=torch.float64)
    report = certify_loop(lambda h, v: dynamics(h, v, 0.2 * h, x), x, num_loops=3)
    assert not report.frozen_stable
    assert min(report.contraction) > 1


def test_the_definition_is_the_public_operation():
    assert ops.looped_step is reference.looped_step


def test_samples_may_be_tokens_and_a_block_may_return_more(block):
    torch.manual_seed(7)
    dynamics = LoopedDynamics(D, init_alpha=0.2).double()
    targets = torch.randn(2, 3, D, dtype=torch.float64)
    x = targets + torch.tensor([1e-6, 1e-3, 1.0], dtype=torch.float64)[:, None]
    counts = []

    def pull(h, target):
        counts.append(len(counts))
        return 0.5 * (target - h), h - target

    both = dynamics.loop(lambda h: pull(h, targets), x, 60, tolerance=1e-4, sample_dims=2)
    assert both.num_loops < 60
    for i in range(3):
        one = dynamics.loop(lambda h, i=i: pull(h, targets[:, i]), x[:, i], 60, tolerance=1e-4)
        assert torch.equal(one.h, both.h[:, i])
        assert torch.equal(one.other, both.other[:, i])
    assert dynamics.loop(block, x, 2).other is None


@pytest.mark.parametrize("sampling", ["uniform", "poisson"])
@pytest.mark.parametrize("mean", [1, 6])
def test_a_drawn_number_has_the_mean_and_depends_on_seed_and_step(sampling, mean):
    drawn = [draw_num_loops(mean, sampling, 0, step) for step in range(4000)]
    assert min(drawn) >= 1
    assert sum(drawn) / len(drawn) == pytest.approx(mean, abs=0.15)
    assert drawn[:50] == [draw_num_loops(mean, sampling, 0, step) for step in range(50)]
    if mean > 1:
        assert drawn != [draw_num_loops(mean, sampling, 1, step) for step in range(4000)]
        assert max(drawn) == 2 * mean - 1 if sampling == "uniform" else max(drawn) > 2 * mean
        variance = sum((x - mean) ** 2 for x in drawn) / len(drawn)
        expected = ((2 * mean - 1) ** 2 - 1) / 12 if sampling == "uniform" else mean - 1
        assert variance == pytest.approx(expected, rel=0.1)


def test_draws_out_of_range_are_refused():
    assert draw_num_loops(3, "fixed", 0, 0) == 3
    with pytest.raises(ValueError, match=r"must lie in \[1, 500\], got 0"):
        draw_num_loops(0, "fixed", 0, 0)
    with pytest.raises(ValueError, match="unknown sampling 'normal'"):
        draw_num_loops(3, "normal", 0, 0)


def test_the_loops_of_a_model_are_certified_where_its_inputs_enter_them(block):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.dynamics, self.used = LoopedDynamics(D, init_alpha=0.3).double(), True

        def forward(self, x):
            return (
                self.dynamics.loop(lambda h: (block(h) - h, None), 2 * x, 2).h if self.used else x
            )

    net, x = Net(), torch.randn(1, 2, D, dtype=torch.float64)
    report = certify_loops(net, (x,), 3)
    mu = 2 * x
    expected = certify_loop(lambda h, v: net.dynamics(h, v, block(h) - h, mu), mu, num_loops=3)
    assert report == {"dynamics": expected}
    net.used = False
    with pytest.raises(ValueError, match="did not run dynamics"):
        certify_loops(net, (x,))
    with pytest.raises(ValueError, match="Linear has no LoopedDynamics"):
        certify_loops(nn.Linear(2, 2), (x,))
