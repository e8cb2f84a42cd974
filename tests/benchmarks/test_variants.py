"""Every variant of the ablations builds, trains, and differs from the rest in what it says."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from torch import Tensor, nn

from inl_core import INLDynamics, INLDynamicsLite, integrators, stability

ROOT = Path(__file__).parents[2]
SIZES = {"hidden_size": 48, "dynamics_controller_hidden": 8}


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scripts import each other by name, as they do when they are run."""
    monkeypatch.setenv("COMPLEXITY_DATA", "unused")


@pytest.fixture
def variants() -> ModuleType:
    from benchmarks.study import variants

    return variants


def randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def lively(adaptive: str = "token", **bounds: Any) -> INLDynamics:
    """A module whose every parameter matters."""
    module = INLDynamics(6, adaptive=adaptive, controller_hidden=4, **bounds)  # type: ignore[arg-type]
    for index, parameter in enumerate(module.parameters()):
        draw = torch.Generator().manual_seed(index)
        nn.init.normal_(parameter, std=0.4, generator=draw)
    return module.double()


def turned(variants: ModuleType, kind: str, module: INLDynamics) -> INLDynamics:
    module = copy.deepcopy(module)
    variants.turn_into(module, getattr(variants, kind))
    return module


@pytest.mark.parametrize("adaptive", ["token", "channel", "layer"])
def test_taken_apart_the_step_is_the_same(variants: ModuleType, adaptive: str) -> None:
    module = lively(adaptive, velocity_max=0.7)
    h, v, force = randn(2, 5, 6), randn(2, 5, 6, seed=1), randn(2, 5, 6, seed=2)
    same = turned(variants, "OpenDynamics", module)
    for arguments in ((h,), (h, v), (h, v, force)):
        torch.testing.assert_close(same(*arguments), module(*arguments))


def test_integrators_come_as_near_to_the_solution_as_their_order(variants: ModuleType) -> None:
    module = lively("channel", dt=0.5)
    h, v = randn(2, 5, 6), randn(2, 5, 6, seed=1)
    want = turned(variants, "Exact", module)(h, v)[0]
    gaps = [
        float((step(h, v)[0] - want).detach().abs().max())
        for step in (module, turned(variants, "Leapfrog", module), turned(variants, "RK4", module))
    ]
    assert gaps[0] > 2 * gaps[1] > 4 * gaps[2] > 0
    point = [x.detach() for x in module._coefficients(h, v)]
    alpha, beta, gate = point[0].sigmoid(), nn.functional.softplus(point[1]), point[2].sigmoid()
    mu = module.mu.detach().clamp(0, 2)
    torch.testing.assert_close(
        turned(variants, "RK4", module)(h, v), integrators.rk4(h, v, alpha, beta, gate, mu, 0.5)
    )
    with pytest.raises(ValueError, match="rk4 knows no force"):
        turned(variants, "RK4", module)(h, v, force=h)


@pytest.mark.parametrize("adaptive", ["token", "channel"])
def test_a_zero_spring_starts_as_the_identity_and_learns(
    variants: ModuleType, adaptive: str
) -> None:
    module = turned(variants, "ZeroSpring", INLDynamics(6, adaptive=adaptive).double())  # type: ignore[arg-type]
    h = randn(2, 5, 6)
    h_next, v_next = module(h)
    assert torch.equal(h_next, h)
    assert not v_next.any()
    h_next.square().sum().backward()
    grad = module.bias_out.grad.chunk(3)[1] if adaptive == "token" else module.beta_raw.grad
    assert grad is not None
    assert grad.abs().min() > 0


def test_critical_damping_has_a_double_eigenvalue(variants: ModuleType) -> None:
    module = turned(variants, "Critical", lively("channel"))
    alpha, beta, gate = (x.detach() for x in module.coefficients(randn(1, 6), None, 2.0))
    a = stability.transition_matrix(alpha, beta, gate, module.dt)
    trace, determinant = a.diagonal(dim1=-2, dim2=-1).sum(-1), torch.linalg.det(a)
    torch.testing.assert_close(trace.square(), 4 * determinant)
    assert bool(stability.is_stable(alpha, beta, gate, module.dt).all())


