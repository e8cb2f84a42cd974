"""The three figures of a certificate against hand-made models whose answers are known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from inl_core import (
    INLDynamics,
    INLDynamicsLite,
    branch_epilogue,
    certify,
    dynamics_modules,
    transition_matrix,
)


class Stack(nn.Module):
    """Dynamics one after another, as a stream without sub-layers."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, h: Tensor, v: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        for layer in self.layers:
            h, v = layer(h, v)
        return h, v


def lite(beta: float, gate: float, **settings: float | None) -> INLDynamicsLite:
    return INLDynamicsLite(4, 0.9, beta, gate, 0.1, **settings)


def inputs() -> Tensor:
    return torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_stable_points_with_a_growing_path() -> None:
    """The counterexample of DESIGN 3.3: each point is stable and sixteen steps grow 4.5-fold."""
    layers = [lite(0.01, 1.0) for _ in range(8)] + [lite(2.0, 0.01) for _ in range(8)]
    model = Stack(*layers).double()
    report = certify(model, (inputs(),))
    assert report.frozen_stable
    assert all(layer.always_stable for layer in report.layers)
    first, second = transition_matrix(0.9, 0.01, 1.0, 0.1), transition_matrix(0.9, 2.0, 0.01, 0.1)
    product = torch.linalg.matrix_power(second, 8) @ torch.linalg.matrix_power(first, 8)
    wanted = float(torch.linalg.matrix_norm(product, ord=2))
    assert report.frozen_product == pytest.approx(wanted, rel=1e-12)
    assert report.frozen_product > 4.5
    # Nothing else happens between these layers, and no token is clipped.
    assert report.response == pytest.approx(wanted, rel=1e-3)


def test_reach_is_the_sum_of_the_clipped_moves_and_is_never_exceeded() -> None:
    model = Stack(lite(2.0, 0.5, velocity_max=3.0), lite(2.0, 1.0, velocity_max=1.0)).double()
    report = certify(model)
    assert report.reach == pytest.approx(0.1 * (0.5 * 3.0 + 1.0 * 1.0))
    h = inputs() * 1e3
    moved = (model(h)[0] - h).detach().abs().max()
    assert float(moved) == pytest.approx(report.reach, rel=1e-9)
    assert certify(Stack(lite(2.0, 0.5, velocity_max=None))).reach == math.inf


def test_gain_of_a_layer_is_that_of_its_worst_token() -> None:
    model = Stack(lite(2.0, 0.5)).double()
    h = inputs()
    with torch.no_grad():
        h_next, v_next = model(h)
    ratio = (h_next.square() + v_next.square()).sum(-1) / h.square().sum(-1)
    (layer,) = certify(model, {"h": h}).layers
    assert layer.gain == pytest.approx(float(ratio.max().sqrt()), rel=1e-12)
    assert certify(model).layers[0].gain is None


@pytest.mark.parametrize("adaptive", [None, "token", "channel"])
def test_a_force_does_not_count_as_gain(adaptive: str | None) -> None:
    layer = INLDynamics(4, adaptive=adaptive) if adaptive else lite(2.0, 0.5)

    class Forced(Stack):
        def forward(self, h: Tensor, size: float) -> Tensor:
            return self.layers[0](h, None, force=size * torch.ones_like(h))[0]

    pushed, alone = (certify(Forced(layer).double(), (inputs(), size)) for size in (1e3, 0.0))
    assert pushed.layers[0].gain == alone.layers[0].gain
    assert pushed.layers[0].gain == certify(Stack(layer).double(), (inputs(),)).layers[0].gain


@pytest.mark.parametrize("adaptive", ["token", "channel", "layer"])
def test_learned_coefficients_are_read_where_the_model_uses_them(adaptive: str) -> None:
    torch.manual_seed(0)
    dynamics = INLDynamics(4, adaptive=adaptive, dt=0.5)
    model = Stack(dynamics).double()
    with torch.no_grad():
        for name, parameter in dynamics.named_parameters():
            if name.startswith(("weight", "alpha")):
                # Not so far that an inertia rounds to 1, which is marginal and no more stable.
                parameter.add_(0.5 * torch.randn_like(parameter))
    h = inputs()
    (layer,) = certify(model, (h,)).layers
    alpha, beta, gate = (
        x.expand(h.shape)
        for x in (
            dynamics._coefficients(h, None)[0].sigmoid(),
            nn.functional.softplus(dynamics._coefficients(h, None)[1]).clamp(max=2.0),
            dynamics._coefficients(h, None)[2].sigmoid(),
        )
    )
    matrix = transition_matrix(alpha, beta, gate, 0.5).detach()
    radius = torch.linalg.eigvals(matrix).abs().max()
    assert layer.spectral_radius == pytest.approx(float(radius), rel=1e-9)
    assert layer.stable_share == 1.0
    assert layer.points == {"token": h.numel(), "channel": 4, "layer": 1}[adaptive]


def test_unbounded_beta_is_not_always_stable_and_divergence_is_detected() -> None:
    dynamics = INLDynamics(4, adaptive="channel", dt=0.1, beta_max=None)
    assert not certify(Stack(dynamics)).layers[0].always_stable
    assert certify(Stack(dynamics)).frozen_stable
    with torch.no_grad():
        dynamics.beta_raw[0] = 80.0  # above 2 (1 + alpha) / (dt gate) = 76
    report = certify(Stack(dynamics))
    assert not report.frozen_stable
    assert report.layers[0].stable_share == 0.75
    assert report.layers[0].spectral_radius > 1.0
    assert "not all" in str(report)


