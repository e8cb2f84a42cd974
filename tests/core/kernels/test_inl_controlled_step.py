"""inl_controlled_step in Triton against its definition: values, gradients, shapes, compiler."""

from __future__ import annotations

import functools
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
)
from torch import Tensor

from inl_core import INLDynamics, ops, reference
from inl_core.kernels import inl_controlled_step as kernels
from inl_core.kernels.inl_controlled_step import (
    inl_controlled_step,
    inl_controlled_step_bwd,
    inl_controlled_step_fwd,
)

BOUNDS: dict[str, Any] = {
    "dt": 0.1, "beta_max": 2.0, "velocity_max": 3.0, "mu_min": 0.0, "mu_max": 2.0,
}  # fmt: skip
UNBOUNDED = {"dt": 0.1, "beta_max": None, "velocity_max": None, "mu_min": None, "mu_max": None}
NUMBERS = (0.1, 2.0, 3.0, 0.0, 2.0)
BF16, FP32 = torch.bfloat16, torch.float32

COMPILED = DEVICE != "cpu"
HIDDEN = BF16 if COMPILED else FP32
"""Of `hidden` among arguments in fp32: compiled, the kernels leave products in fp32 to others."""
CLOSE = {"rtol": 2e-2, "atol": 2e-2} if COMPILED else {}
"""How near the definition is, which rounds the raw coefficients to the dtype of `hidden`."""


def arguments(
    *shape: int,
    controller: int = 5,
    dtype: torch.dtype = FP32,
    hidden_dtype: torch.dtype = HIDDEN,
    v: bool = True,
    force: bool = True,
    seed: int = 0,
) -> list[Tensor | None]:
    """Arguments of inl_controlled_step, some beyond every bound; mu stays in fp32.

    `hidden_dtype` is that of `hidden` where the others are in fp32. Weights are numbers of that
    dtype too: rounded by the kernel, they would put some v' and beta across a bound by chance.
    """
    draws = iter(range(10 * seed, 10 * seed + 10))

    def draw(*size: int) -> Tensor:
        return randn(*size, seed=next(draws))

    width = shape[-1]
    h, velocity, push = (scale * draw(*shape) for scale in (1.0, 3.0, 3.0))
    hidden = draw(*shape[:-1], controller)
    weight, bias = 2.0 * draw(3 * width, controller) / controller**0.5, 2.0 * draw(3 * width)
    weight = weight.to(hidden_dtype)
    given = [h, velocity if v else None, hidden, weight, bias, 1.0 + 2.0 * draw(width)]
    given = [None if x is None else x.to(dtype) for x in given[:5]] + given[5:]
    given[2] = hidden.to(hidden_dtype if dtype == FP32 else dtype)
    return [*given, push.to(dtype) if force else None]


def check(*draws: list[Tensor | None], **options: Any) -> None:
    options = options or BOUNDS
    definition = functools.partial(reference.inl_controlled_step, **options)
    assert_pooled_as_good_as_eager(
        functools.partial(inl_controlled_step, **options),
        definition,
        [
            (given, gradients_away_from_the_clip(reference.inl_controlled_step, given, options))
            for given in draws
        ],
    )


def check_draws(*shape: int, options: Any = None, **choices: Any) -> None:
    check(*(arguments(*shape, seed=seed, **choices) for seed in range(2)), **(options or {}))


# ------------------------------------------------------------------------------------------------
# Values and gradients


@pytest.mark.parametrize("force", [True, False])
@pytest.mark.parametrize("v", [True, False])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_as_good_as_eager(dtype: torch.dtype, v: bool, force: bool) -> None:
    check_draws(2, 9, 20, dtype=dtype, v=v, force=force)


@pytest.mark.parametrize(("width", "controller"), [(1, 5), (7, 1), (33, 16), (50, 64)])
def test_any_width_and_controller(width: int, controller: int) -> None:
    check_draws(12, width, controller=controller)


@pytest.mark.parametrize("shape", [(40,), (2, 1, 9, 20)])
def test_any_leading_shape(shape: tuple[int, ...]) -> None:
    check_draws(*shape)


def test_no_bounds() -> None:
    check_draws(2, 9, 20, options=UNBOUNDED)


def test_several_partial_sums_of_rows_and_columns() -> None:
    assert 2 * kernels.BLOCK_R < 140
    assert 2 * kernels.BACKWARD_COLUMNS < 40
    check(arguments(140, 40))


