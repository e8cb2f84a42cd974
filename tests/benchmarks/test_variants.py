"""Every variant of the ablations builds, trains and differs from the others as it should."""

import copy
import itertools

import pytest
import torch
from benchmarks.study import variants
from benchmarks.study.ablation_labs import LABS
from benchmarks.study.ablation_study import Network
from benchmarks.study.variants_dit import varied_dit
from benchmarks.study.variants_lm import LM_SWAPS, VariedConfig, VariedForCausalLM
from torch import nn

from inl_core import INLDynamics, INLDynamicsLite, integrators, stability
from support.benchmark_rows import committed_study

SIZES = {"hidden_size": 48, "dynamics_controller_hidden": 8}


def randn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def lively(adaptive="token", **bounds):
    """A module whose every parameter matters."""
    module = INLDynamics(6, adaptive=adaptive, controller_hidden=4, **bounds)
    for index, parameter in enumerate(module.parameters()):
        draw = torch.Generator().manual_seed(index)
        nn.init.normal_(parameter, std=0.4, generator=draw)
    return module.double()


def turned(kind, module):
    module = copy.deepcopy(module)
    variants.turn_into(module, getattr(variants, kind))
    return module


@pytest.mark.parametrize("adaptive", ["token", "channel", "layer"])
def test_taken_apart_the_step_is_the_same(adaptive):
    module = lively(adaptive, velocity_max=0.7)
    h, v, force = randn(2, 5, 6), randn(2, 5, 6, seed=1), randn(2, 5, 6, seed=2)
    same = turned("OpenDynamics", module)
    for arguments in ((h,), (h, v), (h, v, force)):
        torch.testing.assert_close(same(*arguments), module(*arguments))


def test_integrators_come_as_near_to_the_solution_as_their_order():
    module = lively("channel", dt=0.5)
    h, v = randn(2, 5, 6), randn(2, 5, 6, seed=1)
    want = turned("Exact", module)(h, v)[0]
    gaps = [
        float((step(h, v)[0] - want).detach().abs().max())
        for step in (module, turned("Leapfrog", module), turned("RK4", module))
    ]
    assert gaps[0] > 2 * gaps[1] > 4 * gaps[2] > 0
    point = [x.detach() for x in module._coefficients(h, v)]
    alpha, beta, gate = point[0].sigmoid(), nn.functional.softplus(point[1]), point[2].sigmoid()
    mu = module.mu.detach().clamp(0, 2)
    torch.testing.assert_close(
        turned("RK4", module)(h, v), integrators.rk4(h, v, alpha, beta, gate, mu, 0.5)
    )
    with pytest.raises(ValueError, match="rk4 takes no force"):
        turned("RK4", module)(h, v, force=h)


@pytest.mark.parametrize("adaptive", ["token", "channel"])
def test_a_zero_spring_starts_as_the_identity_and_learns(adaptive):
    module = turned("ZeroSpring", INLDynamics(6, adaptive=adaptive).double())
    h = randn(2, 5, 6)
    h_next, v_next = module(h)
    assert torch.equal(h_next, h)
    assert not v_next.any()
    h_next.square().sum().backward()
    grad = module.bias_out.grad.chunk(3)[1] if adaptive == "token" else module.beta_raw.grad
    assert grad is not None
    assert grad.abs().min() > 0


def test_critical_damping_has_a_double_eigenvalue():
    module = turned("Critical", lively("channel"))
    alpha, beta, gate = (x.detach() for x in module.coefficients(randn(1, 6), None, 2.0))
    a = stability.transition_matrix(alpha, beta, gate, module.dt)
    trace, determinant = a.diagonal(dim1=-2, dim2=-1).sum(-1), torch.linalg.det(a)
    torch.testing.assert_close(trace.square(), 4 * determinant)
    assert bool(stability.is_stable(alpha, beta, gate, module.dt).all())


def test_without_carrying_the_velocity_that_comes_in_is_nothing():
    module = lively()
    h, v = randn(2, 5, 6), randn(2, 5, 6, seed=1)
    forgetful = turned("NoCarry", module)
    torch.testing.assert_close(forgetful(h, v), module(h))


def test_anchored_dynamics_rest_at_the_start_of_each_token():
    """At h = mu + anchor with v = 0 there is no pull."""

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.dynamics = lively("channel")

        def forward(self, h):
            return self.dynamics(h + self.dynamics.mu.clamp(0, 2))

    layers = [Layer(), Layer()]
    variants.anchor_swap(layers)
    for seed in (0, 1):  # every forward has its own anchor
        h = randn(2, 5, 6, seed=seed)
        layers[0](h)
        moved, v = layers[1](h)
        torch.testing.assert_close(moved, h + layers[1].dynamics.mu.clamp(0, 2))
        torch.testing.assert_close(v, torch.zeros_like(v))