def test_without_carrying_the_velocity_that_comes_in_is_nothing(variants: ModuleType) -> None:
    module = lively()
    h, v = randn(2, 5, 6), randn(2, 5, 6, seed=1)
    forgetful = turned(variants, "NoCarry", module)
    torch.testing.assert_close(forgetful(h, v), module(h))


def test_anchored_dynamics_rest_at_the_start_of_each_token(variants: ModuleType) -> None:
    """At h = mu + anchor with v = 0 there is no pull."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dynamics = lively("channel")

        def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
            return self.dynamics(h + self.dynamics.mu.clamp(0, 2))

    layers = [Layer(), Layer()]
    variants.anchor_swap(layers)
    for seed in (0, 1):  # every forward has its own anchor
        h = randn(2, 5, 6, seed=seed)
        layers[0](h)
        moved, v = layers[1](h)
        torch.testing.assert_close(moved, h + layers[1].dynamics.mu.clamp(0, 2))
        torch.testing.assert_close(v, torch.zeros_like(v))


def test_lite_has_nothing_to_exchange(variants: ModuleType) -> None:
    with pytest.raises(ValueError, match="INLDynamicsLite cannot become RK4"):
        variants.turn_into(INLDynamicsLite(6), variants.RK4)


# The networks ---------------------------------------------------------------------------------


def study(name: str) -> Any:
    from benchmarks.study.ablation_study import read_study

    return read_study(ROOT / f"configs/ablations/{name}.yaml")


def lm_network(network: Any) -> nn.Module:
    from benchmarks.study.ablation_labs import LABS
    from benchmarks.study.variants_lm import VariedConfig, VariedForCausalLM

    config = study("lm").config(LABS["lm"], network, 0, "unused", {})
    inner = config.model.overrides["intermediate_size"] // 8
    sizes = {"vocab_size": 64, "num_hidden_layers": 2, "intermediate_size": inner}
    torch.manual_seed(0)
    return VariedForCausalLM(
        VariedConfig(
            **(config.model.overrides | SIZES | sizes),
            dynamics_placement=config.model.dynamics_placement,
            dynamics_adaptive=config.model.dynamics_adaptive,
            swap=network.swap,
        )
    )


def lm_loss(model: nn.Module) -> Tensor:
    ids = torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(0))
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def dit_network(network: Any) -> nn.Module:
    from benchmarks.study.ablation_labs import LABS
    from benchmarks.study.variants_dit import varied_dit

    config = study("dit").config(LABS["dit"], network, 0, "unused", {})
    torch.manual_seed(0)
    return varied_dit(network.swap).from_size(
        "nano",
        **(
            config.model.overrides
            | SIZES
            | {"num_layers": 2, "sample_size": 8, "label_fields": ["style"], "num_classes": [3]}
        ),
        dynamics_placement=config.model.dynamics_placement,
        dynamics_adaptive=config.model.dynamics_adaptive,
    )


def dit_loss(model: nn.Module) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 8, 8, generator=draw, dtype=torch.float64)
    out = model(x, torch.tensor([300.0, 700.0]).to(x), torch.tensor([[0], [2]]), return_dict=False)[
        0
    ]
    return (out - x).square().mean()


PACKAGES = {"lm": (lm_network, lm_loss), "dit": (dit_network, dit_loss)}
# The image model's blocks start as the identity: two steps pass before a gradient comes to them.
STEPS = {"lm": 2, "dit": 4}


@pytest.fixture(scope="module", params=list(PACKAGES))
def trained(request: pytest.FixtureRequest) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every network of a study at its start and after a few steps: parameters and losses."""
    package = request.param
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COMPLEXITY_DATA", "unused")
        build, loss_of = PACKAGES[package]
        found = {}
        for name, network in study(package).networks.items():
            if network.longer != 1.0:
                continue
            model = build(network).double().train()
            start = {k: p.detach().clone() for k, p in model.named_parameters()}
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.005)
            losses = []
            for _ in range(STEPS[package]):
                loss = loss_of(model)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(float(loss.detach()))
            losses.append(float(loss_of(model).detach()))
            found[name] = {"start": start, "losses": losses}
        yield package, found