def test_dynamics_inside_a_fused_epilogue_are_measured() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dynamics = INLDynamics(4, adaptive="channel")

        def forward(self, x: Tensor) -> Tensor:
            return branch_epilogue(self.dynamics, x, None, x)[0]

    model = Branch().double().train()
    assert certify(model, (inputs(),)).layers[0].gain is not None
    assert model.training
    assert not model.dynamics._collecting


def test_models_that_cannot_be_certified_are_rejected() -> None:
    with pytest.raises(ValueError, match="Linear has no INLDynamics"):
        certify(nn.Linear(2, 2))

    class Idle(Stack):
        def forward(self, h: Tensor) -> Tensor:
            return h

    with pytest.raises(ValueError, match=r"did not run layers\.0"):
        certify(Idle(lite(1.0, 0.5)), (inputs(),))


def test_the_table_names_every_layer() -> None:
    text = str(certify(Stack(lite(1.0, 0.5), lite(0.5, 0.5)).double(), (inputs(),)))
    assert "layers.0" in text
    assert "layers.1" in text
    assert "frozen points stable: all" in text


def jacobian_by_differences(model: nn.Module, first: nn.Module, last: nn.Module, run) -> Tensor:
    """d (h, v) returned by `last` / d (h, v) given to `first`, column by column."""
    moved: Tensor | None = None
    entry: list[Tensor] = []
    found: list[Tensor] = []

    def enter(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        given = dict(zip(("h", "v", "force"), args, strict=False)) | kwargs
        h, v = given["h"], given.get("v")
        entry[:] = [h, torch.zeros_like(h) if v is None else v]
        if moved is None:
            return args, kwargs
        h, v = (x + d.view_as(h) for x, d in zip(entry, moved.chunk(2), strict=True))
        return (), given | {"h": h, "v": v}

    def keep(outputs: tuple[Tensor, Tensor]) -> None:
        found[:] = outputs

    handles = [
        first.register_forward_pre_hook(enter, with_kwargs=True),
        last.register_forward_hook(
            lambda m, args, outputs: found.__setitem__(slice(None), outputs)
        ),
    ]
    step, columns = 1e-6, []
    with torch.no_grad():
        run()
        size = 2 * entry[0].numel()
        for index in range(size):
            ends = []
            for sign in (1.0, -1.0):
                moved = torch.zeros(size, dtype=torch.float64)
                moved[index] = sign * step
                run()
                ends.append(torch.cat([x.flatten() for x in found]))
            columns.append((ends[0] - ends[1]) / (2 * step))
    for handle in handles:
        handle.remove()
    return torch.stack(columns, dim=1)


@pytest.mark.parametrize("adaptive", ["channel", "token", "lite"])
@pytest.mark.parametrize("placement", ["stream", "branch", "force", "force_mlp"])
def test_the_response_is_the_jacobian_of_the_real_language_model(placement, adaptive) -> None:
    from complexity_lm import DeepConfig, DeepForCausalLM

    torch.manual_seed(0)
    config = DeepConfig(
        vocab_size=11, hidden_size=8, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, intermediate_size=12, dynamics_placement=placement,
        dynamics_adaptive=adaptive, dynamics_controller_hidden=4, initializer_range=0.4,
    )  # fmt: skip
    model = DeepForCausalLM(config).double().eval()
    inputs = {"input_ids": torch.tensor([[1, 5, 3]]), "use_cache": False}
    report = certify(model, inputs)
    first, last = model.model.layers[0].dynamics, model.model.layers[-1].dynamics
    if placement == "force":
        last = model.model.layers[-1].dynamics_mlp
    jacobian = jacobian_by_differences(model, first, last, lambda: model(**inputs))
    wanted = float(torch.linalg.matrix_norm(jacobian, ord=2))
    assert report.response == pytest.approx(wanted, rel=2e-3)
    # What is multiplied in the frozen product is not what the network iterates.
    assert report.frozen_product != pytest.approx(wanted, rel=2e-2)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("placement", ["branch", "force_mlp"])
def test_the_response_is_the_jacobian_of_the_real_image_model(placement) -> None:
    from complexity_dit.models.transformer import ComplexityDiTTransformer2DModel

    torch.manual_seed(0)
    model = ComplexityDiTTransformer2DModel(
        sample_size=4, in_channels=1, patch_size=2, hidden_size=8, num_layers=2,
        num_attention_heads=2, label_fields=["a"], num_classes=[2],
        dynamics_placement=placement,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():  # zero-initialised parts pass nothing on
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.double().eval()
    inputs = (torch.randn(1, 1, 4, 4).double(), torch.tensor([500.0]).double(), torch.tensor([[0]]))
    modules = list(dynamics_modules(model).values())
    jacobian = jacobian_by_differences(model, modules[0], modules[-1], lambda: model(*inputs))
    wanted = float(torch.linalg.matrix_norm(jacobian, ord=2))
    assert certify(model, inputs).response == pytest.approx(wanted, rel=2e-3)


def test_a_state_that_ends_responds_with_zero() -> None:
    class Cut(Stack):
        def forward(self, h: Tensor) -> Tensor:
            self.layers[0](h)
            return self.layers[1](torch.ones_like(h))[0]

    assert certify(Cut(lite(1.0, 0.5), lite(1.0, 0.5)).double(), (inputs(),)).response == 0.0
