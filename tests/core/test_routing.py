"""Routing by token id: tables, the plan of a batch, and the routed MLP on a CPU."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from inl_core import (
    TokenRoutedMLP,
    build_routing_table,
    make_routing_plan,
    ops,
    reference,
)
from support.tensors import randn64

D, INNER, EXPERTS = 12, 20, 4
IDS = torch.tensor([[3, 0, 3, 1, 0], [1, 3, 3, 0, 1]])
"""Expert of each token of two sequences; expert 2 has none."""


def weights(dtype: torch.dtype, width: int = D, inner: int = INNER) -> list[Tensor]:
    shapes = ((EXPERTS, inner, width), (EXPERTS, inner, width), (EXPERTS, width, inner))
    return [randn64(*s, seed=i).to(dtype) / s[-1] ** 0.5 for i, s in enumerate(shapes, start=1)]


def one_by_one(x: Tensor, ids: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Token-routed MLP without grouping: each token through the MLP of its expert."""
    rows = [
        F.linear(F.silu(F.linear(row, gate[e])) * F.linear(row, up[e]), down[e])
        for row, e in zip(x.reshape(-1, x.shape[-1]), ids.reshape(-1).tolist(), strict=True)
    ]
    return torch.stack(rows).reshape(x.shape)


def results(op: Callable[..., Tensor], *arguments: Tensor) -> list[Tensor]:
    """Output and gradients; `op` takes x, gate, up, down."""
    leaves = [argument.clone().requires_grad_() for argument in arguments]
    y = op(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, randn64(*y.shape, seed=9).to(y.dtype))]


# ------------------------------------------------------------------------------------------------
# Tables


def test_modulo_table() -> None:
    assert build_routing_table(7, 3).tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert build_routing_table(2, 5).tolist() == [0, 1]
    assert build_routing_table(7, 3).dtype == torch.int64


def test_balanced_table_gives_the_heaviest_id_to_the_lightest_expert() -> None:
    # 8 to expert 0, 7 and 6 to expert 1 (loads 8, 13), 5 and 4 to expert 0.
    table = build_routing_table(5, 2, "balanced", [4, 8, 5, 6, 7])
    assert table.tolist() == [0, 0, 0, 1, 1]


@pytest.mark.parametrize("experts", [2, 7, 16])
def test_balanced_table_is_balanced_where_modulo_is_not(experts: int) -> None:
    """Zipf's law, with all heavy ids on the same expert under modulo."""
    counts = torch.zeros(4000, dtype=torch.int64)
    counts[torch.arange(0, 4000, experts)[:200]] = 10_000 // torch.arange(10, 210)
    loads = {
        scheme: torch.zeros(experts).index_add_(0, table, counts.float())
        for scheme, table in (
            ("modulo", build_routing_table(4000, experts)),
            ("balanced", build_routing_table(4000, experts, "balanced", counts)),
        )
    }
    mean = counts.sum() / experts
    assert loads["modulo"].max() == counts.sum()
    assert loads["balanced"].max() < 1.02 * mean


def test_balanced_table_spreads_ids_that_never_occur() -> None:
    table = build_routing_table(1003, 4, "balanced", torch.tensor([5, 5, 5, 5, 4] + 998 * [0]))
    assert table.bincount(minlength=4).tolist() == [251, 251, 251, 250]


