"""TokenRoutedMLP in a model: initial values, gradients, compiler, autocast."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from inl_core import TokenRoutedMLP, build_routing_table, make_routing_plan

IDS = torch.tensor([[3, 0, 3, 1, 0], [1, 3, 3, 0, 1]])


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_output_is_the_sum_of_expert_and_shared_expert() -> None:
    mlp = TokenRoutedMLP(12, 20, 4, shared_intermediate_size=8).double()
    x = randn(2, 5, 12, dtype=torch.float64)
    y = mlp(x, make_routing_plan(IDS, 4))
    for b, n in ((0, 0), (1, 4)):
        row, e = x[b, n], int(IDS[b, n])
        routed = mlp.down[e] @ (F.silu(mlp.gate[e] @ row) * (mlp.up[e] @ row))
        shared = mlp.shared_down @ (F.silu(mlp.shared_gate @ row) * (mlp.shared_up @ row))
        torch.testing.assert_close(y[b, n], routed + shared, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("shared", "names", "active"), [(None, 6, 1440), (0, 3, 720), (8, 6, 1008)]
)
def test_sizes(shared: int | None, names: int, active: int) -> None:
    mlp = TokenRoutedMLP(12, 20, 4, shared)
    assert len(list(mlp.parameters())) == names
    assert mlp.active_parameters == active
    assert sum(p.numel() for p in mlp.parameters()) == active + 3 * 3 * 12 * 20


def test_every_parameter_of_a_used_expert_has_a_gradient() -> None:
    mlp = TokenRoutedMLP(12, 20, 4)
    mlp(randn(2, 5, 12), make_routing_plan(IDS, 4)).square().mean().backward()
    for name, parameter in mlp.named_parameters():
        assert parameter.grad is not None, name
        if parameter.ndim == 3:
            used = parameter.grad.abs().amax((1, 2)) > 0
            assert used.tolist() == [True, True, False, True], name
        else:
            assert parameter.grad.abs().max() > 0, name


def test_no_tokens() -> None:
    mlp = TokenRoutedMLP(12, 20, 4)
    x = randn(0, 5, 12).requires_grad_()
    y = mlp(x, make_routing_plan(IDS[:0], 4))
    y.sum().backward()
    assert y.shape == x.shape
    assert all(p.grad is not None and p.grad.eq(0).all() for p in mlp.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [0, 1, 10])
def test_output_is_the_same_without_gradients(tokens: int, dtype: torch.dtype) -> None:
    mlp = TokenRoutedMLP(12, 20, 4).to(dtype)
    x, plan = randn(tokens, 12).to(dtype), make_routing_plan(IDS.reshape(-1)[:tokens], 4)
    compiled = torch.compile(mlp, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        found, traced = mlp(x, plan), compiled(x, plan)
    torch.testing.assert_close(
        found, mlp(x, plan), rtol=2e-2 if dtype.itemsize < 4 else 1e-5, atol=1e-6
    )
    torch.testing.assert_close(traced, found)


def test_initial_range_is_that_of_a_linear_layer_of_one_expert() -> None:
    """The fan-in is D or I, not that of the stack, and a parent's init leaves it alone."""
    torch.manual_seed(0)
    mlp = TokenRoutedMLP(64, 100, 8)
    for name, parameter in mlp.named_parameters():
        bound = parameter.shape[-1] ** -0.5
        assert bound * 0.99 < parameter.abs().max() <= bound, name
    model = nn.Sequential(nn.Linear(4, 4), mlp)
    before = {name: value.clone() for name, value in mlp.state_dict().items()}

    def parent_init(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.weight)

    model.apply(parent_init)
    assert model[0].weight.eq(0).all()
    assert all(torch.equal(before[name], value) for name, value in mlp.state_dict().items())


def test_errors_name_the_numbers() -> None:
    for arguments, message in (
        ((0, 20, 4), "hidden_size must be at least 1, got 0"),
        ((12, 0, 4), "intermediate_size must be at least 1, got 0"),
        ((12, 20, 0), "num_experts must be at least 1, got 0"),
        ((12, 20, 4, -1), "shared_intermediate_size must be at least 0, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            TokenRoutedMLP(*arguments)
    mlp = TokenRoutedMLP(12, 20, 4)
    with pytest.raises(ValueError, match=r"\(2, 5, 11\), expected \(\.\.\., 12\)"):
        mlp(randn(2, 5, 11), make_routing_plan(IDS, 4))
    with pytest.raises(ValueError, match="for 5 experts, the weights for 4"):
        mlp(randn(2, 5, 12), make_routing_plan(IDS, 5))


def test_autocast_casts_as_linear_does() -> None:
    mlp, plan = TokenRoutedMLP(16, 32, 4), make_routing_plan(IDS, 4)
    x = randn(2, 5, 16).requires_grad_()
    exact = mlp(x, plan)
    with torch.autocast("cpu", torch.bfloat16):
        y = mlp(x, plan)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), exact, rtol=0.05, atol=0.02)
    y.sum().backward()
    assert {p.grad.dtype for p in mlp.parameters() if p.grad is not None} == {torch.float32}


class TwoLayers(nn.Module):
    """One plan, two layers, inside the compiled region."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", build_routing_table(40, 4))
        self.layers = nn.ModuleList(TokenRoutedMLP(16, 32, 4) for _ in range(2))

    def forward(self, x: Tensor, token_ids: Tensor) -> Tensor:
        plan = make_routing_plan(self.table[token_ids], 4)
        for layer in self.layers:
            x = x + layer(x, plan)
        return x


def losses_and_gradients(model: nn.Module, call: Any, dtype: torch.dtype) -> list[Tensor]:
    token_ids = torch.arange(10).reshape(2, 5) * 7 % 40
    x = randn(2, 5, 16, dtype=dtype).requires_grad_()
    y = call(x, token_ids)
    down = randn(2, 5, 16, seed=1, dtype=dtype)
    return [y, *torch.autograd.grad(y, [x, *model.parameters()], down)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_one_graph_forward_and_backward(dtype: torch.dtype) -> None:
    torch.compiler.reset()
    model = TwoLayers().to(dtype)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    want = losses_and_gradients(model, model, dtype)
    got = losses_and_gradients(model, compiled, dtype)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inductor_compiles_it(dtype: torch.dtype) -> None:
    torch.compiler.reset()
    model = TwoLayers().to(dtype)
    want = losses_and_gradients(model, model, dtype)
    got = losses_and_gradients(model, torch.compile(model, fullgraph=True), dtype)
    for a, b in zip(got, want, strict=True):
        error = (a - b).double().norm()
        assert error <= 4 * torch.finfo(dtype).eps * b.double().norm()