@pytest.mark.slow
@pytest.mark.parametrize("width", [768, 1152])
def test_wide_rows(width: int) -> None:
    check(arguments(70, width, controller=64))


def test_strided_inputs() -> None:
    h = randn(6, 4, 20).transpose(0, 1)
    v = randn(4, 12, 20, seed=1)[:, ::2]
    hidden = randn(4, 6, 11, seed=2, dtype=HIDDEN)[..., 3:8]
    weight = randn(5, 60, seed=3, dtype=HIDDEN).float().t()
    bias = randn(120, seed=4)[::2]
    mu, force = randn(40, seed=5)[::2], randn(4, 6, 40, seed=6)[..., ::2]
    check([h, v, hidden, weight, bias, mu, force])


def test_mixed_dtypes_as_under_autocast() -> None:
    """bf16 activations, fp32 parameters; results keep the dtypes of h and v."""
    h, v, hidden, weight, bias, mu, force = arguments(20, 24, dtype=BF16)
    assert h is not None
    assert v is not None
    assert weight is not None
    assert bias is not None
    check([h, v, hidden, weight.float(), bias.float(), mu, force])
    h_next, v_next = inl_controlled_step(
        h, v.float(), hidden, weight.float(), bias.float(), mu, **BOUNDS
    )  # type: ignore[arg-type]
    assert (h_next.dtype, v_next.dtype) == (BF16, FP32)


def test_autocast_sets_the_dtype_of_the_product() -> None:
    given = arguments(20, 24, hidden_dtype=FP32)
    with torch.autocast(DEVICE, BF16):
        got = inl_controlled_step(*given, **BOUNDS)  # type: ignore[arg-type]
        want = reference.inl_controlled_step(*given, **BOUNDS)  # type: ignore[arg-type]
    exact = reference.inl_controlled_step(*given, **BOUNDS)  # type: ignore[arg-type]
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)
    assert got[1].dtype == FP32
    assert (got[1] - exact[1]).abs().max() > 1e-4


@pytest.mark.parametrize("shape", [(0, 6), (2, 0, 6)])
def test_empty_batch(shape: tuple[int, ...]) -> None:
    leaves = leaves_of(arguments(*shape))
    outputs = inl_controlled_step(*leaves, **BOUNDS)  # type: ignore[arg-type]
    assert [y.shape for y in outputs] == [shape] * 2
    gradients = gradients_of(list(outputs), leaves, [torch.ones_like(y) for y in outputs])
    for leaf, gradient in zip([x for x in leaves if x is not None], gradients, strict=True):
        assert gradient.shape == leaf.shape
        assert gradient.eq(0.0).all()


# ------------------------------------------------------------------------------------------------
# Bounds and NaN


@pytest.mark.parametrize("index", range(7))
def test_nan_in_nan_out(index: int) -> None:
    given = arguments(3, 5, controller=3)
    spoiled = given[index]
    assert spoiled is not None
    spoiled.view(-1)[0] = torch.nan
    leaves, wanted_leaves = leaves_of(given), leaves_of(given)
    outputs = list(inl_controlled_step(*leaves, **BOUNDS))  # type: ignore[arg-type]
    wanted = list(reference.inl_controlled_step(*wanted_leaves, **BOUNDS))  # type: ignore[arg-type]
    ones = [torch.ones_like(y) for y in outputs]
    results = outputs + gradients_of(outputs, leaves, ones)
    expected = wanted + gradients_of(wanted, wanted_leaves, ones)
    assert outputs[0][0, 0].isnan()
    for result, want in zip(results, expected, strict=True):
        torch.testing.assert_close(result, want, equal_nan=True, **CLOSE)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_parameters_return_inside_their_bounds(sign: float) -> None:
    """mu and beta beyond a bound: a gradient passes only if the descent step leads back inside."""
    h, v, hidden, weight, _, _, _ = arguments(4, 6, force=False)
    bias, high = torch.full((18,), 9.0), torch.full((6,), 3.0)
    down = [torch.full((4, 6), sign), torch.full((4, 6), sign)]
    options = BOUNDS | {"velocity_max": None}
    results = []
    for op in (inl_controlled_step, reference.inl_controlled_step):
        leaves = leaves_of([h, v, hidden, weight, bias, high, None])
        results.append(gradients_of(list(op(*leaves, **options)), leaves, down))  # type: ignore[arg-type]
    torch.testing.assert_close(*results, **CLOSE)
    dmu = results[0][5]
    assert dmu.eq(0.0).all() if sign < 0 else dmu.gt(0.0).all()