def test_every_variant_trains(trained: tuple[str, dict[str, Any]]) -> None:
    for name, of in trained[1].items():
        assert all(torch.isfinite(torch.tensor(of["losses"]))), name
        assert of["losses"][-1] < of["losses"][0], name


def test_all_start_from_the_same_backbone(trained: tuple[str, dict[str, Any]]) -> None:
    _, found = trained
    plain = found["none"]["start"]
    for name, of in found.items():
        for key, value in plain.items() if "wide" not in name else ():
            assert torch.equal(of["start"][key], value), (name, key)
        own = {key for key in of["start"] if key not in plain}
        assert all("dynamics" in key or key.endswith("mlp.scale") for key in own), name
        assert bool(own) == (name.partition(",")[0] != "none"), name


# No difference is expected between these: the clip is far from any velocity of two steps.
SAME = [{"branch", "branch, no velocity clip"}]


def test_no_two_variants_are_the_same_network(trained: tuple[str, dict[str, Any]]) -> None:
    """After a few steps every one has a loss of its own, or what it changes does not act."""
    _, found = trained
    names = list(found)
    for i, one in enumerate(names):
        for other in names[:i]:
            equal = found[one]["losses"] == found[other]["losses"]
            assert equal == ({one, other} in SAME), (one, other, found[one], found[other])


def test_swaps_refuse_another_placement() -> None:
    from benchmarks.study.variants_dit import varied_dit
    from benchmarks.study.variants_lm import LM_SWAPS

    network = study("lm").networks["branch"]
    model = lm_network(network)
    with pytest.raises(ValueError, match="is for placement force, not branch"):
        LM_SWAPS["look-ahead"](model)
    with pytest.raises(ValueError, match="a layer has no dynamics_mlp: use placement force"):
        LM_SWAPS["plain-mlp"](model)
    with pytest.raises(ValueError, match="unknown swap 'nothing', choose from: leapfrog"):
        varied_dit("nothing")


@pytest.mark.parametrize("swap", ["plain-attention", "plain-mlp"])
def test_force_on_one_sub_layer_leaves_the_other_plain(swap: str) -> None:
    """With a force that is the plain residual too (alpha = beta = 0), the network is `none`."""
    from benchmarks.study.ablation_study import Network

    plain = lm_network(Network("none", {"model.dynamics_placement": "none"})).eval()
    fields = {"model.dynamics_placement": "force", "model.dynamics_adaptive": "lite"}
    exact = {"alpha": 0.0, "beta": 0.0, "gate": 1.0, "dt": 1.0, "velocity_max": None}
    fields |= {f"model.overrides.dynamics_{k}": v for k, v in exact.items()}
    forced = lm_network(Network("force", fields, swap)).eval()
    torch.testing.assert_close(lm_loss(forced), lm_loss(plain))


def test_force_mlp_of_the_packages_is_the_variant_that_found_it() -> None:
    """`force` with plain attention: the same network, one dynamics module a layer fewer."""
    from benchmarks.study.ablation_study import Network

    channel = {"model.dynamics_adaptive": "channel"}
    for build, loss_of in PACKAGES.values():
        losses = []
        for placement, swap in (("force", "plain-attention"), ("force_mlp", None)):
            network = Network(placement, channel | {"model.dynamics_placement": placement}, swap)
            model = build(network).double()
            for parameter in model.parameters():  # the image model starts as the identity
                parameter.data += 0.01
            losses.append(float(loss_of(model).detach()))
        assert losses[0] == losses[1]


def test_momentum_across_layers_without_memory_is_the_plain_network() -> None:
    from benchmarks.study.ablation_study import Network

    exact = {"alpha": 0.0, "beta": 0.0, "gate": 1.0, "dt": 1.0, "velocity_max": None}
    fields = {"model.dynamics_placement": "stream", "model.dynamics_adaptive": "lite"}
    fields |= {f"model.overrides.dynamics_{k}": v for k, v in exact.items()}
    for (build, loss_of), swap in zip(
        PACKAGES.values(), ("across-layers", "across-blocks"), strict=True
    ):
        plain = build(Network("none", {"model.dynamics_placement": "none"})).double().eval()
        moved = build(Network("across", fields, swap)).double().eval()
        torch.testing.assert_close(loss_of(moved), loss_of(plain))
