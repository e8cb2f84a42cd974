"""The backend "auto" on a device with kernels: eager and compiled, with gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from checks import DEVICE, gradients_of, leaves_of, outputs_of, randn
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func

from inl_core import make_routing_plan, ops, rotary_1d

IDS = torch.tensor([2, 0, 1, 0, 2, 1, 1, 0])


@pytest.fixture(autouse=True)
def kernels_on_every_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter the CPU has kernels."""
    if DEVICE == "cpu":
        monkeypatch.setattr(ops, "_has_kernels", lambda _: True)


def rotated(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor) -> tuple[Tensor, Tensor]:
    return ops.qk_norm_rope(q, k, q_weight, k_weight, *TABLES)


def routed(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return ops.routed_mlp(x, PLAN, gate, up, down)


TABLES, PLAN = rotary_1d(4, 8), make_routing_plan(IDS, 3)
CALLS: dict[str, tuple[Callable[..., Any], list[tuple[int, ...]]]] = {
    "rms_norm": (ops.rms_norm, [(2, 3, 8), (8,)]),
    "swiglu": (ops.swiglu, [(2, 3, 8), (2, 3, 8)]),
    "qk_norm_rope": (rotated, [(2, 4, 2, 8), (2, 4, 1, 8), (8,), (8,)]),
    "routed_mlp": (routed, [(8, 16), (3, 16, 16), (3, 16, 16), (3, 16, 16)]),
}
"""An operation of its tensors alone, and their shapes."""


@pytest.mark.parametrize("backend", ["auto", "triton", "reference"])
@pytest.mark.parametrize("name", CALLS)
def test_one_graph_forward_and_backward(name: str, backend: Any) -> None:
    operation, shapes = CALLS[name]
    graphs: list[str] = []

    def look(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        graphs.append(" ".join(str(node.target) for node in graph.graph.nodes))
        return make_boxed_func(graph.forward)

    torch.compiler.reset()
    compiled = torch.compile(
        operation, fullgraph=True, backend=aot_autograd(fw_compiler=look, bw_compiler=look)
    )
    results = []
    for function in (operation, compiled):
        leaves = leaves_of([randn(*shape, seed=i) for i, shape in enumerate(shapes)])
        with ops.use_backend(backend):
            outputs = outputs_of(function, leaves, {})
        if function is operation and name != "routed_mlp":
            by_kernel = "inl_core" in type(outputs[0].grad_fn).__name__
            assert by_kernel == (backend != "reference")
        downs = [randn(*y.shape, seed=9) for y in outputs]
        results.append(outputs + gradients_of(outputs, leaves, downs))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    fused = backend == "auto" and ops.AUTO[name][1] == "reference"
    assert len(graphs) == 2
    assert [f"inl_core.{name}" in g for g in graphs] == [backend != "reference" and not fused] * 2
