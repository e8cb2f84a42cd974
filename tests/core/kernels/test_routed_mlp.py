"""routed_mlp in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from checks import (
    assert_as_good_as_eager,
    assert_empty_batch_works,
    assert_registered,
    assert_same_under_compile,
    gradients_of,
    leaves_of,
    randn,
)
from torch import Tensor
from torch.nn import functional as F

from inl_core import RoutingPlan, make_routing_plan, ops, reference
from inl_core.kernels.routed_mlp import routed_mlp, routed_mlp_bwd, routed_mlp_fwd

BF16, FP32 = torch.bfloat16, torch.float32
Mlp = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def expert_ids(tokens: int, experts: int) -> Tensor:
    """Uneven, and nothing for expert 1: more than a tile for the first, a token for others."""
    ids = torch.arange(tokens) * 7 % (2 * experts)
    return torch.where((ids >= experts) | (ids == 1), 0, ids)


def tensors(
    tokens: int, width: int, inner: int, experts: int, dtype: torch.dtype = FP32
) -> list[Tensor]:
    shapes = ((experts, inner, width), (experts, inner, width), (experts, width, inner))
    weights = [(randn(*s, seed=i) / s[-1] ** 0.5).to(dtype) for i, s in enumerate(shapes, start=1)]
    return [randn(tokens, width, dtype=dtype), *weights]


def ours(plan: RoutingPlan) -> Mlp:
    return lambda x, gate, up, down: routed_mlp(x, plan, gate, up, down)


def expert_by_expert(ids: Tensor) -> Mlp:
    """What one writes without a kernel: a mask an expert, products in the dtype of x."""

    def mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for e in range(gate.shape[0]):
            mine = x[ids == e]
            inner = reference.swiglu(F.linear(mine, gate[e]), F.linear(mine, up[e]))
            y[ids == e] = F.linear(inner, down[e])
        return y

    return mlp


@pytest.mark.parametrize("dtype", [FP32, BF16, torch.float16])
@pytest.mark.parametrize(("tokens", "width", "inner", "experts"), [(41, 21, 35, 3), (5, 1, 1, 6)])
def test_routed_mlp(tokens: int, width: int, inner: int, experts: int, dtype: torch.dtype) -> None:
    ids = expert_ids(tokens, experts)
    plan = make_routing_plan(ids, experts)
    arguments = tensors(tokens, width, inner, experts, dtype)
    # g, u, a gradient of these and the result of them are each stored in the dtype of x.
    assert_as_good_as_eager(ours(plan), *arguments, definition=expert_by_expert(ids), stores=4)


def test_all_tokens_on_one_expert() -> None:
    ids = torch.full((20,), 4)
    plan = make_routing_plan(ids, 5)
    arguments = tensors(20, 8, 8, 5)
    assert_as_good_as_eager(ours(plan), *arguments, definition=expert_by_expert(ids))
    leaves = leaves_of(arguments)
    y = ours(plan)(*leaves)
    for gradient in gradients_of([y], leaves, [torch.ones_like(y)])[1:]:
        assert gradient.abs().amax((1, 2)).gt(0).tolist() == [False] * 4 + [True]


def test_strides_and_leading_dimensions() -> None:
    ids = expert_ids(12, 3)
    plan = make_routing_plan(ids.reshape(3, 4), 3)
    x, gate, up, down = tensors(12, 10, 9, 3)
    half = torch.cat([x, x], 1)[:, 10:]  # rows at a stride of their own
    turned = down.mT.contiguous().mT
    definition = expert_by_expert(ids)
    assert_as_good_as_eager(ours(plan), half, gate, up, turned, definition=definition)
    y = ours(plan)(x.reshape(3, 4, 10), gate, up, down)
    assert torch.equal(y.reshape(12, 10), ours(plan)(x, gate, up, down))
    leaf = x.clone().requires_grad_()
    ours(plan)(leaf, gate, up, down).sum().backward()  # the cotangent of a sum has strides 0
    want = x.clone().requires_grad_()
    expert_by_expert(ids)(want, gate, up, down).sum().backward()
    torch.testing.assert_close(leaf.grad, want.grad)


def test_empty_batch() -> None:
    plan = make_routing_plan(torch.empty(0, dtype=torch.int64), 3)
    definition = lambda *arguments: reference.routed_mlp(arguments[0], plan, *arguments[1:])  # noqa: E731
    assert_empty_batch_works(ours(plan), *tensors(0, 8, 8, 3), definition=definition)


def test_nan_stays_with_its_token_and_its_expert() -> None:
    ids = expert_ids(20, 3)
    plan = make_routing_plan(ids, 3)
    arguments = tensors(20, 8, 8, 3)
    spot = int((ids == 2).nonzero()[0])
    arguments[0][spot, 3] = torch.nan
    leaves = leaves_of(arguments)
    y = ours(plan)(*leaves)
    dx, *dw = gradients_of([y], leaves, [torch.ones_like(y)])
    for rows in (y, dx):
        assert rows.isnan().any(1).nonzero().flatten().tolist() == [spot]
    for gradient in dw:
        assert gradient.isnan().any(2).any(1).tolist() == [False, False, True]


def test_only_needed_results_are_computed_and_saved() -> None:
    """Frozen experts get no gradient, a first layer's input none, and inference keeps nothing."""
    plan = make_routing_plan(expert_ids(20, 3), 3)
    arguments = tensors(20, 8, 8, 3)
    everything = leaves_of(arguments)
    y = ours(plan)(*everything)
    want = gradients_of([y], everything, [torch.ones_like(y)])
    for wanted in ([0], [1, 2, 3], [3]):
        leaves = [a.clone().requires_grad_(i in wanted) for i, a in enumerate(arguments)]
        ours(plan)(*leaves).sum().backward()
        for i, leaf in enumerate(leaves):
            assert (leaf.grad is not None) == (i in wanted)
            if leaf.grad is not None:
                assert torch.equal(leaf.grad, want[i])
    _, gated, upped = routed_mlp_fwd(arguments[0], plan.order, plan.offsets, *arguments[1:], False)
    assert gated.numel() == upped.numel() == 0