def test_an_id_too_heavy_for_any_expert_is_named() -> None:
    with pytest.warns(UserWarning, match=r"id 2 holds 60\.0% of the counts, more than 1/2"):
        build_routing_table(3, 2, "balanced", [2, 2, 6])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build_routing_table(3, 2, "balanced", [2, 2, 4])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 2), "vocab_size must be at least 1, got 0"),
        ((4, 0), "num_experts must be at least 1, got 0"),
        ((4, 2, "hash"), r"scheme must be one of .*, got 'hash'"),
        ((4, 2, "balanced"), "needs counts"),
        ((4, 2, "modulo", [1, 1, 1, 1]), "takes no counts"),
        ((4, 2, "balanced", [1, 2, 3]), r"shape \(4,\), got \(3,\)"),
        ((4, 2, "balanced", torch.ones(4, 1)), r"shape \(4,\), got \(4, 1\)"),
        ((3, 2, "balanced", [1, -2, 3]), "not negative, got -2 for id 1"),
        ((3, 2, "balanced", [1.0, 2.0, float("nan")]), "finite.*got nan for id 2"),
        ((3, 2, "balanced", [0, 0, 0]), "all zero"),
    ],
)
def test_table_errors_name_the_value(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_routing_table(*arguments)


# ------------------------------------------------------------------------------------------------
# The plan


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_plan_groups_tokens_in_their_order(dtype: torch.dtype) -> None:
    plan = make_routing_plan(IDS.to(dtype), EXPERTS)
    flat = IDS.reshape(-1)
    assert plan.order.tolist() == sorted(range(10), key=lambda t: int(flat[t]))  # stable
    assert plan.order[plan.inverse].tolist() == list(range(10))
    assert plan.offsets.tolist() == [3, 6, 6, 10]
    assert plan.offsets.dtype == torch.int32


def test_plan_of_no_tokens() -> None:
    plan = make_routing_plan(torch.empty(0, 5, dtype=torch.int64), 3)
    assert plan.order.shape == plan.inverse.shape == (0,)
    assert plan.offsets.tolist() == [0, 0, 0]


@pytest.mark.parametrize("wrong", [-1, 4])
def test_ids_outside_the_experts_are_rejected(wrong: int) -> None:
    """Their rows would belong to no expert and contain uninitialized memory."""
    ids = torch.tensor([0, wrong, 3])
    with pytest.raises(RuntimeError, match=r"must lie in \[0, 4\)"):
        make_routing_plan(ids, 4)
    torch.compiler.reset()
    compiled = torch.compile(make_routing_plan, fullgraph=True, backend="aot_eager")
    with pytest.raises(RuntimeError, match=r"must lie in \[0, 4\)"):
        compiled(ids, 4)


def test_plan_errors() -> None:
    with pytest.raises(ValueError, match=r"must be integers, got dtype torch\.float32"):
        make_routing_plan(torch.zeros(3), 4)
    with pytest.raises(ValueError, match="num_experts must be at least 1, got 0"):
        make_routing_plan(IDS, 0)


# ------------------------------------------------------------------------------------------------
# The operation


def test_definition_matches_token_by_token() -> None:
    plan = make_routing_plan(IDS, EXPERTS)
    arguments = [randn64(2, 5, D), *weights(torch.float64)]
    got = results(lambda x, *w: reference.routed_mlp(x, plan, *w), *arguments)
    want = results(lambda x, *w: one_by_one(x, IDS, *w), *arguments)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


# 12 and 20 are multiples of 16 bytes in fp32 only, 5 and 7 in no dtype.
@pytest.mark.parametrize(("width", "inner"), [(D, INNER), (16, 32), (5, 7), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_grouped_product_is_as_good_as_token_by_token(
    width: int, inner: int, dtype: torch.dtype
) -> None:
    plan = make_routing_plan(IDS, EXPERTS)
    arguments = [randn64(2, 5, width).to(dtype), *weights(dtype, width, inner)]
    exact = results(
        lambda x, *w: one_by_one(x, IDS, *w), *[argument.double() for argument in arguments]
    )
    eager = results(lambda x, *w: one_by_one(x, IDS, *w), *arguments)
    got = results(lambda x, *w: ops.routed_mlp(x, plan, *w), *arguments)
    for result, expected, truth in zip(got, eager, exact, strict=True):
        assert (result.dtype, result.shape) == (expected.dtype, expected.shape)
        slack = 2 * torch.finfo(dtype).eps * truth.norm()
        bound = 1.25 * (expected.double() - truth).norm() + slack
        assert (result.double() - truth).norm() <= bound


def test_fp64_and_functional_transforms_go_to_the_definition() -> None:
    plan = make_routing_plan(IDS, EXPERTS)
    x, *w = [randn64(2, 5, D), *weights(torch.float64)]
    assert torch.equal(ops.routed_mlp(x, plan, *w), reference.routed_mlp(x, plan, *w))
    x, *w = [t.float() for t in (x, *w)]
    loss = lambda x: ops.routed_mlp(x, plan, *w).square().sum()  # noqa: E731
    leaf = x.clone().requires_grad_()
    (want,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(x), want)
    with ops.use_backend("reference"):
        assert torch.equal(ops.routed_mlp(x, plan, *w), reference.routed_mlp(x, plan, *w))


def test_the_triton_backend_on_a_cpu_is_an_error() -> None:
    plan = make_routing_plan(IDS, EXPERTS)
    arguments = [t.float() for t in (randn64(2, 5, D), *weights(torch.float32))]
    with ops.use_backend("triton"), pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        ops.routed_mlp(arguments[0], plan, *arguments[1:])


def test_gradcheck() -> None:
    ids = torch.tensor([2, 0, 0])
    plan = make_routing_plan(ids, 3)
    leaves = [
        t.requires_grad_()
        for t in (
            randn64(3, 2),
            randn64(3, 3, 2, seed=1),
            randn64(3, 3, 2, seed=2),
            randn64(3, 2, 3),
        )
    ]
    assert torch.autograd.gradcheck(lambda x, *w: ops.routed_mlp(x, plan, *w), leaves)


def test_second_derivatives_of_the_grouped_product() -> None:
    plan = make_routing_plan(IDS, EXPERTS)
    both = []
    for dtype in (torch.float32, torch.float64):
        leaves = [t.requires_grad_() for t in (randn64(2, 5, D).to(dtype), *weights(dtype))]
        y = ops.routed_mlp(leaves[0], plan, *leaves[1:])
        first = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
        both.append([g.float() for g in second])
    torch.testing.assert_close(*both, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_nan_stays_with_its_token_and_its_expert(dtype: torch.dtype) -> None:
    plan = make_routing_plan(IDS, EXPERTS)
    x = randn64(2, 5, D).to(dtype)
    x[0, 3] = torch.nan  # of expert 1
    y, dx, *dw = results(lambda x, *w: ops.routed_mlp(x, plan, *w), x, *weights(dtype))
    assert torch.equal(y.isnan().any(-1), x.isnan().any(-1))
    assert torch.equal(dx.isnan().any(-1), x.isnan().any(-1))
    for gradient in dw:
        assert gradient.isnan().any((1, 2)).tolist() == [False, True, False, False]


def test_operation_errors_name_the_shapes() -> None:
    plan = make_routing_plan(IDS, EXPERTS)
    x, gate, up, down = [randn64(2, 5, D), *weights(torch.float64)]
    for arguments, message in (
        ((x[..., :3], plan, gate, up, down), r"agree in D, got shapes \(2, 5, 3\)"),
        ((x, plan, gate, up[:, 1:], down), r"up must have that shape.*got \(4, 19, 12\)"),
        ((x, plan, gate, up, down.mT), r"down \(4, 12, 20\), got .* \(4, 20, 12\)"),
        ((x, plan, gate[1:], up[1:], down[1:]), "for 4 experts, the weights for 3"),
        ((x[:1], plan, gate, up, down), r"for 10 tokens, x of shape \(1, 5, 12\) has 5"),
        ((x.float(), plan, gate, up, down), "one floating-point dtype, got torch.float32, torch"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.routed_mlp(*arguments)


# ------------------------------------------------------------------------------------------------
# Defects of the originals


def gradients_by_expert(op: Callable[..., Tensor]) -> list[list[bool]]:
    """For gate, up and down: which experts receive a gradient that is not zero."""
    leaves = [w.requires_grad_() for w in weights(torch.float32)]
    y = op(randn64(2, 5, D).float().requires_grad_(), *leaves)
    gradients = torch.autograd.grad(y.square().sum(), leaves, allow_unused=True)
    return [
        EXPERTS * [False] if g is None else g.abs().amax((1, 2)).gt(0).tolist() for g in gradients
    ]


def test_expert_weights_receive_gradients() -> None:
    """The originals launch a kernel outside autograd: their experts keep their first weights."""
    plan = make_routing_plan(IDS, EXPERTS)

    def outside_autograd(x: Tensor, *w: Tensor) -> Tensor:
        with torch.no_grad():
            routed = ops.routed_mlp(x, plan, *w)
        return x + routed

    used = [True, True, False, True]
    assert gradients_by_expert(lambda x, *w: ops.routed_mlp(x, plan, *w)) == 3 * [used]
    assert gradients_by_expert(outside_autograd) == 3 * [EXPERTS * [False]]


def products(op: Callable[[], Tensor]) -> int:
    """Floating-point operations of all matrix products in `op`."""

    def grouped(a: torch.Size, b: torch.Size, *_: Any, out_shape: torch.Size, **__: Any) -> int:
        return 2 * a[0] * a[1] * b[-1]

    counter = FlopCounterMode(
        display=False, custom_mapping={torch.ops.inl_core.grouped_product: grouped}
    )
    with counter:
        op()
    return counter.get_total_flops()


def test_only_the_expert_of_a_token_computes() -> None:
    """The originals run every expert on every token and mix the results with a mask."""
    plan = make_routing_plan(IDS, EXPERTS)
    x, gate, up, down = [randn64(10, D).float(), *(w.float() for w in weights(torch.float64))]

    def all_and_mask() -> Tensor:
        chosen = F.one_hot(IDS.reshape(-1), EXPERTS).T.unsqueeze(-1)
        inner = F.silu(x @ gate.mT) * (x @ up.mT)
        return (chosen * (inner @ down.mT)).sum(0)

    dense = 3 * 2 * 10 * D * INNER  # an MLP of one expert's width
    assert products(lambda: ops.routed_mlp(x, plan, gate, up, down)) == dense
    assert products(all_and_mask) == EXPERTS * dense
    torch.testing.assert_close(all_and_mask(), ops.routed_mlp(x, plan, gate, up, down))


def test_no_sort_and_no_accumulation_after_the_plan() -> None:
    """Three layers, forward and backward: one sort, rows only gathered, nothing scattered."""
    layers = nn.ModuleList(TokenRoutedMLP(D, INNER, EXPERTS) for _ in range(3))
    x = randn64(2, 5, D).float().requires_grad_()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        plan = make_routing_plan(IDS, EXPERTS)
        h = x
        for layer in layers:
            h = h + layer(h, plan)
        h.sum().backward()
    calls = {event.key: event.count for event in profile.key_averages()}
    assert calls["aten::sort"] == 1
    assert calls["aten::index_select"] == 3 * 4  # in and out, forward and backward
    forbidden = ("argsort", "topk", "bincount", "histc", "index_put", "index_add", "scatter_add")
    assert not [name for name in calls for word in forbidden if word in name]
