"""inl_step in Triton against its definition: values, gradients, shapes, compiler."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from checks import (
    DEVICE,
    assert_pooled_as_good_as_eager,
    assert_registered,
    assert_same_under_compile,
    gradients_away_from_the_clip,
    gradients_of,
    leaves_of,
    randn,
    rms,
)
from torch import Tensor

from inl_core import INLDynamics, branch_epilogue, ops, reference
from inl_core.kernels import inl_step as kernels
from inl_core.kernels.inl_step import inl_step, inl_step_bwd, inl_step_fwd

BOUNDS: dict[str, Any] = {
    "dt": 0.1, "beta_max": 2.0, "velocity_max": 3.0, "mu_min": 0.0, "mu_max": 2.0,
}  # fmt: skip
UNBOUNDED = {"dt": 0.1, "beta_max": None, "velocity_max": None, "mu_min": None, "mu_max": None}
KINDS = ("token", "channel", "layer")


SEEDS = 2
"""Draws pooled into one RMS error: the gradient of a single number has no RMS of its own."""


def arguments(
    *shape: int,
    kind: str = "token",
    dtype: torch.dtype = torch.float32,
    v: bool = True,
    force: bool = True,
    seed: int = 0,
) -> list[Tensor | None]:
    """Arguments of inl_step, some of them beyond every bound; parameters stay in fp32."""
    raw_shape = {"token": shape, "channel": shape[-1:], "layer": (1,)}[kind]
    raw_dtype = dtype if kind == "token" else torch.float32
    draws = iter(range(10 * seed, 10 * seed + 10))

    def draw(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return randn(*size, seed=next(draws), dtype=dtype)

    h, velocity = draw(*shape, dtype=dtype), 3.0 * draw(*shape, dtype=dtype)
    raw = [3.0 * draw(*raw_shape, dtype=raw_dtype) for _ in range(3)]
    mu, push = 1.0 + 2.0 * draw(shape[-1]), 3.0 * draw(*shape, dtype=dtype)
    return [h, velocity if v else None, *raw, mu, push if force else None]


def spread(given: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Every argument with a value a token and channel."""
    h = given[0]
    assert h is not None
    return [None if x is None else x.expand(h.shape).clone() for x in given]


def check(*draws: list[Tensor | None], sums: float = 4.0, **options: Any) -> None:
    options = options or BOUNDS
    kernel = functools.partial(inl_step, **options)
    eager = functools.partial(reference.inl_step, **options)
    pairs = [
        (given, gradients_away_from_the_clip(reference.inl_step, given, options)) for given in draws
    ]
    assert_pooled_as_good_as_eager(kernel, eager, pairs, spread, sums)


def check_draws(*shape: int, kind: str = "token", options: Any = None, **choices: Any) -> None:
    draws = [arguments(*shape, kind=kind, seed=seed, **choices) for seed in range(SEEDS)]
    check(*draws, **(options or {}))


# ------------------------------------------------------------------------------------------------
# Values and gradients


@pytest.mark.parametrize(("v", "force"), [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_good_as_eager(dtype: torch.dtype, kind: str, v: bool, force: bool) -> None:
    check_draws(3, 5, 33, kind=kind, dtype=dtype, v=v, force=force)


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "draws"), [((2, 3, 2), 150), ((2, 3, 33), 100)])
@pytest.mark.parametrize("kind", ["channel", "layer"])
def test_sums_over_many_draws_are_as_good_as_eager(
    kind: str, shape: tuple[int, ...], draws: int
) -> None:
    sums = 0.0 if DEVICE == "cpu" else 1.0  # on a GPU eager sums in a tree, and errs less
    check(*(arguments(*shape, kind=kind, seed=seed) for seed in range(draws)), sums=sums, **BOUNDS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [1, 7, 300])
def test_any_width(width: int, kind: str) -> None:
    check_draws(2, 3, width, kind=kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [768, 1152, 1500])
def test_wide_rows(width: int, kind: str) -> None:
    check(arguments(2, 3, width, kind=kind))


