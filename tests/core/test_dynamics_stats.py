"""Contents of get_dynamics_stats, and side effects that collecting must not have."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from inl_core import INLDynamics, INLDynamicsLite, collect_dynamics_stats
from support.tensors import randn, scramble

ALWAYS = {"mu_min", "mu_max", "mu_clip_fraction"}
COLLECTED = {
    *(f"{name}_{kind}" for name in ("alpha", "beta", "gate") for kind in ("mean", "min", "max")),
    "beta_clip_fraction",
    "velocity_abs_mean",
    "velocity_abs_max",
    "velocity_rms",
    "velocity_clip_fraction",
}


def test_mu_is_always_reported_and_nothing_else_without_the_context() -> None:
    for module in (INLDynamics(4), INLDynamicsLite(4)):
        with torch.no_grad():
            module.mu.copy_(torch.tensor([-1.0, 0.5, 2.0, 5.0]))
        module(randn(2, 4))
        stats = module.get_dynamics_stats()
        assert set(stats) == ALWAYS
        assert stats == {"mu_min": -1.0, "mu_max": 5.0, "mu_clip_fraction": 0.5}
        assert all(type(value) is float for value in stats.values())


def test_mu_clip_fraction_is_zero_without_bounds() -> None:
    module = INLDynamicsLite(2, mu_min=None, mu_max=None)
    with torch.no_grad():
        module.mu.fill_(9.0)
    assert module.get_dynamics_stats()["mu_clip_fraction"] == 0.0


def test_collected_values() -> None:
    module = INLDynamics(2, 0.9, 0.1, 0.5, adaptive="channel")
    with torch.no_grad():
        module.beta_raw[1] = 10.0
    with collect_dynamics_stats(module):
        h_next, v_next = module(torch.tensor([[0.0, -9.0]]), torch.tensor([[2.0, 0.0]]))
    assert v_next.tolist() == [[pytest.approx(1.8), 10.0]]
    assert not h_next.isnan().any()
    stats = module.get_dynamics_stats()
    assert set(stats) == ALWAYS | COLLECTED
    want = {
        "alpha_mean": 0.9, "alpha_min": 0.9, "alpha_max": 0.9,
        "beta_mean": 1.05, "beta_min": 0.1, "beta_max": 2.0, "beta_clip_fraction": 0.5,
        "gate_mean": 0.5, "gate_min": 0.5, "gate_max": 0.5,
        "velocity_abs_mean": 5.9, "velocity_abs_max": 10.0,
        "velocity_rms": math.sqrt((1.8**2 + 100) / 2), "velocity_clip_fraction": 0.5,
    }  # fmt: skip
    assert {name: stats[name] for name in want} == pytest.approx(want, rel=1e-5)


def test_lite_collects_the_same_names() -> None:
    module = INLDynamicsLite(4, alpha=0.7)
    with collect_dynamics_stats(module):
        module(randn(2, 4))
    stats = module.get_dynamics_stats()
    assert set(stats) == ALWAYS | COLLECTED
    assert stats["alpha_mean"] == pytest.approx(0.7)
    assert stats["beta_clip_fraction"] == 0.0


def test_a_clipped_bf16_velocity_counts() -> None:
    module = INLDynamicsLite(2, velocity_max=0.3)  # 0.3 is not a bf16 number
    v = torch.tensor([[9.0, 0.1]], dtype=torch.bfloat16)
    with collect_dynamics_stats(module):
        module(torch.zeros_like(v), v)
    assert module.get_dynamics_stats()["velocity_clip_fraction"] == 0.5


def test_context_reaches_nested_modules_and_ends() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ModuleDict({"deep": INLDynamics(4)}))
    inner = model[1]["deep"]  # type: ignore[index]
    with collect_dynamics_stats(model):
        with collect_dynamics_stats(model):
            pass
        inner(torch.zeros(1, 4))  # the outer block is still open
        inner(torch.full((1, 4), -3.0))
    last = inner.get_dynamics_stats()
    assert last["velocity_abs_max"] == pytest.approx(0.3)  # the last forward, beta * 3
    inner(torch.full((1, 4), -50.0))
    assert inner.get_dynamics_stats() == last  # still readable, no longer renewed
    with pytest.raises(RuntimeError, match="inside"), collect_dynamics_stats(model):
        raise RuntimeError("inside")
    inner(torch.full((1, 4), -50.0))
    assert inner.get_dynamics_stats() == last


def test_statistics_change_neither_result_nor_graph_nor_state_dict() -> None:
    module = INLDynamics(4)
    scramble(module)
    h, v = randn(3, 4).requires_grad_(), randn(3, 4, seed=1)
    plain = module(h, v)
    names = list(module.state_dict())
    with collect_dynamics_stats(module):
        watched = module(h, v)
    for a, b in zip(plain, watched, strict=True):
        assert torch.equal(a, b)
    assert list(module.state_dict()) == names
    assert not any(value.requires_grad for value in module._last_seen.values())
    assert all(value.ndim == 0 for value in module._last_seen.values())


def test_forward_does_not_wait_for_the_device() -> None:
    # On the meta device any read-back raises, so a forward that passes makes none.
    for module in (INLDynamics(4).to("meta"), INLDynamicsLite(4).to("meta")):
        h = torch.empty(2, 4, device="meta")
        with collect_dynamics_stats(module):
            module(h, h)


def test_compiled_forward_collects_nothing_and_does_not_recompile() -> None:
    torch.compiler.reset()
    module = INLDynamics(4)
    count = [0]

    def backend(graph: torch.fx.GraphModule, inputs: object) -> object:
        count[0] += 1
        return graph.forward

    compiled = torch.compile(module, fullgraph=True, backend=backend)
    h = randn(2, 4)
    compiled(h)
    with collect_dynamics_stats(module):
        compiled(h)
    assert set(module.get_dynamics_stats()) == ALWAYS
    assert count == [1]


def test_repr_names_the_settings() -> None:
    text = repr(INLDynamics(4, beta_max=1.5))
    for part in ("4, dt=0.1", "velocity_max=10.0", "beta_max=1.5", "adaptive='token'", "hidden=64"):
        assert part in text
    assert "controller_hidden" not in repr(INLDynamics(4, adaptive="layer"))
    assert "alpha=0.9, beta=0.1, gate=0.5" in repr(INLDynamicsLite(4))
