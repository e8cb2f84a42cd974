"""Dispatch in inl_core.ops on a CPU, without the interpreter."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from inl_core import INLDynamics, ops, reference

BOUNDS: dict[str, Any] = {
    "dt": 0.1, "beta_max": 2.0, "velocity_max": 3.0, "mu_min": 0.0, "mu_max": 2.0,
}  # fmt: skip


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


CALLS: dict[str, tuple[Any, ...]] = {
    "inl_step": (*(randn(2, 3, 8, seed=i) for i in range(5)), randn(8, seed=5)),
    "inl_controlled_step": (
        *(randn(2, 3, 8, seed=i) for i in range(2)), randn(2, 3, 4, seed=2).bfloat16(),
        randn(24, 4, seed=3), randn(24, seed=4), randn(8, seed=5)
    ),
    "rms_norm": (randn(2, 3, 8), randn(8, seed=1)),
    "add_rms_norm": (randn(2, 3, 8), randn(2, 3, 8, seed=1), randn(8, seed=2)),
    "modulated_rms_norm": (randn(2, 3, 8), randn(2, 8, seed=1), randn(2, 8, seed=2)),
    "gated_residual": (randn(2, 3, 8), randn(2, 3, 8, seed=1), randn(2, 8, seed=2)),
    "gated_residual_norm": (
        randn(2, 3, 8), randn(2, 3, 8, seed=1), *(randn(2, 8, seed=i) for i in (2, 3, 4))
    ),
    "qk_norm_rope": (
        randn(2, 3, 2, 8), randn(2, 3, 1, 8, seed=1), randn(8, seed=2), randn(8, seed=3),
        randn(3, 4, seed=4).cos(), randn(3, 4, seed=4).sin()
    ),
    "swiglu": (randn(2, 3, 8), randn(2, 3, 8, seed=1)),
}  # fmt: skip
"""Arguments of every operation that has a kernel or uses one."""


def options(name: str) -> dict[str, Any]:
    return BOUNDS if name in ("inl_step", "inl_controlled_step") else {}


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if k not in ("INL_BACKEND", "TRITON_INTERPRET")}
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env=clean | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_every_operation_with_a_kernel_has_arguments_here() -> None:
    # routed_mlp takes a plan beside its tensors: tests/core/test_routing.py and test_routed_mlp.py.
    assert set(ops.AUTO) | {"inl_controlled_step"} == set(CALLS) | {"routed_mlp"}


# ------------------------------------------------------------------------------------------------
# Choosing


def test_use_backend_nests_and_restores() -> None:
    assert ops.current_backend() == "auto"
    with ops.use_backend("reference"):
        with ops.use_backend("triton"):
            assert ops.current_backend() == "triton"
        with contextlib.suppress(KeyError), ops.use_backend("triton"):
            raise KeyError
        assert ops.current_backend() == "reference"
    assert ops.current_backend() == "auto"


def test_unknown_backends_are_rejected() -> None:
    with pytest.raises(ValueError, match="backend must be one of auto, reference, triton, got 'x'"):
        ops.use_backend("x").__enter__()  # type: ignore[arg-type]
    result = python("import inl_core.ops", INL_BACKEND="cuda")
    assert "INL_BACKEND must be one of auto, reference, triton, got 'cuda'" in result.stderr


@pytest.mark.parametrize("name", ["reference", "triton"])
def test_the_environment_variable_is_read_at_import(name: str) -> None:
    result = python("from inl_core import ops; print(ops.current_backend())", INL_BACKEND=name)
    assert result.stdout.strip() == name, result.stderr


def test_without_triton_only_the_reference_works() -> None:
    code = (
        "import importlib.util as u; real = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'triton' else real(name, *a)\n"
        "import torch; from inl_core import ops\n"
        "print(ops.rms_norm(torch.full((1, 2), 3.0)).tolist())\n"
        "try:\n    ops.use_backend('triton').__enter__()\n"
        "except ValueError as error:\n    print(error)\n"
    )
    result = python(code)
    assert "needs the package triton, which is not installed" in result.stdout, result.stderr
    assert result.stdout.startswith("[[")


# ------------------------------------------------------------------------------------------------
# Computing


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", CALLS)
def test_cpu_tensors_use_the_reference_bit_for_bit(name: str, backend: Any) -> None:
    with ops.use_backend(backend):
        got = getattr(ops, name)(*CALLS[name], **options(name))
    want = getattr(reference, name)(*CALLS[name], **options(name))
    got, want = ([x] if isinstance(x, Tensor) else x for x in (got, want))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("name", CALLS)
def test_kernels_reject_cpu_tensors_with_a_hint(name: str) -> None:
    with ops.use_backend("triton"), pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        getattr(ops, name)(*CALLS[name], **options(name))


@pytest.mark.parametrize("name", CALLS)
def test_fp64_uses_the_reference_with_any_backend(name: str) -> None:
    wide = [x.double() for x in CALLS[name]]
    with ops.use_backend("triton"):
        got = getattr(ops, name)(*wide, **options(name))
    assert (got if isinstance(got, Tensor) else got[0]).dtype == torch.float64


def test_keyword_arguments_reach_the_operation() -> None:
    x, weight = CALLS["rms_norm"]
    want = reference.rms_norm(x, weight, 0.5)
    assert torch.equal(ops.rms_norm(weight=weight, eps=0.5, x=x), want)


# ------------------------------------------------------------------------------------------------
# On a GPU


@pytest.mark.parametrize("name", CALLS)
def test_auto_on_a_gpu(name: str) -> None:
    """Kernels; while compiling, the definition where rows show it faster. An explicit choice wins.

    Fake tensors say who would compute, on any machine.
    """

    def kernel_computes(compiled: bool) -> bool:
        operation = getattr(ops, name)
        if compiled:
            torch.compiler.reset()
            operation = torch.compile(operation, fullgraph=True, backend="eager")
        result = operation(*given, **options(name))
        result = result if isinstance(result, Tensor) else result[0]
        return "inl_core" in type(result.grad_fn).__name__

    with FakeTensorMode():
        given = [
            torch.empty(x.shape, dtype=x.dtype, device="cuda", requires_grad=i == 0)
            for i, x in enumerate(CALLS[name])
        ]
        choice = ops.AUTO["inl_step" if name == "inl_controlled_step" else name]
        assert [kernel_computes(compiled) for compiled in (False, True)] == [
            backend == "triton" for backend in choice
        ]
        with ops.use_backend("triton"):
            assert kernel_computes(compiled=True)
        with ops.use_backend("reference"):
            assert not kernel_computes(compiled=False)


# ------------------------------------------------------------------------------------------------
# Compiler and transforms


@pytest.mark.parametrize("name", CALLS)
def test_the_compiler_traces_through_the_dispatch(name: str) -> None:
    """One graph, forward and backward, of plain operations: no custom op on a CPU."""
    graphs: list[torch.fx.GraphModule] = []

    def look(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    operation = getattr(ops, name)
    leaves = [x.clone().requires_grad_() for x in CALLS[name]]
    compiled = torch.compile(operation, fullgraph=True, backend=look)
    got, want = compiled(*leaves, **options(name)), operation(*leaves, **options(name))
    got, want = ([x] if isinstance(x, Tensor) else list(x) for x in (got, want))
    down = [torch.ones_like(x) for x in want]
    got += torch.autograd.grad(got, leaves, down)
    want += torch.autograd.grad(want, leaves, down)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert len(graphs) == 1
    assert "inl_core" not in "".join(str(node.target) for node in graphs[0].graph.nodes)


def test_inductor_compiles_a_module_forward_and_backward() -> None:
    torch.compiler.reset()
    module = INLDynamics(8, controller_hidden=4)
    torch.nn.init.normal_(module.weight_out, generator=torch.Generator().manual_seed(0))
    h, v = randn(2, 3, 8), randn(2, 3, 8, seed=1)
    results = []
    for forward in (module, torch.compile(module, fullgraph=True)):
        h_next, v_next = forward(h, v)
        loss = h_next.square().sum() + v_next.square().sum()
        results.append([h_next, v_next, *torch.autograd.grad(loss, list(module.parameters()))])
    torch.testing.assert_close(*results)


def test_changing_the_backend_recompiles() -> None:
    torch.compiler.reset()
    count = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(ops.rms_norm, fullgraph=True, backend=count)
    x = randn(2, 8)
    compiled(x)
    compiled(x)
    assert count.frame_count == 1
    with ops.use_backend("reference"):
        compiled(x)
    assert count.frame_count == 2
    with ops.use_backend("triton"), pytest.raises(Exception, match="TRITON_INTERPRET=1"):
        compiled(x)


@pytest.mark.parametrize("name", CALLS)
def test_functional_transforms(name: str) -> None:
    """Under torch.func the reference computes, also where kernels were asked for."""
    first, *rest = CALLS[name]

    def loss(x: Tensor) -> Tensor:
        results = getattr(ops, name)(x, *rest, **options(name))
        results = (results,) if isinstance(results, Tensor) else results
        return sum((y.square().sum() for y in results), torch.zeros(()))

    x = first.clone().requires_grad_()
    (want,) = torch.autograd.grad(loss(x), x)
    for backend in ("auto", "triton"):
        with ops.use_backend(backend):  # type: ignore[arg-type]
            torch.testing.assert_close(torch.func.grad(loss)(first), want)
