"""inl_branch_epilogue in Triton against its definition: values, gradients, shapes, compiler."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from checks import (
    assert_pooled_as_good_as_eager,
    assert_registered,
    assert_same_under_compile,
    gradients_away_from_the_clip,
    gradients_of,
    leaves_of,
    outputs_of,
    randn,
)
from torch import Tensor

from inl_core import ops, reference
from inl_core.kernels.inl_branch_epilogue import (
    inl_branch_epilogue,
    inl_branch_epilogue_bwd,
    inl_branch_epilogue_fwd,
)

BOUNDS: dict[str, Any] = {"dt": 0.1, "velocity_max": 3.0, "mu_min": 0.0, "mu_max": 2.0}
UNBOUNDED = {"dt": 0.1, "velocity_max": None, "mu_min": None, "mu_max": None}
BF16, FP32 = torch.bfloat16, torch.float32
KINDS = ("channel", "layer", "lite")
LITE = {"alpha": 0.9, "beta": 0.1, "gate": 0.5}

Given = list[Tensor | None]


def arguments(
    *shape: int, kind: str = "channel", dtype: torch.dtype = FP32, conditions: bool = True,
    weight: bool = True, v: bool = True, seed: int = 0,
) -> Given:  # fmt: skip
    """The eleven tensor arguments, some velocities and mu beyond their bounds.

    Coefficients, as the module makes them, and mu are in fp32; they are None for "lite".
    """
    draws = iter(range(20 * seed, 20 * seed + 20))

    def draw(*size: int) -> Tensor:
        return randn(*size, seed=next(draws))

    width = shape[-1]
    h, velocity, residual = draw(*shape), 3.0 * draw(*shape), draw(*shape)
    size = {"channel": (width,), "layer": (1,), "lite": ()}[kind]
    coefficients = [draw(*size).sigmoid() if size else None for _ in range(3)]
    mu, rows = 1.0 + 2.0 * draw(width), [draw(shape[0], width) for _ in range(3)]
    states = [x.to(dtype) for x in (h, velocity, residual, *rows, 1 + 0.5 * draw(width))]
    h, velocity, residual, *rows, w = states
    rows = rows if conditions else [None] * 3
    return [h, velocity if v else None, *coefficients, mu, residual, *rows, w if weight else None]


def with_numbers(op: Any, **options: Any) -> Any:
    """`op` of eleven tensors, with the numbers of a Lite module where a coefficient is None."""

    def call(h: Tensor, v: Tensor | None, *rest: Any, **more: Any) -> Any:
        numbers = LITE.values()
        coefficients = [n if x is None else x for x, n in zip(rest[:3], numbers, strict=True)]
        return op(h, v, *coefficients, *rest[3:], **options | more)

    return call


def step(*given: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """(h', v') alone, to find velocities at their bound."""
    h, v, *coefficients, mu = given[:6]
    numbers = LITE.values()
    used = [n if x is None else x for x, n in zip(coefficients, numbers, strict=True)]
    return reference.inl_update(h, v, *used, mu, **options)


def cotangents(given: Given, options: dict[str, Any]) -> list[Tensor]:
    bounds = {name: options[name] for name in BOUNDS}
    down_h, down_v = gradients_away_from_the_clip(step, given, bounds)
    h, residual = given[0], given[6]
    assert h is not None
    assert residual is not None
    # dp jumps at the clip; y and the sum reach it through h', so all their row has to be spared.
    spared = (down_h == 0).any(-1, keepdim=True)
    return [
        randn(*h.shape, seed=102, dtype=h.dtype).masked_fill(spared, 0.0),
        randn(*h.shape, seed=103, dtype=residual.dtype).masked_fill(spared, 0.0),
        down_v,
    ]


def check(*draws: Given, **options: Any) -> None:
    options = BOUNDS | options
    assert_pooled_as_good_as_eager(
        with_numbers(inl_branch_epilogue, **options),
        with_numbers(reference.inl_branch_epilogue, **options),
        [(given, cotangents(given, options)) for given in draws],
        spread,
    )


def spread(given: Given) -> Given:
    """Coefficients, mu and weight with a value a token and channel."""
    h = given[0]
    assert h is not None
    shared = (2, 3, 4, 5, 10)
    return [
        x.expand(h.shape).clone() if x is not None and i in shared else x
        for i, x in enumerate(given)
    ]


def check_draws(*shape: int, options: Any = None, **choices: Any) -> None:
    check(*(arguments(*shape, seed=seed, **choices) for seed in range(2)), **(options or {}))


# ------------------------------------------------------------------------------------------------
# Values and gradients


def test_the_definition_is_its_two_steps() -> None:
    given = [x if x is None else x.double() for x in arguments(3, 5, 12)]
    h, v, alpha, beta, gate, mu, residual, *rest = given
    y, total, v_next = reference.inl_branch_epilogue(*given, eps=1e-3, **BOUNDS)  # type: ignore[arg-type]
    moved, want_v = reference.inl_update(h, v, alpha, beta, gate, mu, **BOUNDS)  # type: ignore[arg-type]
    want = reference.gated_residual_norm(residual, moved, *rest, eps=1e-3)  # type: ignore[arg-type]
    torch.testing.assert_close((y, total, v_next), (*want, want_v))


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(3, 7, 33), (2, 3, 4, 48)])
def test_as_good_as_eager(shape: tuple[int, ...], kind: str, dtype: torch.dtype) -> None:
    check_draws(*shape, kind=kind, dtype=dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_without_velocity_conditions_and_weight(kind: str) -> None:
    check_draws(2, 9, 20, kind=kind, conditions=False)  # a language model: a plain sum, a weight
    check_draws(2, 9, 20, kind=kind, v=False, weight=False)


def test_conditions_one_by_one() -> None:
    for kept in (7, 8, 9):
        given = arguments(3, 5, 24)
        for index in {7, 8, 9} - {kept}:
            given[index] = None
        check(given)


@pytest.mark.parametrize("width", [1, 5, 300])
def test_any_width(width: int) -> None:
    check_draws(12, 3, width, options={"eps": 0.5})


def test_no_bounds() -> None:
    check_draws(2, 9, 20, options=UNBOUNDED)


@pytest.mark.slow
@pytest.mark.parametrize("width", [768, 1152])
def test_wide_rows(width: int) -> None:
    check(arguments(2, 5, width))


def test_kinds_may_differ() -> None:
    given = arguments(4, 3, 6)
    given[2], given[3] = torch.tensor([[0.7]]), None
    h, v, alpha, _, gate, *rest = given
    want = reference.inl_branch_epilogue(h, v, alpha, 0.3, gate, *rest, **BOUNDS)  # type: ignore[arg-type]
    got = inl_branch_epilogue(h, v, alpha, 0.3, gate[None, None], *rest, **BOUNDS)  # type: ignore[index, arg-type]
    torch.testing.assert_close(got, want)


def test_mixed_dtypes_as_under_autocast() -> None:
    """A bf16 branch on an fp32 stream; results keep the dtypes of h, the stream and v."""
    given = arguments(3, 5, 24, dtype=BF16)
    given[6] = given[6].float()  # type: ignore[union-attr]
    check(given)
    given[1] = given[1].float()  # type: ignore[union-attr]
    results = inl_branch_epilogue(*given, **BOUNDS)  # type: ignore[arg-type]
    assert [x.dtype for x in results] == [BF16, FP32, FP32]


def test_strided_inputs() -> None:
    h, v, a, b, c, mu, residual, *_ = arguments(4, 6, 20)
    chunks = randn(4, 60, seed=1).chunk(3, dim=-1)  # one projection makes them all
    wide = randn(6, 4, 50, seed=2)[..., 3:23].transpose(0, 1)
    check([wide, v, a, b, c, randn(40, seed=3)[::2], residual, *chunks, randn(40, seed=4)[::2]])
    v = randn(4, 12, 20, seed=5)[:, ::2]
    check([h, v, a, b, c, mu, wide, *(x[:, None] for x in chunks), None])


@pytest.mark.parametrize("shape", [(0, 3, 6), (2, 0, 6)])
def test_empty_batch(shape: tuple[int, ...]) -> None:
    leaves = leaves_of(arguments(*shape))
    outputs = outputs_of(inl_branch_epilogue, leaves, BOUNDS)
    assert [y.shape for y in outputs] == [shape] * 3
    gradients = gradients_of(outputs, leaves, [torch.ones_like(y) for y in outputs])
    for leaf, gradient in zip([x for x in leaves if x is not None], gradients, strict=True):
        assert gradient.shape == leaf.shape
        assert gradient.eq(0.0).all()


def test_without_eps_tokens_beyond_the_last_contribute_nothing() -> None:
    check(arguments(2, 5, 256), eps=0.0)


# ------------------------------------------------------------------------------------------------
# NaN, bounds, autograd, compiler, errors


@pytest.mark.parametrize("index", range(11))
def test_nan_in_nan_out(index: int) -> None:
    given = arguments(3, 5, 6)
    spoiled = given[index]
    assert spoiled is not None
    spoiled.view(-1)[0] = torch.nan
    results = []
    for op in (inl_branch_epilogue, reference.inl_branch_epilogue):
        leaves = leaves_of(given)
        outputs = outputs_of(op, leaves, BOUNDS)
        down = [torch.ones_like(y) for y in outputs]
        results.append(outputs + gradients_of(outputs, leaves, down))
    assert results[0][0][0, 0, 0].isnan()
    torch.testing.assert_close(*results, equal_nan=True)


@pytest.mark.parametrize("used", [0, 1, 2])
def test_one_result_used(used: int) -> None:
    given, results = arguments(2, 4, 6), []
    for op in (inl_branch_epilogue, reference.inl_branch_epilogue):
        leaves = leaves_of(given)
        y = op(*leaves, **BOUNDS)[used]  # type: ignore[arg-type]
        grads = torch.autograd.grad(y, leaves, randn(2, 4, 6, seed=9), allow_unused=True)  # type: ignore[arg-type]
        pairs = zip(grads, leaves, strict=True)
        results.append([torch.zeros_like(x) if g is None else g for g, x in pairs])  # type: ignore[arg-type]
    torch.testing.assert_close(*results)


def test_mu_returns_inside_its_bounds() -> None:
    given = arguments(2, 4, 6)
    given[5] = torch.full((6,), 3.0)
    for sign in (1.0, -1.0):
        leaves = leaves_of(given)
        v_next = inl_branch_epilogue(*leaves, **BOUNDS | {"velocity_max": None})[2]  # type: ignore[arg-type]
        (dmu,) = torch.autograd.grad(sign * v_next.sum(), leaves[5])  # type: ignore[arg-type]
        assert dmu.gt(0.0).all() if sign > 0 else dmu.eq(0.0).all()


def test_repeats_bit_for_bit() -> None:
    given, runs = arguments(3, 50, 8), []
    for _ in range(2):
        leaves = leaves_of(given)
        outputs = outputs_of(inl_branch_epilogue, leaves, BOUNDS)
        runs.append(outputs + gradients_of(outputs, leaves, [torch.ones_like(y) for y in outputs]))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("kind", ["channel", "lite"])
def test_registered_ops_pass_opcheck(kind: str) -> None:
    numbers = (0.9, 0.1, 0.5, 0.1, 3.0, 1e-6)
    given = arguments(2, 3, 6, kind=kind, v=kind == "channel")
    assert_registered(inl_branch_epilogue_fwd, *leaves_of(given), *numbers)
    assert_registered(inl_branch_epilogue_bwd, randn(2, 3, 6), None, None, *given, *numbers)


def test_fullgraph() -> None:
    assert_same_under_compile(inl_branch_epilogue, *arguments(2, 3, 6), **BOUNDS)


@pytest.mark.parametrize(
    ("index", "value", "words"),
    [
        (0, torch.zeros(2, 3, 4).double(), r"torch\.float64"),
        (1, torch.zeros(4), r"v must have shape \(2, 3, 4\), got \(4,\)"),
        (2, torch.zeros(2, 3, 4), r"takes coefficients that are numbers.*\(2, 3, 4\)"),
        (5, torch.zeros(2), r"mu must have shape \(4,\), got \(2,\)"),
        (6, torch.zeros(4), r"residual must have shape \(2, 3, 4\), got \(4,\)"),
        (7, torch.zeros(3, 4), r"residual_gate must have shape \(2, 4\).*got \(3, 4\)"),
        (9, torch.zeros(2, 3, 4), r"one shape, got \[\(2, 3, 4\), \(2, 4\)\]"),
        (10, torch.zeros(2), r"weight must have shape \(4,\), got \(2,\)"),
    ],
)
def test_errors_name_the_value(index: int, value: Tensor, words: str) -> None:
    given = arguments(2, 3, 4)
    given[index] = value
    with pytest.raises(ValueError, match=words):
        inl_branch_epilogue(*given, **BOUNDS)  # type: ignore[arg-type]


def test_coefficients_per_token_use_the_reference() -> None:
    given = arguments(2, 3, 4)
    given[2] = torch.full((2, 3, 4), 0.5)
    with ops.use_backend("triton"):
        got = ops.inl_branch_epilogue(*given, **BOUNDS)  # type: ignore[arg-type]
    want = reference.inl_branch_epilogue(*given, **BOUNDS)  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
