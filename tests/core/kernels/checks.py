"""Checks that every kernel has to pass."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from inl_core import reference

Op = Callable[..., Any]

# One ulp in bf16 and fp16, where the interpreter truncates; half an ulp in fp32, for the cases in
# which eager happens to be exact.
SLACK = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


DEVICE = os.environ.get("INL_TEST_DEVICE", "cpu")


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers, equal on every device."""
    random = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(*shape, generator=random, device="cpu").to(DEVICE, dtype)


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item() if x.numel() else 0.0


def leaves_of(
    arguments: Sequence[Tensor | None], dtype: torch.dtype | None = None
) -> list[Tensor | None]:
    """Leaves that require gradients, with the memory layout of `arguments`."""
    return [
        None if a is None else a.detach().to(dtype or a.dtype).requires_grad_() for a in arguments
    ]


def outputs_of(op: Op, leaves: Sequence[Tensor | None], options: dict[str, Any]) -> list[Tensor]:
    results = op(*leaves, **options)
    return [results] if isinstance(results, Tensor) else list(results)


def gradients_of(
    outputs: list[Tensor], leaves: Sequence[Tensor | None], cotangents: list[Tensor]
) -> list[Tensor]:
    """Gradient of every tensor argument; all must have one."""
    wanted = [leaf for leaf in leaves if leaf is not None]
    given = [c.to(output.dtype) for c, output in zip(cotangents, outputs, strict=True)]
    return list(torch.autograd.grad(outputs, wanted, given))


def assert_as_good_as_eager(
    op: Op,
    *arguments: Tensor | None,
    definition: Op | None = None,
    seed: int = 100,
    stores: int = 1,
    **options: Any,
) -> None:
    """Outputs and gradients: RMS error against fp64 at most 1.25 × eager's, plus `SLACK`.

    The definition is by default that in `inl_core.reference`. `stores` is the number of consecutive
    stores that lead to a result, one `SLACK` each.
    """
    definition = definition or getattr(reference, op.__name__)
    kernel_leaves, eager_leaves = leaves_of(arguments), leaves_of(arguments)
    exact_leaves = leaves_of(arguments, torch.float64)
    kernel = outputs_of(op, kernel_leaves, options)
    eager = outputs_of(definition, eager_leaves, options)
    exact = outputs_of(definition, exact_leaves, options)
    cotangents = [randn(*y.shape, seed=seed + i, dtype=y.dtype) for i, y in enumerate(eager)]
    kernel += gradients_of(kernel, kernel_leaves, cotangents)
    eager += gradients_of(eager, eager_leaves, cotangents)
    exact += gradients_of(exact, exact_leaves, cotangents)
    for index, (got, want, truth) in enumerate(zip(kernel, eager, exact, strict=True)):
        assert (got.dtype, got.shape) == (want.dtype, want.shape), f"tensor {index}"
        bound = 1.25 * rms(want.double() - truth) + stores * SLACK[got.dtype] * rms(truth)
        error = rms(got.double() - truth)
        assert error <= bound, f"tensor {index}: error {error:.3g} above {bound:.3g}"


def gradients_away_from_the_clip(
    definition: Op, arguments: Sequence[Tensor | None], options: dict[str, Any]
) -> list[Tensor]:
    """Random gradients of (h', v'), 0 where rounding decides about the clip, since dp jumps there.

    The arguments of `definition` begin with h and v, and it returns (h', v').
    """
    h, v = arguments[:2]
    assert h is not None
    down = [randn(*h.shape, seed=100, dtype=h.dtype)]
    down.append(randn(*h.shape, seed=101, dtype=h.dtype if v is None else v.dtype))
    bound = options["velocity_max"]
    if bound is not None:
        wide = [None if x is None else x.double() for x in arguments]
        free = definition(*wide, **options | {"velocity_max": None})[1]
        for gradient in down:
            gradient[(free.abs() - bound).abs() < 1e-5] = 0.0
    return down


