"""The dynamics modules: what a step computes, bounds and ways back, dtypes, compiler."""

from __future__ import annotations

import copy
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from inl_core import (
    INLDynamics,
    INLDynamicsLite,
    apply_bounds,
    branch_epilogue,
    collect_dynamics_stats,
    defer_bounds,
    ops,
)
from support.tensors import coefficients, randn, scramble

MODES = ("token", "channel", "layer")


# ------------------------------------------------------------------------------------------------
# What a step computes


@pytest.mark.parametrize("adaptive", MODES)
def test_forward_is_the_op_on_the_controllers_output(adaptive: str) -> None:
    module = INLDynamics(6, adaptive=adaptive, controller_hidden=5)  # type: ignore[arg-type]
    scramble(module)
    h, v, force = randn(2, 3, 6), randn(2, 3, 6, seed=1), randn(2, 3, 6, seed=2)
    if adaptive == "token":
        joined = torch.cat([module.weight_in_h, module.weight_in_v], dim=1)
        hidden = nn.functional.silu(torch.cat([h, v], -1) @ joined.T + module.bias_in)
        raw = (hidden @ module.weight_out.T + module.bias_out).chunk(3, -1)
    else:
        raw = (module.alpha_raw, module.beta_raw, module.gate_raw)
    want = ops.inl_step(
        h, v, *raw, module.mu, force,
        dt=0.1, beta_max=2.0, velocity_max=10.0, mu_min=0.0, mu_max=2.0,
    )  # fmt: skip
    torch.testing.assert_close(module(h, v, force), want)


def test_initial_dynamics_equal_lite() -> None:
    h, v = randn(2, 3, 6), randn(2, 3, 6, seed=1)
    want = INLDynamicsLite(6)(h, v)
    for adaptive in MODES:
        torch.testing.assert_close(INLDynamics(6, adaptive=adaptive)(h, v), want)


@pytest.mark.parametrize("adaptive", MODES)
def test_no_velocity_equals_zero_velocity(adaptive: str) -> None:
    module = INLDynamics(6, adaptive=adaptive)  # type: ignore[arg-type]
    scramble(module)
    h = randn(2, 3, 6)
    for a, b in zip(module(h), module(h, torch.zeros_like(h)), strict=True):
        assert torch.equal(a, b)


def test_no_velocity_skips_the_velocity_product() -> None:
    module = INLDynamics(6)
    scramble(module)
    with torch.no_grad():
        module.weight_in_v.fill_(torch.nan)
    h_next, v_next = module(randn(3, 6))
    assert h_next.isfinite().all()
    assert v_next.isfinite().all()
    h_next.sum().backward()
    # Zero, but present: DistributedDataParallel waits for a gradient of every parameter.
    assert module.weight_in_v.grad is not None
    assert not module.weight_in_v.grad.any()


@pytest.mark.parametrize("adaptive", ["token", "channel", "layer"])
@pytest.mark.parametrize("v_dtype", [None, torch.bfloat16, torch.float32])
def test_fp32_coefficients_take_states_of_another_dtype(adaptive, v_dtype) -> None:
    """As when the rest of a model is loaded in bf16 and its dynamics are kept in fp32."""
    module = INLDynamics(6, adaptive=adaptive)
    scramble(module)
    h = randn(2, 3, 6).bfloat16()
    v = None if v_dtype is None else randn(2, 3, 6).to(v_dtype)
    h_next, v_next = module(h, v)
    assert (h_next.dtype, v_next.dtype) == (torch.bfloat16, v_dtype or torch.bfloat16)
    for got, want in zip(
        (h_next, v_next), module(h.float(), None if v is None else v.float()), strict=True
    ):
        torch.testing.assert_close(got.float(), want, rtol=1e-2, atol=1e-2)
    module.bfloat16()(h.float(), v)  # and a wider state into narrow coefficients


def test_lite_with_neutral_coefficients_is_the_plain_residual() -> None:
    module = INLDynamicsLite(
        8, alpha=0.0, beta=0.0, gate=1.0, dt=1.0, velocity_max=None, mu_min=None, mu_max=None
    )
    with torch.no_grad():
        module.mu.copy_(randn(8, seed=9))
    h, v, force = randn(4, 8), randn(4, 8, seed=1), 100.0 * randn(4, 8, seed=2)
    assert torch.equal(module(h, v, force)[0], h + force)
    assert torch.equal(module(h, None, force)[0], h + force)