@pytest.mark.slow
def test_widest_row() -> None:
    check(arguments(2, 16384, kind="channel"))


@pytest.mark.parametrize("shape", [(5,), (2, 1, 3, 5)])
@pytest.mark.parametrize("kind", KINDS)
def test_any_leading_shape(shape: tuple[int, ...], kind: str) -> None:
    check_draws(*shape, kind=kind)


@pytest.mark.parametrize("kind", KINDS)
def test_no_bounds(kind: str) -> None:
    check_draws(2, 9, 20, kind=kind, options=UNBOUNDED)


def test_many_rows_in_several_partial_sums() -> None:
    rows_in_a_tile = kernels.tile(8)[0]
    assert 2 * rows_in_a_tile < 500
    check_draws(500, 8, kind="channel")


def test_kinds_may_differ() -> None:
    h, v, alpha, _, _, mu, force = arguments(4, 6)
    check([h, v, alpha, randn(6, seed=3), randn(1, seed=4), mu, force])


def test_leading_ones_of_coefficients_are_dropped() -> None:
    h, v, *_, mu, force = arguments(2, 4, 6)
    check([h, v, randn(1, 1, 6), randn(1, 6), randn(1, 1, 1), mu, force])


def test_mixed_dtypes_as_under_autocast() -> None:
    h, v, alpha, beta, gate, mu, force = arguments(4, 12, kind="channel")
    assert h is not None
    assert v is not None
    assert force is not None
    check([h, v.bfloat16(), alpha, beta, gate, mu, force.bfloat16()])
    h_next, v_next = inl_step(h.bfloat16(), v, alpha, beta, gate, mu, force, **BOUNDS)
    assert (h_next.dtype, v_next.dtype) == (torch.bfloat16, torch.float32)


def test_strided_inputs() -> None:
    h = randn(6, 4, 5).transpose(0, 1)
    v = randn(4, 12, 5, seed=1)[:, ::2]
    raw = randn(4, 6, 15, seed=2).chunk(3, dim=-1)
    check([h, v, *raw, randn(10, seed=3)[::2], randn(4, 6, 10, seed=4)[..., ::2]])


def test_chunks_of_the_controller_are_read_in_place() -> None:
    raw = randn(4, 6, 15).chunk(3, dim=-1)
    for chunk in raw:
        assert kernels._common.as_rows(chunk).data_ptr() == chunk.data_ptr()


@pytest.mark.parametrize("kind", KINDS)
def test_empty_batch(kind: str) -> None:
    leaves = leaves_of(arguments(2, 0, 6, kind=kind))
    outputs = inl_step(*leaves, **BOUNDS)  # type: ignore[arg-type]
    assert [y.shape for y in outputs] == [(2, 0, 6)] * 2
    gradients = gradients_of(list(outputs), leaves, [torch.ones_like(y) for y in outputs])
    for leaf, gradient in zip([x for x in leaves if x is not None], gradients, strict=True):
        assert gradient.shape == leaf.shape
        assert gradient.eq(0.0).all()


# ------------------------------------------------------------------------------------------------
# Bounds and NaN


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("index", range(7))
def test_nan_in_nan_out(index: int, kind: str) -> None:
    given = arguments(3, 5, kind=kind)
    spoiled = given[index]
    assert spoiled is not None
    spoiled.view(-1)[0] = torch.nan
    leaves, wanted_leaves = leaves_of(given), leaves_of(given)
    outputs = list(inl_step(*leaves, **BOUNDS))  # type: ignore[arg-type]
    wanted = list(reference.inl_step(*wanted_leaves, **BOUNDS))  # type: ignore[arg-type]
    ones = [torch.ones_like(y) for y in outputs]
    results = outputs + gradients_of(outputs, leaves, ones)
    expected = wanted + gradients_of(wanted, wanted_leaves, ones)
    assert outputs[0][0, 0].isnan()
    for result, want in zip(results, expected, strict=True):
        torch.testing.assert_close(result, want, equal_nan=True)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, 1e4, -1e4])