# ------------------------------------------------------------------------------------------------
# Autograd, compiler, errors


@pytest.mark.parametrize("used", [0, 1])
def test_one_result_unused(used: int) -> None:
    given, down = arguments(4, 6), [randn(4, 6, seed=9)]
    results = []
    for op in (inl_controlled_step, reference.inl_controlled_step):
        leaves = leaves_of(given)
        results.append(gradients_of([op(*leaves, **BOUNDS)[used]], leaves, down))  # type: ignore[arg-type]
    torch.testing.assert_close(*results, **CLOSE)


def test_frozen_arguments_get_no_gradient() -> None:
    given = arguments(4, 6)
    h = given[0]
    assert h is not None
    h.requires_grad_()
    sum(y.sum() for y in inl_controlled_step(*given, **BOUNDS)).backward()  # type: ignore[union-attr, arg-type]
    assert h.grad is not None
    assert all(x is None or x.grad is None for x in given[1:])


def test_repeats_bit_for_bit_and_saves_only_inputs() -> None:
    given, runs = arguments(140, 8), []
    for _ in range(2):
        leaves = leaves_of(given)
        outputs = list(inl_controlled_step(*leaves, **BOUNDS))  # type: ignore[arg-type]
        saved = {s.data_ptr() for s in outputs[0].grad_fn.saved_tensors}  # type: ignore[union-attr]
        assert saved == {x.data_ptr() for x in leaves if x is not None}
        runs.append(outputs + gradients_of(outputs, leaves, [torch.ones_like(y) for y in outputs]))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("v", [True, False])
def test_registered_ops_pass_opcheck(v: bool) -> None:
    given = arguments(3, 6, v=v, force=v)
    assert_registered(inl_controlled_step_fwd, *leaves_of(given), *NUMBERS)
    assert_registered(inl_controlled_step_bwd, randn(3, 6), None, *given, *NUMBERS)


def test_fullgraph() -> None:
    assert_same_under_compile(inl_controlled_step, *arguments(3, 6), **BOUNDS)


@pytest.mark.parametrize(
    ("index", "value", "words"),
    [
        (0, torch.zeros(2, 3, dtype=torch.float64), "torch.float64"),
        (1, torch.zeros(3), r"v must have shape \(2, 3\), got \(3,\)"),
        (2, torch.zeros(4, 5), r"takes hidden of shape \(2, 'C'\).*got \(4, 5\)"),
        (3, torch.zeros(3, 5), r"weight must have shape \(9, 5\).*got \(3, 5\)"),
        (4, torch.zeros(3), r"bias must have shape \(9,\), got \(3,\)"),
        (5, torch.zeros(2), r"mu must have shape \(3,\), got \(2,\)"),
        (6, torch.zeros(2, 1), r"force must have shape \(2, 3\)"),
    ],
)
def test_errors_name_the_value(index: int, value: Tensor, words: str) -> None:
    given = arguments(2, 3)
    given[index] = value
    with pytest.raises(ValueError, match=words):
        inl_controlled_step(*given, **BOUNDS)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------
# Through the switch and the module


def test_a_wider_controller_uses_the_reference() -> None:
    given = arguments(3, 4, controller=65)
    with pytest.raises(ValueError, match=r"1 <= C <= 64 in bf16 or fp16, got \(3, 65\)"):
        inl_controlled_step(*given, **BOUNDS)  # type: ignore[arg-type]
    with ops.use_backend("triton"):
        got = ops.inl_controlled_step(*given, **BOUNDS)  # type: ignore[arg-type]
    want = reference.inl_controlled_step(*given, **BOUNDS)  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_the_module_uses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    with ops.use_backend("triton"):
        ops._load_kernels()
        kernel, fits = ops._kernels["inl_controlled_step"]

        def counted(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            return kernel(*args, **kwargs)

        monkeypatch.setitem(ops._kernels, "inl_controlled_step", (counted, fits))
        with torch.autocast(DEVICE, HIDDEN, enabled=COMPILED):
            INLDynamics(12, controller_hidden=5)(randn(2, 3, 12), randn(2, 3, 12, seed=1))
    assert calls == [1]