def results_of(
    op: Op,
    arguments: Sequence[Tensor | None],
    down: Sequence[Tensor],
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """Outputs, then the gradient of every argument (zeros where there is none)."""
    leaves = leaves_of(arguments, dtype)
    outputs = outputs_of(op, leaves, {})
    wanted = [leaf for leaf in leaves if leaf is not None]
    given = [c.to(y.dtype) for c, y in zip(down, outputs, strict=True)]
    grads = torch.autograd.grad(outputs, wanted, given, allow_unused=True)
    pairs = zip(grads, wanted, strict=True)
    return outputs + [torch.zeros_like(x) if grad is None else grad for grad, x in pairs]


def assert_pooled_as_good_as_eager(
    op: Op,
    definition: Op,
    draws: Sequence[tuple[Sequence[Tensor | None], Sequence[Tensor]]],
    spread: Callable[[Sequence[Tensor | None]], list[Tensor | None]],
    sums: float = 4.0,
) -> None:
    """Pooled over the draws: RMS error against fp64 at most 1.25 × eager's, plus `SLACK`.

    A gradient that is a sum over rows is one number or a few per draw, so that eager may be nearly
    exact by chance. It may have, in addition, `sums` fp32 half-ulps of the root of the sum of its
    squared terms: the error of a sum of terms that are each rounded a few times.

    Args:
        op: The kernel.
        definition: The reference, in its own dtype and in fp64.
        draws: (arguments, gradients of the outputs) pairs.
        spread: Expands arguments shared by rows to one per row, whose gradients are the terms of
            those sums.
        sums: See above.
    """
    got, want, truth, terms = [], [], [], []
    for given, down in draws:
        got.append(results_of(op, given, down))
        want.append(results_of(definition, given, down))
        truth.append(results_of(definition, given, down, torch.float64))
        terms.append(results_of(definition, spread(given), down, torch.float64))
    for index, (a, b, c, d) in enumerate(
        zip(*(zip(*table, strict=True) for table in (got, want, truth, terms)), strict=True)
    ):
        assert [(x.dtype, x.shape) for x in a] == [(x.dtype, x.shape) for x in b], f"tensor {index}"
        exact = torch.stack(c)
        error = rms(torch.stack(a).detach().double() - exact)
        bound = 1.25 * rms(torch.stack(b).double() - exact) + SLACK[a[0].dtype] * rms(exact)
        if c[0].numel() < d[0].numel():
            count = d[0].numel() / c[0].numel()
            bound += sums * SLACK[torch.float32] * rms(torch.stack(d)) * count**0.5
        assert error <= bound, f"tensor {index}: error {error:.3g} above {bound:.3g}"


def assert_registered(op: Any, *arguments: Any) -> None:
    """``torch.library.opcheck``: schema, autograd registration, fake tensors, dynamic shapes."""
    with warnings.catch_warnings():
        # opcheck itself looks at the .grad of non-leaf tensors.
        warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor")
        torch.library.opcheck(op, arguments)


def assert_same_under_compile(op: Op, *arguments: Tensor | None, **options: Any) -> None:
    """One graph, forward and backward, with the bits of the uncompiled call."""
    torch.compiler.reset()
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    leaves, compiled_leaves = leaves_of(arguments), leaves_of(arguments)
    outputs = outputs_of(op, leaves, options)
    compiled_outputs = outputs_of(compiled, compiled_leaves, options)
    cotangents = [randn(*y.shape, seed=i, dtype=y.dtype) for i, y in enumerate(outputs)]
    outputs += gradients_of(outputs, leaves, cotangents)
    compiled_outputs += gradients_of(compiled_outputs, compiled_leaves, cotangents)
    for plain, fused in zip(outputs, compiled_outputs, strict=True):
        assert torch.equal(plain, fused)


def assert_empty_batch_works(
    op: Op, *arguments: Tensor | None, definition: Op | None = None
) -> None:
    """Zero rows: the shapes of the definition, and gradients that are all zero."""
    definition = definition or getattr(reference, op.__name__)
    leaves, wanted_leaves = leaves_of(arguments), leaves_of(arguments)
    outputs, wanted = outputs_of(op, leaves, {}), outputs_of(definition, wanted_leaves, {})
    assert [(y.shape, y.dtype) for y in outputs] == [(y.shape, y.dtype) for y in wanted]
    gradients = gradients_of(outputs, leaves, [torch.ones_like(y) for y in outputs])
    for leaf, gradient in zip([a for a in leaves if a is not None], gradients, strict=True):
        assert (gradient.shape, gradient.dtype) == (leaf.shape, leaf.dtype)
        assert gradient.eq(0.0).all()