def test_extreme_coefficients(value: float) -> None:
    given = arguments(2, 4)
    for raw in given[2:5]:
        assert raw is not None
        raw[0] = value
    got, want = inl_step(*given, **BOUNDS), reference.inl_step(*given, **BOUNDS)  # type: ignore[arg-type]
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_parameters_return_inside_their_bounds(sign: float, kind: str) -> None:
    """mu and beta beyond a bound: a gradient passes only if the descent step leads back inside."""
    h, v, alpha, beta, gate, _, _ = arguments(4, 6, kind=kind, force=False)
    assert beta is not None
    beyond, high = torch.full_like(beta, 5.0), torch.full((6,), 3.0)
    leaves = leaves_of([h, v, alpha, beyond, gate, high, None])
    wanted_leaves = leaves_of([h, v, alpha, beyond, gate, high, None])
    down = [torch.full((4, 6), sign), torch.full((4, 6), sign)]
    options = BOUNDS | {"velocity_max": None}
    got = gradients_of(list(inl_step(*leaves, **options)), leaves, down)  # type: ignore[arg-type]
    outputs = list(reference.inl_step(*wanted_leaves, **options))  # type: ignore[arg-type]
    want = gradients_of(outputs, wanted_leaves, down)
    torch.testing.assert_close(got, want)
    dmu = got[5]
    assert dmu.eq(0.0).all() if sign < 0 else dmu.gt(0.0).all()


def test_bound_rule_uses_the_gradient_of_the_whole_batch() -> None:
    """Rows that pull mu apart cancel first; only then is the sum blocked or let through."""
    h = torch.zeros(2, 1)
    mu = torch.tensor([3.0], requires_grad=True)
    raw = torch.zeros(1)
    h_next, _ = inl_step(h, None, raw, raw, raw, mu, **BOUNDS)
    (grad,) = torch.autograd.grad(h_next, mu, torch.tensor([[5.0], [-4.0]]))
    (blocked,) = torch.autograd.grad(
        inl_step(h, None, raw, raw, raw, mu, **BOUNDS)[0], mu, torch.tensor([[4.0], [-5.0]])
    )
    assert grad.item() > 0.0
    assert blocked.item() == 0.0


# ------------------------------------------------------------------------------------------------
# Autograd, compiler, errors


@pytest.mark.parametrize("used", [0, 1])
def test_one_result_unused(used: int) -> None:
    given = arguments(4, 6, kind="channel")
    leaves, wanted_leaves = leaves_of(given), leaves_of(given)
    down = [randn(4, 6, seed=9)]
    got = gradients_of([inl_step(*leaves, **BOUNDS)[used]], leaves, down)  # type: ignore[arg-type]
    y = reference.inl_step(*wanted_leaves, **BOUNDS)[used]  # type: ignore[arg-type]
    # The reference leaves out what one result does not depend on; the kernel gives zeros.
    want = torch.autograd.grad(y, wanted_leaves, down, allow_unused=True)  # type: ignore[arg-type]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b)


def test_frozen_arguments_get_no_gradient() -> None:
    given = arguments(4, 6, kind="channel")
    h = given[0]
    assert h is not None
    h.requires_grad_()
    sum(y.sum() for y in inl_step(*given, **BOUNDS)).backward()  # type: ignore[union-attr, arg-type]
    assert h.grad is not None
    assert all(x is None or x.grad is None for x in given[1:])


@pytest.mark.parametrize("kind", KINDS)
def test_repeats_bit_for_bit(kind: str) -> None:
    given = arguments(300, 8, kind=kind)
    runs = []
    for _ in range(2):
        leaves = leaves_of(given)
        outputs = list(inl_step(*leaves, **BOUNDS))  # type: ignore[arg-type]
        runs.append(outputs + gradients_of(outputs, leaves, [torch.ones_like(y) for y in outputs]))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_registered_ops_pass_opcheck(kind: str) -> None:
    numbers = (0.1, 2.0, 3.0, 0.0, 2.0)
    for v in (True, False):
        given = arguments(3, 6, kind=kind, v=v)
        assert_registered(inl_step_fwd, *leaves_of(given), *numbers)
        assert_registered(inl_step_bwd, randn(3, 6), None, *given, *numbers)


