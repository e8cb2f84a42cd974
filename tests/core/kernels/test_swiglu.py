"""swiglu in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from checks import (
    assert_as_good_as_eager,
    assert_empty_batch_works,
    assert_registered,
    assert_same_under_compile,
    randn,
)

from inl_core import reference
from inl_core.kernels.swiglu import swiglu, swiglu_bwd, swiglu_fwd

BF16, FP32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize("dtype", [FP32, BF16, torch.float16])
@pytest.mark.parametrize("shape", [(37, 65), (3, 5, 48), (2, 1200), (300, 1), (1030,)])
def test_swiglu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    gate, up = 3 * randn(*shape, dtype=dtype), randn(*shape, seed=1, dtype=dtype)
    assert_as_good_as_eager(swiglu, gate, up)


@pytest.mark.parametrize(("gate_dtype", "up_dtype"), [(BF16, FP32), (FP32, BF16)])
def test_swiglu_mixed_dtypes(gate_dtype: torch.dtype, up_dtype: torch.dtype) -> None:
    gate, up = randn(20, 48, dtype=gate_dtype), randn(20, 48, seed=1, dtype=up_dtype)
    assert_as_good_as_eager(swiglu, gate, up)


def test_swiglu_halves_of_one_projection_and_other_strides() -> None:
    projected = randn(4, 5, 66)
    assert_as_good_as_eager(swiglu, *projected.chunk(2, dim=-1))
    wide = randn(3, 2100)
    assert_as_good_as_eager(swiglu, *wide.chunk(2, dim=-1))
    turned = randn(40, 6, seed=1).t(), randn(6, 80, seed=2)[:, ::2]
    assert_as_good_as_eager(swiglu, *turned)
    gate, up = (half.clone().requires_grad_() for half in projected.chunk(2, dim=-1))
    swiglu(gate, up).sum().backward()  # the cotangent of a sum has strides 0
    torch.testing.assert_close(up.grad, torch.nn.functional.silu(gate.detach()))


def test_swiglu_large_and_non_finite_values() -> None:
    values = [-1e4, -200.0, -100.0, -20.0, -0.0, 0.0, 20.0, 200.0, 1e4, torch.inf, torch.nan]
    gate = torch.tensor(values)
    up = torch.full_like(gate, 2.0)
    torch.testing.assert_close(swiglu(gate, up), reference.swiglu(gate, up), equal_nan=True)
    gradients = []
    for op in (swiglu, reference.swiglu):
        gate = torch.tensor(values[:-2]).requires_grad_()  # at ±inf the gradient is NaN
        up = torch.full_like(gate, 2.0).requires_grad_()
        gradients.append(torch.autograd.grad(op(gate, up).sum(), (gate, up)))
    torch.testing.assert_close(*gradients)


def test_swiglu_nan_stays_at_its_element() -> None:
    for broken in (0, 1):
        leaves = [randn(5, 7).requires_grad_(), randn(5, 7, seed=1).requires_grad_()]
        leaves[broken].data[2, 3] = torch.nan
        y = swiglu(*leaves)
        gradients = torch.autograd.grad(y, leaves, randn(5, 7, seed=2))
        spot = leaves[broken].isnan()
        assert torch.equal(y.isnan(), spot)
        assert torch.equal(gradients[0].isnan(), spot)
        assert torch.equal(gradients[1].isnan(), spot & (broken == 0))


def test_swiglu_empty() -> None:
    assert_empty_batch_works(swiglu, randn(0, 8), randn(0, 8, dtype=BF16))
    assert_empty_batch_works(swiglu, randn(3, 0), randn(3, 0))


def test_swiglu_registration_and_compile() -> None:
    gate, up = (randn(5, 12, seed=s).requires_grad_() for s in (0, 1))
    assert_registered(swiglu_fwd, gate, up)
    assert_registered(swiglu_bwd, randn(5, 12), gate.detach(), up.detach())
    assert_same_under_compile(swiglu, gate, up)
    assert_same_under_compile(swiglu, *randn(5, 24, dtype=BF16).chunk(2, dim=-1))


def test_swiglu_errors_name_the_value() -> None:
    with pytest.raises(ValueError, match=r"one shape.*got \(2, 4\) and \(4,\)"):
        swiglu(randn(2, 4), randn(4))
    with pytest.raises(ValueError, match=r"swiglu.*torch\.float64"):
        swiglu(randn(4).double(), randn(4))