def test_position_uses_the_clipped_velocity() -> None:
    h, v = torch.zeros(1, 2), torch.full((1, 2), 1e4)
    for module in (INLDynamics(2), INLDynamicsLite(2)):
        h_next, v_next = module(h, v)
        assert v_next.eq(10.0).all()
        torch.testing.assert_close(h_next, torch.full((1, 2), 0.5))


def test_beta_cannot_exceed_its_bound() -> None:
    module = INLDynamics(3, adaptive="token")
    with torch.no_grad():
        module.bias_out[3:6] = 1e6
    assert coefficients(module, randn(4, 3), None)[1].eq(2.0).all()
    _, v_next = module(torch.full((1, 3), 3.0))
    assert v_next.eq(-6.0).all()


def test_bounds_switched_off() -> None:
    module = INLDynamics(
        3, adaptive="channel", beta_max=None, velocity_max=None, mu_min=None, mu_max=None
    )
    with torch.no_grad():
        module.beta_raw.fill_(50.0)
        module.mu.fill_(-7.0)
    _, v_next = module(torch.ones(1, 3))
    assert v_next.eq(-400.0).all()


def test_modules_call_the_dispatched_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("inl_controlled_step", "inl_step", "inl_update"):
        original = getattr(ops, name)

        def spy(*args: object, _name: str = name, _original=original, **kwargs: object) -> object:
            calls.append(_name)
            return _original(*args, **kwargs)

        monkeypatch.setattr(ops, name, spy)
    INLDynamics(4)(randn(2, 4))
    INLDynamics(4, adaptive="channel")(randn(2, 4))
    INLDynamicsLite(4)(randn(2, 4))
    assert calls == ["inl_controlled_step", "inl_step", "inl_step", "inl_update"]


# ------------------------------------------------------------------------------------------------
# No parameter is trapped


@pytest.mark.parametrize("adaptive", MODES)
def test_beta_beyond_its_bound_comes_back(adaptive: str) -> None:
    module = INLDynamics(4, adaptive=adaptive, velocity_max=None)  # type: ignore[arg-type]
    parameter = module.bias_out if adaptive == "token" else module.beta_raw
    rows = slice(4, 8) if adaptive == "token" else slice(None)
    with torch.no_grad():
        parameter[rows] = 3.0  # softplus(3) = 3.05, beyond 2
    optimizer = torch.optim.SGD([parameter], lr=0.5)
    h = torch.ones(2, 4)
    for _ in range(40):
        optimizer.zero_grad()
        _, v_next = module(h)  # v' = -beta here; the loss wants beta = 0.5
        (v_next + 0.5).square().mean().backward()
        optimizer.step()
    beta = coefficients(module, h, None)[1]
    assert beta.max().item() < 1.9


@pytest.mark.parametrize(("start", "target"), [(-1.0, 1.0), (3.0, 1.0)])
@pytest.mark.parametrize("lite", [True, False])
def test_mu_beyond_its_bound_comes_back(lite: bool, start: float, target: float) -> None:
    if lite:
        module: INLDynamics | INLDynamicsLite = INLDynamicsLite(4, beta=1.0)
    else:
        module = INLDynamics(4, init_beta=1.0)
    with torch.no_grad():
        module.mu.fill_(start)
    optimizer = torch.optim.SGD([module.mu], lr=0.3)
    for _ in range(40):
        optimizer.zero_grad()
        _, v_next = module(torch.zeros(2, 4))  # v' = mu, clamped
        (v_next - target).square().mean().backward()
        optimizer.step()
    assert (module.mu - target).abs().max().item() < 0.2


def test_mu_is_not_pushed_further_out() -> None:
    module = INLDynamicsLite(2, beta=1.0)
    with torch.no_grad():
        module.mu.copy_(torch.tensor([-1.0, 3.0]))
    _, v_next = module(torch.zeros(1, 2))
    # Descent on this loss would move mu[0] down and mu[1] up: away from the bounds.
    (v_next * torch.tensor([1.0, -1.0])).sum().backward()
    assert module.mu.grad is not None
    assert module.mu.grad.tolist() == [0.0, 0.0]


# ------------------------------------------------------------------------------------------------
# Dtypes, shapes, gradients, compiler, transforms