@pytest.mark.parametrize("kind", KINDS)
def test_fullgraph(kind: str) -> None:
    assert_same_under_compile(inl_step, *arguments(3, 6, kind=kind), **BOUNDS)


@pytest.mark.parametrize(
    ("index", "value", "words"),
    [
        (0, torch.zeros(2, 3, dtype=torch.float64), "torch.float64"),
        (1, torch.zeros(3), "v has shape"),
        (2, torch.zeros(2, 1), r"raw coefficients have shapes"),
        (5, torch.zeros(2), "mu has shape"),
        (6, torch.zeros(2, 1), "force has shape"),
    ],
)
def test_errors_name_the_value(index: int, value: Tensor, words: str) -> None:
    given = arguments(2, 3)
    given[index] = value
    with pytest.raises(ValueError, match=words):
        inl_step(*given, **BOUNDS)  # type: ignore[arg-type]


def test_too_wide() -> None:
    given = [torch.zeros(1, 16385)] * 5 + [torch.zeros(16385)]
    with pytest.raises(ValueError, match="16385"):
        inl_step(*given, **BOUNDS)


# ------------------------------------------------------------------------------------------------
# Through the switch and the module


@pytest.mark.parametrize("adaptive", KINDS)
def test_module_on_the_kernels(adaptive: str) -> None:
    torch.manual_seed(0)
    module = INLDynamics(12, adaptive=adaptive, controller_hidden=5)  # type: ignore[arg-type]
    for index, parameter in enumerate(module.parameters()):
        parameter.data = 0.3 * randn(*parameter.shape, seed=index)
    results = []
    for backend in ("reference", "triton"):
        h = randn(2, 3, 12).requires_grad_()
        with ops.use_backend(backend):  # type: ignore[arg-type]
            outputs = branch_epilogue(module, *module(h), h)
        by_kernel = ["inl_core" in type(y.grad_fn).__name__ for y in outputs]
        assert by_kernel == [backend == "triton"] * 3
        loss = sum(y.square().sum() for y in outputs)
        results.append([*outputs, *torch.autograd.grad(loss, [h, *module.parameters()])])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
    assert all(rms(x.detach()) > 0 for x in results[0])


def test_other_shapes_and_fp64_use_the_reference() -> None:
    h, v, alpha, beta, gate, mu, force = arguments(2, 3, 4)
    with ops.use_backend("triton"):
        rows = [torch.zeros(3, 1)] * 3
        got = ops.inl_step(h, v, *rows, mu, force, **BOUNDS)  # type: ignore[arg-type]
        want = reference.inl_step(h, v, *rows, mu, force, **BOUNDS)  # type: ignore[arg-type]
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        wide = [x if x is None else x.double() for x in (h, v, alpha, beta, gate, mu, force)]
        assert ops.inl_step(*wide, **BOUNDS)[0].dtype == torch.float64  # type: ignore[arg-type]


def test_functional_transforms_use_the_reference() -> None:
    given = arguments(3, 4, kind="channel")

    def loss(mu: Tensor) -> Tensor:
        h_next, v_next = ops.inl_step(*given[:5], mu, given[6], **BOUNDS)  # type: ignore[arg-type]
        return h_next.square().sum() + v_next.square().sum()

    mu = given[5]
    assert mu is not None
    want = torch.func.grad(loss)(mu)
    with ops.use_backend("triton"):
        got = torch.func.grad(loss)(mu)
        compiled = torch.compile(torch.func.grad(loss), fullgraph=True, backend="eager")(mu)
    assert torch.equal(got, want)
    torch.testing.assert_close(compiled, want)