def test_lite_has_nothing_to_exchange():
    with pytest.raises(ValueError, match="INLDynamicsLite cannot become RK4"):
        variants.turn_into(INLDynamicsLite(6), variants.RK4)


# The networks ---------------------------------------------------------------------------------


def lm_network(network):
    config = committed_study("lm").config(LABS["lm"], network, 0, "unused", {})
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


def lm_loss(model):
    ids = torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(0))
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def dit_network(network):
    config = committed_study("dit").config(LABS["dit"], network, 0, "unused", {})
    torch.manual_seed(0)
    sizes = {"num_layers": 2, "sample_size": 8, "label_fields": ["style"], "num_classes": [3]}
    return varied_dit(network.swap).from_size(
        "nano",
        **(config.model.overrides | SIZES | sizes),
        dynamics_placement=config.model.dynamics_placement,
        dynamics_adaptive=config.model.dynamics_adaptive,
    )


def dit_loss(model):
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 8, 8, generator=draw, dtype=torch.float64)
    out = model(x, torch.tensor([300.0, 700.0]).to(x), torch.tensor([[0], [2]])).sample
    return (out - x).square().mean()


PACKAGES = {"lm": (lm_network, lm_loss), "dit": (dit_network, dit_loss)}
# The image model's blocks start as the identity: two steps pass before a gradient comes to them.
STEPS = {"lm": 2, "dit": 4}


@pytest.fixture(scope="module", params=list(PACKAGES))
def trained(request):
    """Every network of a study at its start and after a few steps: parameters and losses."""
    package = request.param
    build, loss_of = PACKAGES[package]
    networks = {}
    for name, network in committed_study(package).networks.items():
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
        networks[name] = {"start": start, "losses": losses}
    return networks


def test_every_variant_trains(trained):
    for name, of in trained.items():
        assert all(torch.isfinite(torch.tensor(of["losses"]))), name
        assert of["losses"][-1] < of["losses"][0], name


def test_all_start_from_the_same_backbone(trained):
    plain = trained["none"]["start"]
    for name, of in trained.items():
        for key, value in plain.items() if "wide" not in name else ():
            assert torch.equal(of["start"][key], value), (name, key)
        own = {key for key in of["start"] if key not in plain}
        assert all("dynamics" in key or key.endswith("mlp.scale") for key in own), name
        assert bool(own) == (name.partition(",")[0] != "none"), name


# No difference is expected between these: the clip is far from any velocity of two steps.
SAME = [{"branch", "branch, no velocity clip"}]


def test_no_two_variants_are_the_same_network(trained):
    """After a few steps every one has a loss of its own, or what it changes does not act."""
    for one, other in itertools.combinations(trained, 2):
        equal = trained[one]["losses"] == trained[other]["losses"]
        assert equal == ({one, other} in SAME), (one, other)


def test_swaps_refuse_another_placement():
    model = lm_network(committed_study("lm").networks["branch"])
    with pytest.raises(ValueError, match="is for placement force, not branch"):
        LM_SWAPS["look-ahead"](model)
    with pytest.raises(ValueError, match="a layer has no dynamics_mlp: use placement force"):
        LM_SWAPS["plain-mlp"](model)
    with pytest.raises(ValueError, match="unknown swap 'nothing', choose from: leapfrog"):
        varied_dit("nothing")


WITHOUT_MEMORY = {"alpha": 0.0, "beta": 0.0, "gate": 1.0, "dt": 1.0, "velocity_max": None}


@pytest.mark.parametrize(
    ("package", "placement", "swap"),
    [
        ("lm", "force", "plain-attention"),
        ("lm", "force", "plain-mlp"),
        ("lm", "stream", "across-layers"),
        ("dit", "stream", "across-blocks"),
    ],
)
def test_without_spring_and_memory_the_network_is_the_plain_one(package, placement, swap):
    """With alpha = beta = 0 a force or a stream adds what the residual connection does."""
    build, loss_of = PACKAGES[package]
    plain = build(Network("none", {"model.dynamics_placement": "none"})).double().eval()
    fields = {"model.dynamics_placement": placement, "model.dynamics_adaptive": "lite"}
    fields |= {f"model.overrides.dynamics_{k}": v for k, v in WITHOUT_MEMORY.items()}
    varied = build(Network(placement, fields, swap)).double().eval()
    torch.testing.assert_close(loss_of(varied), loss_of(plain))


def test_force_mlp_of_the_packages_is_the_variant_that_found_it():
    """`force` with plain attention: the same network, one dynamics module a layer fewer."""
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