def test_through_ops() -> None:
    plan = make_routing_plan(expert_ids(20, 3), 3)
    x, *weights = tensors(20, 8, 8, 3)
    with ops.use_backend("triton"):
        got = ops.routed_mlp(x, plan, *weights)
        with torch.autocast(x.device.type, BF16):
            low = ops.routed_mlp(x, plan, *weights)
    assert torch.equal(got, routed_mlp(x, plan, *weights))
    assert torch.equal(low, routed_mlp(x.to(BF16), plan, *(w.to(BF16) for w in weights)))


def test_registration_and_compile() -> None:
    plan = make_routing_plan(expert_ids(20, 3), 3)
    arguments = tensors(20, 8, 8, 3)
    leaves = [a.clone().requires_grad_() for a in arguments]
    assert_registered(routed_mlp_fwd, leaves[0], plan.order, plan.offsets, *leaves[1:], True)
    kept = routed_mlp_fwd(arguments[0], plan.order, plan.offsets, *arguments[1:], True)[1:]
    for need in ((True, True), (False, False)):
        assert_registered(
            routed_mlp_bwd, randn(20, 8), arguments[0], plan.order, plan.offsets, *arguments[1:],
            *kept, *need,
        )  # fmt: skip
    assert_same_under_compile(ours(plan), *arguments)


def test_errors_name_the_value() -> None:
    plan = make_routing_plan(expert_ids(20, 3), 3)
    x, *weights = tensors(20, 8, 8, 3)
    with pytest.raises(ValueError, match="for 20 tokens, x of shape"):
        routed_mlp(x[:5], plan, *weights)
    with pytest.raises(ValueError, match=r"one floating-point dtype, got torch\.bfloat16"):
        routed_mlp(x.to(BF16), plan, *weights)
    with pytest.raises(ValueError, match=r"routed_mlp takes .* got torch\.float64"):
        routed_mlp(x.double(), plan, *(w.double() for w in weights))
