"""Initial values of the dynamics modules: exact, safe from a parent's init; argument errors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from inl_core import INLDynamics, INLDynamicsLite
from support.tensors import coefficients, randn, scramble

MODES = ("token", "channel", "layer")


@pytest.mark.parametrize("adaptive", MODES)
@pytest.mark.parametrize(
    ("alpha", "beta", "gate"),
    [(0.9, 0.1, 0.5), (0.99, 0.01, 0.999), (0.001, 2.0, 0.3), (0.5, 1e-8, 0.5)],
)
def test_initial_values_are_exact(adaptive: str, alpha: float, beta: float, gate: float) -> None:
    module = INLDynamics(6, alpha, beta, gate, adaptive=adaptive)  # type: ignore[arg-type]
    h, v = randn(3, 6), randn(3, 6, seed=1)
    for got, want in zip(coefficients(module, h, v), (alpha, beta, gate), strict=True):
        torch.testing.assert_close(got, torch.full_like(got, want), rtol=2e-6, atol=0)
    raw = [part.double()[..., 0].flatten()[0].item() for part in module._coefficients(h, v)]
    wanted = (
        math.log(alpha / (1 - alpha)),
        math.log(math.expm1(beta)),
        math.log(gate / (1 - gate)),
    )
    for got_raw, want_raw in zip(raw, wanted, strict=True):
        # Nothing but the one rounding into fp32 stands between the two.
        assert got_raw == pytest.approx(want_raw, rel=6e-8, abs=1e-15)
    assert module.mu.eq(0.0).all()


@pytest.mark.parametrize("adaptive", MODES)
def test_initial_values_are_exact_in_fp64(adaptive: str) -> None:
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        module = INLDynamics(4, 0.9, 0.1, 0.5, adaptive=adaptive)  # type: ignore[arg-type]
    finally:
        torch.set_default_dtype(default)
    h = randn(2, 4, dtype=torch.float64)
    for got, want in zip(coefficients(module, h, None), (0.9, 0.1, 0.5), strict=True):
        assert got.dtype == torch.float64
        torch.testing.assert_close(got, torch.full_like(got, want), rtol=1e-14, atol=0)


def test_large_initial_beta_without_a_bound() -> None:
    module = INLDynamics(2, init_beta=500.0, beta_max=None, adaptive="layer")
    assert coefficients(module, torch.zeros(1, 2), None)[1].item() == 500.0


def linear_init(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class Parent(nn.Module):
    def __init__(self, adaptive: str, walk: str) -> None:
        super().__init__()
        self.before = nn.Linear(6, 6)
        self.dynamics = INLDynamics(6, 0.8, 0.3, 0.6, adaptive=adaptive)  # type: ignore[arg-type]
        if walk == "apply":
            self.apply(linear_init)
        else:
            for module in self.modules():
                linear_init(module)


@pytest.mark.parametrize("walk", ["apply", "loop"])
@pytest.mark.parametrize("adaptive", MODES)
def test_initial_values_survive_the_parents_init(adaptive: str, walk: str) -> None:
    parent = Parent(adaptive, walk)
    assert parent.before.bias.eq(0.0).all()  # the parent's init did run
    assert not list(parent.dynamics.children())
    used = coefficients(parent.dynamics, randn(3, 6), randn(3, 6, seed=1))
    for got, want in zip(used, (0.8, 0.3, 0.6), strict=True):
        torch.testing.assert_close(got, torch.full_like(got, want), rtol=2e-6, atol=0)


@pytest.mark.parametrize("adaptive", MODES)
def test_reset_parameters_restores_the_initial_values(adaptive: str) -> None:
    module = INLDynamics(6, 0.8, 0.3, 0.6, adaptive=adaptive)  # type: ignore[arg-type]
    scramble(module)
    module.reset_parameters()
    used = coefficients(module, randn(3, 6), None)
    for got, want in zip(used, (0.8, 0.3, 0.6), strict=True):
        torch.testing.assert_close(got, torch.full_like(got, want), rtol=2e-6, atol=0)
    assert module.mu.eq(0.0).all()
    if adaptive == "token":
        assert module.weight_out.eq(0.0).all()
        bound = 1 / math.sqrt(12)
        assert 0 < module.weight_in_h.abs().max().item() <= bound


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"init_alpha": 1.0}, r"init_alpha must lie in \(0, 1\), got 1\.0"),
        ({"init_alpha": 0.0}, r"init_alpha must lie in \(0, 1\), got 0\.0"),
        ({"init_gate": 1.5}, r"init_gate must lie in \(0, 1\), got 1\.5"),
        ({"init_beta": 0.0}, r"init_beta must lie in \(0, beta_max = 2\.0\], got 0\.0"),
        ({"init_beta": 2.1}, r"init_beta must lie in \(0, beta_max = 2\.0\], got 2\.1"),
        ({"init_beta": math.nan}, r"init_beta must lie in .* got nan"),
        ({"init_beta": math.inf, "beta_max": None}, r"init_beta must lie in .* got inf"),
        ({"beta_max": 0.0}, r"beta_max must be positive, or None for no bound, got 0\.0"),
        ({"velocity_max": -1.0}, r"velocity_max must be positive, or None for no bound, got -1\.0"),
        ({"mu_min": 3.0}, r"mu_min 3\.0 must not be above mu_max 2\.0"),
        ({"dt": 0.0}, r"dt must be positive and finite, got 0\.0"),
        ({"adaptive": "head"}, r"adaptive must be one of .*'token'.* got 'head'"),
        ({"controller_hidden": 0}, "controller_hidden must be at least 1, got 0"),
    ],
)
def test_bad_arguments_are_named(kwargs: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        INLDynamics(4, **kwargs)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"hidden_size": 0}, "hidden_size must be at least 1, got 0"),
        ({"alpha": 1.1}, r"alpha must lie in \[0, 1\], got 1\.1"),
        ({"beta": 2.5}, r"beta must lie in \[0, 2\], got 2\.5"),
        ({"beta": -0.1}, r"beta must lie in \[0, 2\], got -0\.1"),
        ({"gate": math.nan}, r"gate must lie in \[0, 1\], got nan"),
    ],
)
def test_bad_lite_arguments_are_named(kwargs: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        INLDynamicsLite(**({"hidden_size": 4} | kwargs))  # type: ignore[arg-type]


def test_bad_shapes_are_named() -> None:
    for module in (INLDynamics(4), INLDynamicsLite(4)):
        with pytest.raises(ValueError, match=r"h has shape \(2, 5\), expected \(\.\.\., 4\)"):
            module(torch.zeros(2, 5))
        with pytest.raises(ValueError, match=r"v has shape \(3, 4\), expected that of h, \(2, 4\)"):
            module(torch.zeros(2, 4), torch.zeros(3, 4))
        with pytest.raises(ValueError, match=r"force has shape \(4,\)"):
            module(torch.zeros(2, 4), force=torch.zeros(4))