@pytest.mark.parametrize("adaptive", MODES)
def test_gradcheck_in_fp64(adaptive: str) -> None:
    module = INLDynamics(3, adaptive=adaptive, controller_hidden=4).double()  # type: ignore[arg-type]
    scramble(module)
    with torch.no_grad():
        module.mu.copy_(torch.tensor([0.4, 1.0, 1.6]))
    names = [name for name, _ in module.named_parameters()]
    values = [p.detach().clone().requires_grad_() for p in module.parameters()]
    state = [randn(2, 3, seed=s, dtype=torch.float64).requires_grad_() for s in (1, 2, 3)]

    def step(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        parameters = dict(zip(names, tensors[3:], strict=True))
        return torch.func.functional_call(module, parameters, tensors[:3])

    assert torch.autograd.gradcheck(step, (*state, *values))


def test_every_parameter_gets_a_gradient() -> None:
    for adaptive in MODES:
        module = INLDynamics(4, adaptive=adaptive)
        scramble(module)
        h_next, v_next = module(randn(5, 4), randn(5, 4, seed=1))
        (h_next.square().sum() + v_next.square().sum()).backward()
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("v_dtype", [torch.float32, torch.bfloat16, None])
@pytest.mark.parametrize("h_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adaptive", MODES)
def test_autocast(adaptive: str, h_dtype: torch.dtype, v_dtype: torch.dtype | None) -> None:
    module = INLDynamics(8, adaptive=adaptive)  # type: ignore[arg-type]
    scramble(module)
    h = randn(3, 8, dtype=h_dtype).requires_grad_()
    v = None if v_dtype is None else randn(3, 8, seed=1, dtype=v_dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        h_next, v_next = module(h, v)
    assert h_next.dtype == h_dtype
    assert v_next.dtype == (v_dtype or h_dtype)
    (h_next.float().sum() + v_next.float().sum()).backward()
    assert module.mu.grad is not None
    assert module.mu.grad.dtype == torch.float32
    want = module(h.detach().float(), None if v is None else v.float())
    torch.testing.assert_close(h_next.float(), want[0], rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(v_next.float(), want[1], rtol=2e-2, atol=2e-2)


def test_bf16_module() -> None:
    module = INLDynamics(8).bfloat16()
    h_next, v_next = module(randn(3, 8, dtype=torch.bfloat16))
    assert h_next.dtype == v_next.dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(0, 4), (2, 0, 4), (4,), (2, 3, 5, 4)])
def test_shapes(shape: tuple[int, ...]) -> None:
    for module in (INLDynamics(4), INLDynamicsLite(4)):
        with collect_dynamics_stats(module):
            h_next, v_next = module(torch.zeros(shape), torch.zeros(shape))
        assert h_next.shape == v_next.shape == shape
        (h_next.sum() + v_next.sum()).backward()


def test_one_channel_and_non_contiguous() -> None:
    assert INLDynamics(1)(randn(3, 1))[0].shape == (3, 1)
    module = INLDynamics(4)
    scramble(module)
    h = randn(3, 5, 4).transpose(0, 1)
    torch.testing.assert_close(module(h), module(h.contiguous()))


def test_nan_in_nan_out() -> None:
    for module in (INLDynamics(4, adaptive="channel"), INLDynamicsLite(4)):
        h = torch.ones(2, 4)
        h[0, 1] = torch.nan
        for out in module(h):
            assert out.isnan().sum() == 1
            assert out[0, 1].isnan()


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_module(backend: str) -> None:
    torch.compiler.reset()
    module = INLDynamics(6, controller_hidden=5)
    scramble(module)
    twin = copy.deepcopy(module)
    compiled = torch.compile(twin, fullgraph=True, backend=backend)
    for v in (None, randn(4, 6, seed=1)):
        h = randn(4, 6)
        want, got = module(h, v), compiled(h, v)
        torch.testing.assert_close(got, want)
        sum(t.square().sum() for t in want).backward()
        sum(t.square().sum() for t in got).backward()
    for a, b in zip(module.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_func_grad_per_sample() -> None:
    module = INLDynamics(4)
    scramble(module)
    with torch.no_grad():
        module.mu.fill_(0.5)  # outside its bounds per-sample gradients need not add up
    parameters = {name: p.detach() for name, p in module.named_parameters()}

    def loss(parameters: dict[str, Tensor], h: Tensor) -> Tensor:
        return torch.func.functional_call(module, parameters, (h,))[0].square().sum()

    h = randn(3, 5, 4)
    grads = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, h)
    module.zero_grad()
    module(h)[0].square().sum().backward()
    torch.testing.assert_close(grads["mu"].sum(0), module.mu.grad)
    torch.testing.assert_close(grads["weight_out"].sum(0), module.weight_out.grad)


# ------------------------------------------------------------------------------------------------
# Over many steps, and the package itself


def test_default_layer_settles_at_its_equilibrium() -> None:
    module = INLDynamicsLite(3)
    with torch.no_grad():
        module.mu.copy_(torch.tensor([0.5, 1.0, 2.0]))
    h, v = torch.full((1, 3), 5.0), None
    distances = []
    for _ in range(300):
        h, v = module(h, v)
        distances.append((h - module.mu).abs().max().item())
    assert distances[-1] < 1e-4
    assert any(b > a for a, b in pairwise(distances))  # it overshoots on its way


def test_import_needs_torch_only() -> None:
    heavy = ("diffusers", "transformers", "torchvision", "numpy.testing", "triton.language")
    code = (
        "import sys, torch; before = set(sys.modules); import inl_core; "
        f"print([m for m in {heavy!r} if m in sys.modules and m not in before])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


# ------------------------------------------------------------------------------------------------
# Gradients that come in parts


def bounded_model(kind: str) -> nn.Module:
    """A network in fp64 with mu and beta at all sides of their bounds."""
    torch.manual_seed(0)
    if kind == "lite":
        dynamics: INLDynamics | INLDynamicsLite = INLDynamicsLite(40)
    else:
        dynamics = INLDynamics(40, adaptive=kind, controller_hidden=5)  # type: ignore[arg-type]
        scramble(dynamics)
        if kind != "token":
            nn.init.uniform_(dynamics.beta_raw, 1.0, 3.0)  # the bound is at softplus(1.85)
            if kind == "layer":
                nn.init.constant_(dynamics.beta_raw, 2.5)
    nn.init.uniform_(dynamics.mu, -2.0, 4.0)
    return dynamics.double()


def parts_of(model: nn.Module, x: Tensor, goal: Tensor, parts: int) -> list[Tensor]:
    """Gradients of a mean over samples, summed over parts of the batch."""
    model.zero_grad()
    for h, wanted in zip(x.chunk(parts), goal.chunk(parts), strict=True):
        h_next, v_next = model(h)
        loss = (h_next - wanted).square().mean() + v_next.square().mean()
        (loss / parts).backward()
    apply_bounds(model)
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("kind", [*MODES, "lite"])
def test_bounds_act_once_on_gradients_that_come_in_parts(kind: str) -> None:
    model = bounded_model(kind)
    x, goal = randn(8, 3, 40).double(), randn(8, 3, 40, seed=1).double()
    whole = parts_of(model, x, goal, 1)
    split = parts_of(model, x, goal, 8)
    assert any(not torch.allclose(a, b, rtol=1e-9) for a, b in zip(whole, split, strict=True))
    defer_bounds(model)
    for parts in (1, 2, 8):
        found = parts_of(model, x, goal, parts)
        torch.testing.assert_close(found, whole, rtol=1e-11, atol=1e-13)
    defer_bounds(model, False)
    torch.testing.assert_close(parts_of(model, x, goal, 1), whole, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", [*MODES, "lite"])
def test_deferred_bounds_leave_the_values_as_they_are(kind: str, dtype: torch.dtype) -> None:
    model, x = bounded_model(kind).to(dtype), randn(8, 3, 40).to(dtype)
    plain = model(x)
    defer_bounds(model)
    eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    rounding = 64 * eps if dtype != torch.bfloat16 else 1e-2
    torch.testing.assert_close(model(x), plain, rtol=rounding, atol=rounding)
    if kind in ("token", "lite"):  # mu alone is exact
        assert all(a.equal(b) for a, b in zip(model(x), plain, strict=True))


def test_deferred_bounds_hold_in_the_fused_epilogue() -> None:
    model = bounded_model("channel")
    x, residual = randn(8, 3, 40).double(), randn(8, 3, 40, seed=1).double()

    def gradients(parts: int) -> list[Tensor]:
        model.zero_grad()
        for h, r in zip(x.chunk(parts), residual.chunk(parts), strict=True):
            normed, total, v_next = branch_epilogue(model, h, None, r)  # type: ignore[arg-type]
            loss = (normed.square() * torch.arange(40) + total + v_next).mean()
            (loss / parts).backward()
        apply_bounds(model)
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    whole = gradients(1)
    defer_bounds(model)
    torch.testing.assert_close(gradients(4), whole, rtol=1e-11, atol=1e-13)


def test_deferred_bounds_compile() -> None:
    model = bounded_model("channel")
    defer_bounds(model)
    x = randn(8, 3, 40).double()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), model(x))
