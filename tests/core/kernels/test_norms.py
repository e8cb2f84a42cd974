"""rms_norm and add_rms_norm in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from checks import (
    Op,
    assert_as_good_as_eager,
    assert_empty_batch_works,
    assert_registered,
    assert_same_under_compile,
    gradients_of,
    leaves_of,
    outputs_of,
    randn,
)

from inl_core import reference
from inl_core.kernels.add_rms_norm import add_rms_norm, add_rms_norm_bwd, add_rms_norm_fwd
from inl_core.kernels.rms_norm import rms_norm, rms_norm_bwd, rms_norm_fwd

BF16, FP32 = torch.bfloat16, torch.float32


# ------------------------------------------------------------------------------------------------
# rms_norm


@pytest.mark.parametrize("dtype", [FP32, BF16, torch.float16])
@pytest.mark.parametrize("shape", [(37, 65), (3, 5, 48), (6, 1200), (40, 31)])
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = randn(*shape, dtype=dtype), 1 + 0.5 * randn(shape[-1], seed=1, dtype=dtype)
    assert_as_good_as_eager(rms_norm, x, weight)
    assert_as_good_as_eager(rms_norm, x, None, eps=1e-3)


def test_rms_norm_of_one_channel() -> None:
    # With a small eps dx cancels to nothing and only rounding would be compared.
    assert_as_good_as_eager(rms_norm, randn(300, 1), None, eps=0.5)


def test_rms_norm_of_a_vector_and_of_one_channel_with_a_weight() -> None:
    """One row has a single r, one channel a single weight: too few numbers for an RMS error."""
    for shape in ((130,), (40, 1)):
        gradients = []
        for op in (rms_norm, reference.rms_norm):
            leaves = [randn(*shape).requires_grad_(), randn(shape[-1], seed=1).requires_grad_()]
            y = op(*leaves, eps=0.5)
            gradients.append([y, *torch.autograd.grad(y, leaves, randn(*shape, seed=2))])
        torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("x_dtype", "weight_dtype"), [(BF16, FP32), (FP32, BF16)])
def test_rms_norm_mixed_dtypes(x_dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    x, weight = randn(20, 48, dtype=x_dtype), randn(48, seed=1, dtype=weight_dtype)
    assert_as_good_as_eager(rms_norm, x, weight)


def test_rms_norm_strided() -> None:
    wide = randn(4, 6, 50)
    for x in (wide[..., :33], wide[:, 1:5], wide.transpose(0, 2), wide[..., ::2]):
        weight = randn(2 * x.shape[-1], seed=1)[::2]
        assert_as_good_as_eager(rms_norm, x, weight)
    leaf = randn(3, 8).requires_grad_()
    rms_norm(leaf).sum().backward()  # the cotangent of a sum has strides 0
    want = randn(3, 8).requires_grad_()
    reference.rms_norm(want).sum().backward()
    torch.testing.assert_close(leaf.grad, want.grad)


def test_rms_norm_empty() -> None:
    assert_empty_batch_works(rms_norm, randn(0, 8), randn(8))
    assert_empty_batch_works(rms_norm, randn(2, 0, 8, dtype=BF16), None)


def test_rms_norm_nan_stays_in_its_row_and_reaches_the_weight() -> None:
    x = randn(9, 12)
    x[4, 3] = torch.nan
    x, weight = x.requires_grad_(), randn(12, seed=1).requires_grad_()
    y = rms_norm(x, weight)
    dx, dweight = torch.autograd.grad(y, (x, weight), randn(9, 12, seed=2))
    rows = torch.arange(9) == 4
    assert torch.equal(y.isnan().all(-1), rows)
    assert torch.equal(y.isnan().any(-1), rows)
    assert torch.equal(dx.isnan().all(-1), rows)
    assert dweight.isnan().all()


def test_rms_norm_zero_rows_and_large_fp16() -> None:
    assert rms_norm(torch.zeros(3, 5)).eq(0.0).all()
    large = torch.full((2, 4), 3e4, dtype=torch.float16)  # its square overflows fp16
    assert rms_norm(large).eq(1.0).all()


@pytest.mark.parametrize("op", [rms_norm, add_rms_norm])
def test_without_eps_rows_beyond_the_last_contribute_nothing(op: Op) -> None:
    """A block holds more rows than these three; the empty ones must not become 0 · inf."""
    arguments = [randn(3, 8), *([randn(3, 8, seed=1)] if op is add_rms_norm else []), randn(8)]
    results = []
    for function in (op, getattr(reference, op.__name__)):
        leaves = leaves_of(arguments)
        outputs = outputs_of(function, leaves, {"eps": 0.0})
        results.append(outputs + gradients_of(outputs, leaves, [randn(3, 8)] * len(outputs)))
    torch.testing.assert_close(*results)


def test_rms_norm_gradient_is_not_that_of_the_originals() -> None:
    """Their backward takes the weight out of the bracket: 38 % off at their sizes."""
    x, weight, dy = randn(6, 64), 0.5 + 2.0 * randn(64, seed=1).abs(), randn(6, 64, seed=2)
    leaf = x.clone().requires_grad_()
    (dx,) = torch.autograd.grad(rms_norm(leaf, weight), leaf, dy)
    r = (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    mean = (x * weight * dy).mean(-1, keepdim=True)
    torch.testing.assert_close(dx, r * (weight * dy - x * r.square() * mean))
    wrong = r * weight * (dy - x * r.square() * mean)
    assert (dx - wrong).norm() > 0.05 * dx.norm()


def test_rms_norm_is_deterministic_and_saves_only_inputs() -> None:
    x, weight = randn(33, 24).requires_grad_(), randn(24, seed=1).requires_grad_()
    dy = randn(33, 24, seed=2)
    y = rms_norm(x, weight)
    assert y.grad_fn is not None
    assert {s.data_ptr() for s in y.grad_fn.saved_tensors} == {x.data_ptr(), weight.data_ptr()}  # type: ignore[attr-defined]
    first = torch.autograd.grad(y, (x, weight), dy)
    second = torch.autograd.grad(rms_norm(x, weight), (x, weight), dy)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_rms_norm_registration_and_compile() -> None:
    x, weight = randn(5, 12).requires_grad_(), randn(12, seed=1).requires_grad_()
    assert_registered(rms_norm_fwd, x, weight, 1e-6)
    assert_registered(rms_norm_fwd, x, None, 1e-6)
    assert_registered(rms_norm_bwd, randn(5, 12), x.detach(), weight.detach(), 1e-6, True)
    assert_same_under_compile(rms_norm, randn(5, 12, dtype=BF16), weight)


def test_rms_norm_errors_name_the_value() -> None:
    with pytest.raises(ValueError, match=r"rms_norm.*torch\.float64"):
        rms_norm(randn(2, 4).double())
    with pytest.raises(ValueError, match=r"weight must have shape \(4,\), got \(5,\)"):
        rms_norm(randn(2, 4), randn(5))
    with pytest.raises(ValueError, match="D = 16385"):
        rms_norm(randn(1, 16385))
    with pytest.raises(ValueError, match="0-dimensional"):
        rms_norm(torch.tensor(1.0))


# ------------------------------------------------------------------------------------------------
# add_rms_norm


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("shape", [(37, 65), (3, 5, 48), (6, 1200), (40, 31)])
def test_add_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, residual = randn(*shape, dtype=dtype), 3 * randn(*shape, seed=1, dtype=dtype)
    weight = 1 + 0.5 * randn(shape[-1], seed=2, dtype=dtype)
    assert_as_good_as_eager(add_rms_norm, x, residual, weight)
    assert_as_good_as_eager(add_rms_norm, x, residual, None, eps=1e-3)


@pytest.mark.parametrize(
    "dtypes", [(BF16, FP32, FP32), (FP32, BF16, FP32), (BF16, torch.float16, BF16)]
)
def test_add_rms_norm_mixed_dtypes(dtypes: tuple[torch.dtype, ...]) -> None:
    """With x in fp32 and a bf16 residual, norm and gradients must see the sum unrounded."""
    x, residual, weight = (
        randn(*shape, seed=seed, dtype=dtype)
        for seed, (shape, dtype) in enumerate(zip([(20, 48), (20, 48), (48,)], dtypes, strict=True))
    )
    assert_as_good_as_eager(add_rms_norm, x, residual, weight)


def test_add_rms_norm_of_one_channel_strided_and_empty() -> None:
    x, residual = randn(300, 1), randn(300, 1, seed=1)
    assert_as_good_as_eager(add_rms_norm, x, residual, None, eps=0.5)
    x, residual = randn(4, 6, 50)[..., 3:36], randn(6, 4, 33, seed=1).transpose(0, 1)
    assert_as_good_as_eager(add_rms_norm, x, residual, randn(33, seed=2))
    assert_empty_batch_works(add_rms_norm, randn(0, 8), randn(0, 8, dtype=BF16), randn(8))


def test_add_rms_norm_with_one_result_unused() -> None:
    arguments = randn(6, 8), randn(6, 8, seed=1), randn(8, seed=2)
    for used in (0, 1):
        gradients = []
        for op in (add_rms_norm, reference.add_rms_norm):
            leaves = [a.clone().requires_grad_() for a in arguments]
            op(*leaves)[used].square().sum().backward()
            gradients.append([torch.zeros_like(a) if a.grad is None else a.grad for a in leaves])
        torch.testing.assert_close(*gradients)


def test_add_rms_norm_nan_stays_in_its_row() -> None:
    x, residual = randn(9, 12), randn(9, 12, seed=1)
    residual[4, 3] = torch.nan
    leaf = x.requires_grad_()
    y, total = add_rms_norm(leaf, residual)
    (dx,) = torch.autograd.grad((y, total), leaf, (randn(9, 12, seed=2), randn(9, 12, seed=3)))
    rows = torch.arange(9) == 4
    for rowwise in (y, dx):
        assert torch.equal(rowwise.isnan().all(-1), rows)
        assert torch.equal(rowwise.isnan().any(-1), rows)
    assert total.isnan().sum() == 1


def test_add_rms_norm_registration_and_compile() -> None:
    x, residual = randn(5, 12).requires_grad_(), randn(5, 12, seed=1).requires_grad_()
    weight = randn(12, seed=2).requires_grad_()
    assert_registered(add_rms_norm_fwd, x, residual, weight, 1e-6)
    assert_registered(
        add_rms_norm_bwd,
        *(randn(5, 12), None, x.detach(), residual.detach(), None, 1e-6, BF16, False),
    )
    half = randn(5, 12, dtype=BF16)
    assert_same_under_compile(add_rms_norm, half, half, weight)
    assert_same_under_compile(add_rms_norm, half, residual, weight)


def test_add_rms_norm_errors_name_the_value() -> None:
    with pytest.raises(ValueError, match=r"residual must have shape \(2, 4\), got \(4,\)"):
        add_rms_norm(randn(2, 4), randn(4))
